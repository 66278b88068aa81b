import { isUtf8 } from 'node:buffer'
import type { Readable } from 'node:stream'
import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import { GatewayError } from '../errors.ts'
import { withExchanges } from '../exchange.ts'
import { type Payload, toPayload } from '../payload.ts'
import { Gathered } from '../wire/gathered.ts'
import { JsonError, JsonScanner } from '../wire/json-scanner.ts'

/**
 * Keeps request bodies as the bytes that arrived, and reads beside them the few fields the gateway needs. On a
 * `json` endpoint the body must be exactly one JSON object; it is checked as it arrives, so that a bad one is
 * rejected before its end.
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

/** Bytes of one body that are read before other requests get their turn: less than 5 ms of work. */
const BURST = 256 * 1024
/** Size (bytes) of the first buffer of a body whose length is not announced. */
const UNKNOWN_LENGTH = 16 * 1024

const payloadPlugin: FastifyPluginAsync = async function payload(fastify) {
  withExchanges(fastify)
  if (!fastify.hasRequestDecorator('payload')) fastify.decorateRequest('payload', undefined)
  fastify.removeAllContentTypeParsers()
  fastify.addContentTypeParser('*', (request, stream, done) => {
    receive(request, stream).then(body => done(null, body), done)
  })

  // Fastify refuses an empty type, though it takes none at all.
  fastify.addHook('onRequest', ({ headers }, _reply, done) => {
    if (headers['content-type'] === '') delete headers['content-type']
    done()
  })
  fastify.addHook('preValidation', (request, _reply, done) => {
    const isEmpty = request.exchange.endpoint?.body === 'json' && request.payload === undefined
    done(isEmpty ? invalidJson('it is empty') : undefined)
  })
}

/** Reads a body to its end. The reading stops at the first error; the rest of the body is then ignored. */
async function receive(request: FastifyRequest, stream: Readable): Promise<Buffer> {
  const { exchange, headers } = request
  const { endpoint } = exchange
  const scanner = endpoint?.body === 'json' ? new JsonScanner() : undefined
  if (scanner && (headers['content-encoding'] ?? 'identity') !== 'identity') {
    throw new GatewayError('unsupported_encoding', 'Send the body without a content-encoding.')
  }
  const limit = request.routeOptions.bodyLimit!
  const length =
    headers['content-length'] === undefined ? undefined : Number(headers['content-length'])
  if (length !== undefined && length > limit) throw tooLarge(limit)
  const body = new Gathered(length ?? UNKNOWN_LENGTH, length ?? limit)
  try {
    await eachChunk(stream, chunk => {
      if (body.length + chunk.length > limit) throw tooLarge(limit)
      exchange.hold(chunk.length)
      body.add(chunk)
      scanner?.scan(body.bytes, body.length)
    })
    if (scanner === undefined || endpoint === undefined || body.length === 0) return body.bytes
    scanner.end()
    if (!isUtf8(body.bytes)) throw invalidJson('it is not valid UTF-8')
    request.payload = toPayload(body.bytes, scanner.members, endpoint)
    return body.bytes
  } catch (error) {
    throw error instanceof JsonError ? invalidJson(error.message) : error
  }
}

/** Hands over chunks until the end. One client that sends fast does not keep the event loop to itself. */
function eachChunk(stream: Readable, take: (chunk: Buffer) => void): Promise<void> {
  return new Promise((resolve, reject) => {
    let burst = 0
    const settle = (error?: unknown) => {
      stream.off('data', onData).off('end', settle).off('error', onError).off('close', onError)
      // Node discards what nobody reads, but only of a stream that flows.
      stream.on('error', () => {}).resume()
      if (error === undefined) resolve()
      else reject(error)
    }
    const onError = () => settle(new GatewayError('client_gone', 'The client has left.'))
    const onData = (chunk: Buffer) => {
      try {
        take(chunk)
      } catch (error) {
        return settle(error)
      }
      burst += chunk.length
      if (burst < BURST) return
      burst = 0
      stream.pause()
      setImmediate(() => stream.resume())
    }
    stream.on('data', onData).on('end', settle).on('error', onError).on('close', onError)
  })
}

function tooLarge(limit: number): GatewayError {
  return new GatewayError(
    'body_too_large',
    `The request body is larger than this server accepts (${limit} bytes).`
  )
}

function invalidJson(problem: string): GatewayError {
  return new GatewayError(
    'invalid_json',
    `The request body is not a valid JSON object: ${problem}.`
  )
}

export default fp(payloadPlugin, { name: 'payload', fastify: '5.x' })
