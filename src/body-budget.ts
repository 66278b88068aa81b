import { GatewayError } from './errors.ts'

/**
 * The memory that request bodies may take together, from their first byte until a backend responds. Slow uploads and
 * long queues would otherwise fill the memory of the process.
 *
 * @example
 * const budget = new BodyBudget()
 * budget.most = 1024
 * budget.take(1000)
 * budget.held // 1000
 */
export class BodyBudget {
  /** Bytes that may be kept together, and that are kept now. */
  most = Number.POSITIVE_INFINITY
  held = 0
  /** Bytes taken since the start; a body that is also recorded counts twice. */
  total = 0

  /** @throws {GatewayError} `overloaded` where there is no room; nothing is taken then */
  take(bytes: number): void {
    if (this.held + bytes > this.most) {
      throw new GatewayError(
        'overloaded',
        'The gateway holds as many request bodies as its memory allows. Retry in a moment.',
        { headers: { 'retry-after': '1' } }
      )
    }
    this.held += bytes
    this.total += bytes
  }

  give(bytes: number): void {
    this.held -= bytes
  }
}
