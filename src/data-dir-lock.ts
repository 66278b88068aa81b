import { accessSync, constants, mkdirSync, statSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { reasonOf } from './errors.ts'

/** The directory that has the gateway's files: it belongs to one gateway and its workers. */

const SQLITE_BUSY = 5
const WRITABLE = constants.W_OK | constants.X_OK

/** The directory cannot be used; the message names it and what to do. */
export class DataDirError extends Error {
  override name = 'DataDirError'
}

/**
 * Makes the directory if it is not there, and takes it for this process and its workers.
 *
 * @returns the lock, which must be kept until the process ends
 * @throws {DataDirError} when it is not writable, or another gateway has it
 */
export function takeDataDir(path: string): DatabaseSync {
  const dir = resolve(path)
  try {
    mkdirSync(dir, { recursive: true, mode: 0o700 })
    accessSync(dir, WRITABLE)
  } catch (error) {
    const uid = process.getuid?.() ?? 0
    throw new DataDirError(
      `The data directory ${dir} is not writable (${reasonOf(error as Error)}): ${ownerOf(dir)}, and the gateway runs as uid ${uid}. Change its owner, or set LLMPROXY_DATA_DIR to another directory.`
    )
  }
  try {
    // SQLite locks files on all systems, and the system frees the lock of a process that is killed.
    const lock = new DatabaseSync(resolve(dir, 'gateway.lock'))
    lock.exec('PRAGMA busy_timeout = 500; BEGIN EXCLUSIVE')
    return lock
  } catch (error) {
    const { errcode = 0, message } = error as Error & { errcode?: number }
    throw new DataDirError(
      errcode === SQLITE_BUSY
        ? `Another gateway uses the data directory ${dir}. Stop it, or set LLMPROXY_DATA_DIR to a directory of its own.`
        : `The data directory ${dir} cannot be locked: ${message}.`
    )
  }
}

function ownerOf(dir: string): string {
  try {
    const { uid, gid, mode } = statSync(dir)
    return `${dir} belongs to uid ${uid}, gid ${gid} (mode ${(mode & 0o777).toString(8)})`
  } catch {
    return dirname(dir) === dir ? 'there is no directory' : ownerOf(dirname(dir))
  }
}
