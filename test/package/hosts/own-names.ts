import Fastify from 'fastify'
import gateway, { type Caller, type Exchange, type Exchanges } from 'llmproxy'
import auth from 'llmproxy/auth'
import backends from 'llmproxy/backends'
import discovery from 'llmproxy/discovery'
import limits from 'llmproxy/limits'
import log from 'llmproxy/log'
import logging from 'llmproxy/logging'
import metering from 'llmproxy/metering'
import metrics from 'llmproxy/metrics'
import payload from 'llmproxy/payload'
import proxy from 'llmproxy/proxy'
import usage from 'llmproxy/usage'

/** A host whose own decorators have the names of the gateway's, with types of its own. */
declare module 'fastify' {
  interface FastifyInstance {
    admin: 'host'
    answerHooks: 'host'
    backends: 'host'
    connections: 'host'
    dataDir: 'host'
    discovery: 'host'
    exchanges: 'host'
    keys: 'host'
    lifecycle: 'host'
    limits: 'host'
    logging: 'host'
    metrics: 'host'
    metricsRegistry: 'host'
    overload: 'host'
    peers: 'host'
    proxy: 'host'
    rateLimit: 'host'
    tokens: 'host'
    usage: 'host'
  }
  interface FastifyRequest {
    caller: 'host'
    exchange: 'host'
    payload: 'host'
  }
  interface FastifyReply {
    forward: 'host'
    from: 'host'
  }
  interface FastifyContextConfig {
    auth?: 'host'
    endpoint?: 'host'
    probe?: 'host'
    rateLimit?: 'host'
  }
}

const fastify = Fastify()
fastify.decorate('usage', 'host')
fastify.decorate('lifecycle', 'host')
const own: 'host' = fastify.usage
await fastify.register(gateway, { prefix: '/llm', backends: [{ url: 'demo://' }] })

// Parts in a scope of their own: their decorators are read with the types that the package exports.
await fastify.register(async scope => {
  await scope.register(auth, { enabled: false })
  await scope.register(payload)
  await scope.register(backends, { backends: [{ url: 'demo://' }] })
  await scope.register(discovery, { enabled: false })
  await scope.register(limits)
  await scope.register(proxy)
  await scope.register(metering)
  await scope.register(usage, { enabled: false })
  await scope.register(metrics)
  await scope.register(log)
  await scope.register(logging)
  const exchanges = scope.getDecorator<Exchanges>('exchanges')
  exchanges.onEnd('log', exchange => exchange.usage?.totalTokens.toFixed())
  scope.get('/who', async request => {
    const { id }: Exchange = request.getDecorator<Exchange>('exchange')
    return { id, caller: request.getDecorator<Caller | undefined>('caller')?.id }
  })
})
await fastify.ready()
const response = await fastify.inject('/who')
if (own !== 'host' || !response.json().id.startsWith('req_')) throw new Error(response.body)
await fastify.close()
