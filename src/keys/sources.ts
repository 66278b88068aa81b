import { existsSync } from 'node:fs'
import { isDeepStrictEqual } from 'node:util'
import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import type { Issue } from '../issues.ts'
import { NotBuilt } from '../options.ts'
import { Redis } from '../store/redis.ts'
import { openDatabase, type StorageOptions, storageIssues } from '../store/storage.ts'
import { BuiltinKeys } from './builtin.ts'
import { CachedKeys, CacheOptions } from './cached.ts'
import { DatabaseKeys, DatabaseKeysOptions } from './database.ts'
import { FileKeys, FileKeysOptions } from './file.ts'
import { JwtKeys, JwtKeysOptions } from './jwt.ts'
import type { KeySource, StatusCodes } from './key.ts'
import type { KeyStore } from './key-store.ts'
import { RedisKeys, RedisKeysOptions } from './redis.ts'
import { type StaticKey, StaticKeyList, StaticKeys } from './static.ts'
import { WebhookKeys, WebhookKeysOptions } from './webhook.ts'

/** The sources of keys that the options ask for. */

export const SourceOptions = Type.Object(
  {
    name: Type.Optional(Type.String({ minLength: 1, description: 'Name in logs' })),
    type: Type.Enum(['builtin', 'static', 'file', 'redis', 'database', 'webhook', 'jwt'], {
      later: ['lua'],
      description: 'What it is; builtin: the embedded store'
    }),
    enabled: Type.Boolean({ default: true, description: 'Switches it on' }),
    static: Type.Optional(
      Type.Object(
        { keys: StaticKeyList('Keys') },
        { additionalProperties: false, description: 'Keys in this file' }
      )
    ),
    file: Type.Optional(FileKeysOptions),
    redis: Type.Optional(RedisKeysOptions),
    database: Type.Optional(DatabaseKeysOptions),
    webhook: Type.Optional(WebhookKeysOptions),
    jwt: Type.Optional(JwtKeysOptions),
    cache: CacheOptions,
    lua: NotBuilt('Script that decides'),
    script: NotBuilt('Script that decides')
  },
  { additionalProperties: false, partOfType: true }
)
export type SourceOptions = Static<typeof SourceOptions>

/** What sources are asked for: in short, and one by one. */
interface Asked {
  enabled: boolean
  keys: StaticKey[]
  pipeline: SourceOptions[]
  status_codes: StatusCodes
}

/** Are keys looked up in the embedded store? Also where nothing else is named. */
export function looksIntoStore({ enabled, keys, pipeline }: Asked): boolean {
  if (keys.length === 0 && pipeline.length === 0) return enabled
  return enabled && pipeline.some(each => each.enabled && each.type === 'builtin')
}

/** Why sources can't use what they name. */
export function sourceIssues({ enabled, pipeline }: Asked, storage: StorageOptions): Issue[] {
  return pipeline.flatMap(({ type, enabled: isOn, ...parts }, at) => {
    if (!enabled || !isOn) return []
    const path = ['pipeline', at, type]
    const { file, redis, database, jwt } = parts
    if (type === 'redis')
      return storageIssues(storage, 'caches', redis!.storage, [...path, 'storage'])
    if (type === 'database') {
      return storageIssues(storage, 'databases', database!.storage, [...path, 'storage'])
    }
    if (type === 'file') return missing(file!.path, [...path, 'path'])
    return type === 'jwt' ? missing(jwt!.jwks_file, [...path, 'jwks_file']) : []
  })
}

/** Why quotas of keys in the configuration cannot be counted. */
export function keyQuotaIssues({ enabled, keys, pipeline }: Asked, hasPrices: boolean): Issue[] {
  if (!enabled || hasPrices) return []
  const lists: [Issue['path'], StaticKey[]][] = [[['keys'], keys]]
  for (const [at, each] of pipeline.entries()) {
    if (each.enabled) lists.push([['pipeline', at, 'static', 'keys'], each.static?.keys ?? []])
  }
  return lists.flatMap(([path, list]) =>
    list.flatMap(({ total_quota, quota_unit }, at) => {
      if (!total_quota || quota_unit !== 'cost') return []
      return [{ path: [...path, at, 'quota_unit'], message: 'needs usage.prices to count by' }]
    })
  )
}

function missing(file: string | undefined, path: Issue['path']): Issue[] {
  if (file === undefined || existsSync(file)) return []
  return [{ path, message: `must be a file that is there (got "${file}")` }]
}

/** What sources need beside their own options. */
export interface Surroundings {
  storage: StorageOptions
  dataDir: string | undefined
  /** Where `builtin` looks; it stays open when the source is closed. */
  store(): KeyStore
  log: FastifyBaseLogger
}

/** Sources, each under all options that it was made of. */
export type Sources = ReadonlyMap<readonly unknown[], KeySource>

/**
 * The sources that are switched on, in order; where nothing is named, the embedded store. Of those that were
 * there before, the ones that nothing has changed for go on, with what they remember.
 *
 * @throws when a file of keys can't be used
 */
export async function toSources(
  asked: Asked,
  around: Surroundings,
  before: Sources
): Promise<Sources> {
  const { enabled, keys, pipeline, status_codes } = asked
  const sources = new Map<readonly unknown[], KeySource>()
  const add = async (said: unknown, make: () => KeySource | Promise<KeySource>) => {
    const all = [said, status_codes, around.storage]
    const known = [...before.keys()].find(each => isDeepStrictEqual(each, all)) ?? all
    sources.set(known, before.get(known) ?? (await make()))
  }
  if (!enabled) return sources
  try {
    if (keys.length > 0) await add(keys, () => StaticKeys.of('keys', keys))
    for (const each of pipeline) {
      if (each.enabled) await add(each, () => toSource(each, status_codes, around))
    }
    if (keys.length === 0 && pipeline.length === 0) {
      await add('builtin', () => new BuiltinKeys('builtin', around.store()))
    }
  } catch (error) {
    closeSources(sources, before)
    throw error
  }
  return sources
}

/** Closes those that the others do not have. */
export function closeSources(sources: Sources, others: Sources): void {
  for (const [all, source] of sources) if (!others.has(all)) void source.close?.()
}

function toSource(
  options: SourceOptions,
  codes: StatusCodes,
  { storage, dataDir, store, log }: Surroundings
): KeySource | Promise<KeySource> {
  const { type, name = type, cache, file, redis, database, webhook, jwt } = options
  const onUnreadable = (member: string, keyId: string) =>
    log.warn({ source: name, keyId, member }, 'a member of a key is unreadable')
  const cached = (source: KeySource) => new CachedKeys(source, cache, log)
  switch (type) {
    case 'builtin':
      return new BuiltinKeys(name, store())
    case 'static':
      return StaticKeys.of(name, options.static!.keys)
    case 'file':
      return FileKeys.open(name, file!, log)
    case 'redis': {
      const found = storage.caches.find(each => each.name === redis!.storage)!
      return cached(new RedisKeys(name, new Redis(found), redis!, onUnreadable))
    }
    case 'database': {
      const found = storage.databases.find(each => each.name === database!.storage)!
      const db = openDatabase(found, dataDir, database!.timeout)
      return cached(new DatabaseKeys(name, db, database!, onUnreadable))
    }
    case 'webhook':
      return cached(new WebhookKeys(name, webhook!, codes, onUnreadable))
    case 'jwt':
      return JwtKeys.open(name, jwt!, onUnreadable, log).then(cached)
  }
}
