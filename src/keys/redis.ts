import { type Static, Type } from 'typebox'
import type { GatewayError } from '../errors.ts'
import type { Redis } from '../store/redis.ts'
import { storageName } from '../store/storage.ts'
import { type KeyAnswer, type OnUnreadable, toAnswer, toObject } from './answer.ts'
import type { KeyRecord, KeySource } from './key.ts'

const PATTERN = /\{api_key(_hash)?\}/

export const RedisKeysOptions = Type.Object(
  {
    storage: storageName('The Redis, as storage.caches names it'),
    key_pattern: Type.String({
      pattern: PATTERN.source,
      expects: 'a name with {api_key} or {api_key_hash} in it',
      default: 'llmproxy:key:{api_key}',
      description: 'Where a key stands; {api_key_hash} is its SHA-256 in hexadecimal digits'
    })
  },
  { additionalProperties: false, description: 'Keys in Redis' }
)
export type RedisKeysOptions = Static<typeof RedisKeysOptions>

/** Keys in Redis: each is a hash, or a text that holds a JSON object (see {@link toAnswer}). */
export class RedisKeys implements KeySource {
  readonly name: string
  readonly #redis: Redis
  readonly #pattern: string
  readonly #onUnreadable: OnUnreadable

  constructor(
    name: string,
    redis: Redis,
    { key_pattern }: RedisKeysOptions,
    onUnreadable: OnUnreadable
  ) {
    this.name = name
    this.#redis = redis
    this.#pattern = key_pattern
    this.#onUnreadable = onUnreadable
  }

  async lookup(key: string, hash: string): Promise<KeyRecord | GatewayError | undefined> {
    const at = this.#pattern.replace(PATTERN, (_, isHash) => (isHash ? hash : key))
    const data = await this.#redis.run(async client => {
      try {
        return await client.hGetAll(at)
      } catch (error) {
        if (!String(error).includes('WRONGTYPE')) throw error
      }
      return toObject(await client.get(at)) ?? { status: 'unreadable' }
    })
    const isThere = Object.keys(data).length > 0
    return isThere ? toAnswer(data as KeyAnswer, hash, this.#onUnreadable) : undefined
  }

  close(): Promise<void> {
    return this.#redis.close()
  }
}
