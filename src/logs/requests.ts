import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import { NotBuilt, Section } from '../options.ts'
import { type Kind, type TableColumns, tableName } from '../store/table.ts'
import type { RequestRow } from './row.ts'

export const RequestLogOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Writes a row for each request' }),
    storage: Type.Optional(
      Type.String({ minLength: 1, description: 'Name of a database of storage.databases' })
    ),
    table: tableName('request_logs'),
    include_body: Type.Boolean({
      default: false,
      description:
        'Keeps the first 64 KB of each request body, with its prompts; answers are never kept'
    }),
    script: NotBuilt('Script that writes the row'),
    file: NotBuilt('Script that writes the row')
  },
  'One row for each request in a database'
)
export type RequestLogOptions = Static<typeof RequestLogOptions>

/** What the columns of the table hold. */
const kinds = {
  request_id: 'key',
  timestamp: 'time',
  client_ip: 'key',
  method: 'key',
  path: 'text',
  api_key_id: 'key',
  caller: 'key',
  user_id: 'key',
  model: 'key',
  is_stream: 'flag',
  status_code: 'count',
  outcome: 'key',
  error: 'key',
  latency_ms: 'count',
  ttft_ms: 'count',
  backend: 'key',
  backend_url: 'text',
  attempts: 'count',
  input_tokens: 'count',
  output_tokens: 'count',
  user_agent: 'text',
  request_body: 'body'
} as const satisfies Record<keyof RequestRow, Kind>

/** The table of the request log. */
export const REQUEST_TABLE: TableColumns = {
  kinds,
  indexed: ['timestamp', 'api_key_id', 'user_id']
}

/** @throws when the rows are not taken; with `kind: 'refused'` they never will be */
export type Insert = (rows: readonly RequestRow[]) => Promise<unknown>

const MAX_BODY = 64 * 1024
/** Rows that wait for a database, and what they may take (bytes). */
const MAX_ROWS = 10_000
const MAX_BYTES = 16 * 1024 * 1024
/** What a row takes besides its body, or more. */
const ROW_BYTES = 1024
const BATCH = 500
const BATCH_MS = 1_000
const FIRST_WAIT = 100
const MAX_WAIT = 5_000
const CLOSE_TIMEOUT = 5_000

/**
 * Rows on their way into a database, many at a time. A database that is slow or gone costs rows at last,
 * never a request; how many is counted, and said when it begins and when it is over.
 *
 * @example
 * const rows = []
 * const requests = new RequestLog(async batch => rows.push(...batch), log)
 * requests.add({ request_id: 'req_1', status_code: 200 })
 * await requests.close()
 * rows.length // 1
 */
export class RequestLog {
  readonly #insert: Insert
  readonly #log: FastifyBaseLogger
  #rows: RequestRow[] = []
  #bytes = 0
  #lost = 0
  #hasFailed = false
  #timer: NodeJS.Timeout | undefined
  #running: Promise<void> | undefined
  readonly #closing = new AbortController()

  constructor(insert: Insert, log: FastifyBaseLogger) {
    this.#insert = insert
    this.#log = log
  }

  /** @param body of the request, where it is to be kept */
  add(row: RequestRow, body?: Buffer): void {
    if (body !== undefined) row.request_body = beginning(body)
    if (this.#rows.length >= MAX_ROWS || this.#bytes + sizeOf(row) > MAX_BYTES) {
      return this.#lose(1, 'the database does not keep up')
    }
    this.#rows.push(row)
    this.#bytes += sizeOf(row)
    if (this.#rows.length >= BATCH) this.#start()
    else this.#timer ??= setTimeout(() => this.#start(), BATCH_MS).unref()
  }

  /** Writes what waits, if the database takes it in time. */
  async close(): Promise<void> {
    this.#closing.abort()
    this.#start()
    await Promise.race([this.#running, sleep(CLOSE_TIMEOUT, undefined, { ref: false })])
    if (this.#rows.length > 0)
      this.#lose(this.#rows.length, 'the database did not take them in time')
    this.#rows = []
  }

  #start(): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    this.#running ??= this.#run().then(() => {
      this.#running = undefined
    })
  }

  async #run(): Promise<void> {
    let size = BATCH
    for (let attempt = 0; this.#rows.length > 0; ) {
      const batch = this.#rows.slice(0, size)
      try {
        await this.#insert(batch)
        this.#drop(batch)
        this.#recover()
        attempt = 0
        size = Math.min(size * 2, BATCH)
      } catch (error) {
        const { message, kind } = error as Error & { kind?: string }
        // One of them spoils it for all: the halves tell which.
        if (kind === 'refused' && batch.length > 1) size = Math.ceil(batch.length / 2)
        else if (kind === 'refused') {
          this.#drop(batch)
          this.#lose(1, message)
        } else {
          this.#fail(message)
          if (this.#closing.signal.aborted) return
          await this.#pause(Math.min(FIRST_WAIT * 2 ** attempt++, MAX_WAIT))
        }
      }
    }
  }

  #drop(batch: RequestRow[]): void {
    this.#rows.splice(0, batch.length)
    for (const row of batch) this.#bytes -= sizeOf(row)
  }

  #fail(reason: string): void {
    if (this.#hasFailed) return
    this.#hasFailed = true
    this.#log.error({ reason }, 'the request log cannot be written; it will be tried again')
  }

  #lose(rows: number, reason: string): void {
    if (this.#lost === 0) this.#log.error({ rows, reason }, 'rows of the request log are lost')
    this.#lost += rows
  }

  #recover(): void {
    if (this.#lost === 0 && !this.#hasFailed) return
    this.#log.warn({ lost: this.#lost }, 'the request log is written again')
    this.#lost = 0
    this.#hasFailed = false
  }

  async #pause(ms: number): Promise<void> {
    const { signal } = this.#closing
    await sleep(ms, undefined, { signal, ref: false }).catch(() => {})
  }
}

/** No half of a character at its end. */
function beginning(body: Buffer): string {
  return new TextDecoder().decode(body.subarray(0, MAX_BODY), { stream: true })
}

function sizeOf(row: RequestRow): number {
  return ROW_BYTES + (row.request_body?.length ?? 0) * 2
}
