import { type Static, Type } from 'typebox'
import { Duration } from '../options.ts'
import type { Database, DatabaseError } from '../store/sql.ts'
import { batchOptions, storageName } from './options.ts'
import type { UsageRecord } from './record.ts'
import { type Receiver, recordJson, type Verdict, whileRunning } from './reporter.ts'
import { insertRecords, prepareTable } from './usage-table.ts'

export const DatabaseReporterOptions = Type.Object(
  {
    storage: storageName('The database, as storage.databases names it'),
    table: Type.String({
      pattern: '^([A-Za-z_][A-Za-z0-9_]{0,62}\\.)?[A-Za-z_][A-Za-z0-9_]{0,62}$',
      expects: 'the name of a table, with or without its schema',
      default: 'usage_records',
      description: 'Table; it is made, or gets the columns that it lacks'
    }),
    timeout: Duration('10s', 'How long one delivery may take'),
    batch: batchOptions('one statement')
  },
  { additionalProperties: false, description: 'A database that receives usage records' }
)
export type DatabaseReporterOptions = Static<typeof DatabaseReporterOptions>

/** Puts usage records into a table of a database. */
export class DatabaseReporter implements Receiver {
  /** One statement is prepared while another one is carried out; and a record that is refused can wait. */
  readonly concurrency = 2
  readonly wantsBody = false
  readonly batch: DatabaseReporterOptions['batch']
  readonly #db: Database
  readonly #table: string
  #prepared: Promise<void> | undefined

  constructor(db: Database, { table, batch }: DatabaseReporterOptions) {
    this.#db = db
    this.#table = table
    this.batch = batch
  }

  async send(entries: readonly string[], signal: AbortSignal): Promise<Verdict> {
    const records = entries.map(each => JSON.parse(recordJson(each, false)) as UsageRecord)
    return whileRunning(signal, () => this.#insert(records))
  }

  close(): Promise<void> {
    return this.#db.close()
  }

  async #insert(records: readonly UsageRecord[]): Promise<Verdict> {
    try {
      this.#prepared ??= prepareTable(this.#db, this.#table)
      await this.#prepared
    } catch (error) {
      this.#prepared = undefined
      return { kind: 'unavailable', reason: (error as Error).message, retryAfter: 0 }
    }
    try {
      await insertRecords(this.#db, this.#table, records)
      return { kind: 'delivered' }
    } catch (error) {
      const { kind, message } = error as DatabaseError
      // The table may be gone, or another one.
      if (kind === 'unavailable') this.#prepared = undefined
      return { kind, reason: message, retryAfter: 0 }
    }
  }
}
