import { existsSync } from 'node:fs'
import { resolve } from 'node:path'
import { finished } from 'node:stream/promises'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { openai } from '../dialects/openai.ts'
import { COMPLETION, EMBEDDING, RANKING } from '../dialects/prompt.ts'
import { responses } from '../dialects/responses.ts'
import { GatewayError, modelMissing } from '../errors.ts'
import { type Endpoint, type Exchange, withExchanges } from '../exchange.ts'
import { part } from '../parts.ts'
import type { Settlement } from '../settlement.ts'
import { DatabaseError } from '../store/sql.ts'
import { forwarded } from './forwarded.ts'
import { Reservations } from './reservations.ts'
import {
  FIRST_CHECK,
  type Owner,
  RESPONSES_FILE,
  type StoredResponse,
  StoredResponses,
  type UnreadResponse
} from './stored-responses.ts'
import { UnreadResponses } from './unread-responses.ts'

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
const SHOWS = { dialect: responses, showsResponse: true, body: 'none' } as const
const READS = { dialect: responses, rejectedBy: 'rates', body: 'none' } as const
const STOPS = { dialect: responses, rejectedBy: 'nothing', body: 'none' } as const

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
  post('/tokenize', { isFree: true }),
  post('/detokenize', { isFree: true }),
  post('/v1/responses', { ...RESPONDS, makesResponses: true }),
  post('/v1/responses/input_tokens', { dialect: responses, isFree: true }),
  post('/v1/responses/compact', { ...RESPONDS, makesResponses: true }),
  post('/v1/responses/:id/cancel', { ...SHOWS, ...STOPS }),
  // Whatever else is under it is about one stored response.
  post('/v1/responses/:id/*', { dialect: responses }),
  { method: 'GET', url: '/v1/responses/:id', ...SHOWS, ...READS },
  { method: 'GET', url: '/v1/responses/:id/*', ...READS },
  { method: 'DELETE', url: '/v1/responses/:id', ...STOPS }
]

