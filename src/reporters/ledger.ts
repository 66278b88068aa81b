import type { DatabaseSync, StatementSync } from 'node:sqlite'
import { newerFormat } from '../store/sql.ts'
import { openSqliteFile, refuseForeign } from '../store/sqlite-file.ts'

/**
 * Where usage records stay until every reporter has them: a SQLite file that one thread owns.
 *
 * Records are written a page at a time, all that have come together: a page is one row and one commit.
 * Where a reporter has got to is one number, its mark. So a record costs a fraction of an insert, and
 * a delivery costs nothing.
 */

/** Records that were committed together; `seq` grows with every page. */
export interface Page {
  seq: number
  /** When it was committed (Unix ms). */
  at: number
  entries: string[]
}

/** A record that its receiver did not take, while it takes others. */
export interface Deferred {
  rowid: number
  /** When it was committed (Unix ms). */
  at: number
  entry: string
}

/** A record that was given up. */
export interface DeadLetter {
  id: number
  reporter: string
  /** When that was (Unix ms), and what its receiver had said last. */
  at: number
  reason: string
  entry: string
}

/** Stands between the entries of a page; JSON has no raw control characters. */
const SEPARATOR = '\x1e'
const SCHEMA_VERSION = 1

const SCHEMA = `
  CREATE TABLE pages (seq INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, entries TEXT NOT NULL);
  CREATE TABLE marks (reporter TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
  CREATE TABLE deferred (reporter TEXT NOT NULL, at INTEGER NOT NULL, entry TEXT NOT NULL);
  CREATE INDEX deferred_by_reporter ON deferred (reporter);
  CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY, reporter TEXT NOT NULL, at INTEGER NOT NULL, reason TEXT NOT NULL, entry TEXT NOT NULL
  );
`

/** Rows that go in one step when it is time or when there is no room: records wait no longer than that. */
const AT_ONCE = 100

/** Of the oldest pages, so that it never reads the whole file. */
const PRUNE = `DELETE FROM pages WHERE at < ?2 AND seq IN (
  SELECT seq FROM pages WHERE seq <= ?1 ORDER BY seq LIMIT ${AT_ONCE}
)`

/** What one step of pruning did. */
export interface Pruned {
  /** Rows that went; 0: there is nothing left to do. */
  gone: number
  /** Records in them that somebody still waited for. */
  lost: number
}

/**
 * @example
 * const ledger = new Ledger(':memory:')
 * ledger.append(['{"id":"a"}', '{"id":"b"}'], 1767225600000)
 * ledger.next(0) // { seq: 1, at: 1767225600000, entries: ['{"id":"a"}', '{"id":"b"}'] }
 */
export class Ledger {
  readonly #db: DatabaseSync
  readonly #append: StatementSync
  readonly #next: StatementSync
  readonly #mark: StatementSync

