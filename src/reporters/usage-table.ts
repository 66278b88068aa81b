import { type Database, type Dialect, placeholders, quoteName, type Value } from '../store/sql.ts'
import type { UsageRecord } from './record.ts'

/** The table that usage records go into: made or completed on first use, and filled many rows at a time. */

type Kind = 'id' | 'time' | 'key' | 'text' | 'count' | 'flag' | 'money' | 'json'

const TYPES: Record<Kind, Record<Dialect, string>> = {
  id: { postgres: 'UUID', mysql: 'CHAR(36) CHARACTER SET ascii', sqlite: 'TEXT' },
  time: { postgres: 'TIMESTAMPTZ(3)', mysql: 'DATETIME(3)', sqlite: 'TEXT' },
  key: { postgres: 'TEXT', mysql: 'VARCHAR(255)', sqlite: 'TEXT' },
  text: { postgres: 'TEXT', mysql: 'TEXT', sqlite: 'TEXT' },
  count: { postgres: 'BIGINT', mysql: 'BIGINT', sqlite: 'INTEGER' },
  flag: { postgres: 'BOOLEAN', mysql: 'BOOLEAN', sqlite: 'INTEGER' },
  money: { postgres: 'NUMERIC', mysql: 'DECIMAL(30,12)', sqlite: 'REAL' },
  json: { postgres: 'JSONB', mysql: 'JSON', sqlite: 'TEXT' }
}

const COLUMNS = {
  id: 'id',
  timestamp: 'time',
  request_id: 'key',
  user_id: 'key',
  api_key_id: 'key',
  caller: 'key',
  requested_model: 'text',
  model: 'key',
  input_tokens: 'count',
  output_tokens: 'count',
  total_tokens: 'count',
  cached_tokens: 'count',
  reasoning_tokens: 'count',
  exactness: 'key',
  outcome: 'key',
  stream: 'flag',
  cost: 'money',
  currency: 'key',
  tags: 'json',
  endpoint: 'text',
  method: 'key',
  path: 'text',
  backend: 'key',
  backend_url: 'text',
  attempts: 'count',
  status_code: 'count',
  ttft_ms: 'count',
  duration_ms: 'count'
} as const satisfies { [Name in keyof UsageRecord]?: Kind }

const NAMES = Object.keys(COLUMNS) as (keyof typeof COLUMNS)[]
const INDEXED = ['timestamp', 'api_key_id', 'user_id', 'model'] as const

/** What an index takes, and what is enough of a path (characters). */
const MAX_LENGTH: Partial<Record<Kind, number>> = { key: 255, text: 1000 }

/**
 * Makes the table, or adds the columns that it lacks.
 *
 * @throws when there is a table of this name that is not one for these records; it is left as it is
 */
export async function prepareTable(db: Database, table: string): Promise<void> {
  const columns = await columnsOf(db, table)
  if (columns.size === 0) return createTable(db, table)
  const id = columns.get('id')
  if (id === undefined || !/char|text|uuid/i.test(id)) {
    const what = id === undefined ? 'it has no column id' : `its column id is ${id}, not text`
    throw new Error(
      `the table ${table} is not one for these records (${what}), and is left as it is; choose another table`
    )
  }
  for (const name of NAMES.filter(each => !columns.has(each))) {
    await db.run(`ALTER TABLE ${quoteName(db.dialect, table)} ADD COLUMN ${definition(db, name)}`)
  }
}

/** Puts the records into the table; one that is there already is left as it is. */
export async function insertRecords(
  db: Database,
  table: string,
  records: readonly UsageRecord[]
): Promise<void> {
  const names = NAMES.map(each => quoteName(db.dialect, each)).join(', ')
  const rows = placeholders(db.dialect, records.length, NAMES.length)
  // Not INSERT IGNORE, which also hides values that don't fit.
  const twice = db.dialect === 'mysql' ? 'DUPLICATE KEY UPDATE id = id' : 'CONFLICT (id) DO NOTHING'
  await db.run(
    `INSERT INTO ${quoteName(db.dialect, table)} (${names}) VALUES ${rows} ON ${twice}`,
    records.flatMap(record => NAMES.map(name => toValue(db.dialect, name, record[name])))
  )
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

async function createTable(db: Database, table: string): Promise<void> {
  const { dialect } = db
  const quoted = quoteName(dialect, table)
  const [name, schema] = table.split('.').reverse()
  const definitions = NAMES.map(each => definition(db, each))
  const index = (column: string) => quoteName(dialect, `${name}_${column}`.slice(-60))
  if (dialect === 'mysql') {
    const keys = INDEXED.map(each => `KEY ${index(each)} (${quoteName(dialect, each)})`)
    return void (await db.run(
      `CREATE TABLE IF NOT EXISTS ${quoted} (${[...definitions, ...keys].join(', ')})
      CHARACTER SET utf8mb4`
    ))
  }
  // SQLite wants the schema before the index, PostgreSQL before the table.
  const of = (column: string) =>
    dialect === 'sqlite' && schema !== undefined
      ? `${quoteName(dialect, schema)}.${index(column)} ON ${quoteName(dialect, name!)}`
      : `${index(column)} ON ${quoted}`
  await db.run(
    [
      `CREATE TABLE IF NOT EXISTS ${quoted} (${definitions.join(', ')})`,
      ...INDEXED.map(each => `CREATE INDEX IF NOT EXISTS ${of(each)} (${quoteName(dialect, each)})`)
    ].join('; ')
  )
}

function definition({ dialect }: Database, name: keyof typeof COLUMNS): string {
  const constraint = name === 'id' ? ' NOT NULL PRIMARY KEY' : ''
  return `${quoteName(dialect, name)} ${TYPES[COLUMNS[name]][dialect]}${constraint}`
}

function toValue(dialect: Dialect, name: keyof typeof COLUMNS, value: unknown): Value {
  if (value === undefined || value === null) return null
  const kind: Kind = COLUMNS[name]
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
