import { existsSync } from 'node:fs'
import type { FastifyBaseLogger } from 'fastify'
import { placeholders, type Row } from '../store/sql.ts'
import { Sqlite } from '../store/sqlite.ts'
import type { Spending } from './counter.ts'
import { ADDRESS, MAX_ADDRESSES } from './store.ts'

/** Maximum time (ms) that the usage of running streams stays in memory alone. */
const WRITE_INTERVAL = 1_000
/** Maximum time (ms) that responses wait for a disk. */
const STATEMENT_TIMEOUT = 5_000
const BATCH = 200
/** How long (ms) an account without usage is kept. */
const KEPT = 62 * 24 * 60 * 60 * 1000

const SCHEMA = `
  CREATE TABLE IF NOT EXISTS quotas (
    account TEXT NOT NULL PRIMARY KEY, period_start INTEGER NOT NULL, period_end INTEGER,
    tokens REAL NOT NULL, cost REAL NOT NULL
  ) WITHOUT ROWID;
  ALTER TABLE quotas ADD COLUMN before TEXT;
`
/** The clock may be ahead now, or was when something was spent: rows are old if both agree. */
const DELETE_OLD =
  'DELETE FROM quotas WHERE period_end <= min(?, (SELECT max(period_start) FROM quotas)) - ?'
/** Client addresses beyond the maximum. */
const DELETE_SURPLUS = `DELETE FROM quotas WHERE account IN (
  SELECT account FROM quotas WHERE account GLOB ? ORDER BY period_start DESC LIMIT -1 OFFSET ${MAX_ADDRESSES}
)`

/**
 * What was spent of quotas, in a file. The file and its writer thread exist only if a quota is configured.
 */
export class Quotas {
  /** Spending of accounts that have no counter at the moment. */
  readonly #idle: Map<string, Spending>
  readonly #db: Sqlite
  readonly #log: FastifyBaseLogger
  /** Accounts whose rows are to be written, or deleted (undefined). */
  readonly #changed = new Map<string, Spending | undefined>()
  readonly #timer: NodeJS.Timeout
  #isPrepared = false
  #writing = Promise.resolve()
  #next: Promise<void> | undefined
  /** The last attempt to write has failed. */
  #isBroken = false

  /** @throws {DatabaseError} */
  static async open(file: string, log: FastifyBaseLogger, now = Date.now()): Promise<Quotas> {
    const db = new Sqlite(file, STATEMENT_TIMEOUT)
    if (!existsSync(file)) return new Quotas(db, new Map(), log)
    await db.upgrade([SCHEMA])
    await db.run(DELETE_OLD, [now, KEPT])
    await db.run(DELETE_SURPLUS, [`per_key:${ADDRESS}*`])
    const rows = await db.run('SELECT * FROM quotas', [])
    return new Quotas(db, new Map(rows.map(row => [String(row.account), toSpending(row)])), log)
  }

  private constructor(db: Sqlite, idle: Map<string, Spending>, log: FastifyBaseLogger) {
    this.#db = db
    this.#idle = idle
    this.#log = log
    this.#timer = setInterval(() => {
      if (this.#changed.size > 0) void this.#flush()
    }, WRITE_INTERVAL).unref()
  }

  /** Hands over what an account has spent to its counter. */
  take(account: string): Spending | undefined {
    const spending = this.#idle.get(account)
    this.#idle.delete(account)
    return spending
  }

  /** The account has no counter any more. */
  keep(account: string, spending: Spending): void {
    this.#idle.set(account, spending)
  }

  /** What the account has spent does not matter any more. */
  forget(account: string): void {
    // While nothing can be written there may be any number of them.
    if (this.#isBroken) this.#changed.delete(account)
    else this.#changed.set(account, undefined)
  }

  note(account: string, spending: Spending): void {
    this.#changed.set(account, spending)
  }

  /** Resolves when all that was noted is on the disk, or cannot be written at the moment. */
  written(): Promise<void> {
    return this.#isBroken ? Promise.resolve() : this.#flush()
  }

  async close(): Promise<void> {
    clearInterval(this.#timer)
    await this.#flush()
    await this.#db.close()
  }

  /** One write at a time; what is noted meanwhile goes together into the next one. */
  #flush(): Promise<void> {
    this.#next ??= this.#writing.then(() => {
      this.#next = undefined
      this.#writing = this.#write()
      return this.#writing
    })
    return this.#next
  }

  async #write(): Promise<void> {
    while (this.#changed.size > 0) {
      const some = this.#takeSome()
      try {
        await this.#writeSome(some)
        if (this.#isBroken) this.#log.info('quotas are written again')
        this.#isBroken = false
      } catch (error) {
        for (const [account, spending] of some) {
          if (!this.#changed.has(account)) this.#changed.set(account, spending)
        }
        const { message: reason } = error as Error
        if (!this.#isBroken) this.#log.error({ reason }, 'quotas cannot be written')
        this.#isBroken = true
        return
      }
    }
  }

  #takeSome(): [string, Spending | undefined][] {
    const some: [string, Spending | undefined][] = []
    for (const each of this.#changed) {
      this.#changed.delete(each[0])
      some.push(each)
      if (some.length === BATCH) break
    }
    return some
  }

  async #writeSome(some: readonly [string, Spending | undefined][]): Promise<void> {
    if (!this.#isPrepared) await this.#db.upgrade([SCHEMA])
    this.#isPrepared = true
    const rows = some.flatMap(([account, spending]) => (spending ? [toRow(account, spending)] : []))
    const gone = some.filter(([, spending]) => spending === undefined).map(([account]) => account)
    if (rows.length > 0) {
      const values = placeholders('sqlite', rows.length, 6)
      await this.#db.run(`INSERT OR REPLACE INTO quotas VALUES ${values}`, rows.flat())
    }
    if (gone.length > 0) {
      const isGone = 'account IN (SELECT value FROM json_each(?))'
      await this.#db.run(`DELETE FROM quotas WHERE ${isGone}`, [JSON.stringify(gone)])
    }
  }
}

function toRow(account: string, { start, end, tokens, cost, before }: Spending) {
  const json = before === undefined ? null : JSON.stringify(before)
  return [account, start, Number.isFinite(end) ? end : null, tokens, cost, json]
}

function toSpending({ period_start, period_end, tokens, cost, before }: Row): Spending {
  return {
    start: Number(period_start),
    end: period_end === null ? Number.POSITIVE_INFINITY : Number(period_end),
    tokens: Number(tokens),
    cost: Number(cost),
    ...(before === null ? {} : { before: JSON.parse(String(before)) })
  }
}
