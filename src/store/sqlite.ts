import { setTimeout as sleep } from 'node:timers/promises'
import type { Worker } from 'node:worker_threads'
import { startThread } from '../thread.ts'
import { type Database, DatabaseError, NewerFormatError, type Row, type Value } from './sql.ts'
import type { Answer, Loss, Order, Schema, Statement } from './sqlite-thread.ts'

/** How long (ms) the thread may take to close its file. */
const CLOSE_TIMEOUT = 1_000
/** How long (ms) one waits for a lock of another process, where nothing else is said. */
const BUSY_TIMEOUT = 5_000
/** SQLITE_TOOBIG, SQLITE_CONSTRAINT and SQLITE_MISMATCH, without what they are extended by. */
const REFUSALS = new Set([18, 19, 20])

export interface SqliteOptions {
  /** How long (ms) one waits for a lock of another process. */
  busyTimeout?: number | undefined
  /** Tables that are made, or brought to the newest version, whenever the file is opened. */
  schema?: Schema | undefined
  /** Called when an empty file has replaced one that is unusable or missing. Without it, no file is replaced. */
  onLoss?: ((loss: Loss) => void) | undefined
}

/**
 * A SQLite file, or `:memory:`, in a thread of its own. It is opened when it is needed.
 *
 * @example
 * const db = new Sqlite(':memory:', 1000)
 * await db.run('CREATE TABLE words (word TEXT)')
 * await db.run('INSERT INTO words VALUES (?)', ['hello'])
 * await db.run('SELECT word FROM words', []) // [{ word: 'hello' }]
 * await db.close()
 */
export class Sqlite implements Database {
  readonly dialect = 'sqlite'
  readonly #file: string
  readonly #timeout: number
  readonly #options: SqliteOptions
  #thread: Worker | undefined
  readonly #asked = new Map<number, PromiseWithResolvers<unknown>>()
  #lastId = 0
  #opened = 0
  #isClosed = false

  /** @param timeout how long (ms) a statement may take */
  constructor(file: string, timeout: number, options: SqliteOptions = {}) {
    this.#file = file
    this.#timeout = timeout
    this.#options = options
  }

  async run(sql: string, values?: readonly Value[]): Promise<Row[]> {
    if (this.#isClosed) throw new DatabaseError('unavailable', 'closed')
    return this.#ask({ sql, values }, this.#timeout)
  }

  /** Runs all of them in one transaction, or none; the rows of each. */
  async runAll(statements: readonly Statement[]): Promise<Row[][]> {
    if (this.#isClosed) throw new DatabaseError('unavailable', 'closed')
    return this.#ask({ all: statements }, this.#timeout)
  }

  /** Reads all of the file, so that damage is known before it is used. */
  async check(): Promise<void> {
    await this.#ask({ isCheck: true }, this.#timeout)
  }

  /**
   * Changes when anybody else has written to the file (`PRAGMA data_version`, which is good for one
   * connection), and when the file was opened anew.
   */
  async version(): Promise<string> {
    const [row] = await this.run('PRAGMA data_version', [])
    return `${this.#opened}.${row!.data_version}`
  }

  async close(): Promise<void> {
    this.#isClosed = true
    const thread = this.#thread
    if (thread === undefined) return
    thread.ref()
    await this.#ask({}, CLOSE_TIMEOUT).catch(() => {})
    this.#giveUp('closed')
    await Promise.race([thread.terminate(), sleep(CLOSE_TIMEOUT, undefined, { ref: false })])
  }

  async #ask<R extends Row[] | Row[][]>(order: Omit<Order, 'id'>, timeout: number): Promise<R> {
    const id = ++this.#lastId
    const asked = Promise.withResolvers<unknown>()
    this.#asked.set(id, asked)
    this.#thread ??= this.#start()
    const thread = this.#thread
    // What hangs would be asked more and more.
    const timer = setTimeout(() => {
      this.#giveUp(`no answer in ${timeout} ms`)
      void thread.terminate()
    }, timeout)
    thread.postMessage({ id, ...order })
    try {
      return (await asked.promise) as R
    } finally {
      clearTimeout(timer)
      this.#asked.delete(id)
    }
  }

  #start(): Worker {
    this.#opened++
    const { busyTimeout = BUSY_TIMEOUT, schema, onLoss } = this.#options
    const isReplaced = onLoss !== undefined
    const workerData = { file: this.#file, busyTimeout, schema, isReplaced }
    const thread = startThread('store/sqlite-thread', { workerData })
    thread.on('message', (answer: Answer) => this.#hear(answer))
    thread.on('error', error => this.#giveUp((error as Error).message))
    // Last, because a message listener refs the thread again.
    thread.unref()
    return thread
  }

  #hear(answer: Answer): void {
    if ('loss' in answer) return this.#options.onLoss?.(answer.loss)
    const asked = this.#asked.get(answer.id)
    if ('rows' in answer) return asked?.resolve(answer.rows)
    const { name, message, code = 0 } = answer.error
    const isRefusal = REFUSALS.has(code & 0xff)
    asked?.reject(
      name === NewerFormatError.name
        ? new NewerFormatError(message)
        : new DatabaseError(isRefusal ? 'refused' : 'unavailable', message)
    )
  }

  /** A thread that is gone is replaced by the next statement. */
  #giveUp(reason: string): void {
    this.#thread = undefined
    for (const { reject } of this.#asked.values()) reject(new DatabaseError('unavailable', reason))
  }
}
