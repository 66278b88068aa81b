import { Socket } from 'node:net'
import type pg from 'pg'
import { type Connection, Connections, type ConnectionsOptions } from './connections.ts'
import type { Target } from './dsn.ts'
import type { Database } from './sql.ts'
import { tlsOf } from './tls.ts'

/** Values that don't fit, rules that are broken, and more than an index takes (SQLSTATE classes). */
const REFUSALS = /^(22|23|54)/

/** Connections to a PostgreSQL server; the first one is made when it is needed. */
export function openPostgres(target: Target, options: ConnectionsOptions): Database {
  const load = async () => {
    const { default: library } = await import('pg')
    return () => connect(library, target)
  }
  return new Connections('postgres', load, isRefusal, options)
}

function isRefusal(error: unknown): boolean {
  const { code, severity } = error as { code?: string; severity?: string }
  return severity !== undefined && REFUSALS.test(code ?? '')
}

/** Types without a zone: Node would take them for local time. */
const [TIMESTAMP, DATE] = [1114, 1082]

function connect({ Client, TypeOverrides }: typeof pg, target: Target): Connection {
  const { host, port = 5432, user, database, password = '' } = target
  const socket = new Socket()
  const types = new TypeOverrides()
  for (const type of [TIMESTAMP, DATE]) types.setTypeParser(type!, String)
  const client = new Client({
    host,
    port,
    user: user || undefined,
    database: database || undefined,
    // A function, so that no file is searched for it.
    password: () => password,
    ssl: tlsOf(target) ?? false,
    types,
    stream: () => socket,
    keepAlive: true,
    application_name: 'llmproxy'
  })
  // Whoever waits for it gets the error, too.
  client.on('error', () => {})
  return {
    ready: client.connect().then(() => {}),
    get isOpen() {
      return !socket.destroyed
    },
    async query(sql, values) {
      const { rows } = await client.query(sql, values as unknown[] | undefined)
      // Of several statements there is a result each, and nobody asks for one.
      return rows ?? []
    },
    end: () => void client.end().catch(() => {}),
    destroy: () => void socket.destroy()
  }
}
