import { connect as dial } from 'node:net'
import { type Connection, Connections, type ConnectionsOptions } from './connections.ts'
import type { Target } from './dsn.ts'
import type { Database, Row } from './sql.ts'
import { tlsOf } from './tls.ts'

/** Values that don't fit, and rules that are broken (SQLSTATE classes). */
const REFUSALS = /^(22|23)/
/** The same without a class of its own: an incorrect value, and a statement that is too long. */
const REFUSED_CODES = new Set(['ER_TRUNCATED_WRONG_VALUE_FOR_FIELD', 'ER_NET_PACKET_TOO_LARGE'])

/** Connections to a MySQL or MariaDB server; the first one is made when it is needed. */
export function openMysql(target: Target, options: ConnectionsOptions): Database {
  const load = async () => {
    const { default: library } = await import('mysql2')
    return () => connect(library, target)
  }
  return new Connections('mysql', load, isRefusal, options)
}

function isRefusal(error: unknown): boolean {
  const { code, sqlState } = error as { code?: string; sqlState?: string }
  return REFUSALS.test(sqlState ?? '') || REFUSED_CODES.has(code ?? '')
}

function connect(library: typeof import('mysql2'), target: Target): Connection {
  const { host, port = 3306, user, database, password } = target
  const socket = host.startsWith('/') ? dial(host) : dial(port, host)
  socket.setKeepAlive(true)
  // mysql2 tells Node's TLS no host where it is an address; without this it would be taken for localhost.
  Object.assign(socket, { _host: host })
  const ssl = tlsOf(target)
  const connection = library.createConnection({
    host,
    user,
    database: database || undefined,
    password,
    // Left to itself it takes any host's certificate.
    ...(ssl === undefined ? {} : { ssl: { ...ssl, verifyIdentity: ssl.rejectUnauthorized } }),
    stream: () => socket,
    charset: 'UTF8MB4_UNICODE_CI',
    // Times have no zone there; they are in UTC.
    timezone: 'Z',
    // Of statements that differ in their number of rows alone there are many.
    maxPreparedStatements: 16
  } as never)
  const ready = Promise.withResolvers<void>()
  // Whoever waits for it gets the error, too.
  connection.on('error', () => {})
  connection.connect(error => (error ? ready.reject(error) : ready.resolve()))
  return {
    ready: ready.promise,
    get isOpen() {
      return !socket.destroyed
    },
    query(sql, values) {
      return new Promise((resolve, reject) => {
        const done = (error: unknown, rows: unknown) =>
          error ? reject(error) : resolve(Array.isArray(rows) ? (rows as Row[]) : [])
        // The server puts the values in, whatever its mode makes of a backslash.
        if (values === undefined) connection.query(sql, done)
        else connection.execute(sql, values as never, done)
      })
    },
    end: () => connection.end(() => {}),
    destroy: () => void socket.destroy()
  }
}
