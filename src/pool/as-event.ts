import type { Failure } from '../dialects/failure.ts'
import type { Tap } from './answer.ts'

const END = '\n\n'
const LINE_END = /[\r\n]/g
/** An error of the Messages API, whose clients look at the name of an event. */
const ERROR = /^\s*\{\s*"type"\s*:\s*"error"/

/**
 * JSON as events of a stream, for a client that has the head of a stream already: a whole response as the only one, or
 * each line as one (NDJSON). Line ends can only be white space in JSON, and are left out.
 */
export class AsEvent implements Tap {
  readonly #inner: Tap | undefined
  /** Whether each line is an event. */
  readonly #isLines: boolean
  /** An event has begun, and has not ended. */
  #isBegun = false

  constructor(inner: Tap | undefined, isLines = false) {
    this.#inner = inner
    this.#isLines = isLines
  }

  pass(chunk: Buffer): Buffer | undefined {
    return this.#framed(this.#inner === undefined ? chunk : this.#inner.pass(chunk))
  }

  get isOver(): boolean {
    return this.#inner?.isOver ?? false
  }

  readonly isBetweenEvents = false

  get failure(): Failure | undefined {
    return this.#inner?.failure
  }

  release(): Buffer | undefined {
    return this.#framed(this.#inner?.release())
  }

  end(): Buffer {
    const last = this.#framed(this.#inner?.end()) ?? Buffer.alloc(0)
    const isOpen = this.#isBegun || !this.#isLines
    return isOpen ? Buffer.concat([last, Buffer.from(END)]) : last
  }

  breakOff(): string {
    return (this.#inner?.breakOff() ?? '') + (this.#isBegun ? END : '')
  }

  isCutShort(): boolean {
    return this.#inner?.isCutShort() ?? false
  }

  #framed(json: Buffer | undefined): Buffer | undefined {
    if (json === undefined) return undefined
    const text = json.toString('latin1')
    const framed = this.#isLines ? this.#lines(text) : this.#event(text.replace(LINE_END, ''))
    return Buffer.from(framed, 'latin1')
  }

  #event(line: string): string {
    const before = this.#isBegun ? '' : ERROR.test(line) ? 'event: error\ndata: ' : 'data: '
    this.#isBegun = true
    return before + line
  }

  #lines(text: string): string {
    let framed = ''
    for (const [index, line] of text.replaceAll('\r', '').split('\n').entries()) {
      if (index > 0 && this.#isBegun) {
        framed += END
        this.#isBegun = false
      }
      if (line !== '') framed += this.#event(line)
    }
    return framed
  }
}
