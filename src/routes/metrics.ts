import type { FastifyPluginAsync } from 'fastify'
import { part } from '../parts.ts'

/** `GET /metrics`: the registry in Prometheus' text format, or the sum over all workers. */
const metricsRoutes: FastifyPluginAsync<{ path: string }> = async function metricsRoutes(
  fastify,
  { path }
) {
  const registry = fastify.metricsRegistry
  fastify.get(path, { config: { rateLimit: false, probe: true } }, async (_request, reply) => {
    return reply
      .type(registry.contentType)
      .send(await (part(fastify, 'peers') ?? registry).metrics())
  })
}

export default metricsRoutes
