import type { FastifyPluginAsync } from 'fastify';
declare const _default: FastifyPluginAsync;
export default _default;
