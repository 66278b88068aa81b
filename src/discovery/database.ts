import { type Static, Type } from 'typebox'
import { Duration } from '../options.ts'
import { BackendOptions } from '../pool/policy.ts'
import { type Database, quoteName } from '../store/sql.ts'
import { storageName } from '../store/storage.ts'
import { pause } from './ask.ts'
import type { Watch } from './source.ts'

const NAME = '[A-Za-z_][A-Za-z0-9_]{0,62}'
/** The columns of the original's table. Others are read where they are named: they may mean something else. */
const STANDARD = ['name', 'url', 'weight', 'status']
/** What a column may hold. */
const MEMBERS = [...new Set([...STANDARD, ...Object.keys(BackendOptions.properties)])].filter(
  each => each !== 'headers' && each !== 'max_idle_conns'
)
const Column = (member: string) =>
  Type.Optional(
    Type.String({
      pattern: `^${NAME}$`,
      expects: 'the name of a column',
      description: `Column of ${member}; ${STANDARD.includes(member) ? member : 'none'} if left out`
    })
  )
const MAX_ROWS = 10_000

export const DatabaseOptions = Type.Object(
  {
    storage: storageName('The database, as storage.databases names it'),
    table: Type.String({
      pattern: `^(${NAME}\\.)?${NAME}$`,
      expects: 'the name of a table, with or without its schema',
      default: 'services',
      description: 'Table, a row for each backend'
    }),
    fields: Type.Object(Object.fromEntries(MEMBERS.map(each => [each, Column(each)])), {
      additionalProperties: false,
      default: {},
      description: 'Which column holds what'
    }),
    interval: Type.Optional(Duration(undefined, 'discovery.interval for this source')),
    timeout: Duration('5s', 'How long a question may take')
  },
  { additionalProperties: false, description: 'A table of a database' }
)
type DatabaseOptions = Static<typeof DatabaseOptions>

/** Reads a table again and again. Columns that are not there say nothing, and others are passed over. */
export function watchDatabase(
  { table, fields }: DatabaseOptions,
  interval: number,
  open: () => Database
): Watch {
  const columns = MEMBERS.flatMap(member => {
    const column = fields[member] ?? (STANDARD.includes(member) ? member : undefined)
    return column === undefined ? [] : [[member, column] as const]
  })
  return async (say, signal) => {
    const db = open()
    const sql = `SELECT * FROM ${quoteName(db.dialect, table)} LIMIT ${MAX_ROWS}`
    try {
      while (!signal.aborted) {
        const rows = await db.run(sql, [])
        say(
          rows.map(row =>
            Object.fromEntries(columns.map(([member, column]) => [member, row[column]]))
          )
        )
        await pause(interval, signal)
      }
    } finally {
      await db.close()
    }
  }
}
