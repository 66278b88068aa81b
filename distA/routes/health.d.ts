import type { FastifyPluginAsync } from 'fastify';
/**
 * `GET /health`: 200 as long as the process serves. `GET /health/ready`, or `/health?ready`: 503 when
 * no backend is available or the gateway is about to stop, so that no traffic is sent here.
 */
declare const healthRoutes: FastifyPluginAsync;
export default healthRoutes;
