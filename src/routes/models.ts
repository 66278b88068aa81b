import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import { openai } from '../dialects/openai.ts'
import { modelNotFound } from '../errors.ts'
import type { Endpoint } from '../exchange.ts'
import { matchesModel, untagged } from '../keys/key.ts'
import { type ModelCard, toCard, toPublic } from '../pool/models.ts'
import { forwarded } from './forwarded.ts'
import { rewriteListings } from './listing.ts'

const get = (url: string, upstreamPrefix?: string): Endpoint => ({
  method: 'GET',
  url,
  dialect: openai,
  body: 'none',
  ...(upstreamPrefix === undefined ? {} : { upstreamPrefix })
})

/**
 * The list of models, and one of them; an id may contain slashes (`org/model`). The list has the models of all
 * backends that the caller may use. As long as no backend's are known the question is passed on to one, unless
 * the caller is held to some: then those are the list.
 */
const modelRoutes: FastifyPluginAsync = fastify => {
  const lists = ['/v1/models', '/models']
  rewriteListings(fastify, lists, body => {
    const { data } = Object(body) as { data?: unknown }
    return { object: 'list', data: Array.isArray(data) ? data.filter(isCard).map(toPublic) : [] }
  })
  rewriteListings(
    fastify,
    lists.map(url => `${url}/*`),
    body => toPublic(body as ModelCard)
  )
  const endpoints = [
    get('/v1/models'),
    get('/v1/models/*'),
    get('/models', '/v1'),
    get('/models/*', '/v1')
  ]
  return forwarded(fastify, endpoints, (request, reply) => {
    const held = request.caller?.models?.filter(name => !name.includes('*')).map(toCard)
    const models = fastify.backends.models() ?? held
    if (models === undefined) return reply.forward()
    reply.header('x-request-id', request.exchange.id)
    const wanted = (request.params as { '*'?: string })['*']
    const data = models.filter(({ id }) => mayUse(request, id))
    if (wanted === undefined) return reply.send({ object: 'list', data })
    const card = data.find(({ id }) => untagged(id) === untagged(wanted))
    if (card === undefined) throw modelNotFound(wanted)
    return reply.send(card)
  })
}

function isCard(value: unknown): value is ModelCard {
  return typeof Object(value).id === 'string'
}

function mayUse({ caller }: FastifyRequest, model: string): boolean {
  return caller?.models === undefined || matchesModel(caller.models, model)
}

export default modelRoutes