const openaiRoutes: FastifyPluginAsync<{ dataDir?: string | undefined }> =
  async function openaiRoutes(fastify, { dataDir }) {
    const { log } = fastify
    const peers = part(fastify, 'peers')
    const exchanges = withExchanges(fastify)
    const file = dataDir === undefined ? ':memory:' : resolve(dataDir, RESPONSES_FILE)
    const made = new StoredResponses(file, log)
    const unread = new UnreadResponses(made, settle, { processes: peers?.count ?? 1 })
    const reservations = new Reservations()
    const leaving = new AbortController()

    // Before the limits, which count what is billed of a stored response.
    fastify.addHook('onRequest', (request, _reply, done) => {
      const { exchange, raw } = request
      if (exchange.endpoint?.dialect !== responses) return done()
      // As a part of an id it would be a path at the backend that no route stands for.
      if (/%(2f|5c)/i.test(raw.url ?? '')) throw new GatewayError('invalid_path', INVALID_ID)
      const { id, '*': rest } = request.params as { id?: string; '*'?: string }
      // Backends ignore a slash at the end: this is the route without it.
      if (rest !== undefined && /^$|\/$/.test(rest)) throw new GatewayError('not_found', SLASH)
      bind(exchange, id).then(() => done(), done)
    })
    fastify.addHook('preHandler', (request, _reply, done) => {
      const { exchange, payload } = request
      if (exchange.endpoint?.dialect !== responses) return done()
      if (exchange.endpoint.makesResponses) exchange.onAnswerId = id => learn(exchange, id)
      bind(exchange, payload?.previousResponseId).then(() => done(nameModel(exchange)), done)
    })

    await forwarded(fastify, ENDPOINTS, (request, reply) => {
      if (request.exchange.settlement?.isLost) conclude(request, reply)
      else reply.forward()
    })
    peers?.onNews(news => {
      if (news.kind !== 'response') return
      made.hear(news.response)
      if (news.isSettled) reservations.release(news.response.id)
    })
    exchanges.onEnd('slot', ({ endpoint, request, statusCode }) => {
      if (endpoint?.dialect !== responses || request.method !== 'DELETE' || statusCode > 299) return
      const { id } = request.params as { id: string }
      if (made.isOpen(id)) made.hasten(id).then(() => unread.wakeAt(0), toWarning)
    })
    fastify.addHook('onReady', async () => {
      if (!existsSync(file)) return
      await made.open()
      unread.wakeAt(Date.now())
    })
    // A backend that does not respond would delay the end until the drain timeout.
    part(fastify, 'lifecycle')?.onLeaving.push(() => {
      unread.stop()
      leaving.abort()
    })
    fastify.addHook('onClose', async () => {
      unread.stop()
      await made.close()
    })

    function learn(exchange: Exchange, id: string): void {
      const { backend, model, request, promptEstimate, clientIp: address } = exchange
      const { caller, payload } = request
      const response = { id, backend: backend!, model, caller: caller?.id }
      keep(response)
      exchange.stored = {
        promptTokens: promptEstimate,
        bill({ usage, isComplete, part }) {
          if (isComplete) return usage
          keep({ ...response, unbilled: promptEstimate }, { caller, address })
          unread.wakeAt(Date.now() + FIRST_CHECK)
          // A response in the foreground ends with its request.
          if (payload?.isBackground) this.hold = release => hold(id, release)
          return usage && made.bill(response, usage, 'open', part)
        }
      }
    }

    function keep(response: StoredResponse, owner?: Owner): void {
      made.add(response, owner)
      peers?.tell({ kind: 'response', response })
    }

    /** What a request has reserved stays reserved until its response is settled. */
    function hold(id: string, release: () => void): void {
      if (made.isOpen(id)) reservations.hold(id, release)
      else release()
    }

    /** Asks the backend for a response that no caller has read, and bills it. */
    async function settle({ response, owner, isLast }: UnreadResponse): Promise<void> {
      const { signal } = leaving
      const exchange = await ask(response, owner, { signal })
      if (signal.aborted || exchange === undefined) return
      // What the gateway itself responds says nothing about the response.
      const isGone = UNREADABLE.has(exchange.statusCode) && exchange.errorCode === undefined
      if (!isLast && !isGone) return
      const isOpen = (await made.find(response.id))?.unbilled !== undefined
      if (isOpen) await ask(response, owner, { isLost: true, signal })
    }

    /** A request to this gateway, so that limits, usage records and metrics are those of any other read. */
    async function ask(
      { id }: StoredResponse,
      { caller, address }: Owner,
      { isLost = false, signal }: { isLost?: boolean; signal?: AbortSignal } = {}
    ) {
      const settlement: Settlement = { caller, isLost, signal, exchange: undefined }
      const { headers, end } = exchanges.settlements.begin(settlement)
      const late = new GatewayError(
        'backend_timeout',
        'The backend did not show the response in time.'
      )
      const timer = setTimeout(() => settlement.exchange?.interrupt(late), SETTLE_TIMEOUT)
      const leave = () => settlement.exchange?.interrupt(shuttingDown())
      signal?.addEventListener('abort', leave)
      try {
        const response = await fastify.inject({
          method: 'GET',
          url: `${fastify.prefix}/v1/responses/${encodeURIComponent(id)}`,
          headers,
          ...(address === undefined ? {} : { remoteAddress: address }),
          payloadAsStream: true
        })
        await finished(response.stream().resume())
      } catch (error) {
        toWarning(error as Error)
      } finally {
        clearTimeout(timer)
        signal?.removeEventListener('abort', leave)
        end()
      }
      return settlement.exchange
    }

    function toWarning({ message: reason }: Error): void {
      log.warn({ reason }, 'an unread response could not be billed')
    }

    /** Chooses a model for a request that continues an unknown response, as for any other request. */
    function nameModel({ model, endpoint, request }: Exchange): GatewayError | undefined {
      const { payload } = request
      if (model !== undefined || payload === undefined || endpoint?.spends === undefined) return
      payload.model = fastify.backends.pool.impliedModel
      payload.isModelImplied = payload.model !== undefined
      return payload.isModelImplied ? undefined : modelMissing()
    }

    /** Sends a request to the backend that has the response, if it belongs to the caller. */
    async function bind(exchange: Exchange, id: string | undefined): Promise<void> {
      if (id === undefined) return
      const caller = exchange.request.caller?.id
      if (exchange.settlement?.signal?.aborted) throw shuttingDown()
      const found = await made.find(id).catch(toUnavailable)
      // Without keys there is nobody to protect, and another gateway may have made it.
      if (found === undefined && caller === undefined) return
      if (found === undefined || found.caller !== caller) {
        throw new GatewayError('not_found', 'Unknown response id.')
      }
      exchange.pinned = found.backend
      exchange.heldModel = found.model
      const { unbilled } = found
      if (unbilled === undefined) return
      const { request, settlement, clientIp: address } = exchange
      // What it has cost is not known afterwards.
      if (request.method === 'DELETE') await ask(found, { caller: request.caller, address })
      if (!exchange.endpoint?.showsResponse) return
      if (settlement?.isLost) exchange.backend = found.backend
      const { starting_after: startsAfter } = request.query as { starting_after?: unknown }
      exchange.stored = {
        promptTokens: unbilled,
        startsAfter: Math.max(0, Math.trunc(Number(startsAfter))) || 0,
        bill({ usage, isComplete, part }) {
          if (usage === undefined && !isComplete) return undefined
          const state = settlement?.isLost ? 'lost' : isComplete ? 'complete' : 'open'
          if (state !== 'open') this.release = () => finish(found, isComplete)
          return made.bill(found, usage, state, part)
        }
      }
    }

    /** A response is settled: it is billed in full, or its backend has lost it. */
    function finish(found: StoredResponse, isComplete: boolean): void {
      const response = isComplete ? { ...found, unbilled: undefined } : found
      peers?.tell({ kind: 'response', response, isSettled: true })
      reservations.release(found.id)
    }
  }

/** Time (ms) that a backend has to show a response. */
const SETTLE_TIMEOUT = 60_000
/** Statuses of a backend that does not show a response: it is unknown there, or no response can be read. */
const UNREADABLE = new Set([404, 405, 501])
const SLASH = 'Unknown route: remove the slash at the end of the path.'
const INVALID_ID = 'Invalid path: a response id must not contain an encoded slash.'

function toUnavailable(error: unknown): never {
  if (!(error instanceof DatabaseError)) throw error
  throw new GatewayError('store_unavailable', 'The owner of the response cannot be looked up.', {
    headers: { 'retry-after': '1' },
    cause: error
  })
}

function shuttingDown(): GatewayError {
  return new GatewayError('shutting_down', 'This server is shutting down.')
}

/** Ends a request for which there is nothing to ask a backend. */
function conclude({ exchange }: FastifyRequest, reply: FastifyReply): void {
  reply.code(204)
  const recorded = exchange.conclude()
  if (recorded === undefined) reply.send()
  else void recorded.then(() => reply.send())
}

export default openaiRoutes
