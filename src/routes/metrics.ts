import type { FastifyPluginAsync } from 'fastify'
import type {} from '../peers.ts'

/** `GET /metrics`: the registry in Prometheus' text format, or the sum over all workers. */
const metricsRoutes: FastifyPluginAsync<{ path: string }> = async function metricsRoutes(
  fastify,
  { path }
) {
  const registry = fastify.metricsRegistry
  fastify.get(path, { config: { rateLimit: false, probe: true } }, async (_request, reply) => {
    return reply.type(registry.contentType).send(await (fastify.peers ?? registry).metrics())
  })
}

export default metricsRoutes
