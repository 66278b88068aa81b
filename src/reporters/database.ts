import { type Static, Type } from 'typebox'
import { Duration } from '../options.ts'
import type { Database, DatabaseError } from '../store/sql.ts'
import { storageName } from '../store/storage.ts'
import { Table, tableName } from '../store/table.ts'
import { batchOptions } from './options.ts'
import type { UsageRecord } from './record.ts'
import { type Receiver, recordJson, type Verdict, whileRunning } from './reporter.ts'
import { USAGE_TABLE } from './usage-table.ts'

export const DatabaseReporterOptions = Type.Object(
  {
    storage: storageName('The database, as storage.databases names it'),
    table: tableName('usage_records'),
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
  readonly #table: Table

  constructor(db: Database, { table, batch }: DatabaseReporterOptions) {
    this.#db = db
    this.#table = new Table(db, table, USAGE_TABLE)
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
      await this.#table.insert(records)
      return { kind: 'delivered' }
    } catch (error) {
      const { kind = 'unavailable', message } = error as DatabaseError
      return { kind, reason: message, retryAfter: 0 }
    }
  }
}