  /** @throws when the file cannot be opened, is no ledger, or is of a newer version */
  constructor(file: string) {
    this.#db = openSqliteFile(file)
    refuseForeign(this.#db, 'pages')
    const { user_version } = this.#db.prepare('PRAGMA user_version').get() as {
      user_version: number
    }
    if (user_version > SCHEMA_VERSION) {
      throw newerFormat(file, user_version, SCHEMA_VERSION)
    }
    if (user_version === 0) {
      this.#db.exec(`BEGIN; ${SCHEMA} PRAGMA user_version = ${SCHEMA_VERSION}; COMMIT`)
    }
    this.#append = this.#db.prepare('INSERT INTO pages (at, entries) VALUES (?, ?)')
    this.#next = this.#db.prepare(
      'SELECT seq, at, entries FROM pages WHERE seq > ? ORDER BY seq LIMIT 1'
    )
    this.#mark = this.#db.prepare(
      'INSERT INTO marks (reporter, seq) VALUES (?, ?) ON CONFLICT (reporter) DO UPDATE SET seq = excluded.seq'
    )
  }

  /** Commits a page and returns its number. */
  append(entries: readonly string[], now = Date.now()): number {
    return Number(this.#append.run(now, entries.join(SEPARATOR)).lastInsertRowid)
  }

  /** The first page after this one. */
  next(seq: number): Page | undefined {
    const row = this.#next.get(seq) as { seq: number; at: number; entries: string } | undefined
    return row && { ...row, entries: row.entries.split(SEPARATOR) }
  }

  /** The last page that this reporter has had all of, with all before it; a new one begins with what comes. */
  markOf(reporter: string): number {
    const row = this.#db.prepare('SELECT seq FROM marks WHERE reporter = ?').get(reporter)
    if (row !== undefined) return Number(row.seq)
    const { seq } = this.#db.prepare('SELECT coalesce(max(seq), 0) AS seq FROM pages').get()!
    this.mark(reporter, Number(seq))
    return Number(seq)
  }

  mark(reporter: string, seq: number): void {
    this.#mark.run(reporter, seq)
  }

  /** Puts a record aside that its receiver does not take, so that those behind it can go on. */
  defer(reporter: string, at: number, entry: string): void {
    this.#db
      .prepare('INSERT INTO deferred (reporter, at, entry) VALUES (?, ?, ?)')
      .run(reporter, at, entry)
  }

  /** The first ones behind this `rowid`. */
  deferred(reporter: string, after: number, limit: number): Deferred[] {
    return this.#db
      .prepare(
        'SELECT rowid, at, entry FROM deferred WHERE reporter = ? AND rowid > ? ORDER BY rowid LIMIT ?'
      )
      .all(reporter, after, limit) as unknown as Deferred[]
  }

  /** A deferred record has been taken at last. */
  settle(rowid: number): void {
    this.#db.prepare('DELETE FROM deferred WHERE rowid = ?').run(rowid)
  }

  /** Records that nobody took for as long as they may wait. */
  bury(reporter: string, reason: string, entries: readonly string[], now = Date.now()): void {
    const bury = this.#db.prepare(
      'INSERT INTO dead_letters (reporter, at, reason, entry) VALUES (?, ?, ?, ?)'
    )
    this.#together(() => {
      for (const entry of entries) bury.run(reporter, now, reason, entry)
    })
  }

  /**
   * Every record that is still here and was committed since then (Unix ms), oldest first. Page by page: a
   * statement that stays open keeps SQLite from emptying its log, which grows and grows.
   */
  *entries(since: number): Generator<string> {
    const first = this.#db.prepare('SELECT min(seq) AS seq FROM pages WHERE at >= ?').get(since)
    const { last } = this.#db.prepare('SELECT max(seq) AS last FROM pages').get()!
    if (first?.seq == null) return
    let page = this.next(Number(first.seq) - 1)
    for (; page !== undefined && page.seq <= Number(last); page = this.next(page.seq)) {
      if (page.at >= since) yield* page.entries
    }
  }

  deadLetters(): DeadLetter[] {
    const all = this.#db.prepare(
      'SELECT id, reporter, at, reason, entry FROM dead_letters ORDER BY id'
    )
    return all.all() as unknown as DeadLetter[]
  }

  /** Dead letters get another `max_age`, which begins now. */
  revive(ids: readonly number[], now = Date.now()): void {
    const revive = this.#db.prepare(
      'INSERT INTO deferred (reporter, at, entry) SELECT reporter, ?, entry FROM dead_letters WHERE id = ?'
    )
    this.#together(() => {
      for (const id of ids) revive.run(now, id)
      this.drop(ids)
    })
  }

  /** Deletes dead letters. */
  drop(ids: readonly number[]): void {
    const drop = this.#db.prepare('DELETE FROM dead_letters WHERE id = ?')
    for (const id of ids) drop.run(id)
  }

  /**
   * Makes some room, in one commit: pages that every one of these reporters has had go when they are older
   * than `before` (Unix ms). While all take more than `maxBytes` the oldest go: dead letters first, then
   * pages, whoever still waits for them, then what was put aside.
   */
  prune(reporters: readonly string[], before: number, maxBytes: number): Pruned {
    const had = Math.min(...reporters.map(each => this.markOf(each)))
    const { changes } = this.#db.prepare(PRUNE).run(had, before)
    if (changes > 0) return { gone: Number(changes), lost: 0 }
    if (this.#size() <= maxBytes) return { gone: 0, lost: 0 }
    const letters = this.#deleteOldest('dead_letters', 'id')
    if (letters > 0) return { gone: letters, lost: 0 }
    const pages = this.#together(() => this.#deletePages(had, maxBytes))
    if (pages.gone > 0) return pages
    const deferred = this.#deleteOldest('deferred', 'rowid')
    return { gone: deferred, lost: deferred }
  }

  close(): void {
    this.#db.close()
  }

  /** The oldest ones, until there is room again, but not too many at once. */
  #deletePages(had: number, maxBytes: number): Pruned {
    const pruned = { gone: 0, lost: 0 }
    for (; pruned.gone < AT_ONCE && this.#size() > maxBytes; pruned.gone++) {
      const oldest = this.next(0)
      if (oldest === undefined) break
      this.#db.prepare('DELETE FROM pages WHERE seq = ?').run(oldest.seq)
      if (oldest.seq > had) pruned.lost += oldest.entries.length
    }
    return pruned
  }

  /** All of it or nothing, in one commit. */
  #together<T>(work: () => T): T {
    this.#db.exec('BEGIN IMMEDIATE')
    try {
      const result = work()
      this.#db.exec('COMMIT')
      return result
    } catch (error) {
      if (this.#db.isTransaction) this.#db.exec('ROLLBACK')
      throw error
    }
  }

  #deleteOldest(table: string, key: string): number {
    const rows = `SELECT ${key} FROM ${table} ORDER BY ${key} LIMIT ${AT_ONCE}`
    const { changes } = this.#db.prepare(`DELETE FROM ${table} WHERE ${key} IN (${rows})`).run()
    return Number(changes)
  }

  /** Bytes that are in use. */
  #size(): number {
    const { bytes } = this.#db
      .prepare(
        'SELECT (page_count - freelist_count) * page_size AS bytes FROM pragma_page_count(), pragma_freelist_count(), pragma_page_size()'
      )
      .get()!
    return Number(bytes)
  }
}
