import type { FastifyPluginAsync } from 'fastify'
import { openai } from '../dialects/openai.ts'
import { responses } from '../dialects/responses.ts'
import { GatewayError } from '../errors.ts'
import type { Endpoint, Exchange, Usage } from '../exchange.ts'
import { Billed, MAX_RESPONSES } from '../metering/stored.ts'
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
const SHOWS = { dialect: responses, showsResponse: true } as const

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
  post('/v1/responses/:id/cancel', { ...SHOWS, body: 'none' }),
  // Whatever else is under it is about one stored response.
  post('/v1/responses/:id/*', { dialect: responses }),
  { method: 'GET', url: '/v1/responses/:id', ...SHOWS, body: 'none' },
  { method: 'GET', url: '/v1/responses/:id/*', dialect: responses, body: 'none' },
  { method: 'DELETE', url: '/v1/responses/:id', dialect: responses, body: 'none' }
]

/** A stored response lives in the backend that made it, and belongs to who asked for it. */
interface Made {
  backend: string
  model: string | undefined
  caller: string | undefined
  /** Not all of its usage is billed: tokens of its prompt, estimated. */
  unbilled: number | undefined
}

const openaiRoutes: FastifyPluginAsync = async function openaiRoutes(fastify) {
  const made = new Map<string, Made>()

  /** In one process alone; several have one bill. */
  const billed = new Billed()

  // Before the limits, which count what is billed of a stored response.
  fastify.addHook('onRequest', (request, _reply, done) => {
    const { exchange } = request
    const { id } = request.params as { id?: string }
    if (exchange.endpoint?.dialect === responses) bind(exchange, id)
    done()
  })
  fastify.addHook('preHandler', (request, _reply, done) => {
    const { exchange, payload } = request
    if (exchange.endpoint?.dialect !== responses) return done()
    bind(exchange, payload?.previousResponseId)
    if (exchange.endpoint.makesResponses) exchange.onAnswerId = id => learn(exchange, id)
    done()
  })

  await forwarded(fastify, ENDPOINTS)
  fastify.peers?.onNews(news => {
    if (news.kind === 'response') remember(news)
  })

  function learn(exchange: Exchange, id: string): void {
    const { backend, request, promptEstimate } = exchange
    const news = {
      kind: 'response',
      response: id,
      backend: backend!,
      model: exchange.model,
      caller: request.caller?.id
    } as const
    tell(news)
    exchange.stored = {
      promptTokens: promptEstimate,
      bill(usage, isComplete) {
        if (isComplete) return usage
        tell({ ...news, unbilled: promptEstimate })
        return usage && raise(id, usage)
      }
    }
  }

  function tell(news: ResponseMade): void {
    remember(news)
    fastify.peers?.tell(news)
  }

  function remember({ response, backend, model, caller, unbilled }: ResponseMade): void {
    if (made.size >= MAX_RESPONSES && !made.has(response)) made.delete(made.keys().next().value!)
    made.set(response, { backend, model, caller, unbilled })
  }

  function raise(id: string, usage: Usage): Usage | Promise<Usage | undefined> | undefined {
    return fastify.peers === undefined ? billed.raise(id, usage) : fastify.peers.bill(id, usage)
  }

  function bind(exchange: Exchange, id: string | undefined): void {
    const known = id === undefined ? undefined : made.get(id)
    if (id === undefined || known === undefined) return
    if (known.caller !== exchange.request.caller?.id) {
      throw new GatewayError('not_found', 'There is no such response.')
    }
    exchange.pinned = known.backend
    exchange.heldModel = known.model
    if (known.unbilled === undefined || !exchange.endpoint?.showsResponse) return
    exchange.stored = {
      promptTokens: known.unbilled,
      bill(usage, isComplete) {
        if (isComplete) tell({ kind: 'response', response: id, ...known, unbilled: undefined })
        return usage && raise(id, usage)
      }
    }
  }
}

export default openaiRoutes
