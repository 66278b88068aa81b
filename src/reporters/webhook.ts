import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import { type Dispatcher, Pool } from 'undici'
import { parseRetryAfter } from '../http.ts'
import { Duration, HeadersToSend, Url } from '../options.ts'
import type { Reporter, UsageEvent } from './reporter.ts'

export const WebhookOptions = Type.Object(
  {
    url: Url('Receives each event'),
    method: Type.Enum(['POST', 'PUT'], { default: 'POST', description: 'Method' }),
    timeout: Duration('3s', 'How long one delivery may take'),
    retry: Type.Integer({
      minimum: 0,
      default: 3,
      description: 'Deliveries after the first failed'
    }),
    headers: HeadersToSend,
    batch: Type.Object(
      {
        max_events: Type.Integer({
          minimum: 1,
          maximum: 1000,
          default: 1,
          description: 'Events in one delivery; above 1 the body is a JSON array'
        }),
        max_wait: Duration('1s', 'How long an event waits for others')
      },
      { additionalProperties: false, default: {}, description: 'Several events in one delivery' }
    ),
    include_request_body: Type.Boolean({
      default: false,
      description: 'Sends the request body too, with all prompts'
    })
  },
  { additionalProperties: false, description: 'A service that receives usage events' }
)
export type WebhookOptions = Static<typeof WebhookOptions>

/** What happened to an event. */
export type Delivery = 'delivered' | 'failed'

const CONCURRENCY = 8
const MAX_EVENTS = 10_000
const MAX_LENGTH = 64 * 1024 * 1024
const FIRST_WAIT = 100
const MAX_WAIT = 5_000
const MAX_RETRY_AFTER = 60_000

/**
 * Sends usage events to a service, each by itself or several together. Deliveries begin in order, a few run at a time, and what fails
 * is sent again with growing waits, or after the `Retry-After` of the answer. The queue is bounded; what does not fit
 * is lost and counted as failed.
 */
export class Webhook implements Reporter {
  readonly name: string
  readonly wantsBody: boolean
  readonly #options: WebhookOptions
  readonly #onDelivery: (result: Delivery) => void
  readonly #log: FastifyBaseLogger
  readonly #sockets: Pool
  readonly #target: Dispatcher.DispatchOptions
  /** JSON texts. */
  readonly #queue: string[] = []
  readonly #closing = new AbortController()
  #length = 0
  /** Deliveries under way, and the events in them. */
  #sending = 0
  #sendingEvents = 0
  #waiting: NodeJS.Timeout | undefined
  readonly #done = Promise.withResolvers<void>()
  #closed: Promise<void> | undefined
  #hasWarned = false

