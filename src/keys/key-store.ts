import { resolve } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { DATA_DIR } from '../data-dir.ts'
import { checkOptions } from '../options.ts'
import { DatabaseError, NewerFormatError, type Row } from '../store/sql.ts'
import { Sqlite } from '../store/sqlite.ts'
import type { KeyFields } from './fields.ts'
import type { KeyNews } from './key.ts'
import { toHash } from './static.ts'
import {
  type KeyChanges,
  KeySpec,
  maskKey,
  newKey,
  type StoredKey,
  toPatch,
  toRow,
  toStored
} from './stored-key.ts'

/** Keys in a file of SQLite: what the `builtin` source looks up, and the commands and the admin API change. */

/** What a lookup needs to know. */
export interface FoundKey {
  id: string
  fields: KeyFields
  isRevoked: boolean
  /** It was rotated away, and is valid until then (Unix ms). */
  until: number | undefined
}

/** Name of the file, where nothing else is said. */
export const DEFAULT_STORE = 'keys.db'

/** A store that ends with the process. */
export const MEMORY = ':memory:'

/** The file of the embedded store that `db_path` names. */
export function keyFile(dataDir: string | undefined, path: string): string {
  return path === MEMORY ? MEMORY : resolve(dataDir ?? DATA_DIR, path)
}

/** Somebody has this key already. */
export class KeyExistsError extends Error {
  override name = 'KeyExistsError'
  constructor() {
    super('a key with this text is there already')
  }
}

/** The file cannot be used; the message says what to do. */
export class KeyStoreError extends Error {
  override name = 'KeyStoreError'
  constructor(file: string, reason: string) {
    const remedy = reason.includes('locked')
      ? 'End the program that has it open.'
      : 'Restore it from a backup (docs/backup.md), or move it away to start without its keys.'
    super(`The API keys in ${file} cannot be read: ${reason}. ${remedy}`)
  }
}

const STATEMENT_TIMEOUT = 5_000
/** How long (ms) a statement waits for another process: it fails with that reason before its time is over. */
const LOCK_TIMEOUT = 4_000
/** How long (ms) a list of keys may take. */
const SYNC_TIMEOUT = 120_000
/** Deleted keys that others are told of at a time. */
const TOLD_AT_ONCE = 1_000
const HASH_LENGTH = 64
/** What a page of the list holds if nothing is said, and at most. */
const PAGE = 20
const MAX_PAGE = 1_000

const TABLES = `
  CREATE TABLE IF NOT EXISTS keys (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, hash TEXT NOT NULL UNIQUE,
    masked TEXT NOT NULL, fields TEXT NOT NULL, created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL, revoked_at INTEGER,
    user_id TEXT GENERATED ALWAYS AS (fields ->> 'user_id')
  );
  CREATE INDEX IF NOT EXISTS keys_by_user ON keys (user_id);
  CREATE TABLE IF NOT EXISTS old_keys (
    hash TEXT NOT NULL PRIMARY KEY, id TEXT NOT NULL, until INTEGER NOT NULL
  ) WITHOUT ROWID;
  CREATE INDEX IF NOT EXISTS old_keys_by_id ON old_keys (id);
`
const SCHEMA = {
  scripts: [TABLES],
  table: 'keys',
  probe: 'SELECT id, hash, masked, fields, created_at, updated_at, revoked_at FROM keys'
}

const INSERT = 'INSERT INTO keys (id, hash, masked, fields, created_at, updated_at)'
const VIEW = `SELECT id, masked, fields, created_at, updated_at, revoked_at,
  (SELECT max(until) FROM old_keys WHERE old_keys.id = keys.id) AS until FROM keys`
const HASH = 'SELECT hash FROM keys WHERE id = ?1'
const HASHES = `${HASH} UNION SELECT hash FROM old_keys WHERE id = ?1`
/** Of a table with AUTOINCREMENT the last number stays, whatever is deleted. */
const HAD_KEYS = "SELECT 1 FROM sqlite_sequence WHERE name = 'keys'"

