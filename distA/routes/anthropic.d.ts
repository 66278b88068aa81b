import type { FastifyPluginAsync } from 'fastify';
/** The Messages API, for backends that speak it (vLLM, SGLang, llama.cpp, Ollama, LM Studio). */
declare const anthropicRoutes: FastifyPluginAsync;
export default anthropicRoutes;
