import replyFrom from '@fastify/reply-from';
import fp from 'fastify-plugin';
import { openai } from '../dialects/openai.js';
import { withExchanges } from '../exchange.js';
import { pathBelow } from '../http.js';
import { checkOptions, Duration, Section } from '../options.js';
import { createDispatcher, EXCHANGE } from '../pool/dispatcher.js';
/**
 * Forwards a request to the pool and streams the answer back: `reply.forward()`.
 *
 * The bytes of the request and of the answer pass as they are; headers that concern one connection,
 * the caller's key, cookies and whatever could steer a backend stay here.
 *
 * @example
 * await fastify.register(backends, { backends: [{ url: 'http://127.0.0.1:8001' }] })
 * await fastify.register(proxy)
 * fastify.post('/v1/embeddings', (request, reply) => reply.forward())
 */
export const ProxyOptions = Section({
    write_timeout: Duration('60s', 'How long a client may let bytes wait; 0: for ever', 0)
}, 'Forwarding');
const proxyPlugin = async function proxy(fastify, given) {
    const options = checkOptions(ProxyOptions, given);
    const { pool, onAttempt } = fastify.backends;
    withExchanges(fastify);
    await fastify.register(replyFrom, {
        undici: createDispatcher(pool, (backend, result) => {
            for (const listener of onAttempt)
                listener(backend, result);
        }, fastify.log),
        retryMethods: [],
        disableRequestLogging: true
    });
    const hooks = [];
    fastify.decorate('answerHooks', hooks);
    const credentials = () => fastify.keys?.credentialHeaders() ?? [];
    const rewriteRequestHeaders = (request, headers) => toBackend(headers, request.exchange, credentials());
    const rewriteHeaders = (headers, request) => toClient(headers, request.exchange);
    const onResponse = ({ exchange }, reply, { stream: answer }) => {
        answer.stallTimeout = options.write_timeout;
        const streams = isStream(reply);
        if (streams) {
            const dialect = exchange.endpoint?.dialect ?? openai;
            answer.lastWords = error => dialect.errorEvent(error, exchange.id);
            // A length would turn the last words into a proper end.
            reply.removeHeader('content-length');
        }
        let sent = answer;
        for (const hook of hooks)
            sent = hook(exchange, answer) ?? sent;
        const whole = streams || sent !== answer ? undefined : answer.takeWhole(reply.raw);
        reply.send(whole ?? sent);
    };
    fastify.decorateReply('forward', function forward() {
        const { request } = this;
        return this.from(`http://pool${backendPath(request, fastify.prefix)}`, {
            ...body(request),
            rewriteRequestHeaders,
            rewriteHeaders,
            onResponse
        });
    });
};
/** The path at the backend; the query string follows by itself. */
function backendPath(request, prefix) {
    return (request.exchange.endpoint?.upstreamPrefix ?? '') + pathBelow(request.url, prefix);
}
/** The body as the bytes that came; a stream is passed on by reply-from itself. */
function body(request) {
    if (request.method === 'GET' || request.method === 'HEAD')
        return {};
    if (!Buffer.isBuffer(request.body))
        return request.body === undefined ? { body: null } : {};
    const contentType = request.headers['content-type'] ?? 'application/json';
    return { body: request.body, contentType };
}
/**
 * Headers that never reach a backend: of one connection (RFC 9110, section 7.6.1), of the caller's
 * identity, and those that steer an inference server behind the gateway's back: vLLM's rank and
 * priority, llama.cpp's conversation that would go on generating after the client has left.
 */
const NOT_TO_BACKEND = new Set([
    'connection',
    'keep-alive',
    'proxy-authenticate',
    'proxy-authorization',
    'proxy-connection',
    'te',
    'trailer',
    'transfer-encoding',
    'upgrade',
    'expect',
    'host',
    'authorization',
    'x-api-key',
    'api-key',
    'cookie',
    'origin',
    'referer',
    'forwarded',
    'x-real-ip',
    'x-conversation-id',
    'x-data-parallel-rank',
    'x-vllm-priority',
    'endpoint-load-metrics-format',
    'traceparent',
    'tracestate',
    'baggage'
]);
function toBackend(headers, exchange, credentials) {
    const kept = { [EXCHANGE]: exchange };
    for (const name in headers) {
        if (NOT_TO_BACKEND.has(name) || name.startsWith('x-forwarded-'))
            continue;
        if (name.startsWith('x-llmproxy-') || credentials.includes(name))
            continue;
        kept[name] = headers[name];
    }
    if (exchange.request.method === 'GET' || exchange.request.method === 'HEAD') {
        delete kept['content-length'];
    }
    // The answer is read as it passes, so it must come uncompressed.
    kept['accept-encoding'] = 'identity';
    kept['x-request-id'] = exchange.id;
    kept['x-llmproxy-request-id'] = exchange.id;
    return kept;
}
const NOT_TO_CLIENT = new Set([
    'connection',
    'keep-alive',
    'proxy-authenticate',
    'proxy-connection',
    'te',
    'trailer',
    'transfer-encoding',
    'upgrade'
]);
/** What the gateway itself has set stays: its id, its limits, its CORS headers. */
function toClient(headers, exchange) {
    const { reply } = exchange;
    const listed = connectionListed(headers.connection);
    const kept = {};
    for (const name in headers) {
        if (NOT_TO_CLIENT.has(name) || listed.includes(name) || reply.hasHeader(name))
            continue;
        kept[name] = headers[name];
    }
    kept['x-request-id'] ??= exchange.id;
    kept[exchange.endpoint?.dialect.idHeader ?? 'x-request-id'] ??= exchange.id;
    if (String(kept['content-type']).startsWith('text/event-stream')) {
        // nginx in front would collect the events otherwise.
        kept['x-accel-buffering'] ??= 'no';
    }
    return kept;
}
function connectionListed(header) {
    if (header === undefined || header === 'keep-alive' || header === 'close')
        return [];
    return String(header)
        .toLowerCase()
        .split(',')
        .map(name => name.trim());
}
function isStream(reply) {
    const type = String(reply.getHeader('content-type'));
    return type.startsWith('text/event-stream') || type.startsWith('application/x-ndjson');
}
export default fp(proxyPlugin, {
    name: 'proxy',
    fastify: '5.x',
    decorators: { fastify: ['backends'] }
});
