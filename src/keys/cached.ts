import type { FastifyBaseLogger } from 'fastify'
import type { Static } from 'typebox'
import type { GatewayError } from '../errors.ts'
import { Duration, LONGEST_AGE, Section } from '../options.ts'
import { type KeyRecord, type KeySource, reasonFor } from './key.ts'
import { Lru } from './lru.ts'

export const CacheOptions = Section(
  {
    ttl: Duration('10s', 'How long an answer is used without asking again', 0, LONGEST_AGE),
    negative_ttl: Duration('2s', 'The same for a key that is unknown or refused', 0, LONGEST_AGE),
    stale_if_error: Duration(
      '5m',
      'How old an answer may be that is used while its source is down; 0: none is',
      0,
      LONGEST_AGE
    )
  },
  'How long answers of redis, database, webhook and jwt are used'
)
export type CacheOptions = Static<typeof CacheOptions>

type Answer = KeyRecord | GatewayError
/** Keys that are remembered, and as many that are unknown. */
const MOST = 10_000

interface Remembered {
  answer: Answer
  /** Monotonic (ms). */
  at: number
}

/**
 * Remembers what a source says of each key, by the key's hash. However many ask about a key at the same
 * time, the source is asked once. While it is down, an answer that is not too old is used at once, and the
 * source is asked behind it.
 */
export class CachedKeys implements KeySource {
  readonly name: string
  readonly #source: KeySource
  readonly #options: CacheOptions
  readonly #log: FastifyBaseLogger
  readonly #known = new Lru<string, Remembered>(MOST)
  /** When it was said that nobody knows them. */
  readonly #unknown = new Lru<string, number>(MOST)
  readonly #asking = new Map<string, Promise<Answer | undefined>>()
  #isDown = false

  constructor(source: KeySource, options: CacheOptions, log: FastifyBaseLogger) {
    this.name = source.name
    this.#source = source
    this.#options = options
    this.#log = log
  }

  async lookup(key: string, hash: string): Promise<Answer | undefined> {
    const { ttl, negative_ttl, stale_if_error } = this.#options
    const now = performance.now()
    const unknownAt = this.#unknown.get(hash)
    if (unknownAt !== undefined && now - unknownAt < negative_ttl) return undefined
    const found = this.#known.get(hash)
    const age = found === undefined ? Number.POSITIVE_INFINITY : now - found.at
    if (age < (found?.answer instanceof Error ? negative_ttl : ttl)) return found!.answer
    const asked = this.#ask(key, hash)
    if (age >= stale_if_error) return asked
    if (!this.#isDown) return asked.catch(() => found!.answer)
    asked.catch(() => {})
    return found!.answer
  }

  forget(hash?: string): void {
    for (const each of [this.#known, this.#unknown, this.#asking]) {
      if (hash === undefined) each.clear()
      else each.delete(hash)
    }
  }

  async close(): Promise<void> {
    await this.#source.close?.()
  }

  #ask(key: string, hash: string): Promise<Answer | undefined> {
    const running = this.#asking.get(hash)
    if (running !== undefined) return running
    const asked = this.#source.lookup(key, hash).then(
      answer => {
        if (this.#isDown) this.#log.info({ source: this.name }, 'a key source is back')
        this.#isDown = false
        // What was asked for before it was forgotten may be old.
        if (this.#asking.get(hash) === asked) this.#remember(hash, answer)
        return answer
      },
      error => {
        if (!this.#isDown) {
          const reason = reasonFor(error, key)
          this.#log.warn({ source: this.name, reason }, 'what is known of keys is used for now')
        }
        this.#isDown = true
        if (this.#asking.get(hash) === asked) this.#asking.delete(hash)
        throw error
      }
    )
    this.#asking.set(hash, asked)
    return asked
  }

  #remember(hash: string, answer: Answer | undefined): void {
    this.#asking.delete(hash)
    const at = performance.now()
    if (answer === undefined) {
      this.#known.delete(hash)
      this.#unknown.set(hash, at)
    } else {
      this.#unknown.delete(hash)
      this.#known.set(hash, { answer, at })
    }
  }
}
