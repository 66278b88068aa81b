import Fastify, { type FastifyInstance } from 'fastify'
import gateway from 'llmproxy'

/**
 * Two gateways in a Fastify server that was there before them: it keeps its own authentication, its
 * own error handler and its own /metrics, and each gateway keeps to its prefix.
 *
 * Run it with: npm run example
 */
export async function buildServer(urls: { team: string; lab: string }): Promise<FastifyInstance> {
  const fastify = Fastify()

  fastify.setErrorHandler((error: Error & { statusCode?: number }, _request, reply) => {
    reply.code(error.statusCode ?? 500).send({ oops: error.message })
  })
  fastify.decorateRequest('user', '')
  fastify.addHook('onRequest', async request => {
    const { user } = request.headers
    if (user === undefined && request.url.startsWith('/own')) {
      throw Object.assign(new Error('who are you?'), { statusCode: 401 })
    }
  })
  fastify.get('/own/hello', async request => ({ hello: request.headers.user }))
  fastify.get('/metrics', async () => 'requests_of_this_server 1\n')

  // With keys, limits and a name of its own for each key.
  await fastify.register(gateway, {
    prefix: '/team',
    backends: [{ name: 'gpu', url: urls.team }],
    auth: { enabled: true, keys: [{ key: 'sk-team', name: 'team' }] },
    rate_limit: { enabled: true, per_key: { requests_per_minute: 60, max_concurrent: 3 } }
  })
  // Open, and metered like the other.
  await fastify.register(gateway, { prefix: '/lab', backends: [{ name: 'lab', url: urls.lab }] })

  return fastify
}

if (import.meta.main) {
  const fastify = await buildServer({ team: 'demo://', lab: 'demo://' })
  console.log(await fastify.listen({ port: 3000 }))
}
