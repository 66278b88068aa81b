import { openai } from '../dialects/openai.js';
import { responses } from '../dialects/responses.js';
import { GatewayError } from '../errors.js';
import { forwarded } from './forwarded.js';
const post = (url, more = {}) => ({
    method: 'POST',
    url,
    dialect: openai,
    body: 'json',
    ...more
});
/** What OpenAI's API and its relatives (vLLM, SGLang, llama.cpp, TGI) offer. */
const ENDPOINTS = [
    post('/v1/chat/completions', { asksForUsage: true }),
    post('/v1/completions', { asksForUsage: true }),
    post('/v1/embeddings'),
    post('/chat/completions', { asksForUsage: true, upstreamPrefix: '/v1' }),
    post('/completions', { asksForUsage: true, upstreamPrefix: '/v1' }),
    post('/embeddings', { upstreamPrefix: '/v1' }),
    post('/v1/rerank'),
    post('/v1/score'),
    post('/v1/images/generations'),
    post('/v1/audio/transcriptions', { body: 'stream' }),
    post('/v1/audio/translations', { body: 'stream' }),
    post('/tokenize'),
    post('/detokenize'),
    post('/v1/responses', { dialect: responses, makesResponses: true }),
    post('/v1/responses/input_tokens', { dialect: responses }),
    post('/v1/responses/:id/cancel', { dialect: responses, body: 'none' }),
    { method: 'GET', url: '/v1/responses/:id', dialect: responses, body: 'none' },
    { method: 'GET', url: '/v1/responses/:id/input_items', dialect: responses, body: 'none' }
];
const MAX_RESPONSES = 10_000;
const openaiRoutes = async function openaiRoutes(fastify) {
    const made = new Map();
    fastify.addHook('preHandler', (request, _reply, done) => {
        const { exchange, payload } = request;
        if (exchange.endpoint?.dialect !== responses)
            return done();
        const { id } = request.params;
        bind(exchange, id ?? payload?.previousResponseId);
        if (exchange.endpoint.makesResponses)
            exchange.onAnswerId = id => learn(exchange, id);
        done();
    });
    await forwarded(fastify, ENDPOINTS);
    fastify.peers?.onNews(remember);
    function learn(exchange, id) {
        const news = { response: id, backend: exchange.backend, caller: exchange.request.caller?.id };
        remember(news);
        fastify.peers?.tell(news);
    }
    function remember({ response, backend, caller }) {
        if (made.size >= MAX_RESPONSES)
            made.delete(made.keys().next().value);
        made.set(response, { backend, caller });
    }
    function bind(exchange, id) {
        const known = id === undefined ? undefined : made.get(id);
        if (known === undefined)
            return;
        if (known.caller !== exchange.request.caller?.id) {
            throw new GatewayError('not_found', 'There is no such response.');
        }
        exchange.pinned = known.backend;
    }
};
export default openaiRoutes;
