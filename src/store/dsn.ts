/** Where a database server is, and how it is spoken to. */
export interface Target {
  /** A host, or the folder or path of a Unix socket. */
  host: string
  port: number | undefined
  user: string | undefined
  password: string | undefined
  database: string | undefined
  /** Undefined where the DSN doesn't say. */
  tls: 'off' | 'verified' | 'unverified' | undefined
  caFile: string | undefined
}

/**
 * Reads a DSN: a URL, for MySQL also the form of Go's driver, for PostgreSQL also that of libpq.
 * Parameters that say nothing about where and how to connect are ignored.
 *
 * @returns undefined when it can't be read.
 * @example
 * parseDsn('mysql', 'me:secret@tcp(db:3306)/usage?tls=skip-verify').tls // 'unverified'
 * parseDsn('postgres', 'host=db user=me password=secret').host // 'db'
 */
export function parseDsn(driver: 'postgres' | 'mysql', dsn: string): Target | undefined {
  if (/^(postgres(ql)?|mysql|mariadb):\/\//.test(dsn)) return fromUrl(dsn)
  return driver === 'mysql' ? fromGo(dsn) : fromLibpq(dsn)
}

type Parts = Record<string, string | undefined>

function fromUrl(dsn: string): Target | undefined {
  try {
    const { hostname, port, username, password, pathname, searchParams } = new URL(dsn)
    const [user, secret, database, host] = [
      username,
      password,
      pathname.slice(1),
      hostname.replace(/^\[|\]$/g, '')
    ].map(decodeURIComponent)
    const params = Object.fromEntries(searchParams)
    return toTarget({ host, port, user, password: secret, database, ...params }, params)
  } catch {
    return undefined
  }
}

/** `user:password@tcp(host:port)/database?params`; a password may hold anything. */
const GO = /^(?:([^:]*?)(?::(.*))?@)?(?:(tcp|unix)\(([^)]*)\))?\/([^/?]*)(?:\?(.*))?$/s

function fromGo(dsn: string): Target | undefined {
  const [, user, password, net, address = '', database, query] = GO.exec(dsn) ?? []
  if (database === undefined) return undefined
  const [, host, port] = /^\[?(.*?)\]?(?::(\d+))?$/.exec(address)!
  const params = Object.fromEntries(new URLSearchParams(query))
  return toTarget({ host: net === 'unix' ? address : host, port, user, password, database }, params)
}

const PAIR = /\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?=\s|$)/gsy

function fromLibpq(dsn: string): Target | undefined {
  const pairs = [...dsn.trim().matchAll(PAIR)]
  if (pairs.length === 0 || pairs.map(([all]) => all).join('') !== dsn.trim()) return undefined
  const params = Object.fromEntries(
    pairs.map(([, name, quoted, bare]) => [name, (quoted ?? bare ?? '').replace(/\\(.)/gs, '$1')])
  )
  return toTarget({ ...params, database: params.dbname }, params)
}

function toTarget(parts: Parts, params: Parts): Target | undefined {
  const port = parts.port ? Number(parts.port) : undefined
  if (port !== undefined && !(port >= 1 && port <= 65535)) return undefined
  const mode = params.sslmode ?? params['ssl-mode'] ?? params.tls ?? params.ssl
  const tls = mode === undefined ? undefined : MODES[mode.toLowerCase().replaceAll('_', '-')]
  if (mode !== undefined && tls === undefined) return undefined
  return {
    host: parts.host || 'localhost',
    port,
    user: parts.user || undefined,
    password: parts.password || undefined,
    database: parts.database || undefined,
    tls,
    caFile: params.sslrootcert
  }
}

/**
 * TLS is checked, or said not to be. Modes that leave it to chance (`prefer`, `allow`, `preferred`)
 * are none.
 */
const MODES: Record<string, 'off' | 'verified' | 'unverified'> = {
  disable: 'off',
  disabled: 'off',
  false: 'off',
  require: 'verified',
  required: 'verified',
  'verify-ca': 'verified',
  'verify-full': 'verified',
  'verify-identity': 'verified',
  true: 'verified',
  'no-verify': 'unverified',
  'skip-verify': 'unverified'
}
