import type { FastifyBaseLogger } from 'fastify'
import type { Caller, Usage } from '../exchange.ts'
import { Lru } from '../keys/lru.ts'
import { type Bill, charge, type Part } from '../metering/billed.ts'
import { DatabaseError, NewerFormatError, type Row } from '../store/sql.ts'
import { Sqlite } from '../store/sqlite.ts'
import type { Loss } from '../store/sqlite-thread.ts'

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

/** Where the bill of a response goes if no caller reads it. */
export interface Owner {
  caller: Caller | undefined
  /** Address of the client, to which limits apply where no keys are checked. */
  address: string | undefined
}

/** A stored response that is not billed, and that no caller has read in full. */
export interface UnreadResponse {
  response: StoredResponse
  owner: Owner
  /** It is settled now, complete or not. */
  isLast: boolean
}

/** `lost`: the backend does not have it any more; what a later read shows nevertheless is still billed. */
export type BillState = 'open' | 'lost' | 'complete'

/** Name of the file in the data directory. */
export const RESPONSES_FILE = 'responses.db'

const RESPONSES = `
  CREATE TABLE IF NOT EXISTS responses (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, caller TEXT NOT NULL,
    backend TEXT NOT NULL, model TEXT, unbilled REAL
  );
  CREATE INDEX IF NOT EXISTS responses_by_caller ON responses (caller, number);
`
/** `billed`: usage that is billed already; `due`: when the gateway asks for it (Unix ms), absent: never; `made`: Unix ms. */
const BILLS = `
  ALTER TABLE responses ADD COLUMN billed TEXT;
  ALTER TABLE responses ADD COLUMN due INTEGER;
  ALTER TABLE responses ADD COLUMN made INTEGER;
  ALTER TABLE responses ADD COLUMN owner TEXT;
  CREATE INDEX responses_by_due ON responses (due) WHERE due IS NOT NULL;
`
const SCHEMA = {
  scripts: [RESPONSES, BILLS],
  table: 'responses',
  probe: 'SELECT id, caller, backend, model, unbilled, billed, due, made, owner FROM responses'
}
const STATEMENT_TIMEOUT = 5_000
/** Part of that for which a statement waits for another process, so that it fails with that reason. */
const LOCK_SHARE = 0.8
/** Maximum number of reads, and of writes, that wait for the file. */
const MAX_UNDERWAY = 1_000
/** Responses in memory, and in the file: for each caller, so that no caller pushes out those of others, and in all. */
const MAX_IN_MEMORY = 10_000
const MAX_OF_CALLER = 10_000
const MAX_IN_FILE = 1_000_000
/** Responses after which the file is pruned. */
const PRUNE_EVERY = 100
/** The gateway asks for an unread response after this time (ms), and again whenever it is an eighth older. */
export const FIRST_CHECK = 5_000
const LONGEST_WAIT = 600_000
/** Age (ms) at which an unread response is settled with what is known. */
const MAX_AGE = 24 * 3_600_000

/**
 * Which caller owns which stored response, and which backend has it. A file keeps that over a restart; without one it
 * ends with the process. Only the newest ones are kept: an id that is not found may be used by no caller.
 *
 * @example
 * const responses = new StoredResponses(':memory:', { warn() {}, error() {} })
 * responses.add({ id: 'resp_1', backend: 'gpu-1', model: 'm', caller: 'alice' })
 * await responses.find('resp_1') // { id: 'resp_1', backend: 'gpu-1', model: 'm', caller: 'alice' }
 * await responses.find('resp_2') // undefined
 * await responses.close()
 */
export class StoredResponses {
  readonly #recent = new Lru<string, StoredResponse>(MAX_IN_MEMORY)
  /** Bills of responses that are not in the file. */
  readonly #billed = new Lru<string, Bill>(MAX_IN_MEMORY)
  readonly #file: string
  readonly #db: Sqlite
  /** Reads do not wait for writes. */
  readonly #reader: Sqlite
  readonly #log: Pick<FastifyBaseLogger, 'warn' | 'error'>
  readonly #maxOfCaller: number
  readonly #writing = new Set<Promise<unknown>>()
  readonly #reading = new Set<Promise<unknown>>()
  #added = 0

