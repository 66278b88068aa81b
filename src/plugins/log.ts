import '../check-node.ts'
import type { FastifyPluginAsync } from 'fastify'
import { withExchanges } from '../exchange.ts'
import { toPart } from '../parts.ts'

/**
 * One log line for each exchange, when it has ended. Never a key, a body or a query string.
 * Routes that are not forwarded (health, metrics) log at debug level.
 *
 * @example
 * await fastify.register(log)
 */
const logPlugin: FastifyPluginAsync = async function log(fastify) {
  withExchanges(fastify).onEnd('log', exchange => {
    const { request, usage } = exchange
    const line = {
      requestId: exchange.id,
      method: request.method,
      route: exchange.endpoint?.url ?? request.routeOptions.url ?? 'none',
      status: exchange.statusCode,
      outcome: exchange.outcome,
      error: exchange.errorCode,
      caller: request.caller?.id,
      model: request.payload?.model?.slice(0, 200),
      stream: request.payload?.stream,
      backend: exchange.backend,
      attempts: exchange.attempts,
      continuations: exchange.continuations || undefined,
      queuedMs: exchange.queuedMs === 0 ? undefined : Math.round(exchange.queuedMs * 10) / 10,
      durationMs: Math.round(exchange.durationMs * 10) / 10,
      ttftMs: exchange.ttftMs === undefined ? undefined : Math.round(exchange.ttftMs * 10) / 10,
      promptTokens: usage?.promptTokens,
      completionTokens: usage?.completionTokens,
      exactness: usage?.exactness
    }
    const isOwn = exchange.settlement !== undefined && usage === undefined
    const isQuiet = (exchange.endpoint === undefined || isOwn) && exchange.outcome === 'ok'
    if (isQuiet) fastify.log.debug(line, 'exchange')
    else fastify.log.info(line, 'exchange')
  })
}

export default toPart(logPlugin, {
  name: 'log'
})
