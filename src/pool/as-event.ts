import type { Failure } from '../dialects/failure.ts'
import type { Tap } from './answer.ts'

const END = Buffer.from('\n\n')
const LINE_END = /[\r\n]/g
/** An error of the Messages API, whose clients look at the name of an event. */
const ERROR = /^\s*\{\s*"type"\s*:\s*"error"/

/**
 * A whole JSON response as the only event of a stream, for a client that has the head of a stream already.
 * Line ends can only be white space in JSON, and are left out.
 */
export class AsEvent implements Tap {
  readonly #inner: Tap | undefined
  #isBegun = false

  constructor(inner: Tap | undefined) {
    this.#inner = inner
  }

  pass(chunk: Buffer): Buffer | undefined {
    return this.#framed(this.#inner === undefined ? chunk : this.#inner.pass(chunk))
  }

  get isOver(): boolean {
    return this.#inner?.isOver ?? false
  }

  get failure(): Failure | undefined {
    return this.#inner?.failure
  }

  release(): Buffer | undefined {
    return this.#framed(this.#inner?.release())
  }

  end(): Buffer {
    return Buffer.concat([this.#framed(this.#inner?.end()) ?? Buffer.alloc(0), END])
  }

  breakOff(): string {
    return (this.#inner?.breakOff() ?? '') + (this.#isBegun ? String(END) : '')
  }

  isCutShort(): boolean {
    return this.#inner?.isCutShort() ?? false
  }

  #framed(json: Buffer | undefined): Buffer | undefined {
    if (json === undefined) return undefined
    const line = json.toString('latin1').replace(LINE_END, '')
    const before = this.#isBegun ? '' : ERROR.test(line) ? 'event: error\ndata: ' : 'data: '
    this.#isBegun = true
    return Buffer.from(before + line, 'latin1')
  }
}
