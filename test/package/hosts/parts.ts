import Fastify from 'fastify'
import auth from 'llmproxy/auth'
import backends from 'llmproxy/backends'
import metering from 'llmproxy/metering'
import proxy from 'llmproxy/proxy'
import type {} from 'llmproxy/types'

/** A host that registers parts and takes their types. */
const fastify = Fastify()
await fastify.register(auth, { keys: [{ key: 'sk-1', name: 'alice' }] })
await fastify.register(backends, { backends: [{ url: 'demo://' }] })
await fastify.register(proxy)
await fastify.register(metering)
fastify.exchanges.onEnd('log', exchange => exchange.usage?.totalTokens.toFixed())
const available: boolean = fastify.backends.pool.available
fastify.get('/', { config: { auth: false } }, async request => {
  // @ts-expect-error: there is no caller without a key
  return request.caller.id
})
fastify.post('/v1/rerank', (_request, reply) => reply.forward())
await fastify.ready()
if (!available) throw new Error('no backend')
// @ts-expect-error: only the gateway's own code uses it
if (fastify.lifecycle !== undefined) throw new Error('lifecycle')
await fastify.close()
