import { timingSafeEqual } from 'node:crypto'
import { type Static, Type } from 'typebox'
import type { Distinct } from '../issues.ts'
import { NotBuilt } from '../options.ts'
import {
  hashKey,
  isNetwork,
  type KeyRecord,
  type KeySource,
  parseStatus,
  parseTime,
  toNetworks
} from './key.ts'

const Networks = (description: string) =>
  Type.Array(
    Type.String({ check: isNetwork, expects: 'an address or network such as 10.0.0.0/8' }),
    {
      description
    }
  )

const Time = (description: string) =>
  Type.Unsafe<string | number>({
    type: ['string', 'number'],
    check: (value: unknown) => !Number.isNaN(parseTime(value)),
    description,
    expects: 'a time such as 2026-12-31T00:00:00Z, or Unix seconds or milliseconds'
  })

const HASHED = 'sha256:'

/** A key as it is kept: `sha256:` and its hash. What is hashed already stays. */
function toHashed(key: string): string {
  return key.startsWith(HASHED) ? key.toLowerCase() : HASHED + hashKey(key)
}

function isKey(key: unknown): boolean {
  if (typeof key !== 'string' || !/^[\x21-\x7e]+$/.test(key)) return false
  return !key.startsWith(HASHED) || /^sha256:[0-9a-f]{64}$/i.test(key)
}

/** One key in the configuration. Text alone is the key itself. */
export const StaticKey = Type.Object(
  {
    key: Type.String({
      check: isKey,
      hashed: toHashed,
      expects: 'a key without spaces, or sha256: and 64 hexadecimal digits',
      secret: true,
      description: 'The key, or sha256: and its SHA-256 in hexadecimal digits'
    }),
    name: Type.Optional(Type.String({ description: 'Name in logs and bills' })),
    user_id: Type.Optional(Type.String({ description: 'Who pays' })),
    status: Type.Optional(
      Type.Unsafe<string | number>({
        type: ['string', 'number'],
        check: (value: unknown) => parseStatus(value) !== undefined,
        description: 'active, disabled, expired or quota_exceeded',
        expects: 'one of active, disabled, expired, quota_exceeded'
      })
    ),
    starts_at: Type.Optional(Time('Not valid before; UTC where no zone is named')),
    expires_at: Type.Optional(Time('Not valid from then on; UTC where no zone is named')),
    allowed_ips: Type.Optional(Networks('Addresses it may be used from; none: all')),
    denied_ips: Type.Optional(Networks('Addresses it may not be used from')),
    models: Type.Optional(
      Type.Array(Type.String({ minLength: 1 }), {
        description: 'Models it may use, * as a wildcard; none: all'
      })
    ),
    total_quota: NotBuilt('Tokens it may use'),
    used_quota: NotBuilt('Tokens it has used'),
    quota_reset_period: Type.Optional(
      Type.Enum(['never', 'daily', 'weekly', 'monthly'], { description: 'Belongs to total_quota' })
    ),
    last_reset_at: Type.Optional(Time('Belongs to total_quota')),
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
      const hash = toHashed(key.key).slice(HASHED.length)
      this.#records.set(hash, { hash: Buffer.from(hash, 'hex'), record: toRecord(key, hash) })
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

function toRecord(key: StaticKey, hash: string): KeyRecord {
  return {
    id: key.name ?? `key_${hash.slice(0, 12)}`,
    name: key.name,
    userId: key.user_id,
    status: parseStatus(key.status ?? 'active')!,
    startsAt: key.starts_at === undefined ? undefined : parseTime(key.starts_at),
    expiresAt: key.expires_at === undefined ? undefined : parseTime(key.expires_at),
    allowedIps: toNetworks(key.allowed_ips),
    deniedIps: toNetworks(key.denied_ips),
    models: key.models?.length === 0 ? undefined : key.models
  }
}
