import { Transform } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import { GatewayError } from '../errors.ts'
import type { Exchange } from '../exchange.ts'

/** A longer response (bytes) is rejected. */
const MAX_BYTES = 4 * 1024 * 1024

/**
 * Rewrites the lists or descriptions of models that a backend returns for these routes, so that a caller sees its own
 * models and no more of them than it may know.
 *
 * @param rewrite gets the parsed response, and returns what the caller gets
 */
export function rewriteListings(
  fastify: FastifyInstance,
  urls: readonly string[],
  rewrite: (body: unknown, exchange: Exchange) => unknown
): void {
  fastify.answerHooks.push((exchange, answer) => {
    const { endpoint, reply } = exchange
    if (!urls.includes(endpoint?.url ?? '') || reply.statusCode > 299) return undefined
    reply.removeHeader('content-length')
    reply.header('content-type', 'application/json; charset=utf-8')
    let size = 0
    const chunks: Buffer[] = []
    const failed = () =>
      new GatewayError(
        'backend_failed',
        'The backend returned a list or description of models that cannot be read.'
      )
    return answer.pipe(
      new Transform({
        transform(chunk: Buffer, _encoding, done) {
          size += chunk.length
          if (size > MAX_BYTES) return done(failed())
          chunks.push(chunk)
          done()
        },
        flush(done) {
          try {
            const body: unknown = JSON.parse(Buffer.concat(chunks).toString())
            done(null, JSON.stringify(rewrite(body, exchange)))
          } catch {
            done(failed())
          }
        }
      })
    )
  })
}
