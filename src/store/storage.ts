import { existsSync } from 'node:fs'
import { resolve } from 'node:path'
import { type Static, Type } from 'typebox'
import { type Distinct, didYouMean, type Issue } from '../issues.ts'
import { Duration, LONGEST_AGE, Section } from '../options.ts'
import { parseDsn, type Target } from './dsn.ts'
import { openMysql } from './mysql.ts'
import { openPostgres } from './postgres.ts'
import type { Database } from './sql.ts'
import { Sqlite } from './sqlite.ts'

/** The databases and caches that other parts name. One that nobody uses is never connected to. */

/** The option that names one of them. */
export function storageName(description: string) {
  return Type.String({ minLength: 1, description })
}

const secret = (description: string) => Type.Optional(Type.String({ secret: true, description }))
const NO_EFFECT = 'Of no effect'
const ignoredCount = Type.Optional(Type.Integer({ description: NO_EFFECT }))
const ignoredTime = Type.Optional(Duration(undefined, NO_EFFECT, 0, LONGEST_AGE))

const Name = Type.String({ minLength: 1, description: 'What other parts call it' })
const Enabled = Type.Boolean({ default: true, description: 'Switches it on' })

const TlsOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Speaks TLS' }),
    ca_file: Type.Optional(
      Type.String({ description: 'Authority of its certificate, PEM; else those that Node trusts' })
    ),
    verify: Type.Boolean({ default: true, description: 'Checks its certificate' })
  },
  'TLS to it'
)

const DatabaseOptions = Type.Object(
  {
    name: Name,
    enabled: Enabled,
    driver: Type.Enum(['postgres', 'mysql', 'sqlite'], {
      description: 'What it is; mysql is MariaDB, too'
    }),
    dsn: secret(
      'Instead of host, port, user, password and database: a URL, or the form of Go or libpq'
    ),
    host: Type.String({ minLength: 1, default: 'localhost', description: 'Its host' }),
    port: Type.Optional(
      Type.Integer({ minimum: 1, maximum: 65535, description: 'Its port; else 5432 or 3306' })
    ),
    user: Type.Optional(Type.String({ description: 'User' })),
    password: secret('Password'),
    database: Type.Optional(Type.String({ description: 'Database' })),
    tls: TlsOptions,
    path: Type.String({
      minLength: 1,
      default: 'llmproxy.db',
      description: 'File of SQLite, below the data directory if relative'
    }),
    max_open_conns: Type.Integer({
      minimum: 0,
      default: 10,
      description: 'Connections of each part that uses it; 0: no limit'
    }),
    max_idle_conns: Type.Integer({
      minimum: 0,
      default: 2,
      description: 'Idle ones that are kept'
    }),
    conn_max_lifetime: Duration(
      '0',
      'How old a connection may get; 0: as old as it likes',
      0,
      LONGEST_AGE
    ),
    conn_max_idle_time: Duration('30s', 'How long an idle one is kept; 0: for ever', 0)
  },
  { additionalProperties: false }
)
export type DatabaseOptions = Static<typeof DatabaseOptions>

const ADDRESS = /^(\[[0-9a-fA-F:.]+\]|[^\s:/[\]]+):\d{1,5}$/

const CacheOptions = Type.Object(
  {
    name: Name,
    enabled: Enabled,
    driver: Type.Enum(['redis', 'memory'], {
      description: 'What it is; memory is of no effect, as in the original'
    }),
    addr: Type.String({
      pattern: ADDRESS.source,
      expects: 'an address such as redis:6379',
      default: 'localhost:6379',
      description: 'Its address'
    }),
    username: Type.Optional(Type.String({ description: 'User' })),
    password: secret('Password'),
    db: Type.Integer({ minimum: 0, default: 0, description: 'Number of the database' }),
    tls: TlsOptions,
    dial_timeout: Duration('5s', 'How long connecting may take'),
    read_timeout: Duration('3s', 'How long a command may take'),
    write_timeout: ignoredTime,
    pool_size: ignoredCount,
    min_idle_conns: ignoredCount,
    max_size: ignoredCount,
    ttl: ignoredTime
  },
  { additionalProperties: false }
)
export type CacheOptions = Static<typeof CacheOptions>

