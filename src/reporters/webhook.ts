import crypto from 'node:crypto'
import { type Static, Type } from 'typebox'
import { type Dispatcher, Pool } from 'undici'
import { parseRetryAfter } from '../http.ts'
import { Duration, HeadersToSend, Url } from '../options.ts'
import { type Receiver, recordJson, type Verdict } from './reporter.ts'

const SECRET = /^(whsec_)?[A-Za-z0-9+/_-]+={0,2}$/

export const WebhookOptions = Type.Object(
  {
    url: Url('Receives each record', { secretPath: true }),
    method: Type.Enum(['POST', 'PUT'], { default: 'POST', description: 'Method' }),
    timeout: Duration('3s', 'How long one delivery may take'),
    retry: Type.Optional(
      Type.Integer({
        minimum: 0,
        description: 'Of no effect: a record is delivered again until it is max_age old'
      })
    ),
    headers: HeadersToSend,
    secret: Type.Optional(
      Type.String({
        pattern: SECRET.source,
        secret: true,
        expects: 'a key in Base64, with or without whsec_ before it',
        description: 'Signs deliveries as Standard Webhooks has it: a key in Base64'
      })
    ),
    concurrency: Type.Integer({
      minimum: 1,
      maximum: 64,
      default: 8,
      description: 'Deliveries at a time; only with 1 they come in order'
    }),
    batch: Type.Object(
      {
        max_events: Type.Integer({
          minimum: 1,
          maximum: 1000,
          default: 1,
          description: 'Records in one delivery; above 1 the body is a JSON array'
        }),
        max_wait: Duration('1s', 'How long a record waits for others')
      },
      { additionalProperties: false, default: {}, description: 'Several records in one delivery' }
    ),
    include_request_body: Type.Boolean({
      default: false,
      description: 'Sends the request body too, with all prompts, if it is not larger than 256 KB'
    })
  },
  { additionalProperties: false, description: 'A service that receives usage records' }
)
export type WebhookOptions = Static<typeof WebhookOptions>

/** These say something about the moment, not about the record: it will be taken another time. */
const TEMPORARY = new Set([401, 403, 404, 408, 409, 423, 425, 429])

/** Sends usage records to a service, each by itself or several together. */
export class Webhook implements Receiver {
  readonly concurrency: number
  readonly batch: WebhookOptions['batch']
  readonly wantsBody: boolean
  readonly #options: WebhookOptions
  readonly #sockets: Pool
  readonly #target: Dispatcher.DispatchOptions
  readonly #key: Buffer | undefined

  constructor(options: WebhookOptions) {
    this.#options = options
    this.concurrency = options.concurrency
    this.batch = options.batch
    this.wantsBody = options.include_request_body
    this.#key = toKey(options.secret)
    const { origin, pathname, search } = new URL(options.url)
    this.#sockets = new Pool(origin, { connections: options.concurrency, allowH2: false })
    this.#target = {
      path: pathname + search,
      method: options.method,
      headersTimeout: 0,
      bodyTimeout: 0
    }
  }

  async send(entries: readonly string[], signal: AbortSignal): Promise<Verdict> {
    const records = entries.map(each => recordJson(each, this.wantsBody))
    const body = this.batch.max_events === 1 ? records[0]! : `[${records.join()}]`
    try {
      const { statusCode, retryAfter } = await this.#post(body, idOf(records), signal)
      if (statusCode >= 200 && statusCode <= 299) return { kind: 'delivered' }
      const isTemporary = statusCode >= 500 || statusCode < 400 || TEMPORARY.has(statusCode)
      const kind = isTemporary ? 'unavailable' : 'refused'
      return { kind, reason: `status ${statusCode}`, retryAfter }
    } catch (error) {
      const { code, name } = error as { code?: string; name: string }
      return { kind: 'unavailable', reason: code ?? name, retryAfter: 0 }
    }
  }

  async close(): Promise<void> {
    await this.#sockets.destroy()
  }

  #headers(body: string, id: string): Record<string, string> {
    const headers = { ...this.#options.headers, 'content-type': 'application/json' }
    if (this.#key === undefined) return headers
    const timestamp = String(Math.floor(Date.now() / 1000))
    const signed = crypto.createHmac('sha256', this.#key).update(`${id}.${timestamp}.${body}`)
    return {
      ...headers,
      'webhook-id': id,
      'webhook-timestamp': timestamp,
      'webhook-signature': `v1,${signed.digest('base64')}`
    }
  }

  /** One delivery: its status, and how long (ms) the receiver asks to be left alone. */
  #post(
    body: string,
    id: string,
    signal: AbortSignal
  ): Promise<{ statusCode: number; retryAfter: number }> {
    return new Promise((resolve, reject) => {
      const response = { statusCode: 0, retryAfter: 0 }
      let controller: Dispatcher.DispatchController | undefined
      let given: Error | undefined
      const giveUp = (code: string) => {
        given = Object.assign(new Error('given up'), { code })
        controller?.abort(given)
        settle()
        reject(given)
      }
      const timer = setTimeout(() => giveUp('TIMEOUT'), this.#options.timeout)
      const stop = () => giveUp('STOPPED')
      signal.addEventListener('abort', stop, { once: true })
      const settle = () => {
        clearTimeout(timer)
        signal.removeEventListener('abort', stop)
      }
      this.#sockets.dispatch(
        { ...this.#target, headers: this.#headers(body, id), body },
        {
          onRequestStart(started) {
            controller = started
            if (given !== undefined) started.abort(given)
          },
          onResponseStart(_controller, statusCode, headers) {
            response.statusCode = statusCode
            response.retryAfter = parseRetryAfter(headers['retry-after'])
          },
          onResponseData() {},
          onResponseEnd() {
            settle()
            resolve(response)
          },
          onResponseError(_controller, error) {
            settle()
            reject(error)
          }
        }
      )
    })
  }
}

function toKey(secret: string | undefined): Buffer | undefined {
  return secret === undefined ? undefined : Buffer.from(secret.replace(/^whsec_/, ''), 'base64')
}

/** The idempotency key of a delivery: a record's own; of several, one that no other set of records has. */
function idOf(records: readonly string[]): string {
  const ids = records.map(each => /"id":"([^"]+)"/.exec(each)?.[1] ?? '')
  return ids.length === 1 ? ids[0]! : `batch_${crypto.hash('sha256', ids.join())}`
}
