import {
  closeSync,
  existsSync,
  fsyncSync,
  openSync,
  readdirSync,
  renameSync,
  rmSync
} from 'node:fs'
import { open, stat } from 'node:fs/promises'
import { join } from 'node:path'

/**
 * Copies of SQLite files. While a gateway runs, a part of what a file contains is in a second one, `-wal`: a copy without
 * it lacks keys and records, and nothing in SQLite notices. So a gateway that ends in order leaves its files whole and
 * marked (`application_id`); one that is neither whole nor has its `-wal` is a bad copy.
 */

/** "LLMP". */
const MARK = 0x4c4c4d50
const HEADER = 100
const MAGIC = 'SQLite format 3\0'

interface Header {
  pageSize: number
  /** Whether a part of the contents may be in the `-wal` file. */
  isWal: boolean
  isMarked: boolean
}

/** The files of a data directory that are databases. */
export function databasesIn(directory: string): string[] {
  if (!existsSync(directory)) return []
  return readdirSync(directory, { withFileTypes: true })
    .filter(each => each.isFile() && each.name.endsWith('.db'))
    .map(({ name }) => join(directory, name))
}

/** Returns whether a file is a copy that lacks all of its tables (`empty`), or may lack the last changes (`partial`). */
export async function incompleteness(file: string): Promise<'empty' | 'partial' | undefined> {
  const header = await readHeader(file)
  if (!header?.isWal || existsSync(`${file}-wal`)) return undefined
  const { size } = await stat(file)
  if (size <= header.pageSize) return 'empty'
  return header.isMarked ? 'partial' : undefined
}

/** Moves all of a file's contents into the file itself, and marks it. If it is in use elsewhere, it stays as it is. */
export async function makeWhole(file: string): Promise<void> {
  try {
    if (!(await readHeader(file))?.isWal) return
    const { DatabaseSync } = await import('node:sqlite')
    const db = new DatabaseSync(file)
    try {
      db.exec('PRAGMA busy_timeout = 0')
      const { application_id } = db.prepare('PRAGMA application_id').get()!
      if (application_id === 0) db.exec(`PRAGMA application_id = ${MARK}`)
      db.exec('PRAGMA journal_mode = DELETE')
    } finally {
      db.close()
    }
  } catch {
    // In use, damaged or read-only: the next start deals with it.
  }
}

/**
 * Copies a database as it is at this moment, also while it is in use.
 *
 * @throws {Error} of SQLite, or of the system (`EEXIST`: there is such a file)
 */
export async function copyDatabase(file: string, target: string): Promise<void> {
  const { DatabaseSync } = await import('node:sqlite')
  const partial = `${target}.part`
  if (existsSync(target)) throw Object.assign(new Error(`${target} exists`), { code: 'EEXIST' })
  // SQLite writes into an empty file, which keeps its mode.
  closeSync(openSync(partial, 'wx', 0o600))
  try {
    const db = new DatabaseSync(file)
    try {
      db.exec('PRAGMA busy_timeout = 5000')
      db.prepare('VACUUM INTO ?').run(partial)
    } finally {
      db.close()
    }
    sync(partial)
    renameSync(partial, target)
  } finally {
    rmSync(partial, { force: true })
  }
}

function sync(file: string): void {
  const descriptor = openSync(file, 'r+')
  fsyncSync(descriptor)
  closeSync(descriptor)
}

/** @returns undefined for a file that is missing, or is no database */
async function readHeader(file: string): Promise<Header | undefined> {
  const handle = await open(file).catch(() => undefined)
  if (handle === undefined) return undefined
  try {
    const bytes = Buffer.alloc(HEADER)
    await handle.read(bytes, 0, HEADER, 0)
    if (bytes.toString('latin1', 0, MAGIC.length) !== MAGIC) return undefined
    const pageSize = bytes.readUInt16BE(16)
    return {
      pageSize: pageSize === 1 ? 65_536 : pageSize,
      isWal: bytes[19] === 2,
      isMarked: bytes.readUInt32BE(68) === MARK
    }
  } finally {
    await handle.close()
  }
}

export async function isDatabase(file: string): Promise<boolean> {
  return (await readHeader(file)) !== undefined
}
