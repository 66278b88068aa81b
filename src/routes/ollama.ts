import type { FastifyInstance, FastifyPluginAsync } from 'fastify'
import { ollama } from '../dialects/ollama.ts'
import { COMPLETION, EMBEDDING, GENERATION } from '../dialects/prompt.ts'
import type { Endpoint, Exchange } from '../exchange.ts'
import { publicNames } from '../pool/models.ts'
import { forwarded } from './forwarded.ts'
import { rewriteListings } from './listing.ts'

const post = (url: string, more: Partial<Endpoint> = {}): Endpoint => ({
  method: 'POST',
  url,
  dialect: ollama,
  body: 'json',
  ...more
})
const GENERATES = {
  spends: 'input and output',
  limitedBy: ['num_predict'],
  streamsByDefault: true
} as const
const EMBEDS = { spends: 'input', prompt: EMBEDDING } as const
const get = (url: string): Endpoint => ({ method: 'GET', url, dialect: ollama, body: 'none' })

/** The fields of a model that Ollama lists, on disk or loaded. */
const LISTED = [
  ...['name', 'model', 'modified_at', 'size', 'digest', 'details', 'capabilities'],
  ...['expires_at', 'size_vram', 'context_length']
]

function isListed(value: unknown): value is Record<string, unknown> & { name: string } {
  return typeof Object(value).name === 'string'
}

/** The models of Ollama's list that the caller may use, by the names that callers use. */
function ownModels(fastify: FastifyInstance, body: unknown, exchange: Exchange): unknown {
  const backend = fastify.backends.pool.backends.find(({ name }) => name === exchange.backend)
  const { models } = Object(body) as { models?: unknown }
  if (!Array.isArray(models)) return { models: [] }
  return {
    models: models.filter(isListed).flatMap(listed => {
      const names = backend === undefined ? [] : publicNames(backend, String(listed.name))
      const shown = Object.entries(listed).filter(([field]) => LISTED.includes(field))
      return names
        .filter(name => exchange.mayUse(name))
        .map(name => ({ ...Object.fromEntries(shown), name, model: name }))
    })
  }
}

/** Ollama's native API without what changes the server: no pull, push, create, copy or delete. */
const ollamaRoutes: FastifyPluginAsync = fastify => {
  rewriteListings(fastify, ['/api/tags', '/api/ps'], (body, exchange) =>
    ownModels(fastify, body, exchange)
  )
  return forwarded(fastify, [
    post('/api/chat', GENERATES),
    post('/api/generate', { ...GENERATES, prompt: GENERATION }),
    post('/api/embed', EMBEDS),
    post('/api/embeddings', { ...EMBEDS, prompt: COMPLETION }),
    post('/api/show'),
    get('/api/tags'),
    get('/api/ps'),
    get('/api/version')
  ])
}

export default ollamaRoutes
