import { type Stats, statSync } from 'node:fs'
import type { DatabaseSync } from 'node:sqlite'
import { parentPort, workerData } from 'node:worker_threads'
import { newerFormat, type Row, type Value } from './sql.ts'
import {
  isUnusable,
  moveAside,
  openSqliteFile,
  refuseDamaged,
  refuseForeign,
  UnusableFileError
} from './sqlite-file.ts'

/** The thread that waits for SQLite, so that nobody else does. */

/** A statement with its parameters. */
export interface Statement {
  sql: string
  values: readonly Value[]
}

/** The tables of a file that the gateway makes itself. */
export interface Schema {
  /** Each leads from one version to the next; the first makes the tables in a new file. */
  scripts: readonly string[]
  /** Name of one of its tables. A file that has tables but not this one belongs to another program. */
  table: string
  /** Selects all columns that are read. */
  probe: string
}

/** Fate of a file that was replaced: the gateway moved it `aside`, or another program removed it. */
export interface Loss {
  aside?: string
  reason: string
}

/** A statement or a script, several statements in one transaction, or a check of the file; without any, the end. */
export interface Order {
  id: number
  sql?: string
  values?: readonly Value[] | undefined
  all?: readonly Statement[]
  isCheck?: true
}

export type Answer =
  | { id: number; rows: Row[] | Row[][] }
  | { id: number; error: { name: string; message: string; code: number | undefined } }
  | { loss: Loss }

/** A statement does not fit the tables. */
const SQLITE_ERROR = 1
const GONE = 'it was deleted or replaced'

const port = parentPort!
const { file, busyTimeout, schema, isReplaced } = workerData as {
  file: string
  busyTimeout: number
  schema: Schema | undefined
  /** Whether an empty file may replace one that is unusable or missing. */
  isReplaced: boolean
}
let db: DatabaseSync | undefined
/** The file as it was opened. */
let opening: Stats | undefined

port.on('message', (order: Order) => {
  const { id } = order
  try {
    say({ id, rows: carryOut(order) })
  } catch (error) {
    const { name, message, errcode: code } = error as Error & { errcode?: number }
    say({ id, error: { name, message, code } })
  }
})

function carryOut(order: Order): Row[] | Row[][] {
  if (order.sql === undefined && order.all === undefined && !order.isCheck) return close()
  leaveReplaced()
  try {
    return obey(order)
  } catch (error) {
    if (!replaceUnusable(error as Error)) throw error
    return obey(order)
  }
}

function obey({ sql, values, all }: Order): Row[] | Row[][] {
  db ??= opened()
  if (all !== undefined) return inTransaction(db, db => all.map(each => query(db, each)))
  if (sql !== undefined && values !== undefined) return query(db, { sql, values })
  if (sql !== undefined) inTransaction(db, db => db.exec(sql))
  else refuseDamaged(db)
  return []
}

function opened(): DatabaseSync {
  opening = statOf()
  const db = openSqliteFile(file, busyTimeout)
  try {
    if (schema !== undefined) prepare(db, schema)
  } catch (error) {
    db.close()
    throw error
  }
  opening ??= statOf()
  return db
}

function prepare(db: DatabaseSync, { scripts, table, probe }: Schema): void {
  try {
    refuseForeign(db, table)
    upgrade(db, scripts)
    db.prepare(probe).get()
  } catch (error) {
    const { errcode, message } = error as Error & { errcode?: number }
    throw errcode === SQLITE_ERROR ? new UnusableFileError(message) : error
  }
}

function upgrade(db: DatabaseSync, scripts: readonly string[]): void {
  if (versionOf(db) === scripts.length) return
  inTransaction(db, db => {
    const version = versionOf(db)
    if (version > scripts.length) throw newerFormat(file, version, scripts.length)
    for (const script of scripts.slice(version)) db.exec(script)
    db.exec(`PRAGMA user_version = ${scripts.length}`)
  })
}

function versionOf(db: DatabaseSync): number {
  return Number(db.prepare('PRAGMA user_version').get()!.user_version)
}

/** A file that was deleted or replaced would take what is written, and lose it. */
function leaveReplaced(): void {
  if (db === undefined || !isReplaced || isSame()) return
  close()
  say({ loss: { reason: GONE } })
}

/** Whether an empty file is in the place of one that cannot be used. */
function replaceUnusable(error: Error): boolean {
  if (!isReplaced || !isUnusable(error)) return false
  close()
  // Another process may have been first.
  if (isSame()) say({ loss: { aside: moveAside(file), reason: error.message } })
  return true
}

function isSame(): boolean {
  if (opening === undefined) return true
  const now = statOf()
  return now?.ino === opening.ino && now.dev === opening.dev
}

/** Not of an operator's own database: an empty file would be of no use there. */
function statOf(): Stats | undefined {
  const isOwn = schema !== undefined && file !== ':memory:'
  return isOwn ? statSync(file, { throwIfNoEntry: false }) : undefined
}

function query(db: DatabaseSync, { sql, values }: Statement): Row[] {
  const bound = values.map(each => (typeof each === 'boolean' ? Number(each) : each))
  return db.prepare(sql).all(...bound) as Row[]
}

/** All of it, or nothing. */
function inTransaction<T>(db: DatabaseSync, work: (db: DatabaseSync) => T): T {
  if (!isSame()) throw new Error(`${file}: ${GONE}; restart the gateway`)
  try {
    db.exec('BEGIN IMMEDIATE')
    const result = work(db)
    db.exec('COMMIT')
    return result
  } catch (error) {
    if (db.isTransaction) db.exec('ROLLBACK')
    throw error
  }
}

function close(): Row[] {
  db?.close()
  db = undefined
  return []
}

function say(answer: Answer): void {
  port.postMessage(answer)
}
