import { Type } from 'typebox'
import {
  type Database,
  type DatabaseError,
  type Dialect,
  placeholders,
  quoteName,
  type Value
} from './sql.ts'

/** A table of rows that are only ever added: made or completed on first use, and filled many rows at a time. */

export type Kind = 'id' | 'time' | 'key' | 'text' | 'count' | 'flag' | 'money' | 'json' | 'body'

const TYPES: Record<Kind, Record<Dialect, string>> = {
  id: { postgres: 'UUID', mysql: 'CHAR(36) CHARACTER SET ascii', sqlite: 'TEXT' },
  time: { postgres: 'TIMESTAMPTZ(3)', mysql: 'DATETIME(3)', sqlite: 'TEXT' },
  key: { postgres: 'TEXT', mysql: 'VARCHAR(255)', sqlite: 'TEXT' },
  text: { postgres: 'TEXT', mysql: 'TEXT', sqlite: 'TEXT' },
  count: { postgres: 'BIGINT', mysql: 'BIGINT', sqlite: 'INTEGER' },
  flag: { postgres: 'BOOLEAN', mysql: 'BOOLEAN', sqlite: 'INTEGER' },
  money: { postgres: 'NUMERIC', mysql: 'DECIMAL(30,12)', sqlite: 'REAL' },
  json: { postgres: 'JSONB', mysql: 'JSON', sqlite: 'TEXT' },
  body: { postgres: 'TEXT', mysql: 'MEDIUMTEXT', sqlite: 'TEXT' }
}

/** What an index takes, and what is enough of a path (characters); a body has a bound of its own. */
const MAX_LENGTH: Partial<Record<Kind, number>> = { key: 255, text: 1000 }

/** The option that names it. */
export function tableName(byDefault: string) {
  return Type.String({
    pattern: '^([A-Za-z_][A-Za-z0-9_]{0,62}\\.)?[A-Za-z_][A-Za-z0-9_]{0,62}$',
    expects: 'the name of a table, with or without its schema',
    default: byDefault,
    description: 'Table; it is made, or gets the columns that it lacks'
  })
}

/** Its columns; the first one is the primary key. */
export interface TableColumns {
  kinds: Readonly<Record<string, Kind>>
  indexed: readonly string[]
}

/**
 * @example
 * const db = new Sqlite(':memory:', 1000)
 * const words = new Table(db, 'words', { kinds: { id: 'key', word: 'text' }, indexed: [] })
 * await words.insert([{ id: 'a', word: 'hello' }])
 * await db.run('SELECT word FROM words', []) // [{ word: 'hello' }]
 * await db.close()
 */
export class Table {
  readonly #db: Database
  readonly #name: string
  readonly #kinds: TableColumns['kinds']
  readonly #indexed: readonly string[]
  readonly #columns: string[]
  readonly #key: string
  #prepared: Promise<void> | undefined

  constructor(db: Database, name: string, { kinds, indexed }: TableColumns) {
    this.#db = db
    this.#name = name
    this.#kinds = kinds
    this.#indexed = indexed
    this.#columns = Object.keys(kinds)
    this.#key = this.#columns[0]!
  }

  /**
   * Adds rows; one that is there already is left as it is.
   *
   * @throws {DatabaseError}, or another error when there is a table of this name that is not one for these
   *   rows; it is left as it is
   */
  async insert(rows: readonly object[]): Promise<void> {
    await this.#prepare()
    const { dialect } = this.#db
    const names = this.#columns.map(each => quoteName(dialect, each)).join(', ')
    const key = quoteName(dialect, this.#key)
    // Not INSERT IGNORE, which also hides values that don't fit.
    const twice =
      dialect === 'mysql' ? `DUPLICATE KEY UPDATE ${key} = ${key}` : `CONFLICT (${key}) DO NOTHING`
    try {
      await this.#db.run(
        `INSERT INTO ${quoteName(dialect, this.#name)} (${names})
        VALUES ${placeholders(dialect, rows.length, this.#columns.length)} ON ${twice}`,
        rows.flatMap(row =>
          this.#columns.map(name =>
            toValue(dialect, this.#kinds[name]!, (row as Record<string, unknown>)[name])
          )
        )
      )
    } catch (error) {
      // The table may be gone, or another one.
      if ((error as DatabaseError).kind === 'unavailable') this.#prepared = undefined
      throw error
    }
  }

