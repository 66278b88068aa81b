import { timingSafeEqual } from 'node:crypto'
import { type Static, Type } from 'typebox'
import type { Distinct } from '../issues.ts'
import { keyFields, Time, toKeyRecord } from './fields.ts'
import { hashKey, idOfHash, type KeyRecord, type KeySource } from './key.ts'

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

/** Keys from the configuration, kept as hashes. */
export class StaticKeys implements KeySource {
  readonly name: string
  readonly #records = new Map<string, { hash: Buffer; record: KeyRecord }>()

  constructor(name: string, keys: StaticKey[]) {
    this.name = name
    for (const key of keys) {
      const hash = toHash(key.key)
      const record = toKeyRecord(key.name ?? idOfHash(hash), key)
      this.#records.set(hash, { hash: Buffer.from(hash, 'hex'), record })
    }
  }

  async lookup(_key: string, hash: string): Promise<KeyRecord | undefined> {
    const found = this.#records.get(hash)
    if (found === undefined) return undefined
    return timingSafeEqual(found.hash, Buffer.from(hash, 'hex')) ? found.record : undefined
  }

  get size(): number {
    return this.#records.size
  }
}
