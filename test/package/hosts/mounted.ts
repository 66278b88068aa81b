import Fastify from 'fastify'
import gateway from 'llmproxy'

/** A host that mounts a gateway: nothing of it is promised to be on the host. */
const fastify = Fastify()
await fastify.register(gateway, { prefix: '/llm', backends: [{ url: 'demo://' }] })
// @ts-expect-error: it stays in the gateway's scope
if (fastify.usage !== undefined) throw new Error('usage')
// @ts-expect-error: it stays in the gateway's scope
if (fastify.exchanges !== undefined) throw new Error('exchanges')
fastify.get('/', async request => {
  // @ts-expect-error: this route is not the gateway's
  return request.caller
})
await fastify.close()
