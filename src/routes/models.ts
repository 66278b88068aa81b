import type { FastifyPluginAsync } from 'fastify'
import { openai } from '../dialects/openai.ts'
import type { Endpoint } from '../exchange.ts'
import { forwarded } from './forwarded.ts'

const get = (url: string, upstreamPrefix?: string): Endpoint => ({
  method: 'GET',
  url,
  dialect: openai,
  body: 'none',
  ...(upstreamPrefix === undefined ? {} : { upstreamPrefix })
})

/** The list of models, and one of them; an id may contain slashes (`org/model`). */
const modelRoutes: FastifyPluginAsync = fastify =>
  forwarded(fastify, [
    get('/v1/models'),
    get('/v1/models/*'),
    get('/models', '/v1'),
    get('/models/*', '/v1')
  ])

export default modelRoutes
