import { Readable } from 'node:stream'
import type { FastifyBaseLogger } from 'fastify'
import type { Dispatcher } from 'undici'
import { GatewayError } from '../errors.ts'
import type { Exchange } from '../exchange.ts'
import type { Answer } from './answer.ts'
import {
  Attempt,
  type AttemptOwner,
  type AttemptResult,
  type Head,
  type Headers
} from './attempt.ts'
import type { Backend } from './backend.ts'
import type { FailureKind, Pool } from './pool.ts'
import type { Refusal } from './refusal.ts'

/** The exchange a request belongs to, as a property of its headers: reply-from hands it through. */
export const EXCHANGE = Symbol('exchange')

type Options = Dispatcher.DispatchOptions & { headers: Headers & { [EXCHANGE]?: Exchange } }
type Done = (error: Error | null, answer?: Head & { body: Answer }) => void
type OnAttempt = (backend: string, result: AttemptResult) => void

/**
 * What @fastify/reply-from takes as its `undici` option: it sends a request to a backend of the
 * pool, and to another one as long as the client has not had a byte of an answer, and calls back
 * once, with the answer that is the client's.
 */
export function createDispatcher(pool: Pool, onAttempt: OnAttempt, log: FastifyBaseLogger) {
  return {
    request: (options: Options, done: Done) =>
      new Delivery(pool, onAttempt, log, options, done).start(),
    close: () => {},
    destroy: () => {}
  }
}

/** One request and all its attempts. */
class Delivery implements AttemptOwner {
  readonly #pool: Pool
  readonly #onAttempt: OnAttempt
  readonly #log: FastifyBaseLogger
  readonly #options: Options
  readonly #done: Done
  readonly #exchange: Exchange
  readonly #tried = new Set<Backend>()
  readonly #running = new Set<Attempt>()
  #waits = 0
  #timer: NodeJS.Timeout | undefined
  /** The latest error answer of a backend; it is the client's when nothing better comes. */
  #refusal: Refusal | undefined
  #answer: Answer | undefined

  constructor(
    pool: Pool,
    onAttempt: OnAttempt,
    log: FastifyBaseLogger,
    options: Options,
    done: Done
  ) {
    this.#pool = pool
    this.#onAttempt = onAttempt
    this.#log = log
    this.#options = options
    this.#done = done
    this.#exchange = options.headers[EXCHANGE]!
  }

