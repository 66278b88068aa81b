import { resolve } from 'node:path'
import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import { type DatabaseError, NewerFormatError } from '../store/sql.ts'
import type { Sqlite } from '../store/sqlite.ts'
import type { UsageRecord } from './record.ts'
import { type Receiver, recordJson, type Verdict, whileRunning } from './reporter.ts'
import { forgetBefore, keepRecords, openUsageStore } from './usage-store.ts'

export const BuiltinOptions = Type.Object(
  {
    retention_days: Type.Integer({
      minimum: 0,
      default: 90,
      description: 'How many days records and sums stay, in UTC; 0: for ever'
    })
  },
  { additionalProperties: false, description: 'The embedded store, usage-builtin.db' }
)
export type BuiltinOptions = Static<typeof BuiltinOptions>

const FORGET_INTERVAL = 60 * 60 * 1000

/** The file of the embedded store. */
export function builtinFile(dataDir: string | undefined): string {
  return dataDir === undefined ? ':memory:' : resolve(dataDir, 'usage-builtin.db')
}

/** Opens the embedded store. An empty file replaces one that is unusable. */
export function openBuiltin(file: string, log: FastifyBaseLogger): Sqlite {
  return openUsageStore(file, undefined, loss => {
    log.error({ file, ...loss }, 'the embedded usage store is of no use or gone: sums start anew')
  })
}

/** Keeps usage records in the embedded store, and their sums. */
export class Builtin implements Receiver {
  readonly concurrency = 2
  readonly wantsBody = false
  readonly batch = { max_events: 500, max_wait: 100 }
  readonly #file: string
  readonly #db: Sqlite
  readonly #days: number
  readonly #log: FastifyBaseLogger
  readonly #forgetting: NodeJS.Timeout
  #isClosed = false

  constructor(file: string, { retention_days }: BuiltinOptions, log: FastifyBaseLogger) {
    this.#file = file
    this.#db = openBuiltin(file, log)
    this.#days = retention_days
    this.#log = log
    this.#forgetting = setInterval(() => void this.#forget(), FORGET_INTERVAL).unref()
  }

  async open(): Promise<void> {
    try {
      await this.#db.run('SELECT 1', [])
      void this.#forget()
    } catch (error) {
      if (error instanceof NewerFormatError) throw error
      const { message: reason } = error as Error
      this.#log.error({ file: this.#file, reason }, 'the embedded usage store cannot be read')
    }
  }

  send(entries: readonly string[], signal: AbortSignal): Promise<Verdict> {
    const records = entries.map(each => JSON.parse(recordJson(each, false)) as UsageRecord)
    return whileRunning(signal, async () => {
      try {
        await keepRecords(this.#db, records)
        return { kind: 'delivered' }
      } catch (error) {
        const { kind = 'unavailable', message } = error as DatabaseError
        return { kind, reason: message, retryAfter: 0 }
      }
    })
  }

  async close(): Promise<void> {
    this.#isClosed = true
    clearInterval(this.#forgetting)
    await this.#db.close()
  }

  async #forget(): Promise<void> {
    if (this.#days === 0) return
    try {
      await forgetBefore(this.#db, Date.now(), this.#days)
    } catch (error) {
      if (this.#isClosed) return
      this.#log.error({ reason: (error as Error).message }, 'old usage records cannot be deleted')
    }
  }
}
