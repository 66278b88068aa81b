import '../check-node.ts'
import { pipeline } from 'node:stream'
import { promisify } from 'node:util'
import replyFrom from '@fastify/reply-from'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { type Static, Type } from 'typebox'
import { dropControls, ENGINE_CONTROLS, isControlHeader } from '../engine-controls.ts'
import { type Exchange, withExchanges } from '../exchange.ts'
import { isStream, pathBelow } from '../http.ts'
import { checkOptions, Duration, type Given, Section } from '../options.ts'
import { part, share, toPart } from '../parts.ts'
import type { Answer } from '../pool/answer.ts'
import { createDispatcher, EXCHANGE } from '../pool/dispatcher.ts'
import { Renamed } from '../pool/renamed.ts'

/**
 * Forwards a request to the pool and streams the answer back: `reply.forward()`.
 *
 * The bytes of the request and of the answer pass as they are; headers that concern one connection,
 * the caller's key, cookies and whatever could steer a backend stay here.
 *
 * @example
 * await fastify.register(backends, { backends: [{ url: 'http://127.0.0.1:8001' }] })
 * await fastify.register(proxy)
 * fastify.post('/v1/embeddings', (request, reply) => reply.forward())
 */

/** Names of fields and headers that steer an engine, and pass nevertheless. */
export const AllowEngineControls = Type.Array(Type.Enum(ENGINE_CONTROLS), {
  uniqueItems: true,
  default: [],
  description:
    'Request fields and headers that steer an engine and reach a backend nevertheless, such as priority; see docs/security.md'
})

export const ProxyOptions = Section(
  {
    write_timeout: Duration('60s', 'How long a client may let bytes wait; 0: for ever', 0),
    heartbeat: Duration(
      '15s',
      'How long a stream may be silent before the client gets a comment; 0: for ever',
      0
    ),
    allow_engine_controls: AllowEngineControls
  },
  'Forwarding'
)
export type ProxyOptions = Static<typeof ProxyOptions>

/**
 * Sees every answer before it is sent; may return a stream to send in its place, but of one that was waited
 * for with heartbeats, where a tap must do.
 */
export type AnswerHook = (exchange: Exchange, answer: Answer) => NodeJS.ReadableStream | undefined

export interface Forwarding {
  /** Applies to responses that begin afterwards. */
  update(options: Given<ProxyOptions>): void
}

const proxyPlugin: FastifyPluginAsync<Given<ProxyOptions>> = async function proxy(fastify, given) {
  let options = checkOptions(ProxyOptions, given)
  let allowed = new Set(options.allow_engine_controls)
  const { pool, onAttempt } = part(fastify, 'backends')!
  withExchanges(fastify)

  const hooks: AnswerHook[] = []
  const prepare = (exchange: Exchange, answer: Answer) => {
    let sent: NodeJS.ReadableStream = answer
    for (const hook of hooks) sent = hook(exchange, answer) ?? sent
    return withName(exchange, answer, sent)
  }

  // Not registered: Fastify would end the start with the error of a decorator that is already there.
  await promisify(replyFrom as never)(fastify, {
    undici: createDispatcher(pool, fastify.log, {
      heartbeat: () => options.heartbeat,
      attempted(backend, result) {
        for (const listener of onAttempt) listener(backend, result)
      },
      answers: (exchange, answer) => void prepare(exchange, answer),
      asked: exchange => part(fastify, 'tokens')?.input(exchange) ?? 0,
      passed: exchange => part(fastify, 'tokens')?.output(exchange) ?? 0
    }),
    retryMethods: [],
    disableRequestLogging: true
  })

  share(fastify, 'answerHooks', hooks)
  share(fastify, 'proxy', {
    update(changed) {
      options = checkOptions(ProxyOptions, changed)
      allowed = new Set(options.allow_engine_controls)
    }
  })
  const credentials = () => part(fastify, 'keys')?.credentialHeaders() ?? []

  const rewriteRequestHeaders = (request: FastifyRequest, headers: Headers) =>
    toBackend(headers, request.exchange, credentials(), allowed)
  const rewriteHeaders = (headers: Headers, request?: FastifyRequest) =>
    toClient(headers, request!.exchange)
  const onResponse = (
    { exchange }: FastifyRequest,
    reply: FastifyReply,
    { stream: answer }: { stream: Answer }
  ) => {
    answer.stallTimeout = options.write_timeout
    answer.account = exchange
    answer.isStream = isStream(answer.framing)
    // nginx in front would collect the events otherwise.
    if (answer.framing === 'sse' && !reply.hasHeader('x-accel-buffering')) {
      reply.header('x-accel-buffering', 'no')
    }
    // A length would turn the last words of a stream into a proper end.
    if (answer.isStream) reply.removeHeader('content-length')
    if (answer.isAwaited) return void reply.send(answer)
    const sent = prepare(exchange, answer)
    const whole = answer.isStream || sent !== answer ? undefined : answer.takeWhole(reply.raw)
    if (whole === undefined) return void reply.send(sent)
    const recorded = exchange.conclude()
    if (recorded === undefined) reply.send(whole)
    else void recorded.then(() => (exchange.closed ? undefined : reply.send(whole)))
  }

  fastify.decorateReply('forward', function forward(this: FastifyReply) {
    const { request } = this
    if (request.payload !== undefined) dropControls(request.payload, allowed)
    return this.from(`http://pool${backendPath(request, fastify.prefix)}`, {
      ...body(request),
      rewriteRequestHeaders,
      rewriteHeaders,
      onResponse
    } as never)
  })
}

