import Fastify from 'fastify'
import payload, { type Endpoint, openai } from 'llmproxy/payload'
import type {} from 'llmproxy/types'

/** A host that registers the payload part alone. */
const endpoint: Endpoint = { method: 'POST', url: '/chat', dialect: openai, body: 'json' }
const fastify = Fastify()
await fastify.register(payload)
fastify.post('/chat', { config: { endpoint } }, async request => request.payload?.model)
const response = await fastify.inject({ method: 'POST', url: '/chat', body: { model: 'm' } })
if (response.payload !== 'm') throw new Error(response.payload)
await fastify.close()
