import type { FastifyPluginAsync } from 'fastify';
/** `GET /metrics`: the registry in Prometheus' text format, or the sum over all workers. */
declare const metricsRoutes: FastifyPluginAsync<{
    path: string;
}>;
export default metricsRoutes;
