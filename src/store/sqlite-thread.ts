import type { DatabaseSync } from 'node:sqlite'
import { parentPort, workerData } from 'node:worker_threads'
import type { Row, Value } from './sql.ts'
import { openSqliteFile } from './sqlite-file.ts'

/** The thread that waits for SQLite, so that nobody else does. */

/** A statement with its parameters. */
export interface Statement {
  sql: string
  values: readonly Value[]
}

/** A statement or a script, several statements in one transaction, or an upgrade; without any, the end. */
export interface Order {
  id: number
  sql?: string
  values?: readonly Value[] | undefined
  all?: readonly Statement[]
  scripts?: readonly string[]
}

export interface Answer {
  id: number
  rows?: Row[] | Row[][]
  error?: { message: string; code: number | undefined }
}

const port = parentPort!
const { file } = workerData as { file: string }
let db: DatabaseSync | undefined

port.on('message', (order: Order) => {
  const { id } = order
  try {
    const rows = carryOut(order)
    port.postMessage({ id, rows } satisfies Answer)
  } catch (error) {
    const { message, errcode: code } = error as Error & { errcode?: number }
    port.postMessage({ id, error: { message, code } } satisfies Answer)
  }
})

function carryOut({ sql, values, all, scripts }: Order): Row[] | Row[][] {
  if (all !== undefined) return runAll(all)
  if (scripts !== undefined) return upgrade(scripts)
  return sql === undefined ? close() : run(sql, values)
}

function run(sql: string, values: readonly Value[] | undefined): Row[] {
  db ??= openSqliteFile(file)
  if (values !== undefined) return query(db, { sql, values })
  inTransaction(db, db => db.exec(sql))
  return []
}

function runAll(statements: readonly Statement[]): Row[][] {
  db ??= openSqliteFile(file)
  return inTransaction(db, db => statements.map(each => query(db, each)))
}

function upgrade(scripts: readonly string[]): Row[] {
  db ??= openSqliteFile(file)
  if (versionOf(db) === scripts.length) return []
  inTransaction(db, db => {
    const version = versionOf(db)
    if (version > scripts.length) throw new Error('was written by a newer version of LLMProxy')
    for (const script of scripts.slice(version)) db.exec(script)
    db.exec(`PRAGMA user_version = ${scripts.length}`)
  })
  return []
}

function versionOf(db: DatabaseSync): number {
  return Number(db.prepare('PRAGMA user_version').get()!.user_version)
}

function query(db: DatabaseSync, { sql, values }: Statement): Row[] {
  const bound = values.map(each => (typeof each === 'boolean' ? Number(each) : each))
  return db.prepare(sql).all(...bound) as Row[]
}

/** All of it, or nothing. */
function inTransaction<T>(db: DatabaseSync, work: (db: DatabaseSync) => T): T {
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
