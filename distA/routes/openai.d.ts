import type { FastifyPluginAsync } from 'fastify';
declare const openaiRoutes: FastifyPluginAsync;
export default openaiRoutes;
