import type { UsageRecord } from './record.ts'
import { USAGE_TABLE } from './usage-table.ts'

const COLUMNS = Object.keys(USAGE_TABLE.kinds) as (keyof UsageRecord)[]

/**
 * A line of CSV (RFC 4180), for undefined the line of names. Texts that a spreadsheet would take for a
 * formula get an apostrophe before them: models, tags and paths come from clients.
 *
 * @example
 * toCsv(undefined).split(',')[0] // 'id'
 */
export function toCsv(record: UsageRecord | undefined): string {
  const cells = record === undefined ? COLUMNS : COLUMNS.map(name => toCell(record[name]))
  return `${cells.join()}\r\n`
}

function toCell(value: unknown): string {
  if (value === undefined || value === null) return ''
  if (typeof value === 'number' || typeof value === 'boolean') return String(value)
  const text = typeof value === 'string' ? value : JSON.stringify(value)
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe
}
