import '../check-node.ts'
import { isDeepStrictEqual } from 'node:util'
import type { FastifyPluginAsync } from 'fastify'
import type { Static } from 'typebox'
import { Type } from 'typebox'
import { type Exchange, withExchanges } from '../exchange.ts'
import type { Issue } from '../issues.ts'
import { AccessLogOptions, openAccessLog, toLine } from '../logs/access.ts'
import { REQUEST_TABLE, RequestLog, RequestLogOptions } from '../logs/requests.ts'
import { type RequestRow, toRow, toStillbornRow } from '../logs/row.ts'
import type { LogSink } from '../logs/sink.ts'
import { checkOptions, type Given, OptionsError, Section } from '../options.ts'
import { share, toPart } from '../parts.ts'
import type { Database } from '../store/sql.ts'
import { openDatabase, StorageOptions, storageIssues } from '../store/storage.ts'
import { Table } from '../store/table.ts'

/**
 * The access log, a line for each request, and the request log, a row in a database: also for those that
 * were refused. Never a key or a query string, and a body only where that is asked for. Probes (health,
 * metrics) have none as long as they are answered.
 *
 * @example
 * await fastify.register(logging, { access: { enabled: true, format: 'json' } })
 */

export const LoggingOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Writes the logs below' }),
    access: AccessLogOptions,
    request: RequestLogOptions
  },
  'Logs of requests'
)
export type LoggingOptions = Static<typeof LoggingOptions>

export interface Logging {
  /** @throws when the new file cannot be written; then the old one stays */
  update(options: LoggingOptions, storage: StorageOptions): Promise<void>
}

/** How long (ms) a statement may take. */
const STATEMENT_TIMEOUT = 10_000

/** Why the request log can't use what it names of the storage. */
export function requestLogIssues(
  { enabled, request }: LoggingOptions,
  storage: StorageOptions
): Issue[] {
  if (!enabled || !request.enabled) return []
  return storageIssues(storage, 'databases', request.storage ?? '', ['request', 'storage'])
}

/** What is written to. */
interface Logs {
  access: LogSink | undefined
  requests: RequestLog | undefined
  db: Database | undefined
}

/** The options of the plugin; `storage` has what the request log names. */
export type GivenLoggingOptions = Given<LoggingOptions> & {
  storage?: Given<StorageOptions>
  /** Directory of relative paths; without it, the working directory. */
  dataDir?: string | undefined
}

const loggingPlugin: FastifyPluginAsync<GivenLoggingOptions> = async function logging(
  fastify,
  given
) {
  const { storage: givenStorage, dataDir, ...givenOptions } = given
  let options = checkOptions(LoggingOptions, { enabled: true, ...givenOptions })
  let storage = checkOptions(StorageOptions, givenStorage)
  const issues = requestLogIssues(options, storage)
  if (issues.length > 0) throw new OptionsError(issues)
  let logs = open(options, storage)

  function open({ enabled, access, request }: LoggingOptions, { databases }: StorageOptions): Logs {
    const found = databases.find(({ name }) => name === request.storage)
    const db =
      enabled && request.enabled ? openDatabase(found!, dataDir, STATEMENT_TIMEOUT) : undefined
    const table = db && new Table(db, request.table, REQUEST_TABLE)
    return {
      access: enabled && access.enabled ? openAccessLog(access, dataDir) : undefined,
      requests: table && new RequestLog(rows => table.insert(rows), fastify.log),
      db
    }
  }

  function write(row: RequestRow, body?: Buffer): void {
    logs.access?.write(toLine(row, options.access.format))
    logs.requests?.add(row, body)
  }

  const exchanges = withExchanges(fastify)
  fastify.addHook('onRequest', ({ exchange }, _reply, done) => {
    exchange.logsBody = logs.requests !== undefined && options.request.include_body
    done()
  })
  exchanges.onEnd('log', exchange => {
    if (logs.access === undefined && logs.requests === undefined) return
    if (isAnsweredProbe(exchange)) return
    const { payload } = exchange.request
    write(toRow(exchange), exchange.logsBody ? payload?.bytes : undefined)
  })
  exchanges.onStillborn.push((error, id, clientIp) => write(toStillbornRow(id, error, clientIp)))

  share(fastify, 'logging', {
    async update(changed, changedStorage) {
      const same = isDeepStrictEqual([changed, changedStorage], [options, storage])
      if (same) return
      const before = logs
      logs = open(changed, changedStorage)
      options = changed
      storage = changedStorage
      await close(before)
    }
  })
  fastify.addHook('onClose', async () => {
    const last = logs
    logs = { access: undefined, requests: undefined, db: undefined }
    await close(last)
  })
}

async function close({ access, requests, db }: Logs): Promise<void> {
  await Promise.all([access?.close(), requests?.close()])
  await db?.close()
}

function isAnsweredProbe({ request, outcome }: Exchange): boolean {
  return request.routeOptions.config.probe === true && outcome === 'ok'
}

export default toPart(loggingPlugin, {
  name: 'logging',
  decorates: ['logging']
})
