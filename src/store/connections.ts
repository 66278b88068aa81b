import { reasonOf } from './reason.ts'
import { type Database, DatabaseError, type Dialect, type Row, type Value } from './sql.ts'

/** A connection to a server, as its driver makes it. */
export interface Connection {
  /** Resolves when it can be used. */
  readonly ready: Promise<void>
  readonly isOpen: boolean
  query(sql: string, values: readonly Value[] | undefined): Promise<Row[]>
  /** Takes its leave from the server. */
  end(): void
  /** Ends at once, whatever is under way. */
  destroy(): void
}

export interface ConnectionsOptions {
  /** 0: no limit. */
  max_open_conns: number
  max_idle_conns: number
  /** 0: for ever (ms). */
  conn_max_lifetime: number
  conn_max_idle_time: number
  /** How long (ms) connecting and one statement may take together. */
  timeout: number
}

/** How long (ms) a server may take to let go of a connection. */
const LEAVE_TIMEOUT = 1_000

interface Member {
  connection: Connection
  /** When it was made (monotonic, ms). */
  since: number
  idle: NodeJS.Timeout | undefined
}

/**
 * A few connections to one server. Each statement gets one for itself; one that fails or takes too long
 * is closed, so that nothing is ever asked of a connection whose state isn't known.
 */
export class Connections implements Database {
  readonly dialect: Dialect
  readonly #load: () => Promise<() => Connection>
  #open: (() => Connection) | undefined
  readonly #isRefusal: (error: unknown) => boolean
  readonly #options: ConnectionsOptions
  readonly #all = new Set<Member>()
  /** The one that was used last is the last. */
  readonly #idle: Member[] = []
  readonly #waiting: (() => void)[] = []
  #isClosed = false

  /** @param load brings the driver, and how it makes a connection */
  constructor(
    dialect: Dialect,
    load: () => Promise<() => Connection>,
    isRefusal: (error: unknown) => boolean,
    options: ConnectionsOptions
  ) {
    this.dialect = dialect
    this.#load = load
    this.#isRefusal = isRefusal
    this.#options = options
  }

  async run(sql: string, values?: readonly Value[]): Promise<Row[]> {
    const member = await this.#take().catch(error => {
      throw new DatabaseError('unavailable', reasonOf(error))
    })
    const { connection } = member
    let isLate = false
    const timer = setTimeout(() => {
      isLate = true
      connection.destroy()
    }, this.#options.timeout)
    try {
      await connection.ready
      return await connection.query(sql, values)
    } catch (error) {
      const isRefusal = this.#isRefusal(error)
      if (!isRefusal) connection.destroy()
      const reason = isLate ? `no answer in ${this.#options.timeout} ms` : reasonOf(error)
      throw new DatabaseError(isRefusal ? 'refused' : 'unavailable', reason)
    } finally {
      clearTimeout(timer)
      this.#giveBack(member)
    }
  }

  async close(): Promise<void> {
    this.#isClosed = true
    for (const next of this.#waiting.splice(0)) next()
    for (const member of this.#all) {
      if (this.#idle.includes(member)) this.#leave(member)
      else member.connection.destroy()
    }
  }

  async #take(): Promise<Member> {
    const { max_open_conns } = this.#options
    this.#open ??= await this.#load()
    while (!this.#isClosed) {
      const member = this.#idle.pop()
      if (member !== undefined) {
        clearTimeout(member.idle)
        if (this.#isGood(member)) return member
        this.#leave(member)
        continue
      }
      if (max_open_conns === 0 || this.#all.size < max_open_conns) {
        const opened = { connection: this.#open(), since: performance.now(), idle: undefined }
        this.#all.add(opened)
        return opened
      }
      await new Promise<void>(resolve => this.#waiting.push(resolve))
    }
    throw new Error('closed')
  }

  #giveBack(member: Member): void {
    const { max_idle_conns, conn_max_idle_time } = this.#options
    if (this.#isClosed || !this.#isGood(member) || this.#idle.length >= max_idle_conns) {
      this.#leave(member)
    } else {
      this.#idle.push(member)
      if (conn_max_idle_time > 0) {
        member.idle = setTimeout(() => this.#leave(member), conn_max_idle_time).unref()
      }
    }
    this.#waiting.shift()?.()
  }

  #isGood({ connection, since }: Member): boolean {
    const { conn_max_lifetime } = this.#options
    const isYoung = conn_max_lifetime === 0 || performance.now() - since < conn_max_lifetime
    return connection.isOpen && isYoung
  }

  #leave(member: Member): void {
    const { connection } = member
    clearTimeout(member.idle)
    this.#all.delete(member)
    const at = this.#idle.indexOf(member)
    if (at !== -1) this.#idle.splice(at, 1)
    if (!connection.isOpen) return
    connection.end()
    setTimeout(() => connection.destroy(), LEAVE_TIMEOUT).unref()
  }
}
