import type { FastifyPluginAsync } from 'fastify';
/** Ollama's native API without what changes the server: no pull, push, create, copy or delete. */
declare const ollamaRoutes: FastifyPluginAsync;
export default ollamaRoutes;
