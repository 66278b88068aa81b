import type { DatabaseSync, StatementSync } from 'node:sqlite'
import { openSqliteFile } from '../store/sqlite-file.ts'

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

/** Of the oldest pages, so that it never reads the whole file. */
const PRUNE = `DELETE FROM pages WHERE at < ?2 AND seq IN (
  SELECT seq FROM pages WHERE seq <= ?1 ORDER BY seq LIMIT 1000
)`

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
    const { user_version } = this.#db.prepare('PRAGMA user_version').get() as {
      user_version: number
    }
    if (user_version > SCHEMA_VERSION) {
      throw new Error(`${file} was written by a newer version of LLMProxy`)
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

  deferred(reporter: string, limit: number): Deferred[] {
    return this.#db
      .prepare('SELECT rowid, at, entry FROM deferred WHERE reporter = ? ORDER BY rowid LIMIT ?')
      .all(reporter, limit) as unknown as Deferred[]
  }

  /** A deferred record has been taken at last. */
  settle(rowid: number): void {
    this.#db.prepare('DELETE FROM deferred WHERE rowid = ?').run(rowid)
  }

  /** A record that nobody took for as long as it may wait. */
  bury(reporter: string, reason: string, entry: string, now = Date.now()): void {
    this.#db
      .prepare('INSERT INTO dead_letters (reporter, at, reason, entry) VALUES (?, ?, ?, ?)')
      .run(reporter, now, reason, entry)
  }

  /**
   * Makes room: pages that every one of these reporters has had go when they are older than `before`
   * (Unix ms); and the oldest ones go, whoever still waits for them, while all take more than `maxBytes`.
   *
   * @returns how many records went that somebody still waited for
   */
  prune(reporters: readonly string[], before: number, maxBytes: number): number {
    const had = Math.min(...reporters.map(each => this.markOf(each)))
    this.#db.prepare(PRUNE).run(had, before)
    let lost = 0
    while (this.#size() > maxBytes) {
      const oldest = this.next(0)
      if (oldest === undefined) break
      this.#db.prepare('DELETE FROM pages WHERE seq = ?').run(oldest.seq)
      if (oldest.seq > had) lost += oldest.entries.length
    }
    return lost
  }

  close(): void {
    this.#db.close()
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