  /** @param file a path, or `:memory:` */
  constructor(
    file: string,
    log: Pick<FastifyBaseLogger, 'warn' | 'error'>,
    { maxOfCaller = MAX_OF_CALLER, timeout = STATEMENT_TIMEOUT } = {}
  ) {
    const onLoss = (loss: Loss) => {
      log.error(
        { file, ...loss },
        'the file of stored responses is of no use or gone: it is made anew'
      )
    }
    const open = (onLoss: (loss: Loss) => void) =>
      new Sqlite(file, timeout, { busyTimeout: timeout * LOCK_SHARE, schema: SCHEMA, onLoss })
    this.#file = file
    this.#db = open(onLoss)
    // A file that is gone is an event for one of them.
    this.#reader =
      file === ':memory:' ? this.#db : open(loss => loss.aside !== undefined && onLoss(loss))
    this.#log = log
    this.#maxOfCaller = maxOfCaller
  }

  /**
   * Opens the file. One that cannot be opened now may be later.
   *
   * @throws {NewerFormatError} when a newer version has written it
   */
  async open(): Promise<void> {
    try {
      await this.#db.run('SELECT 1', [])
    } catch (error) {
      if (error instanceof NewerFormatError) throw error
      const { message: reason } = error as Error
      this.#log.error({ file: this.#file, reason }, 'stored responses cannot be read')
    }
  }

  /** Whether a response is known that is not settled. */
  isOpen(id: string): boolean {
    return this.#recent.get(id)?.unbilled !== undefined
  }

  /** Remembers a response that another process has written down. The first owner of an id stays its owner. */
  hear(response: StoredResponse): void {
    const { id, caller } = response
    const known = this.#recent.get(id)
    if (known === undefined || known.caller === caller) this.#recent.set(id, response)
    else this.#log.warn({ response: id }, 'a backend gave the id of a response of another caller')
  }

