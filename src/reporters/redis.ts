import { type Static, Type } from 'typebox'
import type { Redis } from '../store/redis.ts'
import { storageName } from '../store/storage.ts'
import { batchOptions } from './options.ts'
import { type Receiver, recordJson, type Verdict, whileRunning } from './reporter.ts'

export const RedisReporterOptions = Type.Object(
  {
    storage: storageName('The Redis, as storage.caches names it'),
    stream: Type.String({ minLength: 1, default: 'llmproxy:usage', description: 'Stream' }),
    max_length: Type.Integer({
      minimum: 0,
      default: 1_000_000,
      description: 'Records that stay in it, about; 0: all'
    }),
    batch: batchOptions('one transaction')
  },
  { additionalProperties: false, description: 'A Redis stream that receives usage records' }
)
export type RedisReporterOptions = Static<typeof RedisReporterOptions>

/** Adds usage records to a Redis stream, in the order of the outbox. */
export class RedisReporter implements Receiver {
  readonly concurrency = 1
  readonly wantsBody = false
  readonly batch: RedisReporterOptions['batch']
  readonly #redis: Redis
  readonly #options: RedisReporterOptions

  constructor(redis: Redis, options: RedisReporterOptions) {
    this.#redis = redis
    this.#options = options
    this.batch = options.batch
  }

  send(entries: readonly string[], signal: AbortSignal): Promise<Verdict> {
    return whileRunning(signal, async () => {
      try {
        await this.#add(entries.map(each => recordJson(each, false)))
        return { kind: 'delivered' }
      } catch (error) {
        // Redis looks into no record: whatever it says is about itself or the stream.
        return { kind: 'unavailable', reason: (error as Error).message, retryAfter: 0 }
      }
    })
  }

  close(): Promise<void> {
    return this.#redis.close()
  }

  /** All of them or none, so that what is sent again was not there before, as far as Redis can tell. */
  async #add(records: readonly string[]): Promise<void> {
    const { stream, max_length } = this.#options
    const trim =
      max_length === 0
        ? {}
        : ({ TRIM: { strategy: 'MAXLEN', strategyModifier: '~', threshold: max_length } } as const)
    await this.#redis.run(async client => {
      const transaction = client.multi()
      for (const record of records) {
        const { id } = JSON.parse(record) as { id: string }
        transaction.xAdd(stream, '*', { id, record }, trim)
      }
      await transaction.exec()
    })
  }
}
