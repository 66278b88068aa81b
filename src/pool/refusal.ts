import type { Dispatcher } from 'undici'
import type { Framing } from '../http.ts'
import { Answer, NOBODY_SENDS } from './answer.ts'
import type { Head } from './attempt.ts'

const MAX_KEPT = 64 * 1024

/** A backend's error answer that is kept while others are tried, in case none does better. */
export class Refusal {
  readonly head: Head
  readonly chunks: Buffer[] = []
  readonly #controller: Dispatcher.DispatchController
  readonly #framing: Framing | undefined
  #size = 0
  #state: 'coming' | 'complete' | 'lost' = 'coming'
  #settled: ((isComplete: boolean) => void) | undefined

  constructor(head: Head, controller: Dispatcher.DispatchController, framing?: Framing) {
    this.head = head
    this.#framing = framing
    this.#controller = controller
  }

  /** Keeps a chunk; returns false, and does not, when it would be too much. */
  data(chunk: Buffer): boolean {
    if (this.#size + chunk.length > MAX_KEPT) return false
    this.#size += chunk.length
    this.chunks.push(chunk)
    return true
  }

  end(): void {
    this.#settle('complete')
  }

  lose(): void {
    this.#settle('lost')
  }

  /** Calls back once, when all of it has come, or it is certain that it won't within `ms`. */
  whenSettled(ms: number, callback: (isComplete: boolean) => void): void {
    if (this.#state !== 'coming') return callback(this.#state === 'complete')
    const timer = setTimeout(() => this.#controller.abort(new Error('the rest did not come')), ms)
    this.#settled = isComplete => {
      clearTimeout(timer)
      callback(isComplete)
    }
  }

  get text(): string {
    return Buffer.concat(this.chunks).toString()
  }

  toAnswer(): Answer {
    const answer = new Answer(NOBODY_SENDS)
    answer.framing = this.#framing
    for (const chunk of this.chunks) answer.data(chunk)
    answer.end()
    return answer
  }

  #settle(state: 'complete' | 'lost'): void {
    this.#state = state
    this.#settled?.(state === 'complete')
  }
}
