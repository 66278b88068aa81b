import { type Static, Type } from 'typebox'
import type { GatewayError } from '../errors.ts'
import { Duration } from '../options.ts'
import { type Database, placeholders, quoteName } from '../store/sql.ts'
import { storageName } from '../store/storage.ts'
import { type OnUnreadable, toAnswer } from './answer.ts'
import type { KeyRecord, KeySource } from './key.ts'

const NAME = '[A-Za-z_][A-Za-z0-9_]{0,62}'
const Column = (description: string) =>
  Type.String({ pattern: `^${NAME}$`, expects: 'the name of a column', description })

export const DatabaseKeysOptions = Type.Object(
  {
    storage: storageName('The database, as storage.databases names it'),
    table: Type.String({
      pattern: `^(${NAME}\\.)?${NAME}$`,
      expects: 'the name of a table, with or without its schema',
      description: 'Table'
    }),
    key_column: Type.String({ ...Column('Column the key stands in'), default: 'api_key' }),
    key_format: Type.Enum(['plain', 'sha256'], {
      default: 'plain',
      description: 'plain: it holds keys; sha256: their SHA-256 in hexadecimal digits'
    }),
    fields: Type.Array(
      Type.String({
        pattern: `^(\\*|${NAME})$`,
        expects: 'the name of a column, or *',
        description: 'Column'
      }),
      { minItems: 1, default: ['*'], description: 'Columns that are read; *: all' }
    ),
    timeout: Duration('5s', 'How long a lookup may take')
  },
  { additionalProperties: false, description: 'Keys in a database' }
)
export type DatabaseKeysOptions = Static<typeof DatabaseKeysOptions>

/** What the database takes for the same key; it may not look at the case or at spaces at the end. */
const ALIKE = 10
const KEY = 'llmproxy_key'

/** Keys in a table of a database, a row each (see {@link toAnswer}). */
export class DatabaseKeys implements KeySource {
  readonly name: string
  readonly #db: Database
  readonly #isHashed: boolean
  readonly #sql: string
  readonly #onUnreadable: OnUnreadable

  constructor(
    name: string,
    db: Database,
    { table, key_column, key_format, fields }: DatabaseKeysOptions,
    onUnreadable: OnUnreadable
  ) {
    const { dialect } = db
    const quoted = (each: string) => (each === '*' ? each : quoteName(dialect, each))
    const key = quoted(key_column)
    this.name = name
    this.#db = db
    this.#isHashed = key_format === 'sha256'
    this.#sql = `SELECT ${fields.map(quoted).join(', ')}, ${key} AS ${KEY}
      FROM ${quoted(table)} WHERE ${key} IN ${placeholders(dialect, 1, 1)} LIMIT ${ALIKE}`
    this.#onUnreadable = onUnreadable
  }

  async lookup(key: string, hash: string): Promise<KeyRecord | GatewayError | undefined> {
    const wanted = this.#isHashed ? hash : key
    const rows = await this.#db.run(this.#sql, [wanted])
    const row = rows.find(each => each[KEY] === wanted)
    if (row === undefined) return undefined
    const said = Object.entries(row).filter(([, value]) => value !== null)
    return toAnswer(Object.fromEntries(said), hash, this.#onUnreadable)
  }

  close(): Promise<void> {
    return this.#db.close()
  }
}
