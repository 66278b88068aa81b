import type { FastifyPluginAsync } from 'fastify'

/** `GET /metrics`: the registry in Prometheus' text format. */
const metricsRoutes: FastifyPluginAsync<{ path: string }> = async function metricsRoutes(
  fastify,
  { path }
) {
  const registry = fastify.metricsRegistry
  fastify.get(path, { config: { rateLimit: false } }, async (_request, reply) => {
    return reply.type(registry.contentType).send(await registry.metrics())
  })
}

export default metricsRoutes
