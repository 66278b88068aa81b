import { existsSync } from 'node:fs'
import type { FastifyBaseLogger } from 'fastify'
import { placeholders } from '../store/sql.ts'
import { Sqlite } from '../store/sqlite.ts'
import type { Spending } from './counter.ts'

/** How long (ms) what was spent may stay in memory alone. */
const WRITE_INTERVAL = 1_000
const STATEMENT_TIMEOUT = 10_000
const BATCH = 200
/** How long (ms) an account that spends nothing any more is known. */
const KEPT = 62 * 24 * 60 * 60 * 1000

const SCHEMA = `
  CREATE TABLE IF NOT EXISTS quotas (
    account TEXT NOT NULL PRIMARY KEY, period_start INTEGER NOT NULL, period_end INTEGER,
    tokens REAL NOT NULL, cost REAL NOT NULL
  ) WITHOUT ROWID
`

/**
 * What was spent of quotas, in a file, so that a restart does not forget it. Who has no quotas has neither the
 * file nor the thread that writes it.
 */
export class Quotas {
  /** What each account has spent, as far as it was noted. */
  readonly known: Map<string, Spending>
  readonly #db: Sqlite
  readonly #log: FastifyBaseLogger
  readonly #changed = new Map<string, Spending>()
  readonly #timer: NodeJS.Timeout
  #isPrepared = false
  #writing: Promise<void> | undefined

  /** @throws {DatabaseError} */
  static async open(file: string, log: FastifyBaseLogger): Promise<Quotas> {
    const db = new Sqlite(file, STATEMENT_TIMEOUT)
    if (!existsSync(file)) return new Quotas(db, new Map(), log)
    await db.run(SCHEMA)
    await db.run('DELETE FROM quotas WHERE period_end <= ?', [Date.now() - KEPT])
    const known = new Map<string, Spending>()
    for (const row of await db.run('SELECT * FROM quotas', [])) {
      const { account, period_start, period_end, tokens, cost } = row as Record<string, number>
      const end = period_end ?? Number.POSITIVE_INFINITY
      known.set(String(account), { start: period_start!, end, tokens: tokens!, cost: cost! })
    }
    return new Quotas(db, known, log)
  }

  private constructor(db: Sqlite, known: Map<string, Spending>, log: FastifyBaseLogger) {
    this.#db = db
    this.known = known
    this.#log = log
    this.#timer = setInterval(() => void this.#write(), WRITE_INTERVAL).unref()
  }

  note(account: string, spending: Spending): void {
    this.known.set(account, spending)
    this.#changed.set(account, spending)
  }

  async close(): Promise<void> {
    clearInterval(this.#timer)
    await this.#writing
    await this.#write()
    await this.#db.close()
  }

  async #write(): Promise<void> {
    if (this.#writing !== undefined || this.#changed.size === 0) return
    this.#writing = this.#writeChanged().finally(() => {
      this.#writing = undefined
    })
    await this.#writing
  }

  async #writeChanged(): Promise<void> {
    while (this.#changed.size > 0) {
      const some = [...this.#changed].slice(0, BATCH)
      for (const [account] of some) this.#changed.delete(account)
      try {
        if (!this.#isPrepared) await this.#db.run(SCHEMA)
        this.#isPrepared = true
        await this.#db.run(
          `INSERT OR REPLACE INTO quotas VALUES ${placeholders('sqlite', some.length, 5)}`,
          some.flatMap(([account, { start, end, tokens, cost }]) => [
            account,
            start,
            Number.isFinite(end) ? end : null,
            tokens,
            cost
          ])
        )
      } catch (error) {
        for (const [account, spending] of some) {
          if (!this.#changed.has(account)) this.#changed.set(account, spending)
        }
        this.#log.error({ reason: (error as Error).message }, 'quotas cannot be written down')
        return
      }
    }
  }
}
