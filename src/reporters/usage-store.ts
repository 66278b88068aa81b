import { type Database, placeholders, type Value } from '../store/sql.ts'
import { Sqlite } from '../store/sqlite.ts'
import type { Loss } from '../store/sqlite-thread.ts'
import type { UsageRecord } from './record.ts'

/**
 * The embedded store of usage records. What was spent by whom and on which day is summed up as records
 * come, by a trigger: so a record that comes twice counts once, and nobody who asks for a sum reads them.
 */

const DAY = 24 * 60 * 60 * 1000
/** Rows that go in one step; others can write between two. */
const STEP = 1_000
const MAX_NAME = 255

const SUMMED = [
  'input_tokens',
  'output_tokens',
  'cached_tokens',
  'cache_write_tokens',
  'cost'
] as const
const COLUMNS = [
  'id',
  'at',
  'day',
  'api_key_id',
  'user_id',
  'model',
  'backend',
  'currency',
  ...SUMMED,
  'tags',
  'record'
] as const

const TABLES = `
  CREATE TABLE IF NOT EXISTS usage_records (
    id TEXT NOT NULL PRIMARY KEY, at INTEGER NOT NULL, day TEXT NOT NULL, api_key_id TEXT NOT NULL,
    user_id TEXT NOT NULL, model TEXT NOT NULL, backend TEXT NOT NULL, currency TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    cost REAL NOT NULL, tags TEXT NOT NULL, record TEXT NOT NULL
  );
  CREATE INDEX IF NOT EXISTS usage_records_by_time ON usage_records (at);
  CREATE TABLE IF NOT EXISTS usage_sums (
    dimension TEXT NOT NULL, day TEXT NOT NULL, value TEXT NOT NULL, currency TEXT NOT NULL,
    requests INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, cost REAL NOT NULL,
    PRIMARY KEY (dimension, day, value, currency)
  ) WITHOUT ROWID;
  CREATE INDEX IF NOT EXISTS usage_sums_by_day ON usage_sums (day);
`
const CACHE_WRITES = `
  ALTER TABLE usage_records ADD COLUMN cache_write_tokens INTEGER NOT NULL DEFAULT 0;
  ALTER TABLE usage_sums ADD COLUMN cache_write_tokens INTEGER NOT NULL DEFAULT 0;
  DROP TRIGGER IF EXISTS usage_records_summed;
  CREATE TRIGGER usage_records_summed AFTER INSERT ON usage_records BEGIN
    INSERT INTO usage_sums (dimension, day, value, currency, requests, ${SUMMED.join(', ')})
    SELECT dimension, NEW.day, value, NEW.currency, 1, ${SUMMED.map(each => `NEW.${each}`).join(', ')}
    FROM (
      SELECT 'day' AS dimension, '' AS value
      UNION ALL SELECT 'key', NEW.api_key_id
      UNION ALL SELECT 'user', NEW.user_id
      UNION ALL SELECT 'model', NEW.model
      UNION ALL SELECT 'backend', NEW.backend
      UNION ALL SELECT 'tag:' || key, value FROM json_each(NEW.tags)
    )
    WHERE true
    ON CONFLICT DO UPDATE SET requests = requests + 1,
      ${SUMMED.map(each => `${each} = ${each} + excluded.${each}`).join(', ')};
  END;
`

const SCHEMA = {
  scripts: [TABLES, CACHE_WRITES],
  table: 'usage_records',
  probe: `SELECT ${COLUMNS.join(', ')} FROM usage_records`
}
const STATEMENT_TIMEOUT = 10_000

/** What is summed up: `day` alone, or for each of these; `tag:` and a tag's name for each of its values, `tag` for those of all tags. */
export type Dimension = 'day' | 'key' | 'user' | 'model' | 'backend' | 'tag' | `tag:${string}`

/** What was spent in one currency; `value` is a day, a key's id, a model, `NAME=VALUE` of all tags ...; '' where there is none. */
export interface Sum {
  value: string
  /** null where no price is configured. */
  currency: string | null
  requests: number
  input_tokens: number
  output_tokens: number
  cached_tokens: number
  cache_write_tokens: number
  cost: number
}

