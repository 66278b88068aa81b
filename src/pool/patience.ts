import { type Dispatcher, errors } from 'undici'
import { GatewayError } from '../errors.ts'
import type { TimeLimits } from './backend.ts'

/** Beyond any time of `performance.now()`, as the bound of a sum. */
const NEVER = Number.MAX_SAFE_INTEGER
/** A backend's silence is noticed at most this much (ms), and at most an eighth, later than asked for. */
const LATEST_MS = 1_000
const LEAST_STEPS = 8

/** The client would not wait for an answer any more; the backend is not to blame. */
export function tooLate(): GatewayError {
  return new GatewayError(
    'backend_timeout',
    'No answer began within the time that the client has set.'
  )
}

/** The whole of an answer has taken too long. */
export class TotalTimeoutError extends Error {
  static readonly CODE = 'TOTAL_TIMEOUT'
  readonly code = TotalTimeoutError.CODE
}

/**
 * How long a backend is waited for: for the first byte of its answer, and then between two chunks.
 * undici's own timeouts have a clock that ticks twice a second; and a server that sends its head before
 * it queues the request has not begun to answer, so a head alone ends no waiting.
 */
export class Patience {
  /** Set by every chunk: a store costs less than a look at the clock or a timer that begins anew. */
  heard = false
  isListening = false
  readonly #limits: TimeLimits
  #timer: NodeJS.Timeout | undefined
  #total: NodeJS.Timeout | undefined

  constructor(limits: TimeLimits) {
    this.#limits = limits
  }

  /** Waits for the first byte, and at most until the deadline of the client (monotonic, ms), which can be put off. */
  begin(controller: Dispatcher.DispatchController, deadline: () => number): void {
    if (this.#timer !== undefined) return
    const { totalTimeout } = this.#limits
    if (totalTimeout > 0 && this.#total === undefined) {
      const late = () => controller.abort(new TotalTimeoutError('the answer took too long'))
      this.#total = setTimeout(late, totalTimeout).unref()
    }
    this.#waitUntil(controller, deadline, performance.now() + (this.#limits.timeout || NEVER))
  }

  /** @param end when the backend is waited for no longer */
  #waitUntil(controller: Dispatcher.DispatchController, deadline: () => number, end: number): void {
    const until = Math.min(deadline(), end)
    if (until >= NEVER) return
    const late = () => {
      const now = performance.now()
      if (end <= now) controller.abort(new errors.HeadersTimeoutError())
      else if (deadline() <= now) controller.abort(tooLate())
      else this.#waitUntil(controller, deadline, end)
    }
    this.#timer = setTimeout(late, Math.max(0, until - performance.now())).unref()
  }

  /** The first byte is here: from now on no silence may be too long. */
  listen(controller: Dispatcher.DispatchController): void {
    clearTimeout(this.#timer)
    this.isListening = true
    const { idleTimeout: ms } = this.#limits
    if (ms === 0) return
    const steps = Math.max(LEAST_STEPS, Math.ceil(ms / LATEST_MS))
    let silent = 0
    this.#timer = setInterval(
      () => {
        // A backend that must wait for a slow client is not silent.
        silent = this.heard || controller.paused ? 0 : silent + 1
        this.heard = false
        if (silent === steps) controller.abort(new errors.BodyTimeoutError())
      },
      Math.ceil(ms / steps)
    ).unref()
  }

  end(): void {
    clearTimeout(this.#timer)
    clearTimeout(this.#total)
  }
}
