import replyFrom from '@fastify/reply-from'
import Fastify from 'fastify'

/** @fastify/reply-from with nothing around it: `bare.ts PORT BACKEND_URL`. */

const [port, base] = process.argv.slice(2)
const fastify = Fastify({ bodyLimit: 64 * 1024 * 1024 })
fastify.removeAllContentTypeParsers()
fastify.addContentTypeParser('*', { parseAs: 'buffer' }, (_request, body, done) => done(null, body))
await fastify.register(replyFrom, {
  base: base!,
  undici: { connections: 20_000, pipelining: 1, bodyTimeout: 0 },
  disableRequestLogging: true
})
fastify.all('/*', (request, reply) =>
  reply.from(request.url, {
    body: request.body,
    contentType: request.headers['content-type'] ?? 'application/json'
  })
)
await fastify.listen({ port: Number(port), host: '127.0.0.1', backlog: 4096 })
