import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import { openai } from '../dialects/openai.ts'
import { modelNotFound } from '../errors.ts'
import type { Endpoint } from '../exchange.ts'
import { matchesModel } from '../keys/key.ts'
import { forwarded } from './forwarded.ts'

const get = (url: string, upstreamPrefix?: string): Endpoint => ({
  method: 'GET',
  url,
  dialect: openai,
  body: 'none',
  ...(upstreamPrefix === undefined ? {} : { upstreamPrefix })
})

/**
 * The list of models, and one of them; an id may contain slashes (`org/model`). The list has the models of all
 * backends that the caller may use. As long as no backend's are known the question is passed on to one.
 */
const modelRoutes: FastifyPluginAsync = async fastify => {
  fastify.addHook('preHandler', (request, reply, done) => {
    const models = fastify.backends.models()
    if (models === undefined) return done()
    const wanted = (request.params as { '*'?: string })['*']
    if (wanted === undefined) {
      const data = models.filter(({ id }) => mayUse(request, id))
      return void reply.send({ object: 'list', data })
    }
    const card = models.find(({ id }) => id === wanted && mayUse(request, id))
    if (card === undefined) throw modelNotFound(wanted)
    reply.send(card)
  })
  await forwarded(fastify, [
    get('/v1/models'),
    get('/v1/models/*'),
    get('/models', '/v1'),
    get('/models/*', '/v1')
  ])
}

function mayUse({ caller }: FastifyRequest, model: string): boolean {
  return caller?.models === undefined || matchesModel(caller.models, model)
}

export default modelRoutes
