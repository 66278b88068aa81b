import { type Dispatcher, errors } from 'undici'
import { GatewayError } from '../errors.ts'

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

/**
 * How long a backend is waited for: for the first byte of its answer, and then between two chunks.
 * undici's own timeouts have a clock that ticks twice a second; and a server that sends its head before
 * it queues the request has not begun to answer, so a head alone ends no waiting.
 */
export class Patience {
  /** Set by every chunk: a store costs less than a look at the clock or a timer that begins anew. */
  heard = false
  isListening = false
  #timer: NodeJS.Timeout | undefined

  /** Waits for the first byte: `ms` (0: for ever), and at most until `deadline` (monotonic, ms). */
  begin(controller: Dispatcher.DispatchController, ms: number, deadline: number): void {
    if (this.#timer !== undefined) return
    const left = deadline - performance.now()
    const isClients = left < (ms || Number.POSITIVE_INFINITY)
    if (!isClients && ms === 0) return
    const late = () => (isClients ? tooLate() : new errors.HeadersTimeoutError())
    const wait = isClients ? Math.max(0, left) : ms
    this.#timer = setTimeout(() => controller.abort(late()), wait).unref()
  }

  /** The first byte is here: from now on a silence of `ms` is too long; 0: none is. */
  listen(controller: Dispatcher.DispatchController, ms: number): void {
    this.end()
    this.isListening = true
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
  }
}
