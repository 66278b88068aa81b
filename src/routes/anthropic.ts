import type { FastifyPluginAsync } from 'fastify'
import { anthropic } from '../dialects/anthropic.ts'
import { forwarded } from './forwarded.ts'

/** The Messages API, for backends that speak it (vLLM, SGLang, llama.cpp, Ollama, LM Studio). */
const anthropicRoutes: FastifyPluginAsync = fastify =>
  forwarded(fastify, [
    {
      method: 'POST',
      url: '/v1/messages',
      dialect: anthropic,
      body: 'json',
      spends: 'input and output',
      limitedBy: ['max_tokens']
    },
    {
      method: 'POST',
      url: '/v1/messages/count_tokens',
      dialect: anthropic,
      body: 'json',
      isFree: true
    }
  ])

export default anthropicRoutes
