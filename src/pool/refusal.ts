import type { Dispatcher } from 'undici'
import { Answer } from './answer.ts'
import type { Head } from './attempt.ts'

const MAX_KEPT = 64 * 1024

/** A backend's error answer that is kept while others are tried, in case none does better. */
export class Refusal {
  readonly head: Head
  readonly #controller: Dispatcher.DispatchController
  readonly #chunks: Buffer[] = []
  #size = 0
  #state: 'coming' | 'complete' | 'lost' = 'coming'
  #settled: ((isComplete: boolean) => void) | undefined

  constructor(head: Head, controller: Dispatcher.DispatchController) {
    this.head = head
    this.#controller = controller
  }

  data(chunk: Buffer): void {
    this.#size += chunk.length
    if (this.#size <= MAX_KEPT) this.#chunks.push(chunk)
    else this.#controller.abort(new Error('the error answer is too long to be kept'))
  }

  end(): void {
    this.#settle('complete')
  }

  lose(): void {
    this.#settle('lost')
  }

  /** Calls back once, when all of it has come or it is certain that it won't. */
  whenSettled(callback: (isComplete: boolean) => void): void {
    this.#settled = callback
    if (this.#state !== 'coming') callback(this.#state === 'complete')
  }

  get text(): string {
    return Buffer.concat(this.#chunks).toString()
  }

  toAnswer(): Answer {
    const answer = new Answer({
      aborted: false,
      paused: false,
      reason: null,
      abort: () => {},
      pause: () => {},
      resume: () => {}
    })
    for (const chunk of this.#chunks) answer.data(chunk)
    answer.end()
    return answer
  }

  #settle(state: 'complete' | 'lost'): void {
    this.#state = state
    this.#settled?.(state === 'complete')
  }
}
