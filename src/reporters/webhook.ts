import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import { Agent, type Dispatcher } from 'undici'
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
const MAX_BYTES = 64 * 1024 * 1024
const FIRST_WAIT = 100
const MAX_WAIT = 5_000
const MAX_RETRY_AFTER = 60_000

/**
 * Sends each usage event to a service. Deliveries begin in order, a few run at a time, and what fails
 * is sent again with growing waits, or after the `Retry-After` of the answer. The queue is bounded; what does not fit
 * is lost and counted as failed.
 */
export class Webhook implements Reporter {
  readonly name: string
  readonly #options: WebhookOptions
  readonly #onDelivery: (result: Delivery) => void
  readonly #log: FastifyBaseLogger
  readonly #agent = new Agent({ connections: CONCURRENCY, allowH2: false })
  readonly #queue: Buffer[] = []
  readonly #closing = new AbortController()
  #bytes = 0
  #sending = 0
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
    this.#options = options
    this.#onDelivery = onDelivery
    this.#log = log
  }

  get pending(): number {
    return this.#queue.length + this.#sending
  }

  report(event: UsageEvent, body: Buffer | undefined): void {
    const payload = this.#options.include_request_body ? withBody(event, body) : encode(event)
    if (this.#queue.length >= MAX_EVENTS || this.#bytes + payload.length > MAX_BYTES) {
      if (!this.#hasWarned) {
        this.#log.error({ reporter: this.name }, 'usage events are lost: the queue is full')
      }
      this.#hasWarned = true
      this.#onDelivery('failed')
      return
    }
    this.#bytes += payload.length
    this.#queue.push(payload)
    if (this.#sending < CONCURRENCY) void this.#send()
  }

  close(signal: AbortSignal): Promise<void> {
    const { resolve } = this.#done
    if (signal.aborted) resolve()
    else signal.addEventListener('abort', () => resolve(), { once: true })
    this.#closed ??= this.#finish()
    return this.#closed
  }

  async #finish(): Promise<void> {
    if (this.pending > 0) await this.#done.promise
    const lost = this.pending
    for (let count = 0; count < lost; count++) this.#onDelivery('failed')
    if (lost > 0) this.#log.error({ reporter: this.name, lost }, 'usage events were not delivered')
    this.#closing.abort()
    this.#queue.length = 0
    await this.#agent.destroy()
  }

  async #send(): Promise<void> {
    this.#sending++
    for (let payload = this.#queue.shift(); payload !== undefined; payload = this.#queue.shift()) {
      const isDelivered = await this.#deliver(payload)
      this.#bytes -= payload.length
      if (this.#closing.signal.aborted) return
      this.#hasWarned &&= !isDelivered
      this.#onDelivery(isDelivered ? 'delivered' : 'failed')
    }
    this.#sending--
    if (this.pending === 0 && this.#closed !== undefined) this.#done.resolve()
  }

  async #deliver(payload: Buffer): Promise<boolean> {
    let failure = ''
    for (let attempt = 0; attempt <= this.#options.retry; attempt++) {
      let wait = Math.min(FIRST_WAIT * 2 ** attempt, MAX_WAIT) * (0.75 + Math.random() / 2)
      try {
        const { statusCode, headers, body } = await this.#agent.request({
          ...this.#target(),
          body: payload
        })
        await body.dump()
        if (statusCode >= 200 && statusCode <= 299) return true
        failure = `status ${statusCode}`
        wait = Math.max(wait, Math.min(parseRetryAfter(headers['retry-after']), MAX_RETRY_AFTER))
      } catch (error) {
        failure = (error as { code?: string }).code ?? (error as Error).name
      }
      if (this.#closing.signal.aborted) return false
      if (attempt < this.#options.retry) await this.#pause(wait)
    }
    this.#log.error({ reporter: this.name, failure }, 'a usage event could not be delivered')
    return false
  }

  #target(): Dispatcher.RequestOptions & { origin: string } {
    const { url, method, timeout, headers } = this.#options
    const { origin, pathname, search } = new URL(url)
    return {
      origin,
      path: pathname + search,
      method,
      headers: { ...headers, 'content-type': 'application/json' },
      signal: AbortSignal.any([this.#closing.signal, AbortSignal.timeout(timeout)])
    }
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#closing.signal }).catch(() => {})
  }
}

function encode(event: UsageEvent): Buffer {
  return Buffer.from(JSON.stringify(event))
}

/** The body is JSON already and goes in as it is. */
function withBody(event: UsageEvent, body: Buffer | undefined): Buffer {
  if (body === undefined) return encode(event)
  const open = JSON.stringify(event).slice(0, -1)
  return Buffer.concat([Buffer.from(`${open},"request_body":`), body, Buffer.from('}')])
}
