import type { FastifyPluginAsync } from 'fastify'
import { part } from '../parts.ts'
import { VERSION } from '../version.ts'

/**
 * `GET /health`: 200 as long as the process serves. `GET /health/ready`, or `/health?ready`: 503 when
 * no backend can be called or the gateway is about to stop, so that no traffic is sent here. `/healthz` and `/livez` are
 * other names of the first, `/readyz` of the second.
 */
const healthRoutes: FastifyPluginAsync = async function healthRoutes(fastify) {
  const config = { rateLimit: false as const, probe: true }

  const live = '/health'
  for (const url of [live, '/healthz', '/livez']) {
    const alias = { config: { ...config, aliasOf: live } }
    fastify.get<{ Querystring: { ready?: string } }>(url, alias, (request, reply) => {
      reply.code('ready' in request.query && !isReady() ? 503 : 200).send(state())
    })
  }
  const ready = '/health/ready'
  for (const url of [ready, '/readyz']) {
    fastify.get(url, { config: { ...config, aliasOf: ready } }, (_request, reply) => {
      reply.code(isReady() ? 200 : 503).send(state())
    })
  }

  function isReady(): boolean {
    return !fastify.lifecycle.isLeaving && fastify.backends.pool.available
  }

  function state() {
    const { backends, callable, isPanicking } = fastify.backends.pool
    const available = callable.length
    const status = isPanicking ? 'panic' : available > 0 ? 'ok' : 'no_backend'
    return {
      status: fastify.lifecycle.isLeaving ? 'draining' : status,
      ready: isReady(),
      version: VERSION,
      uptime_s: Math.floor(process.uptime()),
      data_dir: part(fastify, 'dataDirWatch')?.trouble === undefined ? 'ok' : 'not_safe',
      usage: fastify.usage.trouble === undefined ? 'ok' : 'not_safe',
      backends: { total: backends.length, available }
    }
  }
}

export default healthRoutes
