import { resolve } from 'node:path'
import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import type { DatabaseError } from '../store/sql.ts'
import { Sqlite } from '../store/sqlite.ts'
import type { UsageRecord } from './record.ts'
import { type Receiver, recordJson, type Verdict, whileRunning } from './reporter.ts'
import { forgetBefore, keepRecords, prepareStore } from './usage-store.ts'

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

const STATEMENT_TIMEOUT = 10_000
const FORGET_INTERVAL = 60 * 60 * 1000

/** The file of the embedded store. */
export function builtinFile(dataDir: string | undefined): string {
  return dataDir === undefined ? ':memory:' : resolve(dataDir, 'usage-builtin.db')
}

/** Keeps usage records in the embedded store, and their sums. */
export class Builtin implements Receiver {
  readonly concurrency = 2
  readonly wantsBody = false
  readonly batch = { max_events: 500, max_wait: 100 }
  readonly #db: Sqlite
  readonly #days: number
  readonly #log: FastifyBaseLogger
  #prepared: Promise<void> | undefined
  readonly #forgetting: NodeJS.Timeout
  #isClosed = false

  constructor(file: string, { retention_days }: BuiltinOptions, log: FastifyBaseLogger) {
    this.#db = new Sqlite(file, STATEMENT_TIMEOUT)
    this.#days = retention_days
    this.#log = log
    this.#forgetting = setInterval(() => void this.#forget(), FORGET_INTERVAL).unref()
    void this.#forget()
  }

  send(entries: readonly string[], signal: AbortSignal): Promise<Verdict> {
    const records = entries.map(each => JSON.parse(recordJson(each, false)) as UsageRecord)
    return whileRunning(signal, async () => {
      try {
        await this.#prepare()
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

  async #prepare(): Promise<void> {
    this.#prepared ??= prepareStore(this.#db)
    try {
      await this.#prepared
    } catch (error) {
      this.#prepared = undefined
      throw error
    }
  }

  async #forget(): Promise<void> {
    if (this.#days === 0) return
    try {
      await this.#prepare()
      await forgetBefore(this.#db, Date.now(), this.#days)
    } catch (error) {
      if (this.#isClosed) return
      this.#log.error({ reason: (error as Error).message }, 'old usage records cannot be deleted')
    }
  }
}
