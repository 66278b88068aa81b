import type { FastifyBaseLogger } from 'fastify'
import { Lru } from '../keys/lru.ts'
import { Sqlite } from '../store/sqlite.ts'

/** A stored response: it lives in the backend that made it, and belongs to the caller that asked for it. */
export interface StoredResponse {
  id: string
  backend: string
  model: string | undefined
  /** Id of the caller; undefined where no keys are checked. */
  caller: string | undefined
  /** Not all of its usage is billed: tokens of its prompt, estimated. */
  unbilled?: number | undefined
}

/** Name of the file in the data directory. */
export const RESPONSES_FILE = 'responses.db'

const SCHEMA = `
  CREATE TABLE IF NOT EXISTS responses (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, caller TEXT NOT NULL,
    backend TEXT NOT NULL, model TEXT, unbilled REAL
  );
  CREATE INDEX IF NOT EXISTS responses_by_caller ON responses (caller, number);
`
const STATEMENT_TIMEOUT = 5_000
/** Responses in memory, and in the file: for each caller, so that nobody can push out those of others, and in all. */
const MAX_IN_MEMORY = 10_000
const MAX_OF_CALLER = 10_000
const MAX_IN_FILE = 1_000_000
/** Responses after which the file is pruned. */
const PRUNE_EVERY = 100

/**
 * Which caller owns which stored response, and which backend has it. A file keeps that over a restart; without one it
 * ends with the process. Only the newest ones are kept: an id that is not found may be used by no caller.
 *
 * @example
 * const responses = new StoredResponses(':memory:', { warn() {} })
 * responses.add({ id: 'resp_1', backend: 'gpu-1', model: 'm', caller: 'alice' })
 * await responses.find('resp_1') // { id: 'resp_1', backend: 'gpu-1', model: 'm', caller: 'alice' }
 * await responses.find('resp_2') // undefined
 * await responses.close()
 */
export class StoredResponses {
  readonly #recent = new Lru<string, StoredResponse>(MAX_IN_MEMORY)
  readonly #db: Sqlite
  readonly #log: Pick<FastifyBaseLogger, 'warn'>
  readonly #maxOfCaller: number
  #prepared: Promise<void> | undefined
  /** Statements run in their order. */
  #last: Promise<unknown> = Promise.resolve()
  #added = 0

  /** @param file a path, or `:memory:` */
  constructor(file: string, log: Pick<FastifyBaseLogger, 'warn'>, maxOfCaller = MAX_OF_CALLER) {
    this.#db = new Sqlite(file, STATEMENT_TIMEOUT)
    this.#log = log
    this.#maxOfCaller = maxOfCaller
  }

  /** Remembers a response that another process has written down. The first owner of an id stays its owner. */
  hear(response: StoredResponse): void {
    const { id, caller } = response
    const known = this.#recent.get(id)
    if (known === undefined || known.caller === caller) this.#recent.set(id, response)
    else this.#log.warn({ response: id }, 'a backend gave the id of a response of another caller')
  }

  /** Remembers a response, or what has become of its bill, and writes it down. */
  add(response: StoredResponse): void {
    this.hear(response)
    const isPruned = ++this.#added % PRUNE_EVERY === 0
    this.#last = this.#last
      .then(() => this.#write(response, isPruned))
      .catch(error => {
        this.#log.warn(
          { reason: error.message },
          'the owner of a stored response is not written down'
        )
      })
  }

  /** @throws {DatabaseError} when the file cannot be read */
  async find(id: string): Promise<StoredResponse | undefined> {
    const recent = this.#recent.get(id)
    if (recent !== undefined) return recent
    await this.#last
    await this.#prepare()
    const [row] = await this.#db.run('SELECT * FROM responses WHERE id = ?', [id])
    if (row === undefined) return undefined
    const found = {
      id,
      backend: String(row.backend),
      model: row.model === null ? undefined : String(row.model),
      caller: row.caller === '' ? undefined : String(row.caller),
      ...(row.unbilled === null ? {} : { unbilled: Number(row.unbilled) })
    }
    this.hear(found)
    return found
  }

  async close(): Promise<void> {
    await this.#last
    await this.#db.close()
  }

  async #write(response: StoredResponse, isPruned: boolean) {
    const { id, backend, model, caller = '', unbilled } = response
    await this.#prepare()
    const insert = {
      sql: `INSERT INTO responses (id, caller, backend, model, unbilled) VALUES (?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET unbilled = excluded.unbilled WHERE caller = excluded.caller`,
      values: [id, caller, backend, model ?? null, unbilled ?? null]
    }
    const pruneCaller = {
      sql: `DELETE FROM responses WHERE caller = ?1 AND number <= (SELECT number FROM responses
        WHERE caller = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2)`,
      values: [caller, this.#maxOfCaller]
    }
    const prune = {
      sql: 'DELETE FROM responses WHERE number <= (SELECT max(number) FROM responses) - ?',
      values: [MAX_IN_FILE]
    }
    await this.#db.runAll(isPruned ? [insert, pruneCaller, prune] : [insert])
  }

  #prepare(): Promise<void> {
    this.#prepared ??= this.#db.upgrade([SCHEMA]).catch(error => {
      this.#prepared = undefined
      throw error
    })
    return this.#prepared
  }
}
