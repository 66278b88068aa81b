import type { FastifyPluginAsync } from 'fastify';
/** The list of models, and one of them; an id may contain slashes (`org/model`). */
declare const modelRoutes: FastifyPluginAsync;
export default modelRoutes;
