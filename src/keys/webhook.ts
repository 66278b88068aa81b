import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import { request } from 'undici'
import { GatewayError } from '../errors.ts'
import { Duration, HeadersToSend, Url } from '../options.ts'
import {
  type KeyRecord,
  type KeySource,
  parseStatus,
  parseTime,
  type StatusCodes,
  statusRefusal,
  toNetworks
} from './key.ts'

export const WebhookKeysOptions = Type.Object(
  {
    url: Url('Asked for each request'),
    method: Type.Enum(['POST', 'PUT'], { default: 'POST', description: 'Method' }),
    timeout: Duration('5s', 'How long the answer may take'),
    headers: HeadersToSend
  },
  { additionalProperties: false, description: 'A service that knows the keys' }
)
export type WebhookKeysOptions = Static<typeof WebhookKeysOptions>

const MAX_ANSWER = 64 * 1024

/** An answer that decides nothing; `code` says why, and holds nothing of it. */
class WebhookError extends Error {
  readonly code: string

  constructor(why: string) {
    super(`the auth webhook's answer is of no use: ${why}`)
    this.code = why
  }
}

/**
 * Asks a service about a key: `{"api_key": "...", "timestamp": 1767225600}`. It answers 2xx with a
 * JSON object (`status`, `user_id`, `name`, `starts_at`, `expires_at`, `allowed_ips`, `denied_ips`,
 * `models`, `total_quota` and `used_quota`, `balance`; all may be missing, an empty list counts as
 * missing), or refuses: 401 and 404 unknown, 403 disabled, 402 and 429 quota used up. A `code` other
 * than 0 or 200 refuses too.
 */
export class WebhookKeys implements KeySource {
  readonly name: string
  readonly #options: WebhookKeysOptions
  readonly #codes: StatusCodes
  readonly #log: FastifyBaseLogger

  constructor(
    name: string,
    options: WebhookKeysOptions,
    codes: StatusCodes,
    log: FastifyBaseLogger
  ) {
    this.name = name
    this.#options = options
    this.#codes = codes
    this.#log = log
  }

  async lookup(key: string, hash: string): Promise<KeyRecord | GatewayError | undefined> {
    const { statusCode, body } = await request(this.#options.url, {
      method: this.#options.method,
      headers: { ...this.#options.headers, 'content-type': 'application/json' },
      body: JSON.stringify({ api_key: key, timestamp: Math.floor(Date.now() / 1000) }),
      headersTimeout: this.#options.timeout,
      bodyTimeout: this.#options.timeout,
      signal: AbortSignal.timeout(this.#options.timeout)
    })
    if (statusCode < 200 || statusCode > 299) {
      await body.dump()
      return this.#refusal(statusCode)
    }
    const data = parseJson(await readText(body))
    if (typeof data !== 'object' || data === null || Array.isArray(data)) {
      throw new WebhookError('no JSON object')
    }
    const record = toRecord(data as Record<string, unknown>, hash)
    for (const member of ['startsAt', 'expiresAt'] as const) {
      if (record instanceof GatewayError || !Number.isNaN(record[member])) continue
      // Not what it was: that may be anything. The id is the service's own, or begins the key's hash.
      this.#log.warn(
        { source: this.name, keyId: record.id, member },
        'a time of a key is unreadable'
      )
      return refused(undefined)
    }
    return record
  }

  #refusal(statusCode: number): GatewayError | undefined {
    switch (statusCode) {
      case 401:
      case 404:
        return undefined
      case 403:
        return statusRefusal('disabled', this.#codes) ?? refused(undefined)
      case 402:
      case 429:
        return statusRefusal('quota_exceeded', this.#codes) ?? refused(undefined)
      default:
        throw new WebhookError(`status ${statusCode}`)
    }
  }
}

function toRecord(data: Record<string, unknown>, hash: string): KeyRecord | GatewayError {
  const status = data.status === undefined ? 'active' : parseStatus(data.status)
  const accepted = data.code === undefined || data.code === 0 || data.code === 200
  if (!accepted || status === undefined) return refused(data.message)
  const id = text(data.api_key_id) ?? text(data.id) ?? `key_${hash.slice(0, 12)}`
  return {
    id,
    name: text(data.name),
    userId: text(data.user_id),
    status,
    startsAt: optional(data.starts_at, parseTime),
    expiresAt: optional(data.expires_at, parseTime),
    allowedIps: toNetworks(texts(data.allowed_ips)),
    deniedIps: toNetworks(texts(data.denied_ips)),
    models: texts(data.models),
    quotaLeft: quotaLeft(data)
  }
}

function quotaLeft({ total_quota, used_quota, balance }: Record<string, unknown>) {
  const total = Number(total_quota ?? 0)
  const left = total > 0 ? total - Number(used_quota ?? 0) : undefined
  if (balance === undefined || balance === null) return left
  return Math.min(Number(balance), left ?? Number.POSITIVE_INFINITY)
}

function refused(message: unknown): GatewayError {
  return new GatewayError('key_refused', text(message) ?? 'This API key may not be used.')
}

async function readText(body: AsyncIterable<Buffer>): Promise<string> {
  const chunks: Buffer[] = []
  let size = 0
  for await (const chunk of body) {
    size += chunk.length
    if (size > MAX_ANSWER) throw new WebhookError('more than 64 KB')
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString()
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

function optional<T>(value: unknown, parse: (value: unknown) => T): T | undefined {
  return value === undefined || value === null || value === '' ? undefined : parse(value)
}

function text(value: unknown): string | undefined {
  if (typeof value === 'number') return String(value)
  return typeof value === 'string' && value !== '' ? value : undefined
}

/**
 * A list of texts, or one alone; an empty list says nothing. An item that is no text stays as one that
 * matches nothing, so that a list of such items is not taken for an empty one.
 */
function texts(value: unknown): string[] | undefined {
  const items = optional(value, given => (Array.isArray(given) ? given : [given])) ?? []
  return items.length === 0 ? undefined : items.map(item => text(item) ?? '')
}
