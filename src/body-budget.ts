import { GatewayError } from './errors.ts'

/** While more than this part of the memory is taken, a caller may have no more than `SHARE` of it. */
const CONTENDED = 1 / 2
const SHARE = 1 / 4

/** In place of a caller: bodies in usage records that are not written down yet. No id of a caller begins with a line end. */
export const RECORDS = '\nrecords'

/**
 * The memory that request bodies may take together, from their first byte until a backend responds. Slow uploads and
 * long queues would otherwise fill the memory of the process, and those of one caller would keep out all others.
 *
 * @example
 * const budget = new BodyBudget()
 * budget.most = 1024
 * budget.take('alice', 300, 0)
 * budget.take('bob', 300, 0)
 * budget.held // 600
 */
export class BodyBudget {
  /** Bytes that may be kept together, and that are kept now. */
  most = Number.POSITIVE_INFINITY
  held = 0
  /** Bytes taken since the start; a body that is also recorded counts twice. */
  total = 0
  readonly #byCaller = new Map<string, number>()

  /**
   * @param caller whose body it is, or {@link RECORDS}
   * @param before bytes of the same body that are kept already
   * @throws {GatewayError} `overloaded` where there is no room; nothing is taken then
   */
  take(caller: string, bytes: number, before: number): void {
    const own = this.#byCaller.get(caller) ?? 0
    const held = this.held + bytes
    const isContended = held > this.most * CONTENDED
    const hasOthers = own > before
    if (held > this.most || (isContended && hasOthers && own + bytes > this.most * SHARE)) {
      throw new GatewayError(
        'overloaded',
        'The gateway holds as many request bodies as its memory allows. Retry in a moment.',
        { headers: { 'retry-after': '1' } }
      )
    }
    this.held = held
    this.total += bytes
    this.#byCaller.set(caller, own + bytes)
  }

  give(caller: string, bytes: number): void {
    if (bytes === 0) return
    this.held -= bytes
    const rest = this.#byCaller.get(caller)! - bytes
    if (rest > 0) this.#byCaller.set(caller, rest)
    else this.#byCaller.delete(caller)
  }
}
