import { randomBytes } from 'node:crypto'
import { type Static, Type } from 'typebox'
import { gathered } from '../batches.ts'
import { replaced } from '../json-body.ts'
import { checkOptions } from '../options.ts'
import type { Row } from '../store/sql.ts'
import { type KeyFields, keyFields } from './fields.ts'
import { type KeyStatus, parseStatus, parseTime } from './key.ts'
import { NewKeyText, toHash } from './static.ts'

/** A key of the embedded store: how it is given, how it is kept in a row, and how it is shown. */

/** What a key is made of. With `key` it is one that its owner has already; else a new one is made. */
export const KeySpec = Type.Object(
  { key: Type.Optional(NewKeyText), ...keyFields },
  { additionalProperties: false }
)
export type KeySpec = Static<typeof KeySpec>

/** One that its owner has already. */
export const OwnedKey = Type.Object(
  { key: NewKeyText, ...keyFields },
  { additionalProperties: false }
)
export type OwnedKey = Static<typeof OwnedKey>
const OwnedKeys = Type.Array(OwnedKey)

const Fields = Type.Object(keyFields, { additionalProperties: false })

/** Fields to change; null takes one away, and so it does within `limits` and `tags` (RFC 7396). */
export type KeyChanges = { [Name in keyof KeyFields]?: Removable<KeyFields[Name]> | null }
type Removable<T> = T extends unknown[] | string | number | undefined
  ? T
  : { [Name in keyof T]?: T[Name] | null }

/** A key as it is shown: never the key itself. Times are ISO 8601 in UTC. */
export interface StoredKey extends KeyFields {
  /** Stays the same when the key is rotated: limits and bills hang on it. */
  id: string
  /** Enough to tell keys apart: `sk-AbCd...wXyZ`. */
  key: string
  status: KeyStatus | 'revoked'
  created_at: string
  updated_at: string
  revoked_at?: string
  /** The key before the last rotation is valid until then. */
  old_key_until?: string
}

/** 256 random bits. */
export function newKey(): string {
  return `sk-${randomBytes(32).toString('base64url')}`
}

/** Enough to tell keys apart. */
export function maskKey(key: string): string {
  return key.length < 20 ? '...' : `${key.slice(0, 7)}...${key.slice(-4)}`
}

/** The columns that {@link KeyStore} inserts. */
export function toRow({ key: _, ...fields }: KeySpec, key: string, now: number) {
  const id = `key_${randomBytes(8).toString('hex')}`
  const json = JSON.stringify({ ...fields, ...normalized(fields) })
  return [id, toHash(key), maskKey(key), json, now, now] as const
}

/**
 * Rows as JSON, many in one text: a text reaches the thread of the database without blocking this one.
 *
 * @throws {OptionsError} when something is wrong with a field
 */
export function* toRows(specs: OwnedKey[]): Generator<string> {
  const checked = checkOptions(OwnedKeys, specs, 'keys')
  const now = Date.now()
  const rows = checked.map(spec => toRow(spec, spec.key, now))
  for (const some of gathered(rows, ([, , , fields]) => fields.length)) yield JSON.stringify(some)
}

/**
 * Checks what is set; what is taken away needs no check.
 *
 * @throws {OptionsError}
 */
export function toPatch(changes: KeyChanges): object {
  const set = replaced(changes, each => each ?? undefined)
  return { ...changes, ...normalized(checkOptions(Fields, set, 'key')) }
}

/** Those that can be written in several ways: a status as text, times in ISO 8601. */
function normalized(fields: KeyFields): KeyFields {
  const { status } = fields
  const times = TIMES.filter(name => fields[name] !== undefined)
  const iso = (time: unknown) => new Date(parseTime(time)).toISOString()
  return {
    ...(status === undefined ? {} : { status: parseStatus(status)! }),
    ...Object.fromEntries(times.map(name => [name, iso(fields[name])]))
  }
}

const TIMES = ['starts_at', 'expires_at', 'last_reset_at'] as const

/** What {@link KeyStore} reads. */
export function toStored(row: Row): StoredKey {
  const { id, masked, fields, created_at, updated_at, revoked_at, until } = row
  const time = (at: unknown) => new Date(Number(at)).toISOString()
  const { status = 'active', ...rest } = JSON.parse(String(fields))
  return {
    id: String(id),
    key: String(masked),
    status: revoked_at === null ? status : 'revoked',
    ...rest,
    created_at: time(created_at),
    updated_at: time(updated_at),
    ...(revoked_at === null ? {} : { revoked_at: time(revoked_at) }),
    ...(until === null || Number(until) <= Date.now() ? {} : { old_key_until: time(until) })
  }
}