  async #prepare(): Promise<void> {
    this.#prepared ??= this.#makeOrComplete()
    try {
      await this.#prepared
    } catch (error) {
      this.#prepared = undefined
      throw error
    }
  }

  async #makeOrComplete(): Promise<void> {
    const columns = await columnsOf(this.#db, this.#name)
    if (columns.size === 0) return this.#create()
    const type = columns.get(this.#key)
    if (type === undefined || !/char|text|uuid/i.test(type)) {
      const what =
        type === undefined
          ? `it has no column ${this.#key}`
          : `its column ${this.#key} is ${type}, not text`
      throw new Error(
        `the table ${this.#name} is not one for these records (${what}), and is left as it is; choose another table`
      )
    }
    for (const name of this.#columns.filter(each => !columns.has(each))) {
      await this.#db.run(
        `ALTER TABLE ${quoteName(this.#db.dialect, this.#name)} ADD COLUMN ${this.#definition(name)}`
      )
    }
  }

  async #create(): Promise<void> {
    const { dialect } = this.#db
    const quoted = quoteName(dialect, this.#name)
    const [name, schema] = this.#name.split('.').reverse()
    const definitions = this.#columns.map(each => this.#definition(each))
    const index = (column: string) => quoteName(dialect, `${name}_${column}`.slice(-60))
    if (dialect === 'mysql') {
      const keys = this.#indexed.map(each => `KEY ${index(each)} (${quoteName(dialect, each)})`)
      return void (await this.#db.run(
        `CREATE TABLE IF NOT EXISTS ${quoted} (${[...definitions, ...keys].join(', ')})
        CHARACTER SET utf8mb4`
      ))
    }
    // SQLite wants the schema before the index, PostgreSQL before the table.
    const of = (column: string) =>
      dialect === 'sqlite' && schema !== undefined
        ? `${quoteName(dialect, schema)}.${index(column)} ON ${quoteName(dialect, name!)}`
        : `${index(column)} ON ${quoted}`
    await this.#db.run(
      [
        `CREATE TABLE IF NOT EXISTS ${quoted} (${definitions.join(', ')})`,
        ...this.#indexed.map(
          each => `CREATE INDEX IF NOT EXISTS ${of(each)} (${quoteName(dialect, each)})`
        )
      ].join('; ')
    )
  }

  #definition(name: string): string {
    const { dialect } = this.#db
    const constraint = name === this.#key ? ' NOT NULL PRIMARY KEY' : ''
    return `${quoteName(dialect, name)} ${TYPES[this.#kinds[name]!][dialect]}${constraint}`
  }
}

async function columnsOf(db: Database, table: string): Promise<Map<string, string>> {
  const [schema, name] = table.includes('.') ? table.split('.') : [null, table]
  const rows = await {
    postgres: () =>
      db.run(
        `SELECT attname AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
        WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped`,
        [quoteName('postgres', table)]
      ),
    mysql: () =>
      db.run(
        `SELECT column_name AS name, data_type AS type FROM information_schema.columns
        WHERE table_schema = coalesce(?, database()) AND table_name = ?`,
        [schema!, name!]
      ),
    sqlite: () =>
      db.run('SELECT name, type FROM pragma_table_info(?, ?)', [name!, schema ?? 'main'])
  }[db.dialect]()
  return new Map(rows.map(({ name, type }) => [String(name), String(type)]))
}

function toValue(dialect: Dialect, kind: Kind, value: unknown): Value {
  if (value === undefined || value === null) return null
  if (kind === 'json') return JSON.stringify(value, (_, each) => clean(each))
  if (kind === 'flag' && dialect !== 'postgres') return Number(value)
  // There a time has no zone: it is in UTC.
  if (kind === 'time' && dialect === 'mysql') return String(value).replace('T', ' ').slice(0, 23)
  return clean(typeof value === 'string' ? value.slice(0, MAX_LENGTH[kind]) : value) as Value
}

/** PostgreSQL takes no NUL, and no half of a character. */
function clean(value: unknown): unknown {
  return typeof value === 'string' ? value.replaceAll('\0', '').toWellFormed() : value
}
