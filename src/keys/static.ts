import { type Static, Type } from 'typebox'
import type { Distinct } from '../issues.ts'
import { inSlices } from '../slices.ts'
import { type KeyFields, keyFields, Time, toKeyRecord } from './fields.ts'
import { hashKey, idOfHash, type KeyRecord, type KeySource } from './key.ts'
import { Lru } from './lru.ts'

const HASHED = 'sha256:'

/** A key as it is kept: `sha256:` and its hash. What is hashed already stays. */
function toHashed(key: string): string {
  return key.startsWith(HASHED) ? key.toLowerCase() : HASHED + hashKey(key)
}

/** SHA-256 of a key, which may be given as `sha256:` and its hash. */
export function toHash(key: string): string {
  return toHashed(key).slice(HASHED.length)
}

function isKey(key: unknown): boolean {
  if (typeof key !== 'string' || !/^[\x21-\x7e]+$/.test(key)) return false
  return !key.startsWith(HASHED) || /^sha256:[0-9a-f]{64}$/i.test(key)
}

const keyText = {
  check: isKey,
  expects: 'a key without spaces, or sha256: and 64 hexadecimal digits',
  secret: true,
  description: 'The key, or sha256: and its SHA-256 in hexadecimal digits'
}
export const KeyText = Type.String(keyText)

/** A shorter key is a mistake, or guessed. */
const MIN_KEY = 4
/** A key that the store receives. */
export const NewKeyText = Type.String({
  ...keyText,
  check: (key: unknown) => isKey(key) && String(key).length >= MIN_KEY,
  expects: `a key without spaces, of at least ${MIN_KEY} characters, or sha256: and 64 hexadecimal digits`
})

/** One key in the configuration. Text alone is the key itself. */
export const StaticKey = Type.Object(
  {
    key: Type.String({ ...keyText, hashed: toHashed }),
    ...keyFields,
    created_at: Type.Optional(Time('A note for people')),
    updated_at: Type.Optional(Time('A note for people'))
  },
  { additionalProperties: false, shorthand: 'key', type: ['object', 'string'] }
)
export type StaticKey = Static<typeof StaticKey>

function hashOf(key: unknown): string | undefined {
  return isKey(key) ? toHashed(String(key)) : undefined
}

/** A list of keys: each once, and each name once, since limits and bills hang on it. */
export const StaticKeyList = (description: string) =>
  Type.Array(StaticKey, {
    default: [],
    secret: true,
    description,
    distinct: [
      { by: given => hashOf(typeof given === 'string' ? given : given.key), what: 'key' },
      { by: given => (typeof given === 'string' ? undefined : given.name), what: 'name' }
    ] satisfies Distinct[]
  })

/** A key as it is kept: its SHA-256, and its fields as JSON, which take less memory than objects. */
export type KeptKey = [hash: string, fields: string]

export function toKept({ key, created_at: _, updated_at: __, ...fields }: StaticKey): KeptKey {
  return [toHash(key), JSON.stringify(fields)]
}

/** Records that are remembered, of keys that were used lately. */
const MOST = 10_000

/** Keys from the configuration or a file, kept as hashes. */
export class StaticKeys implements KeySource {
  readonly name: string
  readonly #fields = new Map<string, string>()
  readonly #records = new Lru<string, Promise<KeyRecord>>(MOST)

  /** Takes keys without blocking the event loop. */
  static async of(name: string, keys: readonly StaticKey[]): Promise<StaticKeys> {
    const all = new StaticKeys(name)
    await inSlices(keys, key => all.add(toKept(key)))
    return all
  }

  constructor(name: string) {
    this.name = name
  }

  add([hash, fields]: KeptKey): void {
    this.#fields.set(hash, fields)
  }

  async lookup(_key: string, hash: string): Promise<KeyRecord | undefined> {
    const known = this.#records.get(hash)
    if (known !== undefined) return known
    const json = this.#fields.get(hash)
    if (json === undefined) return undefined
    const fields: KeyFields = JSON.parse(json)
    const record = toKeyRecord(fields.name ?? idOfHash(hash), fields)
    this.#records.set(hash, record)
    return record
  }
}
