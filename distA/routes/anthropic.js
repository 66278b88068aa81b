import { anthropic } from '../dialects/anthropic.js';
import { forwarded } from './forwarded.js';
/** The Messages API, for backends that speak it (vLLM, SGLang, llama.cpp, Ollama, LM Studio). */
const anthropicRoutes = fastify => forwarded(fastify, [
    { method: 'POST', url: '/v1/messages', dialect: anthropic, body: 'json' },
    { method: 'POST', url: '/v1/messages/count_tokens', dialect: anthropic, body: 'json' }
]);
export default anthropicRoutes;