  start(): void {
    if (this.#exchange.closed) return
    this.#exchange.onClose = () => this.#cancel()
    this.#exchange.onInterrupt = error => {
      if (this.#answer !== undefined) return this.#answer.break(error)
      this.#cancel()
      this.#done(error)
    }
    this.#next()
  }

  get hasAsked(): boolean {
    return this.#exchange.question?.asked === true
  }

  deliver(attempt: Attempt, head: Head, answer: Answer): void {
    for (const other of this.#running) if (other !== attempt) other.cancel()
    this.#answer = answer
    this.#done(null, { ...head, body: answer })
  }

  refused(attempt: Attempt, kind: FailureKind, refusal: Refusal): boolean {
    const wait = this.#plan(kind, retryAfter(refusal.head.headers))
    if (wait === undefined) return false
    this.#logFailure(attempt, kind, `status ${refusal.head.statusCode}`)
    this.#refusal = refusal
    this.#retry(wait)
    return true
  }

  failed(attempt: Attempt, kind: FailureKind, error: Error): void {
    if (error instanceof GatewayError) return this.#giveUp(error, 'rejected')
    this.#logFailure(attempt, kind, reason(error))
    const wait = isOurs(error) ? undefined : this.#plan(kind)
    if (wait !== undefined) this.#retry(wait)
    else
      this.#giveUp(toGatewayError(kind, error), kind === 'timeout' ? 'timed_out' : 'backend_failed')
  }

  broke(attempt: Attempt, kind: FailureKind, error: GatewayError): void {
    this.#logFailure(attempt, kind, `${reason(error.cause as Error)}, in the middle of an answer`)
    this.#exchange.fail(kind === 'timeout' ? 'timed_out' : 'backend_failed', error)
  }

  again(attempt: Attempt): void {
    this.#log.info({ backend: attempt.backend.name }, 'backend takes no stream_options')
    this.#exchange.attempts--
    this.#send(attempt.backend)
  }

  count(attempt: Attempt, result: AttemptResult): void {
    this.#onAttempt(attempt.backend.name, result)
  }

  over(attempt: Attempt): void {
    this.#running.delete(attempt)
  }

  /** Time in ms until another attempt may be made, or undefined if there is to be none. */
  #plan(kind: FailureKind, retryAfterMs = 0): number | undefined {
    if (this.#exchange.closed || !this.#canResend()) return undefined
    const { retry, backends } = this.#pool
    const another = backends.some(each => each.available && !this.#tried.has(each))
    // A connection that was refused, or broke before there was an answer, has cost nobody anything.
    if (kind === 'connect_failure' && another) return 0
    const isAllowed = retry.enabled && retry.retryOn.includes(kind)
    if (!isAllowed || this.#exchange.attempts > retry.maxRetries) return undefined
    if (another) return 0
    if (retryAfterMs > retry.maxWait) return undefined
    const backOff = Math.min(retry.initialWait * retry.multiplier ** this.#waits, retry.maxWait)
    return Math.max(backOff, retryAfterMs)
  }

  #retry(wait: number): void {
    if (wait === 0) return this.#next()
    this.#waits++
    this.#tried.clear()
    this.#timer = setTimeout(() => this.#next(), wait)
  }

  #next(): void {
    const backend = this.#pool.pick(this.#tried, this.#exchange.pinned)
    if (backend !== undefined) return this.#send(backend)
    const error = new GatewayError('no_backend', 'No backend is available at the moment.', {
      headers: { 'retry-after': '1' }
    })
    this.#giveUp(error, this.#exchange.attempts === 0 ? 'rejected' : 'backend_failed')
  }

  #send(backend: Backend): void {
    this.#tried.add(backend)
    this.#exchange.attempts++
    this.#exchange.backend = backend.name
    this.#exchange.backendUrl = backend.origin + backend.basePath
    const attempt = new Attempt(this, backend)
    this.#running.add(attempt)
    attempt.start(this.#request(backend))
  }

  #request(backend: Backend): Dispatcher.DispatchOptions {
    const headers: Record<string, string | string[]> = {}
    for (const name in this.#options.headers) {
      const value = this.#options.headers[name]
      if (value !== undefined && name !== 'host') headers[name] = value
    }
    for (const name in backend.config.headers) headers[name] = backend.config.headers[name]!
    const { question } = this.#exchange
    if (question !== undefined) question.asked = backend.takesUsageQuestion
    if (question?.asked !== true) return { ...this.#options, headers }
    headers['content-length'] = String(question.bytes.length)
    return { ...this.#options, headers, body: question.bytes }
  }

  #cancel(): void {
    clearTimeout(this.#timer)
    for (const attempt of this.#running) attempt.cancel()
  }

  #giveUp(error: GatewayError, outcome: Exchange['outcome']): void {
    if (this.#exchange.closed) return
    const refusal = this.#refusal
    if (refusal === undefined) {
      this.#exchange.fail(outcome, error)
      this.#done(error)
      return
    }
    refusal.whenSettled(isComplete => {
      if (this.#exchange.closed) return
      if (isComplete) {
        this.#answer = refusal.toAnswer()
        return this.#done(null, { ...refusal.head, body: this.#answer })
      }
      this.#refusal = undefined
      this.#giveUp(error, outcome)
    })
  }

  /** A streamed body can be sent again only as long as nothing of it has been read. */
  #canResend(): boolean {
    const { body } = this.#options
    return !(body instanceof Readable) || !(body.readableDidRead || body.destroyed)
  }

  #logFailure({ backend }: Attempt, kind: FailureKind, why: string): void {
    const { id } = this.#exchange
    this.#log.warn({ requestId: id, backend: backend.name, kind, reason: why }, 'attempt failed')
  }
}

/** `retry-after` in ms: seconds or a date (RFC 9110, section 10.2.3). */
function retryAfter(headers: Headers): number {
  const text = headers['retry-after']
  if (typeof text !== 'string') return 0
  const ms = /^\d+(\.\d+)?$/.test(text) ? Number(text) * 1000 : Date.parse(text) - Date.now()
  return Number.isNaN(ms) ? 0 : Math.max(0, ms)
}

function toGatewayError(kind: FailureKind, error: Error): GatewayError {
  if (isOurs(error)) {
    return new GatewayError('invalid_request', 'The request cannot be forwarded as it is.', {
      cause: error
    })
  }
  return kind === 'timeout'
    ? new GatewayError('backend_timeout', 'The backend did not answer in time.', { cause: error })
    : new GatewayError('backend_unreachable', 'No backend could be reached.', { cause: error })
}

/** undici refused to send the request at all: no backend is to blame. */
function isOurs(error: Error & { code?: string }): boolean {
  return error.code === 'UND_ERR_INVALID_ARG' || error.code === 'UND_ERR_NOT_SUPPORTED'
}

function reason(error: Error & { code?: string }): string {
  return error.code ?? error.message
}
