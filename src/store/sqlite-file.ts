import { closeSync, existsSync, mkdirSync, openSync, renameSync } from 'node:fs'
import { dirname } from 'node:path'
import { DatabaseSync } from 'node:sqlite'

/**
 * Opens a SQLite file, and makes it if it is not there. What is committed is on the disk, whatever
 * happens to the machine then. It blocks: only threads of their own do this.
 *
 * @example
 * openSqliteFile(':memory:').prepare('SELECT 1 AS one').get().one // 1
 */
export function openSqliteFile(file: string, busyTimeout = 5_000): DatabaseSync {
  if (file !== ':memory:') makePrivate(file)
  const db = new DatabaseSync(file)
  try {
    db.exec(
      `PRAGMA busy_timeout = ${busyTimeout}; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL`
    )
  } catch (error) {
    db.close()
    throw error
  }
  return db
}

/** SQLITE_CORRUPT and SQLITE_NOTADB. */
const DAMAGED = new Set([11, 26])

/** Whether SQLite cannot read a file, or it is not one of the gateway's. */
export function isUnusable(error: unknown): boolean {
  const { errcode = 0 } = error as { errcode?: number }
  return error instanceof UnusableFileError || DAMAGED.has(errcode & 0xff)
}

/** A file that SQLite can open, and the gateway cannot use. */
export class UnusableFileError extends Error {
  override name = 'UnusableFileError'
}

/** Gives a file that is of no use another name, and what belongs to it; returns the name. */
export function moveAside(file: string): string {
  const aside = `${file}.unusable-${new Date().toISOString().replaceAll(/\D/g, '')}`
  for (const suffix of ['', '-wal', '-shm']) {
    if (existsSync(file + suffix)) renameSync(file + suffix, aside + suffix)
  }
  return aside
}

/** Rejects a database of another program: it has tables, but not the one that all of ours have. */
export function refuseForeign(db: DatabaseSync, table: string): void {
  const { tables, own } = db
    .prepare(
      `SELECT count(*) AS tables, coalesce(sum(name = ?), 0) AS own FROM sqlite_schema
        WHERE type = 'table' AND name NOT LIKE 'sqlite_%'`
    )
    .get(table)!
  if (Number(tables) > 0 && Number(own) === 0)
    throw new UnusableFileError('it was not made by LLMProxy')
}

/** Reads all of a file. */
export function refuseDamaged(db: DatabaseSync): void {
  const { quick_check: found } = db.prepare('PRAGMA quick_check(1)').get()!
  if (found !== 'ok') throw new UnusableFileError(String(found).replaceAll('\n', ' '))
}

/** Nobody else may read who has spent what. */
function makePrivate(file: string): void {
  mkdirSync(dirname(file), { recursive: true, mode: 0o700 })
  closeSync(openSync(file, 'a', 0o600))
}
