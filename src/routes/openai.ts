import { resolve } from 'node:path'
import type { FastifyPluginAsync } from 'fastify'
import { openai } from '../dialects/openai.ts'
import { COMPLETION, EMBEDDING, RANKING } from '../dialects/prompt.ts'
import { responses } from '../dialects/responses.ts'
import { GatewayError, modelMissing } from '../errors.ts'
import type { Endpoint, Exchange, Usage } from '../exchange.ts'
import { Billed } from '../metering/billed.ts'
import { DatabaseError } from '../store/sql.ts'
import { forwarded } from './forwarded.ts'
import { RESPONSES_FILE, type StoredResponse, StoredResponses } from './stored-responses.ts'

const post = (url: string, more: Partial<Endpoint> = {}): Endpoint => ({
  method: 'POST',
  url,
  dialect: openai,
  body: 'json',
  ...more
})

const GENERATES = { spends: 'input and output' } as const
const RESPONDS = { ...GENERATES, dialect: responses, limitedBy: ['max_output_tokens'] } as const
const TEXT = { ...GENERATES, asksForUsage: true } as const
const CHATS = { ...TEXT, limitedBy: ['max_tokens', 'max_completion_tokens'] } as const
const COMPLETES = { ...TEXT, prompt: COMPLETION, limitedBy: ['max_tokens'] } as const
const EMBEDS = { spends: 'input', prompt: EMBEDDING } as const
const RANKS = { spends: 'input', prompt: RANKING } as const
const SHOWS = { dialect: responses, showsResponse: true } as const

/** What OpenAI's API and its relatives (vLLM, SGLang, llama.cpp, TGI) offer. */
const ENDPOINTS: Endpoint[] = [
  post('/v1/chat/completions', CHATS),
  post('/v1/completions', COMPLETES),
  post('/v1/embeddings', EMBEDS),
  post('/chat/completions', { ...CHATS, upstreamPrefix: '/v1' }),
  post('/completions', { ...COMPLETES, upstreamPrefix: '/v1' }),
  post('/embeddings', { ...EMBEDS, upstreamPrefix: '/v1' }),
  post('/v1/rerank', RANKS),
  post('/v1/score', RANKS),
  post('/v1/images/generations'),
  post('/v1/audio/transcriptions', { body: 'stream' }),
  post('/v1/audio/translations', { body: 'stream' }),
  post('/tokenize'),
  post('/detokenize'),
  post('/v1/responses', { ...RESPONDS, makesResponses: true }),
  post('/v1/responses/input_tokens', { dialect: responses }),
  post('/v1/responses/compact', { ...RESPONDS, makesResponses: true }),
  post('/v1/responses/:id/cancel', { ...SHOWS, body: 'none' }),
  // Whatever else is under it is about one stored response.
  post('/v1/responses/:id/*', { dialect: responses }),
  { method: 'GET', url: '/v1/responses/:id', ...SHOWS, body: 'none' },
  { method: 'GET', url: '/v1/responses/:id/*', dialect: responses, body: 'none' },
  { method: 'DELETE', url: '/v1/responses/:id', dialect: responses, body: 'none' }
]

const openaiRoutes: FastifyPluginAsync = async function openaiRoutes(fastify) {
  const { dataDir, log, peers } = fastify
  const file = dataDir === undefined ? ':memory:' : resolve(dataDir, RESPONSES_FILE)
  const made = new StoredResponses(file, log)
  /** In one process alone; several have one bill. */
  const billed = new Billed()

  // Before the limits, which count what is billed of a stored response.
  fastify.addHook('onRequest', (request, _reply, done) => {
    const { exchange, raw } = request
    if (exchange.endpoint?.dialect !== responses) return done()
    // As a part of an id it would be a path at the backend that no route stands for.
    if (/%(2f|5c)/i.test(raw.url ?? '')) throw new GatewayError('invalid_path', INVALID_ID)
    const { id } = request.params as { id?: string }
    bind(exchange, id).then(() => done(), done)
  })
  fastify.addHook('preHandler', (request, _reply, done) => {
    const { exchange, payload } = request
    if (exchange.endpoint?.dialect !== responses) return done()
    if (exchange.endpoint.makesResponses) exchange.onAnswerId = id => learn(exchange, id)
    bind(exchange, payload?.previousResponseId).then(() => done(nameModel(exchange)), done)
  })

  await forwarded(fastify, ENDPOINTS)
  peers?.onNews(news => {
    if (news.kind === 'response') made.hear(news.response)
  })
  fastify.addHook('onClose', () => made.close())

  function learn(exchange: Exchange, id: string): void {
    const { backend, model, request, promptEstimate } = exchange
    const response = { id, backend: backend!, model, caller: request.caller?.id }
    keep(response)
    exchange.stored = {
      promptTokens: promptEstimate,
      bill(usage, isComplete) {
        if (isComplete) return usage
        keep({ ...response, unbilled: promptEstimate })
        return usage && raise(id, usage)
      }
    }
  }

  function keep(response: StoredResponse): void {
    made.add(response)
    peers?.tell({ kind: 'response', response })
  }

  function raise(id: string, usage: Usage): Usage | Promise<Usage | undefined> | undefined {
    return peers === undefined ? billed.raise(id, usage) : peers.bill(id, usage)
  }

  /** A request that continues an unknown response needs a model as any other does. */
  function nameModel({ model, endpoint, request }: Exchange): GatewayError | undefined {
    const { payload } = request
    if (model !== undefined || payload === undefined || endpoint?.spends === undefined) return
    payload.model = fastify.backends.pool.onlyModel
    payload.isModelImplied = payload.model !== undefined
    return payload.isModelImplied ? undefined : modelMissing()
  }

  /** Sends a request to the backend that has the response, if it belongs to the caller. */
  async function bind(exchange: Exchange, id: string | undefined): Promise<void> {
    if (id === undefined) return
    const caller = exchange.request.caller?.id
    const found = await made.find(id).catch(toUnavailable)
    // Without keys there is nobody to protect, and another gateway may have made it.
    if (found === undefined && caller === undefined) return
    if (found === undefined || found.caller !== caller) {
      throw new GatewayError('not_found', 'Unknown response id.')
    }
    exchange.pinned = found.backend
    exchange.heldModel = found.model
    const { unbilled } = found
    if (unbilled === undefined || !exchange.endpoint?.showsResponse) return
    exchange.stored = {
      promptTokens: unbilled,
      bill(usage, isComplete) {
        if (isComplete) keep({ ...found, unbilled: undefined })
        return usage && raise(id, usage)
      }
    }
  }
}

const INVALID_ID = 'Invalid path: a response id must not contain an encoded slash.'

function toUnavailable(error: unknown): never {
  if (!(error instanceof DatabaseError)) throw error
  throw new GatewayError('store_unavailable', 'The owner of the response cannot be looked up.', {
    headers: { 'retry-after': '1' },
    cause: error
  })
}

export default openaiRoutes
