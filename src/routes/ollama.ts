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

/** Fields that `/api/show` shows as they are: no modelfile, which has paths of the server. */
const SHOWN = ['license', 'parameters', 'template', 'capabilities', 'modified_at']
const DETAILS = [
  ...['format', 'family', 'families', 'parameter_size', 'quantization_level'],
  ...['context_length', 'embedding_length']
]
/** Texts of a model's metadata that are no paths of the machine on which it was made. */
const METADATA = [
  ...['architecture', 'basename', 'finetune', 'name', 'organization', 'size_label', 'type'].map(
    name => `general.${name}`
  ),
  ...['tokenizer.ggml.model', 'tokenizer.ggml.pre']
]

function picked(value: unknown, isShown: (name: string, value: unknown) => boolean): object {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return {}
  return Object.fromEntries(Object.entries(value).filter(([name, each]) => isShown(name, each)))
}

/** The parent may be a path, or a model that the caller may not use; clients expect a text. */
function detailsOf(details: unknown): object {
  const isChild = Object.hasOwn(Object(details), 'parent_model')
  return {
    ...(isChild ? { parent_model: '' } : {}),
    ...picked(details, name => DETAILS.includes(name))
  }
}

/** Metadata without lists, such as those of tokens. */
function metadataOf(metadata: unknown): object {
  return picked(
    metadata,
    (name, value) =>
      METADATA.includes(name) || typeof value === 'number' || typeof value === 'boolean'
  )
}

/** Fields of a model that callers see. */
function toShown(body: unknown): object {
  const { details, model_info, projector_info } = Object(body)
  return {
    ...picked(body, name => SHOWN.includes(name)),
    details: detailsOf(details),
    ...(model_info === undefined ? {} : { model_info: metadataOf(model_info) }),
    ...(projector_info === undefined ? {} : { projector_info: metadataOf(projector_info) })
  }
}

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
        .map(name => ({
          ...Object.fromEntries(shown),
          ...(listed.details === undefined ? {} : { details: detailsOf(listed.details) }),
          name,
          model: name
        }))
    })
  }
}

/** Ollama's native API without what changes the server: no pull, push, create, copy or delete. */
const ollamaRoutes: FastifyPluginAsync = fastify => {
  rewriteListings(fastify, ['/api/tags', '/api/ps'], (body, exchange) =>
    ownModels(fastify, body, exchange)
  )
  rewriteListings(fastify, ['/api/show'], toShown)
  return forwarded(fastify, [
    post('/api/chat', GENERATES),
    post('/api/generate', { ...GENERATES, prompt: GENERATION }),
    post('/api/embed', EMBEDS),
    post('/api/embeddings', { ...EMBEDS, prompt: COMPLETION }),
    post('/api/show', { isFree: true }),
    get('/api/tags'),
    get('/api/ps'),
    get('/api/version')
  ])
}

export default ollamaRoutes
