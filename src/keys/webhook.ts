import { type Static, Type } from 'typebox'
import { request } from 'undici'
import type { GatewayError } from '../errors.ts'
import { Duration, HeadersToSend, Url } from '../options.ts'
import { type KeyAnswer, type OnUnreadable, parseJson, refused, toAnswer } from './answer.ts'
import { type KeyRecord, type KeySource, type StatusCodes, statusRefusal } from './key.ts'

export const WebhookKeysOptions = Type.Object(
  {
    url: Url('Asked about each key', { secretPath: true }),
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
 * JSON object (see {@link toAnswer}), or refuses: 401 and 404 unknown, 403 disabled, 402 and 429 quota used
 * up. A `code` other than 0 or 200 refuses too.
 */
export class WebhookKeys implements KeySource {
  readonly name: string
  readonly #options: WebhookKeysOptions
  readonly #codes: StatusCodes
  readonly #onUnreadable: OnUnreadable

  constructor(
    name: string,
    options: WebhookKeysOptions,
    codes: StatusCodes,
    onUnreadable: OnUnreadable
  ) {
    this.name = name
    this.#options = options
    this.#codes = codes
    this.#onUnreadable = onUnreadable
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
    const { code, message } = data as KeyAnswer
    if (code !== undefined && code !== 0 && code !== 200) return refused(message)
    return toAnswer(data as KeyAnswer, hash, this.#onUnreadable)
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
