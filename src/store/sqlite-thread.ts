import type { DatabaseSync } from 'node:sqlite'
import { parentPort, workerData } from 'node:worker_threads'
import type { Row, Value } from './sql.ts'
import { openSqliteFile } from './sqlite-file.ts'

/** The thread that waits for SQLite, so that nobody else does. */

/** A statement with its parameters, or a script; without either, the end. */
export interface Order {
  id: number
  sql?: string
  values?: readonly Value[] | undefined
}

export interface Answer {
  id: number
  rows?: Row[]
  error?: { message: string; code: number | undefined }
}

const port = parentPort!
const { file } = workerData as { file: string }
let db: DatabaseSync | undefined

port.on('message', ({ id, sql, values }: Order) => {
  try {
    const rows = sql === undefined ? close() : run(sql, values)
    port.postMessage({ id, rows } satisfies Answer)
  } catch (error) {
    const { message, errcode: code } = error as Error & { errcode?: number }
    port.postMessage({ id, error: { message, code } } satisfies Answer)
  }
})

function run(sql: string, values: readonly Value[] | undefined): Row[] {
  db ??= openSqliteFile(file)
  if (values === undefined) return script(db, sql)
  const bound = values.map(each => (typeof each === 'boolean' ? Number(each) : each))
  return db.prepare(sql).all(...bound) as Row[]
}

/** All of its statements, or none. */
function script(db: DatabaseSync, sql: string): Row[] {
  try {
    db.exec(`BEGIN IMMEDIATE; ${sql}; COMMIT`)
    return []
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
