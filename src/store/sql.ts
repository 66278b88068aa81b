/** What PostgreSQL, MySQL and SQLite have in common, as far as it is needed here. */

export type Dialect = 'postgres' | 'mysql' | 'sqlite'
export type Value = string | number | boolean | null
export type Row = Record<string, unknown>

export interface Database {
  readonly dialect: Dialect
  /**
   * Runs one statement; its parameters stand as {@link placeholders} has them.
   *
   * @throws {DatabaseError}
   */
  run(sql: string, values?: readonly Value[]): Promise<Row[]>
  /** Ends what is under way, and does not wait for a server that hangs. */
  close(): Promise<void>
}

/**
 * `refused`: the statement or a value in it will never be taken. `unavailable`: it may be taken another
 * time, as when nobody answers or a table is not there. What it says is fit for a log.
 */
export class DatabaseError extends Error {
  override name = 'DatabaseError'
  readonly kind: 'refused' | 'unavailable'

  constructor(kind: DatabaseError['kind'], message: string) {
    super(message)
    this.kind = kind
  }
}

/** A file that this version must not touch; what it says names the file and both versions. */
export class NewerFormatError extends DatabaseError {
  override name = 'NewerFormatError'
  constructor(message: string) {
    super('unavailable', message)
  }
}

/** The format of a file is newer than the newest that is known. */
export function newerFormat(file: string, format: number, known: number): NewerFormatError {
  return new NewerFormatError(
    `${file} was written by a newer version of LLMProxy: it has format ${format}, and this version knows ${known}`
  )
}

/**
 * `(?, ?), (?, ?)` for so many rows, numbered where the dialect wants that.
 *
 * @example
 * placeholders('postgres', 2, 2) // '($1, $2), ($3, $4)'
 */
export function placeholders(dialect: Dialect, rows: number, columns: number): string {
  let count = 0
  const one = () => (dialect === 'postgres' ? `$${++count}` : '?')
  const row = () => `(${Array.from({ length: columns }, one).join(', ')})`
  return Array.from({ length: rows }, row).join(', ')
}

/**
 * A name, or a name in a schema, as the dialect quotes it.
 *
 * @example
 * quoteName('mysql', 'billing.usage') // '`billing`.`usage`'
 */
export function quoteName(dialect: Dialect, name: string): string {
  const mark = dialect === 'mysql' ? '`' : '"'
  return name
    .split('.')
    .map(part => mark + part + mark)
    .join('.')
}