const distinct: Distinct[] = [
  { by: given => (typeof given === 'string' ? undefined : given.name), what: 'name' }
]

export const StorageOptions = Section(
  {
    databases: Type.Array(DatabaseOptions, { default: [], distinct, description: 'SQL databases' }),
    caches: Type.Array(CacheOptions, { default: [], distinct, description: 'Redis' })
  },
  'Databases and caches that other parts name'
)
export type StorageOptions = Static<typeof StorageOptions>

const PACKAGES = { postgres: 'pg', mysql: 'mysql2', sqlite: undefined, redis: '@redis/client' }

/**
 * Why the part at `path` can't use the database or the cache that it names; the path of an issue
 * within the storage begins with `storage`.
 */
export function storageIssues(
  storage: StorageOptions,
  list: 'databases' | 'caches',
  name: string,
  path: Issue['path']
): Issue[] {
  const usable = storage[list].filter(({ driver }) => driver !== 'memory')
  const found = usable.find(each => each.name === name)
  const noun = list === 'databases' ? 'a database' : 'a redis'
  if (found === undefined) {
    const known = usable.map(each => each.name)
    const hint = didYouMean(name, known)
    return [
      { path, message: `must be the name of ${noun} of storage.${list} (got "${name}")${hint}` }
    ]
  }
  if (!found.enabled) return [{ path, message: `names ${noun} that is switched off` }]
  const at = ['storage', list, (storage[list] as readonly unknown[]).indexOf(found)]
  const issues: Issue[] = []
  const missing = missingPackage(found.driver as keyof typeof PACKAGES)
  if (missing !== undefined) issues.push({ path: [...at, 'driver'], message: missing })
  if ('dsn' in found && found.driver !== 'sqlite' && targetOf(found) === undefined) {
    const message = `must be what ${found.driver} understands, such as ${EXAMPLES[found.driver]}`
    issues.push({ path: [...at, 'dsn'], message })
  }
  const { ca_file } = found.tls
  if (ca_file !== undefined && !existsSync(ca_file)) {
    const message = `must be a file that is there (got "${ca_file}")`
    issues.push({ path: [...at, 'tls', 'ca_file'], message })
  }
  return issues
}

/**
 * Makes the client of a database. Nothing is connected to before the first statement.
 *
 * @param dataDir where a file is, if its path is relative
 * @param timeout how long (ms) connecting and one statement may take together
 */
export function openDatabase(
  options: DatabaseOptions,
  dataDir: string | undefined,
  timeout: number
): Database {
  if (options.driver === 'sqlite') return new Sqlite(fileOf(options, dataDir), timeout)
  const open = options.driver === 'postgres' ? openPostgres : openMysql
  return open(targetOf(options)!, { ...options, timeout })
}

/** Go's driver takes a DSN for SQLite, too: the file, as a URI or not. */
export function fileOf({ dsn, path }: DatabaseOptions, dataDir = ''): string {
  return resolve(dataDir, (dsn ?? path).replace(/^file:|\?.*$/g, ''))
}

function targetOf(options: DatabaseOptions): Target | undefined {
  const { driver, dsn, host, port, user, password, database, tls } = options
  const given = { host, port, user, password, database, tls: undefined, caFile: undefined }
  const target = dsn === undefined ? given : parseDsn(driver === 'mysql' ? driver : 'postgres', dsn)
  const mode = tls.enabled ? (tls.verify ? 'verified' : 'unverified') : 'off'
  return target && { ...target, tls: target.tls ?? mode, caFile: target.caFile ?? tls.ca_file }
}

const EXAMPLES = {
  postgres: 'postgres://user:password@host:5432/database?sslmode=verify-full',
  mysql: 'user:password@tcp(host:3306)/database?tls=true'
}

/** The clients are no dependencies of this package: who uses a driver installs its client. */
function missingPackage(driver: keyof typeof PACKAGES): string | undefined {
  const name = PACKAGES[driver]
  if (name === undefined) return undefined
  try {
    import.meta.resolve(name)
    return undefined
  } catch {
    return `${driver} needs the package "${name}": npm install ${name}`
  }
}
