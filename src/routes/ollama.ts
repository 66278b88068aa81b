import type { FastifyPluginAsync } from 'fastify'
import { ollama } from '../dialects/ollama.ts'
import type { Endpoint } from '../exchange.ts'
import { forwarded } from './forwarded.ts'

const post = (url: string, streamsByDefault = false): Endpoint => ({
  method: 'POST',
  url,
  dialect: ollama,
  body: 'json',
  streamsByDefault
})
const get = (url: string): Endpoint => ({ method: 'GET', url, dialect: ollama, body: 'none' })

/** Ollama's native API without what changes the server: no pull, push, create, copy or delete. */
const ollamaRoutes: FastifyPluginAsync = fastify =>
  forwarded(fastify, [
    post('/api/chat', true),
    post('/api/generate', true),
    post('/api/embed'),
    post('/api/embeddings'),
    post('/api/show'),
    get('/api/tags'),
    get('/api/ps'),
    get('/api/version')
  ])

export default ollamaRoutes
