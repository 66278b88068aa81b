import { existsSync } from 'node:fs'
import type { FastifyBaseLogger } from 'fastify'
import { NewerFormatError, placeholders, type Row } from '../store/sql.ts'
import { Sqlite } from '../store/sqlite.ts'
import type { Spending } from './counter.ts'
import { ADDRESS, MAX_ADDRESSES } from './store.ts'

/** Maximum time (ms) that the usage of running streams stays in memory alone. */
const WRITE_INTERVAL = 1_000
/** Maximum time (ms) that responses wait for a disk. */
const STATEMENT_TIMEOUT = 5_000
const BATCH = 200
const ANEW = 'all quotas start anew'
/** How long (ms) an account without usage is kept. */
const KEPT = 62 * 24 * 60 * 60 * 1000

const TABLES = `
  CREATE TABLE IF NOT EXISTS quotas (
    account TEXT NOT NULL PRIMARY KEY, period_start INTEGER NOT NULL, period_end INTEGER,
    tokens REAL NOT NULL, cost REAL NOT NULL
  ) WITHOUT ROWID;
  ALTER TABLE quotas ADD COLUMN before TEXT;
`
const SCHEMA = {
  scripts: [TABLES],
  table: 'quotas',
  probe: 'SELECT account, period_start, period_end, tokens, cost, before FROM quotas'
}
/** The clock may be ahead now, or was when something was spent: rows are old if both agree. */
const DELETE_OLD =
  'DELETE FROM quotas WHERE period_end <= min(?, (SELECT max(period_start) FROM quotas)) - ?'
/** Client addresses beyond the maximum. */
const DELETE_SURPLUS = `DELETE FROM quotas WHERE account IN (
  SELECT account FROM quotas WHERE account GLOB ? ORDER BY period_start DESC LIMIT -1 OFFSET ${MAX_ADDRESSES}
)`

/**
 * Usage of quotas, in a file. The file and its writer thread exist only if a quota is configured.
 */
export class Quotas {
  /** Spending of accounts that have no counter at the moment. */
  readonly #idle: Map<string, Spending>
  /** Spending of accounts that have a counter. */
  counted: () => Iterable<[account: string, spending: Spending]> = () => []
  readonly #db: Sqlite
  readonly #log: FastifyBaseLogger
  /** Accounts whose rows are to be written, or deleted (undefined). */
  readonly #changed = new Map<string, Spending | undefined>()
  readonly #timer: NodeJS.Timeout
  #writing = Promise.resolve()
  #next: Promise<void> | undefined
  /** The last attempt to write has failed. */
  #isBroken = false

  /**
   * A file that cannot be read does not keep the gateway from its start: one that is damaged or of another program is
   * moved aside, one that is locked is left as it is.
   *
   * @param timeout how long (ms) a statement may take
   * @throws {NewerFormatError} when a newer version has written the file
   */
  static async open(
    file: string,
    log: FastifyBaseLogger,
    now = Date.now(),
    timeout = STATEMENT_TIMEOUT
  ): Promise<Quotas> {
    // A statement that waits for a lock fails before its thread is given up.
    let quotas: Quotas | undefined
    const db = new Sqlite(file, timeout, {
      busyTimeout: timeout / 2,
      schema: SCHEMA,
      onLoss(loss) {
        const kept =
          quotas === undefined ? ANEW : 'what the gateway knows of quotas is written again'
        log.error({ file, ...loss }, `the file of quotas is of no use or gone: ${kept}`)
        quotas?.noteAll()
      }
    })
    let spent: [string, Spending][] = []
    try {
      if (existsSync(file)) spent = await readSpent(db, file, log, now)
    } catch (error) {
      if (error instanceof NewerFormatError) {
        await db.close()
        throw error
      }
      const { message: reason } = error as Error
      log.error({ file, reason }, `quotas cannot be read: ${ANEW}`)
    }
    quotas = new Quotas(db, new Map(spent), log)
    return quotas
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

  /** The usage of the account does not matter any more. */
  forget(account: string): void {
    // While nothing can be written there may be any number of them.
    if (this.#isBroken) this.#changed.delete(account)
    else this.#changed.set(account, undefined)
  }

  note(account: string, spending: Spending): void {
    this.#changed.set(account, spending)
  }

  /** The file is empty: it lacks also what has not changed. */
  noteAll(): void {
    for (const all of [this.#idle, this.counted()]) {
      for (const [account, spending] of all) this.#changed.set(account, spending)
    }
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

async function readSpent(
  db: Sqlite,
  file: string,
  log: FastifyBaseLogger,
  now: number
): Promise<[string, Spending][]> {
  await db.check()
  try {
    await db.run(DELETE_OLD, [now, KEPT])
    await db.run(DELETE_SURPLUS, [`per_key:${ADDRESS}*`])
  } catch (error) {
    // A file that another process is writing can be read nevertheless.
    log.warn({ file, reason: (error as Error).message }, 'old quotas cannot be deleted')
  }
  const rows = await db.run('SELECT * FROM quotas', [])
  return rows.map(row => [String(row.account), toSpending(row)])
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
