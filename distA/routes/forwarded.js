import { Transform } from 'node:stream';
import { GatewayError } from '../errors.js';
/**
 * Declares routes that are forwarded to the backends. Only paths that are declared reach one: the
 * control paths of an inference server never do.
 */
export async function forwarded(fastify, endpoints) {
    for (const endpoint of endpoints.filter(({ body }) => body !== 'stream')) {
        declare(fastify, endpoint);
    }
    const streamed = endpoints.filter(({ body }) => body === 'stream');
    if (streamed.length === 0)
        return;
    await fastify.register(async (scope) => {
        scope.removeAllContentTypeParsers();
        scope.addContentTypeParser('*', async (request, body) => {
            const { headers } = request;
            return limited(body, Number(headers['content-length'] ?? 0), scope.initialConfig.bodyLimit);
        });
        for (const endpoint of streamed)
            declare(scope, endpoint);
    });
}
function declare(fastify, endpoint) {
    fastify.route({
        method: endpoint.method,
        url: endpoint.url,
        // fastify-metrics leaves them out: the gateway's own metrics say all of it, and more.
        config: { endpoint, disableMetrics: true },
        handler: (_request, reply) => reply.forward()
    });
}
/** The same stream, which fails when more comes than `limit` bytes. */
function limited(body, length, limit) {
    const tooLarge = () => new GatewayError('body_too_large', 'The request body is larger than this server accepts.');
    if (length > limit)
        throw tooLarge();
    let size = 0;
    const counter = new Transform({
        transform(chunk, _encoding, done) {
            size += chunk.length;
            done(size > limit ? tooLarge() : null, chunk);
        }
    });
    counter.on('error', () => { });
    body.on('error', () => {
        counter.destroy(new GatewayError('client_gone', 'The client has left.'));
    });
    return body.pipe(counter);
}
