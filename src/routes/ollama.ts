import type { FastifyPluginAsync } from 'fastify'
import { ollama } from '../dialects/ollama.ts'
import type { Endpoint } from '../exchange.ts'
import { forwarded } from './forwarded.ts'

const post = (url: string, more: Partial<Endpoint> = {}): Endpoint => ({
  method: 'POST',
  url,
  dialect: ollama,
  body: 'json',
  ...more
})
const GENERATES = { spends: 'input and output', streamsByDefault: true } as const
const EMBEDS = { spends: 'input' } as const
const get = (url: string): Endpoint => ({ method: 'GET', url, dialect: ollama, body: 'none' })

/** Ollama's native API without what changes the server: no pull, push, create, copy or delete. */
const ollamaRoutes: FastifyPluginAsync = fastify =>
  forwarded(fastify, [
    post('/api/chat', GENERATES),
    post('/api/generate', GENERATES),
    post('/api/embed', EMBEDS),
    post('/api/embeddings', EMBEDS),
    post('/api/show'),
    get('/api/tags'),
    get('/api/ps'),
    get('/api/version')
  ])

export default ollamaRoutes
