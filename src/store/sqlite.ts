import { setTimeout as sleep } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import { type Database, DatabaseError, type Row, type Value } from './sql.ts'
import type { Answer, Order, Statement } from './sqlite-thread.ts'

const THREAD = new URL(`./sqlite-thread${import.meta.url.slice(-3)}`, import.meta.url)
/** How long (ms) the thread may take to close its file. */
const CLOSE_TIMEOUT = 1_000
/** SQLITE_TOOBIG, SQLITE_CONSTRAINT and SQLITE_MISMATCH, without what they are extended by. */
const REFUSALS = new Set([18, 19, 20])

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
  #thread: Worker | undefined
  readonly #asked = new Map<number, PromiseWithResolvers<unknown>>()
  #lastId = 0
  #opened = 0
  #isClosed = false

  /** @param timeout how long (ms) a statement may take */
  constructor(file: string, timeout: number) {
    this.#file = file
    this.#timeout = timeout
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

  /**
   * Brings the file to the newest version, also one that is new. Several processes may do it simultaneously.
   *
   * @param scripts each leads from one version to the next; the first makes the tables in a new file
   */
  async upgrade(scripts: readonly string[]): Promise<void> {
    if (this.#isClosed) throw new DatabaseError('unavailable', 'closed')
    await this.#ask({ scripts }, this.#timeout)
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
    // Options of the process, such as --input-type, may be none for a thread.
    const thread = new Worker(THREAD, { workerData: { file: this.#file }, execArgv: [] })
    thread.unref()
    thread.on('message', (answer: Answer) => this.#hear(answer))
    thread.on('error', error => this.#giveUp((error as Error).message))
    return thread
  }

  #hear({ id, rows, error }: Answer): void {
    const asked = this.#asked.get(id)
    if (error === undefined) asked?.resolve(rows)
    else {
      const isRefusal = REFUSALS.has((error.code ?? 0) & 0xff)
      asked?.reject(new DatabaseError(isRefusal ? 'refused' : 'unavailable', error.message))
    }
  }

  /** A thread that is gone is replaced by the next statement. */
  #giveUp(reason: string): void {
    this.#thread = undefined
    for (const { reject } of this.#asked.values()) reject(new DatabaseError('unavailable', reason))
  }
}
