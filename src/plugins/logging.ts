import { isDeepStrictEqual } from 'node:util'
import type { FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import type { Static } from 'typebox'
import { Type } from 'typebox'
import { type Exchange, withExchanges } from '../exchange.ts'
import { AccessLogOptions, openAccessLog, toLine } from '../logs/access.ts'
import { type RequestRow, toRow, toStillbornRow } from '../logs/row.ts'
import type { LogSink } from '../logs/sink.ts'
import { checkOptions, type Given, NotBuilt, Section } from '../options.ts'

/**
 * The access log: a line for each request, also for those that were refused. Never a key, a body or a
 * query string. Probes (health, metrics) have none as long as they are answered.
 *
 * @example
 * await fastify.register(logging, { access: { enabled: true, format: 'json' } })
 */

export const LoggingOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Writes the logs below' }),
    access: AccessLogOptions,
    request: NotBuilt('One row for each request in a database')
  },
  'Logs of requests'
)
export type LoggingOptions = Static<typeof LoggingOptions>

declare module 'fastify' {
  interface FastifyInstance {
    logging: {
      /** @throws when the new file cannot be written; then the old one stays */
      update(options: LoggingOptions): Promise<void>
    }
  }
  interface FastifyContextConfig {
    /** Asked by machines all the time. */
    probe?: boolean
  }
}

const loggingPlugin: FastifyPluginAsync<Given<LoggingOptions>> = async function logging(
  fastify,
  given
) {
  let options = checkOptions(LoggingOptions, { enabled: true, ...given })
  let access = open(options)

  function open({ enabled, access }: LoggingOptions): LogSink | undefined {
    return enabled && access.enabled ? openAccessLog(access, fastify.dataDir) : undefined
  }

  function write(row: RequestRow): void {
    access?.write(toLine(row, options.access.format))
  }

  const exchanges = withExchanges(fastify)
  exchanges.onEnd('log', exchange => {
    if (access !== undefined && !isAnsweredProbe(exchange)) write(toRow(exchange))
  })
  exchanges.onStillborn.push((error, id, clientIp) => write(toStillbornRow(id, error, clientIp)))

  fastify.decorate('logging', {
    async update(changed) {
      if (isDeepStrictEqual(changed, options)) return
      const before = access
      access = open(changed)
      options = changed
      await before?.close()
    }
  })
  fastify.addHook('onClose', async () => {
    const last = access
    access = undefined
    await last?.close()
  })
}

function isAnsweredProbe({ request, outcome }: Exchange): boolean {
  return request.routeOptions.config.probe === true && outcome === 'ok'
}

export default fp(loggingPlugin, { name: 'logging', fastify: '5.x' })
