import { Transform } from 'node:stream'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { GatewayError } from '../errors.ts'
import type { Endpoint } from '../exchange.ts'

type Handler = (request: FastifyRequest, reply: FastifyReply) => void

/**
 * Declares routes that are forwarded to the backends. Only paths that are declared reach one: the
 * control paths of an inference server never do. `handler` may answer some calls itself.
 */
export async function forwarded(
  fastify: FastifyInstance,
  endpoints: Endpoint[],
  handler: Handler = (_request, reply) => reply.forward()
): Promise<void> {
  for (const endpoint of endpoints.filter(({ body }) => body !== 'stream')) {
    declare(fastify, endpoint, handler)
  }
  const streamed = endpoints.filter(({ body }) => body === 'stream')
  if (streamed.length === 0) return
  await fastify.register(async scope => {
    scope.removeAllContentTypeParsers()
    scope.addContentTypeParser('*', async (request: unknown, body: NodeJS.ReadableStream) => {
      const { headers } = request as { headers: Record<string, string | undefined> }
      return limited(body, Number(headers['content-length'] ?? 0), scope.initialConfig.bodyLimit!)
    })
    for (const endpoint of streamed) declare(scope, endpoint, handler)
  })
}

function declare(fastify: FastifyInstance, endpoint: Endpoint, handler: Handler): void {
  fastify.route({
    method: endpoint.method,
    url: endpoint.url,
    // fastify-metrics leaves them out: the gateway's own metrics say all of it, and more.
    config: { endpoint, disableMetrics: true },
    // Not returned: Fastify would wait for the reply as for a promise.
    handler: (request, reply) => void handler(request, reply)
  })
}

/** The same stream, which fails when more comes than `limit` bytes. */
function limited(body: NodeJS.ReadableStream, length: number, limit: number): Transform {
  const tooLarge = () =>
    new GatewayError('body_too_large', 'The request body is larger than this server accepts.')
  if (length > limit) throw tooLarge()
  let size = 0
  const counter = new Transform({
    transform(chunk: Buffer, _encoding, done) {
      size += chunk.length
      done(size > limit ? tooLarge() : null, chunk)
    }
  })
  counter.on('error', () => {})
  body.on('error', () => {
    counter.destroy(new GatewayError('client_gone', 'The client has left.'))
  })
  return body.pipe(counter)
}
