import { closeSync, mkdirSync, openSync } from 'node:fs'
import { dirname } from 'node:path'
import { DatabaseSync } from 'node:sqlite'

/**
 * Opens a SQLite file, and makes it if it is not there. What is committed is on the disk, whatever
 * happens to the machine then. It blocks: only threads of their own do this.
 *
 * @example
 * openSqliteFile(':memory:').prepare('SELECT 1 AS one').get().one // 1
 */
export function openSqliteFile(file: string): DatabaseSync {
  if (file !== ':memory:') makePrivate(file)
  const db = new DatabaseSync(file)
  db.exec('PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL')
  return db
}

/** Nobody else may read who has spent what. */
function makePrivate(file: string): void {
  mkdirSync(dirname(file), { recursive: true, mode: 0o700 })
  closeSync(openSync(file, 'a', 0o600))
}