/** The keys of a list, while they are taken over. */
const LISTED = `CREATE TEMP TABLE listed (
  id TEXT, hash TEXT UNIQUE ON CONFLICT REPLACE, masked TEXT, fields TEXT, created_at, updated_at
)`
const LIST = `INSERT INTO listed SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4,
  value ->> 5 FROM json_each(?)`
const IS_GONE = 'hash NOT IN (SELECT hash FROM listed)'
const REMOVE = [
  `SELECT group_concat(hash, '') AS hashes FROM (
    SELECT hash FROM keys WHERE revoked_at IS NULL AND ${IS_GONE}
    UNION SELECT hash FROM old_keys WHERE ${IS_GONE}
  )`,
  `DELETE FROM keys WHERE ${IS_GONE}`,
  'DELETE FROM old_keys'
]
const UPSERT = `${INSERT} SELECT * FROM listed WHERE true ORDER BY rowid
  ON CONFLICT (hash) DO UPDATE SET fields = excluded.fields, updated_at = excluded.updated_at`

/** Is told of the SHA-256 of keys, or undefined for all; `validFor`: they die in so many ms. */
export type OnKeyChange = (hashes: readonly string[] | undefined, validFor?: number) => void

/**
 * @example
 * const store = new KeyStore(':memory:')
 * const { key, record } = await store.create({ name: 'alice', limits: { requests_per_minute: 60 } })
 * key.length // 46
 * await store.update(record.id, { models: ['qwen-*'], name: null })
 * await store.get(record.id) // { models: ['qwen-*'], status: 'active', ... }
 * const rotated = await store.rotate(record.id, { grace: 60_000 })
 * rotated.record.id === record.id // true
 * await store.revoke(record.id) // { status: 'revoked', ... }
 * await store.list({ limit: 10 }) // { total: 1, ... }
 * await store.delete(record.id) // true
 * await store.close()
 */
export class KeyStore {
  readonly #file: string
  readonly #db: Sqlite
  readonly #onChange: OnKeyChange

