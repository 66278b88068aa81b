import Fastify, { type FastifyInstance } from 'fastify'
import auth from 'llmproxy/auth'
import backends from 'llmproxy/backends'
import limits from 'llmproxy/limits'
import proxy from 'llmproxy/proxy'
import type {} from 'llmproxy/types'

/** Single plugins instead of the whole gateway: keys and limits for a route of one's own. */
export async function buildParts(url: string): Promise<FastifyInstance> {
  const fastify = Fastify()
  await fastify.register(auth, { keys: [{ key: 'sk-1', name: 'alice' }] })
  await fastify.register(limits, { per_key: { requests_per_minute: 2 } })
  await fastify.register(backends, { backends: [{ url }] })
  await fastify.register(proxy)

  fastify.get('/hello', async request => ({ hello: request.caller?.id }))
  fastify.post('/v1/rerank', (_request, reply) => reply.forward())
  return fastify
}
