import type { FastifyPluginAsync } from 'fastify'
import { VERSION } from '../version.ts'

/**
 * `GET /health`: 200 as long as the process serves. `GET /health/ready`, or `/health?ready`: 503 when
 * no backend is available or the gateway is about to stop, so that no traffic is sent here.
 */
const healthRoutes: FastifyPluginAsync = async function healthRoutes(fastify) {
  const config = { rateLimit: false as const, probe: true }

  fastify.get<{ Querystring: { ready?: string } }>('/health', { config }, (request, reply) => {
    reply.code('ready' in request.query && !isReady() ? 503 : 200).send(state())
  })
  fastify.get('/health/ready', { config }, (_request, reply) => {
    reply.code(isReady() ? 200 : 503).send(state())
  })

  function isReady(): boolean {
    return !fastify.lifecycle.isLeaving && fastify.backends.pool.available
  }

  function state() {
    const { backends } = fastify.backends.pool
    const available = backends.filter(backend => backend.available).length
    return {
      status: fastify.lifecycle.isLeaving ? 'draining' : available > 0 ? 'ok' : 'no_backend',
      ready: isReady(),
      version: VERSION,
      uptime_s: Math.floor(process.uptime()),
      usage: fastify.usage.trouble === undefined ? 'ok' : 'not_safe',
      backends: { total: backends.length, available }
    }
  }
}

export default healthRoutes
