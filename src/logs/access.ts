import { resolve } from 'node:path'
import { type Static, Type } from 'typebox'
import { NotBuilt, Section } from '../options.ts'
import { fileOptions, RotatingFile } from './rotating-file.ts'
import type { RequestRow } from './row.ts'
import { LogSink } from './sink.ts'

export const AccessLogOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Writes a line for each request' }),
    format: Type.Enum(['combined', 'json'], {
      default: 'combined',
      description: 'combined: text in the order of web servers; json: an object a line'
    }),
    output: Type.Enum(['stdout', 'file'], { default: 'stdout', description: 'Where to' }),
    file: Section(fileOptions('access.log', 10), 'For output: file'),
    script: NotBuilt('Script that writes the line')
  },
  'One line for each request'
)
export type AccessLogOptions = Static<typeof AccessLogOptions>

/** Where the lines go. */
export function openAccessLog({ output, file }: AccessLogOptions, dataDir = '.'): LogSink {
  if (output === 'stdout') return new LogSink(1, 'access log')
  const target = new RotatingFile({ ...file, path: resolve(dataDir, file.path) })
  target.touch()
  return new LogSink(target, 'access log')
}

/** The line of a request. What a client sent can neither end it nor pass for another field. */
export function toLine(row: RequestRow, format: AccessLogOptions['format']): string {
  return format === 'json' ? toJson(row) : toCombined(row)
}

/** As web servers have it, and what the original puts behind it. */
function toCombined(row: RequestRow): string {
  const user = field(row.user_id ?? row.api_key_id)
  const call = `${field(row.method)} ${field(row.path)}`
  const error = row.error === null ? '' : ` error="${row.error}"`
  return (
    `${field(row.client_ip)} - ${user} [${clock(new Date(row.timestamp))}] "${call}" ` +
    `${row.status_code} ${row.latency_ms}ms "${field(row.backend_url)}" ` +
    `model=${field(row.model)} stream=${row.is_stream}${error}\n`
  )
}

/** Some readers take these for the end of a line, and JSON doesn't. */
const LINE_ENDS = /[\u007f-\u009f\u2028\u2029]/g

function toJson(row: RequestRow): string {
  const json = JSON.stringify(row).replace(
    LINE_ENDS,
    char => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`
  )
  return `${json}\n`
}

/** All but visible ASCII, and what ends or escapes a text. */
const UNSAFE = /[^\x21\x23-\x5b\x5d-\x7e]/gu

/** A text with `\xHH` for each byte that is unsafe, as nginx writes it. */
function field(text: string | null): string {
  return text ? text.replace(UNSAFE, escapeBytes) : '-'
}

function escapeBytes(char: string): string {
  const bytes = [...Buffer.from(char)]
  return bytes.map(byte => `\\x${byte.toString(16).toUpperCase().padStart(2, '0')}`).join('')
}

const MONTHS = 'Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec'.split(' ')

/** `02/Jan/2006:15:04:05 -0700`, in local time. */
function clock(date: Date): string {
  const offset = -date.getTimezoneOffset()
  const ahead = Math.abs(offset)
  const day = `${two(date.getDate())}/${MONTHS[date.getMonth()]}/${date.getFullYear()}`
  const time = [date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join(':')
  const zone = `${offset < 0 ? '-' : '+'}${two(Math.floor(ahead / 60))}${two(ahead % 60)}`
  return `${day}:${time} ${zone}`
}

function two(number: number): string {
  return String(number).padStart(2, '0')
}
