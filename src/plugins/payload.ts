import '../check-node.ts'
import { isUtf8 } from 'node:buffer'
import type { Readable } from 'node:stream'
import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import { GatewayError } from '../errors.ts'
import { withExchanges } from '../exchange.ts'
import { toPart } from '../parts.ts'
import { toPayload } from '../payload.ts'
import { refuseReferences } from '../references.ts'
import { codingsOf, newDecoder } from '../wire/codings.ts'
import { Gathered } from '../wire/gathered.ts'
import { JsonError, JsonScanner } from '../wire/json-scanner.ts'

/**
 * Keeps request bodies as the bytes that arrived, and reads beside them the few fields the gateway needs. On a
 * `json` endpoint the body must be exactly one JSON object; it is checked as it arrives, so that a bad one is
 * rejected before its end.
 *
 * Affects every route of the scope it is registered in: `request.body` is a Buffer there, and routes with an endpoint
 * whose body is `json` have `request.payload`.
 *
 * @example
 * await fastify.register(payload)
 * const endpoint = { method: 'POST', url: '/v1/chat/completions', dialect: openai, body: 'json' }
 * fastify.post(endpoint.url, { config: { endpoint } }, async request => request.payload.model)
 */

export { anthropic } from '../dialects/anthropic.ts'
export type { Dialect } from '../dialects/dialect.ts'
export { ollama } from '../dialects/ollama.ts'
export { openai } from '../dialects/openai.ts'
export { responses } from '../dialects/responses.ts'
export type { Endpoint } from '../exchange.ts'
export type { Payload } from '../payload.ts'

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

  fastify.addHook('onRequest', (request, _reply, done) => {
    const { headers } = request
    // The host may have a decorator of this name.
    request.payload = undefined
    // Fastify refuses an empty type, though it takes none at all.
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
  const limit = request.routeOptions.bodyLimit!
  const announced =
    headers['content-length'] === undefined ? undefined : Number(headers['content-length'])
  if (announced !== undefined && announced > limit) throw tooLarge(limit)
  const plain = scanner === undefined ? stream : decoded(stream, headers['content-encoding'])
  // A decoded body has another length, and is sent decoded.
  const length = plain === stream ? announced : undefined
  if (scanner !== undefined) delete headers['content-encoding']
  const body = new Gathered(length ?? UNKNOWN_LENGTH, length ?? limit)
  try {
    await eachChunk(plain, chunk => {
      if (body.length + chunk.length > limit) throw tooLarge(limit)
      exchange.hold(chunk.length)
      body.add(scanner && body.length === 0 ? withoutMark(chunk) : chunk)
      scanner?.scan(body.bytes, body.length)
    })
    if (scanner === undefined || endpoint === undefined || body.length === 0) return body.bytes
    scanner.end()
    if (!isUtf8(body.bytes)) throw invalidJson('it is not valid UTF-8')
    const payload = toPayload(body.bytes, scanner, endpoint)
    if (request.caller !== undefined) {
      if (payload.hasStoredPrompt) throw storedPrompt()
      await refuseReferences(body.bytes, scanner.members, endpoint.dialect.name)
    }
    request.payload = payload
    return body.bytes
  } catch (error) {
    if (plain !== stream) plain.destroy()
    if (!(error instanceof JsonError || error instanceof GatewayError)) {
      throw plain === stream ? clientGone() : invalidCoding()
    }
    throw error instanceof JsonError ? invalidJson(error.message) : error
  }
}

/** A byte order mark is no part of JSON (RFC 8259, section 8.1); some editors write one nevertheless. */
function withoutMark(chunk: Buffer): Buffer {
  const isMarked = chunk[0] === 0xef && chunk[1] === 0xbb && chunk[2] === 0xbf
  return isMarked ? chunk.subarray(3) : chunk
}

/**
 * Returns a body without its content codings. Destroying it leaves the body open: the response needs its connection.
 *
 * @throws {GatewayError} `unsupported_encoding`
 */
function decoded(body: Readable, encoding: string | undefined): Readable {
  const { codings, unknown } = codingsOf(encoding)
  if (unknown !== undefined) {
    throw new GatewayError(
      'unsupported_encoding',
      'content-encoding: must be gzip, deflate, br, zstd or identity.'
    )
  }
  let plain = body
  for (const name of codings.toReversed()) {
    const stage = newDecoder(name)
    stage.once('error', error => plain.destroy(error))
    plain = plain.pipe(stage)
  }
  if (plain === body) return body
  const onClose = () => {
    if (!body.readableEnded) plain.destroy(clientGone())
  }
  body.once('close', onClose).once('error', onClose)
  plain.once('close', () => {
    body.off('close', onClose).unpipe()
    body.on('error', () => {}).resume()
  })
  return plain
}

/** Hands over chunks until the end. One client that sends fast does not keep the event loop to itself. */
function eachChunk(stream: Readable, take: (chunk: Buffer) => void): Promise<void> {
  return new Promise((resolve, reject) => {
    let burst = 0
    const settle = (error?: unknown) => {
      stream.off('data', onData).off('end', settle).off('error', onError).off('close', onError)
      if (error === undefined) return resolve()
      // Node discards the rest of a body without a reader, but only of a stream that flows.
      stream.on('error', () => {}).resume()
      reject(error)
    }
    const onError = (error: unknown = clientGone()) => settle(error)
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

function invalidCoding(): GatewayError {
  return new GatewayError('invalid_request', 'content-encoding: the body is not coded like that.')
}

function clientGone(): GatewayError {
  return new GatewayError('client_gone', 'The client has left.')
}

function tooLarge(limit: number): GatewayError {
  return new GatewayError(
    'body_too_large',
    `The request body is larger than this server accepts (${limit} bytes).`
  )
}

function storedPrompt(): GatewayError {
  const message = 'prompt: stored prompts are not supported; use "instructions" and "input".'
  return new GatewayError('invalid_request', message)
}

function invalidJson(problem: string): GatewayError {
  return new GatewayError(
    'invalid_json',
    `The request body is not a valid JSON object: ${problem}.`
  )
}

export default toPart(payloadPlugin, {
  name: 'payload'
})