  /**
   * @param file a path, or {@link MEMORY}
   * @param onChange is told of each change made here
   */
  constructor(file: string, onChange: OnKeyChange = () => {}) {
    this.#file = file
    // No `onLoss`: replacing an unusable file with an empty one would revoke every key.
    this.#db = new Sqlite(file, STATEMENT_TIMEOUT, {
      busyTimeout: LOCK_TIMEOUT,
      schema: SCHEMA
    })
    this.#onChange = onChange
  }

  /**
   * Makes a key; its text can't be had again.
   *
   * @throws {OptionsError} when something is wrong with a field
   * @throws {KeyExistsError}
   */
  async create(spec: KeySpec): Promise<{ key: string; record: StoredKey }> {
    return (await this.#insert(spec, 'VALUES (?, ?, ?, ?, ?, ?)'))!
  }

  /** The same, but undefined if there is a key, or ever was one: whoever comes first makes it. */
  createFirst(spec: KeySpec): Promise<{ key: string; record: StoredKey } | undefined> {
    return this.#insert(spec, `SELECT ?, ?, ?, ?, ?, ? WHERE NOT EXISTS (${HAD_KEYS})`)
  }

  /**
   * Reads all of the file.
   *
   * @throws {KeyStoreError} when it cannot be used
   * @throws {NewerFormatError}
   */
  async check(): Promise<void> {
    try {
      await this.#db.check()
    } catch (error) {
      if (error instanceof NewerFormatError) throw error
      throw new KeyStoreError(this.#file, (error as Error).message)
    }
  }

  /** Is there a key, or was there ever one? */
  async hadKeys(): Promise<boolean> {
    return (await this.#db.run(HAD_KEYS, [])).length > 0
  }

  /**
   * Takes over a whole list of keys in one step: those that are there are replaced and keep their ids,
   * others are added; `full` also deletes those that are not in the list. A revoked key stays revoked.
   *
   * @param rows of the keys (see {@link toRows})
   */
  async sync(rows: Iterable<string>, mode: 'full' | 'incremental'): Promise<void> {
    const listing = [...rows].map(json => ({ sql: LIST, values: [json] }))
    const isFull = mode === 'full'
    await this.#db.runAll([])
    const run = (...all: string[]) => all.map(sql => ({ sql, values: [] }))
    // A long list takes seconds, which lookups must not wait for: they have another connection.
    const db = this.#file === MEMORY ? this.#db : new Sqlite(this.#file, SYNC_TIMEOUT)
    try {
      const results = await db.runAll([
        ...run(LISTED),
        ...listing,
        ...run(...(isFull ? REMOVE : []), UPSERT, 'DROP TABLE listed')
      ])
      const gone = isFull ? String(results[1 + listing.length]![0]!.hashes ?? '') : ''
      await this.#tellGone(gone)
    } finally {
      if (db !== this.#db) await db.close()
    }
    this.#onChange(undefined)
  }

  /** The newest first; of one user, if `user_id` is given. */
  async list({
    offset = 0,
    limit = PAGE,
    user_id
  }: {
    offset?: number
    limit?: number
    user_id?: string | undefined
  } = {}): Promise<{ keys: StoredKey[]; total: number }> {
    const of = user_id === undefined ? '' : 'WHERE user_id = ?'
    const values = user_id === undefined ? [] : [user_id]
    const page = [Math.max(0, Math.min(limit, MAX_PAGE)), offset]
    const [rows, [count]] = (await this.#db.runAll([
      { sql: `${VIEW} ${of} ORDER BY number DESC LIMIT ? OFFSET ?`, values: [...values, ...page] },
      { sql: `SELECT count(*) AS total FROM keys ${of}`, values }
    ])) as [Row[], [Row]]
    return { keys: rows.map(toStored), total: Number(count.total) }
  }

  /** @param reference an id, or the SHA-256 of a key, which may be one that was rotated away */
  async get(reference: string): Promise<StoredKey | undefined> {
    const [row] = await this.#db.run(
      `${VIEW} WHERE id = ? OR hash = ? OR id = (SELECT id FROM old_keys WHERE hash = ?)`,
      [reference, reference, reference]
    )
    return row && toStored(row)
  }

  /**
   * @returns undefined when there is no such key
   * @throws {OptionsError} when something is wrong with a field
   */
  async update(id: string, changes: KeyChanges): Promise<StoredKey | undefined> {
    const patch = toPatch(changes)
    const sql = `UPDATE keys SET fields = json_patch(fields, ?), updated_at = ? WHERE id = ?`
    return this.#change(id, [{ sql, values: [JSON.stringify(patch), Date.now(), id] }])
  }

  /** For good: neither an update nor a rotation brings it back. */
  async revoke(id: string): Promise<StoredKey | undefined> {
    const sql = 'UPDATE keys SET revoked_at = ?, updated_at = ? WHERE id = ? AND revoked_at IS NULL'
    const now = Date.now()
    return this.#change(id, [{ sql, values: [now, now, id] }], 0)
  }

  /**
   * Another gateway has revoked these, which may be none of ours. A key that was made since then is another
   * one, and of a key that was rotated the old text alone may be meant. `onChange` is not told.
   */
  async hearRevoked(revoked: readonly KeyNews[]): Promise<void> {
    const values = [JSON.stringify(revoked)]
    const heard = `(SELECT value ->> 'hash' AS dead, value ->> 'revokedAt' AS at FROM json_each(?))`
    await this.#db.runAll([
      {
        sql: `UPDATE keys SET revoked_at = at, updated_at = max(updated_at, at) FROM ${heard}
          WHERE hash = dead AND created_at <= at AND revoked_at IS NULL`,
        values
      },
      {
        sql: `UPDATE old_keys SET until = at FROM ${heard} WHERE hash = dead AND at < until`,
        values
      }
    ])
  }

  /**
   * Gives a key a new text. Its id stays, and with it limits and bills.
   *
   * @param grace how long (ms) the old text is still valid
   * @returns undefined when there is no such key
   */
  async rotate(
    id: string,
    { grace = 0 }: { grace?: number } = {}
  ): Promise<{ key: string; record: StoredKey } | undefined> {
    const key = newKey()
    const now = Date.now()
    const statements = [
      { sql: 'DELETE FROM old_keys WHERE until <= ?', values: [now] },
      {
        sql: 'INSERT INTO old_keys (hash, id, until) SELECT hash, id, ? FROM keys WHERE id = ?',
        values: [now + grace, id]
      },
      {
        sql: 'UPDATE keys SET hash = ?, masked = ?, updated_at = ? WHERE id = ?',
        values: [toHash(key), maskKey(key), now, id]
      }
    ]
    const record = await this.#change(id, statements, grace, HASH)
    return record && { key, record }
  }

  /** @returns whether it was there; bills keep its id */
  async delete(id: string): Promise<boolean> {
    const [hashes, [key]] = (await this.#db.runAll([
      { sql: HASHES, values: [id] },
      { sql: 'SELECT revoked_at FROM keys WHERE id = ?', values: [id] },
      { sql: 'DELETE FROM old_keys WHERE id = ?', values: [id] },
      { sql: 'DELETE FROM keys WHERE id = ?', values: [id] }
    ])) as [Row[], [Row]]
    // Where it was revoked that is known; whoever has made it anew since then is not meant.
    this.#tell(hashes, key?.revoked_at === null ? 0 : undefined)
    return hashes.length > 0
  }

  /** Looks a key up by its SHA-256. */
  async find(hash: string): Promise<FoundKey | undefined> {
    const [row] = await this.#db.run(
      `SELECT id, fields, revoked_at, NULL AS until FROM keys WHERE hash = ? UNION ALL
      SELECT id, fields, revoked_at, until FROM old_keys JOIN keys USING (id)
      WHERE old_keys.hash = ? LIMIT 1`,
      [hash, hash]
    )
    if (row === undefined) return undefined
    const { id, fields, revoked_at, until } = row
    return {
      id: String(id),
      fields: JSON.parse(String(fields)),
      isRevoked: revoked_at !== null,
      until: until === null ? undefined : Number(until)
    }
  }

  /** Changes when another process has changed anything. */
  async version(): Promise<string> {
    return this.#db.version()
  }

  close(): Promise<void> {
    return this.#db.close()
  }

  async #insert(given: KeySpec, source: string) {
    const spec = checkOptions(KeySpec, given, 'key')
    const key = spec.key ?? newKey()
    const row = toRow(spec, key, Date.now())
    try {
      const [[inserted], [stored]] = (await this.#db.runAll([
        { sql: `${INSERT} ${source} RETURNING id`, values: row },
        { sql: `${VIEW} WHERE id = ?`, values: [row[0]] }
      ])) as [Row[], Row[]]
      if (inserted === undefined) return undefined
      this.#onChange([row[1]])
      return { key, record: toStored(stored!) }
    } catch (error) {
      const isTaken = error instanceof DatabaseError && error.message.includes('keys.hash')
      throw isTaken ? new KeyExistsError() : error
    }
  }

  /** @param changed asks for the hashes that are told of, as they were before */
  async #change(
    id: string,
    statements: { sql: string; values: (string | number)[] }[],
    validFor?: number,
    changed = HASHES
  ): Promise<StoredKey | undefined> {
    const results = await this.#db.runAll([
      { sql: changed, values: [id] },
      ...statements,
      { sql: `${VIEW} WHERE id = ?`, values: [id] }
    ])
    this.#tell(results[0]!, validFor)
    const [row] = results.at(-1)!
    return row && toStored(row)
  }

  /** @param hashes one after the other */
  async #tellGone(hashes: string): Promise<void> {
    for (let at = 0; at < hashes.length; at += TOLD_AT_ONCE * HASH_LENGTH) {
      const some = hashes.slice(at, at + TOLD_AT_ONCE * HASH_LENGTH)
      this.#onChange(some.match(/.{64}/g)!, 0)
      await setImmediate()
    }
  }

  #tell(rows: Row[], validFor?: number): void {
    const hashes = rows.map(({ hash }) => String(hash))
    if (hashes.length > 0) this.#onChange(hashes, validFor)
  }
}