  constructor(
    name: string,
    options: WebhookOptions,
    onDelivery: (result: Delivery) => void,
    log: FastifyBaseLogger
  ) {
    this.name = name
    this.wantsBody = options.include_request_body
    this.#options = options
    this.#onDelivery = onDelivery
    this.#log = log
    const { origin, pathname, search } = new URL(options.url)
    this.#sockets = new Pool(origin, { connections: CONCURRENCY, allowH2: false })
    this.#target = {
      path: pathname + search,
      method: options.method,
      headers: { ...options.headers, 'content-type': 'application/json' },
      headersTimeout: 0,
      bodyTimeout: 0
    }
  }

  get pending(): number {
    return this.#queue.length + this.#sendingEvents
  }

  report(event: UsageEvent, body: Buffer | undefined): void {
    const json = this.wantsBody ? withBody(event, body) : JSON.stringify(event)
    if (this.#queue.length >= MAX_EVENTS || this.#length + json.length > MAX_LENGTH) {
      if (!this.#hasWarned) {
        this.#log.error({ reporter: this.name }, 'usage events are lost: the queue is full')
      }
      this.#hasWarned = true
      this.#onDelivery('failed')
      return
    }
    this.#length += json.length
    this.#queue.push(json)
    this.#proceed()
  }

  close(signal: AbortSignal): Promise<void> {
    const { resolve } = this.#done
    if (signal.aborted) resolve()
    else signal.addEventListener('abort', () => resolve(), { once: true })
    this.#closed ??= this.#finish()
    this.#proceed()
    return this.#closed
  }

  async #finish(): Promise<void> {
    if (this.pending > 0) await this.#done.promise
    const lost = this.pending
    for (let count = 0; count < lost; count++) this.#onDelivery('failed')
    if (lost > 0) this.#log.error({ reporter: this.name, lost }, 'usage events were not delivered')
    this.#closing.abort()
    clearTimeout(this.#waiting)
    this.#queue.length = 0
    await this.#sockets.destroy()
  }

  /** Starts a delivery when there is a full one, or sees to it that one starts in time. */
  #proceed(): void {
    if (this.#queue.length === 0 || this.#sending >= CONCURRENCY) return
    if (this.#isDue()) void this.#send()
    else this.#waiting ??= setTimeout(() => void this.#send(), this.#options.batch.max_wait)
  }

  #isDue(): boolean {
    const least = this.#closed === undefined ? this.#options.batch.max_events : 1
    return this.#queue.length >= least
  }

  async #send(): Promise<void> {
    clearTimeout(this.#waiting)
    this.#waiting = undefined
    this.#sending++
    do {
      const events = this.#queue.splice(0, this.#options.batch.max_events)
      this.#sendingEvents += events.length
      const isSingle = this.#options.batch.max_events === 1
      const isDelivered = await this.#deliver(isSingle ? events[0]! : `[${events.join()}]`)
      if (this.#closing.signal.aborted) return
      this.#sendingEvents -= events.length
      this.#hasWarned &&= !isDelivered
      for (const { length } of events) {
        this.#length -= length
        this.#onDelivery(isDelivered ? 'delivered' : 'failed')
      }
    } while (this.#isDue())
    this.#sending--
    if (this.pending === 0 && this.#closed !== undefined) this.#done.resolve()
    this.#proceed()
  }

  async #deliver(payload: string): Promise<boolean> {
    let failure = ''
    for (let attempt = 0; attempt <= this.#options.retry; attempt++) {
      let wait = Math.min(FIRST_WAIT * 2 ** attempt, MAX_WAIT) * (0.75 + Math.random() / 2)
      try {
        const { statusCode, retryAfter } = await this.#post(payload)
        if (statusCode >= 200 && statusCode <= 299) return true
        failure = `status ${statusCode}`
        wait = Math.max(wait, Math.min(retryAfter, MAX_RETRY_AFTER))
      } catch (error) {
        failure = (error as { code?: string }).code ?? (error as Error).name
      }
      if (this.#closing.signal.aborted) return false
      if (attempt < this.#options.retry) await this.#pause(wait)
    }
    this.#log.error({ reporter: this.name, failure }, 'a usage event could not be delivered')
    return false
  }

  /** One delivery: its status, and how long (ms) the receiver asks to be left alone. */
  #post(body: string): Promise<{ statusCode: number; retryAfter: number }> {
    return new Promise((resolve, reject) => {
      const response = { statusCode: 0, retryAfter: 0 }
      let controller: Dispatcher.DispatchController | undefined
      let late: Error | undefined
      const timer = setTimeout(() => {
        late = Object.assign(new Error('no answer in time'), { code: 'TIMEOUT' })
        controller?.abort(late)
        reject(late)
      }, this.#options.timeout)
      this.#sockets.dispatch(
        { ...this.#target, body },
        {
          onRequestStart(started) {
            controller = started
            if (late !== undefined) started.abort(late)
          },
          onResponseStart(_controller, statusCode, headers) {
            response.statusCode = statusCode
            response.retryAfter = parseRetryAfter(headers['retry-after'])
          },
          onResponseData() {},
          onResponseEnd() {
            clearTimeout(timer)
            resolve(response)
          },
          onResponseError(_controller, error) {
            clearTimeout(timer)
            reject(error)
          }
        }
      )
    })
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#closing.signal }).catch(() => {})
  }
}

/** The body is JSON already and goes in as it is. */
function withBody(event: UsageEvent, body: Buffer | undefined): string {
  const json = JSON.stringify(event)
  return body === undefined ? json : `${json.slice(0, -1)},"request_body":${body}}`
}
