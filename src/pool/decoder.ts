import type { Dispatcher } from 'undici'
import { newDecoder, type Stage } from '../wire/codings.ts'

/** Undoes the content codings of a response (RFC 9110, section 8.4.1) that no client has asked for. */

/** The response cannot be decoded. */
export class CodingError extends Error {
  readonly code = 'CONTENT_CODING'
}

/** Receives the decoded response. */
export interface Decoded {
  data(chunk: Buffer): void
  end(): void
  fail(error: Error): void
}

/** Stands between a backend and the receiver of its response, which controls the backend through it. */
export class Decoder implements Dispatcher.DispatchController {
  readonly #codings: string[]
  readonly #source: Dispatcher.DispatchController
  readonly #to: Decoded
  readonly #stages: Stage[] = []
  /** The backend has sent all, or broke off. */
  #isComplete = false
  #cause: Error | undefined
  /** Bytes follow the end of a coding. */
  #isTrailed = false
  #isAborted = false
  #isOver = false

  constructor(codings: string[], source: Dispatcher.DispatchController, to: Decoded) {
    this.#codings = codings
    this.#source = source
    this.#to = to
  }

  write(chunk: Buffer): void {
    if (this.#isOver || this.#isAborted || chunk.length === 0) return
    if (this.#stages.length === 0) this.#begin()
    const [first] = this.#stages
    if (first!.write(chunk)) return
    this.#source.pause()
    first!.once('drain', () => this.#source.resume())
  }

  /** The backend has sent all. */
  end(): void {
    this.#isComplete = true
    const [first] = this.#stages
    if (this.#isOver) return
    if (first === undefined) this.#finish()
    else first.end()
  }

  /** The backend broke off: what can be decoded goes on before the error. */
  break(error: Error): void {
    if (this.#isOver) return
    this.#isComplete = true
    this.#cause = error
    if (this.#isAborted) this.#finish()
    else this.#drain(0)
  }

  get aborted(): boolean {
    return this.#source.aborted
  }

  get paused(): boolean {
    return this.#source.paused || (this.#stages.at(-1)?.isPaused() ?? false)
  }

  get reason(): Error | null {
    return this.#source.reason
  }

  abort(reason: Error): void {
    if (this.#isOver || this.#isAborted) return
    this.#isAborted = true
    this.#destroy()
    if (this.#isComplete) this.break(reason)
    else this.#source.abort(reason)
  }

  pause(): void {
    const last = this.#stages.at(-1)
    if (last === undefined) this.#source.pause()
    else last.pause()
  }

  resume(): void {
    const last = this.#stages.at(-1)
    if (last === undefined) this.#source.resume()
    else last.resume()
  }

  #begin(): void {
    for (const name of this.#codings.toReversed()) {
      const stage = newDecoder(name)
      stage.on('error', ({ message }) => this.#fail(`${name}: ${message}`))
      // Node drops what a stage has not read as soon as that stage has ended.
      stage.once('end', () => {
        this.#isTrailed ||= stage.writableLength > 0
      })
      this.#stages.at(-1)?.pipe(stage)
      this.#stages.push(stage)
    }
    const last = this.#stages.at(-1)!
    last.on('data', chunk => this.#to.data(chunk))
    last.once('end', () => this.#finish())
  }

  /** Waits until one stage after the other has decoded what it has. */
  #drain(at: number): void {
    if (this.#isOver) return
    const stage = this.#stages[at]
    if (stage !== undefined) stage.flush(() => this.#drain(at + 1))
    else if (at === 0) this.#finish()
    else this.#stages.at(-1)!.push(null)
  }

  #finish(): void {
    if (this.#isOver) return
    const isTrailed = this.#isTrailed || !this.#isComplete
    if (this.#cause === undefined && isTrailed) return this.#fail('bytes follow its end')
    this.#isOver = true
    if (this.#cause === undefined) this.#to.end()
    else this.#to.fail(this.#cause)
  }

  #fail(why: string): void {
    if (this.#isOver) return
    const error = new CodingError(`the content coding ${this.#codings} is broken (${why})`)
    this.#isOver = true
    this.#destroy()
    if (!this.#isComplete) this.#source.abort(error)
    this.#to.fail(error)
  }

  #destroy(): void {
    for (const stage of this.#stages) stage.destroy()
  }
}
