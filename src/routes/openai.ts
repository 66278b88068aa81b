import { resolve } from 'node:path'
import type { FastifyPluginAsync } from 'fastify'
import { openai } from '../dialects/openai.ts'
import { COMPLETION, EMBEDDING, RANKING } from '../dialects/prompt.ts'
import { responses } from '../dialects/responses.ts'
import { GatewayError } from '../errors.ts'
import type { Endpoint, Exchange } from '../exchange.ts'
import { DatabaseError } from '../store/sql.ts'
import { forwarded } from './forwarded.ts'
import { RESPONSES_FILE, StoredResponses } from './stored-responses.ts'

const post = (url: string, more: Partial<Endpoint> = {}): Endpoint => ({
  method: 'POST',
  url,
  dialect: openai,
  body: 'json',
  ...more
})

const ANSWERS = { spends: 'input and output' } as const
const STREAMS = { ...ANSWERS, asksForUsage: true } as const
const COMPLETES = { ...STREAMS, prompt: COMPLETION } as const
const EMBEDS = { spends: 'input', prompt: EMBEDDING } as const
const RANKS = { spends: 'input', prompt: RANKING } as const

/** What OpenAI's API and its relatives (vLLM, SGLang, llama.cpp, TGI) offer. */
const ENDPOINTS: Endpoint[] = [
  post('/v1/chat/completions', STREAMS),
  post('/v1/completions', COMPLETES),
  post('/v1/embeddings', EMBEDS),
  post('/chat/completions', { ...STREAMS, upstreamPrefix: '/v1' }),
  post('/completions', { ...COMPLETES, upstreamPrefix: '/v1' }),
  post('/embeddings', { ...EMBEDS, upstreamPrefix: '/v1' }),
  post('/v1/rerank', RANKS),
  post('/v1/score', RANKS),
  post('/v1/images/generations'),
  post('/v1/audio/transcriptions', { body: 'stream' }),
  post('/v1/audio/translations', { body: 'stream' }),
  post('/tokenize'),
  post('/detokenize'),
  post('/v1/responses', { ...ANSWERS, dialect: responses, makesResponses: true }),
  post('/v1/responses/input_tokens', { dialect: responses }),
  post('/v1/responses/compact', { ...ANSWERS, dialect: responses, makesResponses: true }),
  post('/v1/responses/:id/cancel', { dialect: responses, body: 'none' }),
  // Whatever else is under it is about one stored response.
  post('/v1/responses/:id/*', { dialect: responses }),
  { method: 'GET', url: '/v1/responses/:id', dialect: responses, body: 'none' },
  { method: 'GET', url: '/v1/responses/:id/*', dialect: responses, body: 'none' },
  { method: 'DELETE', url: '/v1/responses/:id', dialect: responses, body: 'none' }
]

const openaiRoutes: FastifyPluginAsync = async function openaiRoutes(fastify) {
  const { dataDir, log, peers } = fastify
  const file = dataDir === undefined ? ':memory:' : resolve(dataDir, RESPONSES_FILE)
  const stored = new StoredResponses(file, log)

  // As a part of an id it would be a path at the backend that no route stands for.
  fastify.addHook('onRequest', ({ exchange, raw }, _reply, done) => {
    const isOdd = exchange.endpoint?.dialect === responses && /%(2f|5c)/i.test(raw.url ?? '')
    done(isOdd ? new GatewayError('invalid_path', INVALID_ID) : undefined)
  })
  fastify.addHook('preHandler', (request, _reply, done) => {
    const { exchange, payload } = request
    if (exchange.endpoint?.dialect !== responses) return done()
    const { id = payload?.previousResponseId } = request.params as { id?: string }
    if (exchange.endpoint.makesResponses) exchange.onAnswerId = id => learn(exchange, id)
    if (id === undefined) return done()
    bind(exchange, id).then(() => done(), done)
  })

  await forwarded(fastify, ENDPOINTS)
  peers?.onNews(news => {
    if (news.kind === 'response') stored.hear(news.response)
  })
  fastify.addHook('onClose', () => stored.close())

  function learn(exchange: Exchange, id: string): void {
    const { backend, model, request } = exchange
    const response = { id, backend: backend!, model, caller: request.caller?.id }
    stored.add(response)
    peers?.tell({ kind: 'response', response })
  }

  /** Sends a request to the backend that has the response, if it belongs to the caller. */
  async function bind(exchange: Exchange, id: string): Promise<void> {
    const caller = exchange.request.caller?.id
    const found = await stored.find(id).catch(toUnavailable)
    // Without keys there is nobody to protect, and another gateway may have made it.
    if (found === undefined && caller === undefined) return
    if (found === undefined || found.caller !== caller) {
      throw new GatewayError('not_found', 'Unknown response id.')
    }
    exchange.pinned = found.backend
    exchange.heldModel = found.model
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