  /**
   * Remembers a response and writes it down. Its bill begins anew, because a backend may use an id again.
   *
   * @param owner of a response that is not billed
   */
  add(response: StoredResponse, owner?: Owner): void {
    this.hear(response)
    this.#billed.delete(response.id)
    const isPruned = ++this.#added % PRUNE_EVERY === 0
    void bounded(this.#writing, () => this.#write(response, owner, isPruned)).catch(error => {
      this.#log.warn(
        { reason: error.message },
        'the owner of a stored response is not written down'
      )
    })
  }

  /**
   * Writes down what is billed of a response, so that each token is billed once: it can be read several times, in part,
   * by several processes simultaneously, and after a restart.
   *
   * @returns the part of this usage that was not billed before; undefined: none
   */
  async bill(
    response: StoredResponse,
    usage: Usage | undefined,
    state: BillState,
    part?: Part
  ): Promise<Usage | undefined> {
    const { id } = response
    if (state === 'complete') this.hear({ ...response, unbilled: undefined })
    const charged = usage && charge(usage, part, this.#billed.get(id))
    if (charged !== undefined) this.#billed.set(id, charged.bill)
    try {
      return await bounded(this.#writing, () => this.#raise(response, usage, state, part))
    } catch (error) {
      const { message: reason } = error as Error
      this.#log.warn({ reason }, 'the bill of a stored response is not written down')
      return charged?.due
    }
  }

  /**
   * Takes unread responses that are due; each is due again later. `next`: when another one is (Unix ms).
   *
   * @throws {DatabaseError} when the file cannot be written
   */
  async claim(count: number): Promise<{ unread: UnreadResponse[]; next: number | undefined }> {
    const now = Date.now()
    const [rows, [first]] = (await bounded(this.#writing, () =>
      this.#db.runAll([
        {
          sql: `UPDATE responses SET due = ?1 + max(?3, min(?4, (?1 - made) / 8)) WHERE number IN
            (SELECT number FROM responses WHERE due <= ?1 ORDER BY due LIMIT ?2) RETURNING *`,
          values: [now, count, FIRST_CHECK, LONGEST_WAIT]
        },
        { sql: 'SELECT min(due) AS due FROM responses WHERE due IS NOT NULL', values: [] }
      ])
    )) as [Row[], Row[]]
    const unread = rows.map(row => ({
      response: toResponse(row),
      owner: JSON.parse(String(row.owner)) as Owner,
      isLast: now - Number(row.made) > MAX_AGE
    }))
    return { unread, next: first!.due === null ? undefined : Number(first!.due) }
  }

  /** @throws {DatabaseError} when the file cannot be read */
  async find(id: string): Promise<StoredResponse | undefined> {
    const recent = this.#recent.get(id)
    if (recent !== undefined) return recent
    const [row] = await bounded(this.#reading, () =>
      this.#reader.run('SELECT * FROM responses WHERE id = ?', [id])
    )
    if (row === undefined) return undefined
    const found = toResponse(row)
    this.hear(found)
    return found
  }

  /** Makes an unread response due now: its backend was told to delete it. */
  async hasten(id: string): Promise<void> {
    const sql = 'UPDATE responses SET due = 0 WHERE id = ? AND due IS NOT NULL'
    await bounded(this.#writing, () => this.#db.run(sql, [id]))
  }

  async close(): Promise<void> {
    await Promise.allSettled([...this.#writing, ...this.#reading])
    await Promise.all([this.#reader.close(), this.#db.close()])
  }

  async #write(response: StoredResponse, owner: Owner | undefined, isPruned: boolean) {
    const { id, backend, model, caller = '', unbilled } = response
    const now = Date.now()
    const isUnread = unbilled !== undefined && owner !== undefined
    const insert = {
      sql: `INSERT INTO responses (id, caller, backend, model, unbilled, made, due, owner)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET backend = excluded.backend, model = excluded.model,
        unbilled = excluded.unbilled, made = excluded.made, due = excluded.due,
        owner = excluded.owner, billed = NULL WHERE caller = excluded.caller`,
      values: [
        ...[id, caller, backend, model ?? null, unbilled ?? null, now],
        ...(isUnread ? [now + FIRST_CHECK, JSON.stringify(owner)] : [null, null])
      ]
    }
    const old = `caller = ?1 AND number <= (SELECT number FROM responses
      WHERE caller = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2)`
    const values = [caller, this.#maxOfCaller]
    const pruneCaller = { sql: `DELETE FROM responses WHERE ${old} AND due IS NULL`, values }
    const settleOld = {
      sql: `UPDATE responses SET made = 0, due = 0 WHERE ${old} AND made > 0`,
      values
    }
    const prune = {
      sql: 'DELETE FROM responses WHERE number <= (SELECT max(number) FROM responses) - ?',
      values: [MAX_IN_FILE]
    }
    await this.#db.runAll(isPruned ? [insert, pruneCaller, settleOld, prune] : [insert])
  }

  /** Another process may raise the same bill: what is read must still be there when it is written. */
  async #raise(
    { id, caller = '' }: StoredResponse,
    usage: Usage | undefined,
    state: BillState,
    part: Part | undefined
  ): Promise<Usage | undefined> {
    const isOver = state === 'open' ? '' : ', due = NULL'
    const isComplete = state === 'complete' ? ', unbilled = NULL' : ''
    while (true) {
      const [row] = await this.#db.run(
        'SELECT billed, unbilled FROM responses WHERE id = ? AND caller = ?',
        [id, caller]
      )
      if (row === undefined) throw new Error('its row is not there any more')
      if (state === 'lost' && row.unbilled === null) return undefined
      const old = row.billed === null ? null : String(row.billed)
      const before = old === null ? undefined : (JSON.parse(old) as Bill)
      const charged = usage && charge(usage, part, before)
      const billed = charged === undefined ? old : JSON.stringify(charged.bill)
      const [written] = await this.#db.run(
        `UPDATE responses SET billed = ?1${isOver}${isComplete} WHERE id = ?2 AND billed IS ?3
          RETURNING number`,
        [billed, id, old]
      )
      if (written !== undefined) return charged?.due
    }
  }
}

/** @throws {DatabaseError} when too much is under way */
async function bounded<T>(underway: Set<Promise<unknown>>, work: () => Promise<T>): Promise<T> {
  if (underway.size >= MAX_UNDERWAY) {
    throw new DatabaseError('unavailable', 'too many statements wait')
  }
  const running = work()
  underway.add(running)
  try {
    return await running
  } finally {
    underway.delete(running)
  }
}

function toResponse({ id, backend, model, caller, unbilled }: Row): StoredResponse {
  return {
    id: String(id),
    backend: String(backend),
    model: model === null ? undefined : String(model),
    caller: caller === '' ? undefined : String(caller),
    ...(unbilled === null ? {} : { unbilled: Number(unbilled) })
  }
}
