/** `GET /metrics`: the registry in Prometheus' text format, or the sum over all workers. */
const metricsRoutes = async function metricsRoutes(fastify, { path }) {
    const registry = fastify.metricsRegistry;
    fastify.get(path, { config: { rateLimit: false } }, async (_request, reply) => {
        return reply.type(registry.contentType).send(await (fastify.peers ?? registry).metrics());
    });
};
export default metricsRoutes;
