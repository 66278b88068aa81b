import type { FastifyPluginAsync } from 'fastify'
import { openai } from '../dialects/openai.ts'
import { responses } from '../dialects/responses.ts'
import { GatewayError } from '../errors.ts'
import type { Endpoint, Exchange } from '../exchange.ts'
import type { ResponseMade } from '../peers.ts'
import { forwarded } from './forwarded.ts'

const post = (url: string, more: Partial<Endpoint> = {}): Endpoint => ({
  method: 'POST',
  url,
  dialect: openai,
  body: 'json',
  ...more
})

const ANSWERS = { spends: 'input and output' } as const
const STREAMS = { ...ANSWERS, asksForUsage: true } as const
const EMBEDS = { spends: 'input' } as const

/** What OpenAI's API and its relatives (vLLM, SGLang, llama.cpp, TGI) offer. */
const ENDPOINTS: Endpoint[] = [
  post('/v1/chat/completions', STREAMS),
  post('/v1/completions', STREAMS),
  post('/v1/embeddings', EMBEDS),
  post('/chat/completions', { ...STREAMS, upstreamPrefix: '/v1' }),
  post('/completions', { ...STREAMS, upstreamPrefix: '/v1' }),
  post('/embeddings', { ...EMBEDS, upstreamPrefix: '/v1' }),
  post('/v1/rerank', EMBEDS),
  post('/v1/score', EMBEDS),
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

const MAX_RESPONSES = 10_000

/** A stored response lives in the backend that made it, and belongs to who asked for it. */
interface Made {
  backend: string
  model: string | undefined
  caller: string | undefined
}

const openaiRoutes: FastifyPluginAsync = async function openaiRoutes(fastify) {
  const made = new Map<string, Made>()

  fastify.addHook('preHandler', (request, _reply, done) => {
    const { exchange, payload } = request
    if (exchange.endpoint?.dialect !== responses) return done()
    const { id } = request.params as { id?: string }
    bind(exchange, id ?? payload?.previousResponseId)
    if (exchange.endpoint.makesResponses) exchange.onAnswerId = id => learn(exchange, id)
    done()
  })

  await forwarded(fastify, ENDPOINTS)
  fastify.peers?.onNews(news => {
    if (news.kind === 'response') remember(news)
  })

  function learn(exchange: Exchange, id: string): void {
    const { backend, request } = exchange
    const news = {
      kind: 'response',
      response: id,
      backend: backend!,
      model: exchange.model,
      caller: request.caller?.id
    } as const
    remember(news)
    fastify.peers?.tell(news)
  }

  function remember({ response, backend, model, caller }: ResponseMade): void {
    if (made.size >= MAX_RESPONSES) made.delete(made.keys().next().value!)
    made.set(response, { backend, model, caller })
  }

  function bind(exchange: Exchange, id: string | undefined): void {
    const known = id === undefined ? undefined : made.get(id)
    if (known === undefined) return
    if (known.caller !== exchange.request.caller?.id) {
      throw new GatewayError('not_found', 'There is no such response.')
    }
    exchange.pinned = known.backend
    exchange.heldModel = known.model
  }
}

export default openaiRoutes