/** What is asked for; the days (`2026-01-31`) are both included. */
export interface SumQuery {
  by: Dimension
  since?: string
  until?: string
}

/**
 * The tables are made in a file that is new, and completed in one of an older version.
 *
 * @param timeout how long (ms) a statement may take
 */
export function openUsageStore(
  file: string,
  timeout = STATEMENT_TIMEOUT,
  onLoss?: (loss: Loss) => void
): Sqlite {
  return new Sqlite(file, timeout, { schema: SCHEMA, onLoss })
}

/** Keeps the records; one that is there already is left as it is, and so are the sums. */
export async function keepRecords(db: Database, records: readonly UsageRecord[]): Promise<void> {
  const rows = placeholders(db.dialect, records.length, COLUMNS.length)
  await db.run(
    `INSERT INTO usage_records (${COLUMNS.join(', ')}) VALUES ${rows} ON CONFLICT (id) DO NOTHING`,
    records.flatMap(toRow)
  )
}

/**
 * What was spent between two days (`2026-01-31`, in UTC, both included). It reads sums alone.
 *
 * @example
 * const db = openUsageStore(':memory:')
 * await readSums(db, { by: 'model', since: '2026-01-01', until: '2026-01-31' }) // []
 * await db.close()
 */
export async function readSums(
  db: Database,
  { by, since = '', until = '9999' }: SumQuery
): Promise<Sum[]> {
  const [query, which] = by === 'tag' ? [TAG_SUMS, []] : [SUMS, [by]]
  return (await db.run(query, [...which, since, until])) as unknown as Sum[]
}

const sums = (value: string, which: string) => `
  SELECT ${value} AS value, nullif(currency, '') AS currency,
    sum(requests) AS requests, ${SUMMED.map(each => `sum(${each}) AS ${each}`).join(', ')}
  FROM usage_sums WHERE ${which} AND day BETWEEN ? AND ?
  GROUP BY 1, 2 ORDER BY 1, 2
`

export const SUMS = sums("CASE dimension WHEN 'day' THEN day ELSE value END", 'dimension = ?')
/** Of every tag; ';' is what comes after ':'. */
const TAG_SUMS = sums(
  "substr(dimension, 5) || '=' || value",
  "dimension >= 'tag:' AND dimension < 'tag;'"
)

/** Whole days go, records and sums alike, so that the sums are those of the records that are there. */
export async function forgetBefore(db: Database, now: number, days: number): Promise<void> {
  const first = dayOf(now - days * DAY)
  await deleteInSteps(db, 'usage_records', 'at < ?', Date.parse(first))
  await deleteInSteps(db, 'usage_sums', 'day < ?', first)
}

async function deleteInSteps(
  db: Database,
  table: string,
  isOld: string,
  bound: Value
): Promise<void> {
  const key = table === 'usage_sums' ? '(dimension, day, value, currency)' : '(rowid)'
  const some = `SELECT ${key.slice(1, -1)} FROM ${table} WHERE ${isOld} LIMIT ${STEP}`
  let gone: unknown[]
  do {
    gone = await db.run(`DELETE FROM ${table} WHERE ${key} IN (${some}) RETURNING 1`, [bound])
  } while (gone.length === STEP)
}

function toRow(record: UsageRecord): Value[] {
  const { id, timestamp, tags = {}, cost = 0, currency = '' } = record
  const names = [record.api_key_id, record.user_id, record.model, record.backend]
  const at = Date.parse(timestamp)
  return [
    id,
    at,
    dayOf(at),
    ...names.map(each => (each ?? '').slice(0, MAX_NAME)),
    currency,
    record.input_tokens,
    record.output_tokens,
    record.cached_tokens ?? 0,
    record.cache_write_tokens ?? 0,
    cost,
    JSON.stringify(tags),
    JSON.stringify(record)
  ]
}

function dayOf(at: number): string {
  return new Date(at).toISOString().slice(0, 10)
}