/** The model is called in its answer what callers call it. */
function withName(exchange: Exchange, answer: Answer, sent: NodeJS.ReadableStream) {
  const { reply, served } = exchange
  if (served?.model === undefined || served.model === served.upstream) return sent
  const { framing } = answer
  if (framing === undefined || reply.statusCode > 299) return sent
  reply.removeHeader('content-length')
  const renamed = new Renamed(answer.tap, framing, served.model)
  if (sent !== answer) return pipeline(sent, renamed.toTransform(), () => {})
  answer.tap = renamed
  return sent
}

/** The path at the backend; the query string follows by itself. */
function backendPath(request: FastifyRequest, prefix: string): string {
  const path = pathBelow(request.url, prefix).replace(/(?<=.)\/$/, '')
  return (request.exchange.endpoint?.upstreamPrefix ?? '') + path
}

/** The body as the bytes that came; a stream is passed on by reply-from itself. */
function body(request: FastifyRequest): { body?: Buffer | null; contentType?: string } {
  if (request.method === 'GET' || request.method === 'HEAD') return {}
  if (!Buffer.isBuffer(request.body)) return request.body === undefined ? { body: null } : {}
  const contentType = request.headers['content-type'] ?? 'application/json'
  return { body: request.body, contentType }
}

/**
 * Headers that never reach a backend: those of one connection (RFC 9110, section 7.6.1), of the caller's identity and
 * of its trace.
 */
const NOT_TO_BACKEND = new Set([
  'connection',
  'keep-alive',
  'proxy-authenticate',
  'proxy-authorization',
  'proxy-connection',
  'te',
  'trailer',
  'transfer-encoding',
  'upgrade',
  'expect',
  'host',
  'authorization',
  'x-api-key',
  'api-key',
  'x-admin-token',
  'cookie',
  'origin',
  'referer',
  'traceparent',
  'tracestate',
  'baggage'
])

type Headers = Record<string, string | string[] | undefined>

function toBackend(
  headers: Headers,
  exchange: Exchange,
  credentials: readonly string[],
  allowed: ReadonlySet<string>
) {
  const kept: Headers & { [EXCHANGE]: Exchange } = { [EXCHANGE]: exchange }
  const listed = connectionListed(exchange.request.headers.connection)
  for (const given in headers) {
    // Python's servers make the same variable of an underscore and a hyphen.
    const name = given.includes('_') ? given.replaceAll('_', '-') : given
    if (NOT_TO_BACKEND.has(name) || (isControlHeader(name) && !allowed.has(given))) continue
    if (name.startsWith('x-llmproxy-') || name === 'x-request-id') continue
    if (credentials.includes(name) || listed.includes(given)) continue
    kept[given] = headers[given]
  }
  if (exchange.request.method === 'GET' || exchange.request.method === 'HEAD') {
    delete kept['content-length']
  }
  // The answer is read as it passes, so it must come uncompressed.
  kept['accept-encoding'] = 'identity'
  kept['x-request-id'] = exchange.id
  kept['x-llmproxy-request-id'] = exchange.id
  return kept as never
}

const NOT_TO_CLIENT = new Set([
  'connection',
  'keep-alive',
  'proxy-authenticate',
  'proxy-connection',
  'te',
  'trailer',
  'transfer-encoding',
  'upgrade'
])

/** What the gateway itself has set stays: its id, its limits, its CORS headers. */
function toClient(headers: Headers, exchange: Exchange) {
  const { reply } = exchange
  const listed = connectionListed(headers.connection)
  // Not by assigning each name: V8 compiles that for the names it has seen, and does so again and again.
  const kept: Headers = Object.fromEntries(
    Object.entries(headers).filter(
      ([name]) => !NOT_TO_CLIENT.has(name) && !listed.includes(name) && !reply.hasHeader(name)
    )
  )
  kept['x-request-id'] ??= exchange.id
  kept[exchange.dialect.idHeader] ??= exchange.id
  // Several are no type at all.
  const { 'content-type': type } = kept
  if (Array.isArray(type)) kept['content-type'] = type[0]
  return kept as never
}

function connectionListed(header: string | string[] | undefined): string[] {
  if (header === undefined || header === 'keep-alive' || header === 'close') return []
  return String(header)
    .toLowerCase()
    .split(',')
    .map(name => name.trim())
}

export default toPart(proxyPlugin, {
  name: 'proxy',
  needs: ['backends'],
  decorates: ['proxy', 'answerHooks']
})
