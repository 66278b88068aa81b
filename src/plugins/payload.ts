import { isUtf8 } from 'node:buffer'
import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import { GatewayError } from '../errors.ts'
import { type Endpoint, type Payload, withExchanges } from '../exchange.ts'
import { findMembers } from '../metering/members.ts'

/**
 * Keeps request bodies as the bytes that came, and reads beside them the few members the gateway
 * needs. On a `json` endpoint the body must be exactly one JSON object.
 *
 * Affects every route of the scope it is registered in: `request.body` is a Buffer there.
 *
 * @example
 * await fastify.register(payload)
 * fastify.post('/v1/chat/completions', { config: { endpoint } }, async request => request.payload.model)
 */

declare module 'fastify' {
  interface FastifyRequest {
    payload: Payload | undefined
  }
}

/** Members whose meaning must be the same for the gateway and for every backend's JSON parser. */
const READ = ['model', 'stream', 'stream_options']
/** What is known of models is kept by their names: a longer text (characters) is none. */
const LONGEST_MODEL = 1_000

const payloadPlugin: FastifyPluginAsync = async function payload(fastify) {
  withExchanges(fastify)
  if (!fastify.hasRequestDecorator('payload')) fastify.decorateRequest('payload', undefined)
  fastify.removeAllContentTypeParsers()
  fastify.addContentTypeParser('*', { parseAs: 'buffer' }, (_request, body, done) => {
    done(null, body)
  })

  // Fastify refuses an empty type, though it takes none at all.
  fastify.addHook('onRequest', ({ headers }, _reply, done) => {
    if (headers['content-type'] === '') delete headers['content-type']
    done()
  })
  fastify.addHook('preValidation', (request, _reply, done) => {
    const { endpoint } = request.exchange
    if (endpoint?.body !== 'json') return done()
    if ((request.headers['content-encoding'] ?? 'identity') !== 'identity') {
      throw new GatewayError('unsupported_encoding', 'Send the body without a content-encoding.')
    }
    request.payload = readPayload(request, endpoint)
    done()
  })
}

function readPayload(request: FastifyRequest, endpoint: Endpoint): Payload {
  const bytes = request.body
  if (!Buffer.isBuffer(bytes) || bytes.length === 0) {
    throw new GatewayError('invalid_json', 'The request body is empty; it must be a JSON object.')
  }
  const body = parseObject(bytes)
  if (request.caller?.models !== undefined) refuseAmbiguity(bytes)
  const { model, stream, stream_options, previous_response_id } = body
  if (model !== undefined && model !== null && typeof model !== 'string') {
    throw new GatewayError('invalid_request', 'model must be a string.')
  }
  if (model && model.length > LONGEST_MODEL) {
    throw new GatewayError('invalid_request', 'model is too long for the name of a model.')
  }
  if (stream !== undefined && stream !== null && typeof stream !== 'boolean') {
    throw new GatewayError('invalid_request', 'stream must be true or false.')
  }
  return {
    bytes,
    // No name is no model: servers with one model take it for theirs.
    model: model || undefined,
    stream: stream ?? endpoint.streamsByDefault ?? false,
    includeUsage: asksForUsage(stream_options),
    maxTokens: maxTokens(body),
    previousResponseId: typeof previous_response_id === 'string' ? previous_response_id : undefined
  }
}

function parseObject(bytes: Buffer): Record<string, unknown> {
  let body: unknown
  try {
    if (!isUtf8(bytes)) throw new SyntaxError('it is not valid UTF-8')
    body = JSON.parse(bytes.toString())
  } catch (error) {
    throw new GatewayError(
      'invalid_json',
      `The request body is not valid JSON: ${jsonComplaint(error as Error)}.`
    )
  }
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    throw new GatewayError('invalid_json', 'The request body must be a JSON object.')
  }
  return body as Record<string, unknown>
}

/** The parser's complaint without the excerpt of the body that V8 puts into it. */
function jsonComplaint(error: Error): string {
  return error.message.split(/,? "|, \.\.\.|, '/)[0]!.replace(/\.$/, '')
}

/**
 * Parsers disagree about `{"model": "a", "Model": "b"}`: Go's ignores case, others take the last of
 * two equal names. A caller who is held to some models must not profit from that.
 */
function refuseAmbiguity(bytes: Buffer): void {
  const names = findMembers(bytes).map(member => member.name)
  for (const read of READ) {
    if (names.filter(name => name.toLowerCase() === read).length > 1) {
      throw new GatewayError('invalid_request', `${read} must be there only once.`)
    }
  }
}

/** The most tokens that all its answers together may have. */
function maxTokens({ n, options, ...body }: Record<string, unknown>): number | undefined {
  const { max_completion_tokens, max_tokens = max_completion_tokens } = body
  const { max_output_tokens = max_tokens } = body
  const { num_predict } = (options ?? {}) as { num_predict?: unknown }
  const most = Number(max_output_tokens ?? num_predict)
  return most > 0 ? most * Math.max(1, Number(n) || 1) : undefined
}

function asksForUsage(options: unknown): boolean {
  return typeof options === 'object' && options !== null && 'include_usage' in options
    ? options.include_usage === true
    : false
}

export default fp(payloadPlugin, { name: 'payload', fastify: '5.x' })
