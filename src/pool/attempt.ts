import type { Socket } from 'node:net'
import type { Dispatcher } from 'undici'
import { GatewayError } from '../errors.ts'
import { Answer } from './answer.ts'
import type { Backend, BackendHandler } from './backend.ts'
import type { FailureKind } from './pool.ts'
import { Refusal } from './refusal.ts'

export type Headers = Record<string, string | string[] | undefined>

/** The head of an answer. */
export interface Head {
  statusCode: number
  headers: Headers
}

/** What became of an attempt: a status class, or how it failed. */
export type AttemptResult = FailureKind | '2xx' | '3xx' | '4xx' | 'client_gone'

/** A failed attempt counts as this slow (ms) when backends are compared by latency. */
const FAILURE_LATENCY = 10_000

/** What an attempt tells the delivery it belongs to. */
export interface AttemptOwner {
  /** This is the client's answer. */
  deliver(attempt: Attempt, head: Head, answer: Answer): void
  /** The backend refuses; returns whether another attempt is made, else the refusal is delivered. */
  refused(attempt: Attempt, kind: FailureKind, refusal: Refusal): boolean
  /** It failed before there was anything to pass on. */
  failed(attempt: Attempt, kind: FailureKind, error: Error): void
  /** The answer broke off after some of it was passed on. */
  broke(attempt: Attempt, kind: FailureKind, error: GatewayError): void
  /** The backend does not take `stream_options` and should be asked without. */
  again(attempt: Attempt): void
  /** The request was sent with a question for usage. */
  readonly hasAsked: boolean
  count(attempt: Attempt, result: AttemptResult): void
  over(attempt: Attempt): void
}

/** One try at one backend. */
export class Attempt implements BackendHandler {
  socket: Socket | undefined
  readonly backend: Backend
  readonly #owner: AttemptOwner
  readonly #startedAt = performance.now()
  #controller: Dispatcher.DispatchController | undefined
  #head: Head | undefined
  #answer: Answer | undefined
  #isDelivered = false
  #isOver = false
  #isCancelled = false
  /** The error answer, while it is not certain that it is the client's. */
  #refusal: Refusal | undefined
  /** It may be our own question for usage that is refused. */
  #isInDoubt = false

  constructor(owner: AttemptOwner, backend: Backend) {
    this.#owner = owner
    this.backend = backend
  }

  start(options: Dispatcher.DispatchOptions): void {
    this.backend.inFlight++
    this.backend.dispatch(options, this)
  }

  /** Closes the connection, in whatever phase it is. */
  cancel(): void {
    if (this.#isOver) return
    this.#isCancelled = true
    if (this.#head === undefined) this.#owner.count(this, 'client_gone')
    this.#end()
    const reason = new GatewayError('client_gone', 'The client has left.')
    if (this.#controller !== undefined) this.#controller.abort(reason)
    else this.socket?.destroy(reason)
  }

  onRequestStart(controller: Dispatcher.DispatchController): void {
    this.#controller = controller
    if (this.#isCancelled) controller.abort(new Error('cancelled before it began'))
  }

  onResponseStart(
    controller: Dispatcher.DispatchController,
    statusCode: number,
    headers: Headers
  ): void {
    if (statusCode < 200) return
    this.#head = { statusCode, headers }
    if (this.#owner.hasAsked && (statusCode === 400 || statusCode === 422)) {
      this.#isInDoubt = true
      this.#refusal = new Refusal(this.#head, controller)
      return
    }
    const kind = statusFailure(statusCode)
    this.#owner.count(this, kind ?? (`${Math.floor(statusCode / 100)}xx` as AttemptResult))
    if (kind !== undefined) {
      this.#penalise()
      const refusal = new Refusal(this.#head, controller)
      if (this.#owner.refused(this, kind, refusal)) {
        this.#refusal = refusal
        return
      }
    }
    this.#answer = new Answer(controller)
  }

  onResponseData(_controller: Dispatcher.DispatchController, chunk: Buffer): void {
    if (this.#refusal !== undefined) return this.#refusal.data(chunk)
    this.#answer!.data(chunk)
    if (!this.#isDelivered) this.#deliver()
  }

  onResponseEnd(): void {
    this.#end()
    if (this.#isInDoubt) return this.#settleDoubt(this.#refusal!)
    if (this.#refusal !== undefined) return this.#refusal.end()
    if (!this.#isDelivered) this.#deliver()
    const { headers } = this.#head!
    const isFramed = 'content-length' in headers || 'transfer-encoding' in headers
    if (isFramed || this.#answer!.tap?.isCutShort() !== true) this.#answer!.end()
    else this.#break(new Error('the connection was closed in the middle of a stream'))
  }

  onResponseError(_controller: Dispatcher.DispatchController, error: Error): void {
    this.#end()
    // An answer that was destroyed is one that its client gave up.
    if (this.#isCancelled || this.#answer?.destroyed) return
    if (this.#isDelivered) return this.#break(error)
    if (this.#refusal !== undefined && !this.#isInDoubt) return this.#refusal.lose()
    const kind = isTimeout(error) ? 'timeout' : 'connect_failure'
    // An error of our own making is about the request's body: the backend is not to blame.
    if (!(error instanceof GatewayError)) {
      this.#owner.count(this, kind)
      this.#penalise()
    }
    this.#owner.failed(this, kind, error)
  }

  #deliver(): void {
    this.#isDelivered = true
    if (this.#head!.statusCode < 500) {
      const now = performance.now()
      this.backend.observeLatency(now - this.#startedAt, now)
    }
    this.#owner.deliver(this, this.#head!, this.#answer!)
  }

  /** A backend that names the field it was given on the caller's behalf goes without it from now on. */
  #settleDoubt(refusal: Refusal): void {
    if (this.backend.takesUsageQuestion && /stream_options|include_usage/.test(refusal.text)) {
      this.backend.takesUsageQuestion = false
      return this.#owner.again(this)
    }
    this.#owner.count(this, '4xx')
    this.#owner.deliver(this, this.#head!, refusal.toAnswer())
  }

  #break(error: Error): void {
    const kind = isTimeout(error) ? 'timeout' : 'connect_failure'
    const gatewayError =
      kind === 'timeout'
        ? new GatewayError(
            'backend_timeout',
            'The backend fell silent in the middle of its answer.',
            {
              cause: error
            }
          )
        : new GatewayError('backend_failed', 'The backend broke off in the middle of its answer.', {
            cause: error
          })
    this.#penalise()
    this.#owner.broke(this, kind, gatewayError)
    this.#answer!.break(gatewayError)
  }

  #penalise(): void {
    const now = performance.now()
    this.backend.observeLatency(Math.max(FAILURE_LATENCY, now - this.#startedAt), now)
  }

  #end(): void {
    if (this.#isOver) return
    this.#isOver = true
    this.backend.inFlight--
    this.#owner.over(this)
  }
}

function statusFailure(statusCode: number): FailureKind | undefined {
  if (statusCode >= 500) return '5xx'
  return statusCode === 429 ? '429' : undefined
}

function isTimeout(error: Error & { code?: string }): boolean {
  return error.code === 'UND_ERR_HEADERS_TIMEOUT' || error.code === 'UND_ERR_BODY_TIMEOUT'
}
