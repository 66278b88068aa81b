import rateLimit, { normalizeIP } from '@fastify/rate-limit';
import fp from 'fastify-plugin';
import { Type } from 'typebox';
import { GatewayError } from '../errors.js';
import { withExchanges } from '../exchange.js';
import { MemoryLimiter } from '../limits/memory.js';
import { checkOptions, NotBuilt, Section } from '../options.js';
/**
 * Limits: how many requests a second and a minute, and how many at the same time, for everybody
 * together and for each API key (each client address where no key is known). A request that is
 * refused costs nothing; a slot comes back exactly once, when the exchange closes.
 *
 * @example
 * await fastify.register(limits, { per_key: { requests_per_minute: 60, max_concurrent: 3 } })
 * fastify.get('/hello', async () => 'hello')
 */
const count = (description) => Type.Integer({ minimum: 0, default: 0, description });
const limitOptions = {
    requests_per_second: count('Average rate; 0: no limit'),
    requests_per_minute: count('At most so many in any 60 s; 0: no limit'),
    burst_size: count('Requests at once; 0: twice requests_per_second'),
    max_concurrent: count('Requests in flight, until the last byte of the answer; 0: no limit'),
    tokens_per_minute: NotBuilt('Tokens a minute')
};
export const LimitsOptions = Section({
    enabled: Type.Boolean({ default: false, description: 'Switches all limits on' }),
    storage: Type.Enum(['memory'], {
        default: 'memory',
        later: ['redis'],
        description: 'Where counts are kept'
    }),
    redis: Type.Optional(Type.String({ description: 'Belongs to storage: redis' })),
    script: NotBuilt('Script that decides'),
    global: Section({
        enabled: Type.Boolean({ default: true, description: 'Switches these on' }),
        ...limitOptions
    }, 'For everybody together'),
    per_key: Section({
        enabled: Type.Boolean({ default: true, description: 'Switches these on' }),
        ...limitOptions
    }, 'For each API key')
}, 'How much may be asked');
const limitsPlugin = async function limits(fastify, given) {
    const limiter = new MemoryLimiter(toPolicy(checkOptions(LimitsOptions, { enabled: true, ...given })));
    const refusals = [];
    const exchanges = withExchanges(fastify);
    fastify.decorate('limits', {
        update: options => limiter.update(toPolicy(options)),
        refusals
    });
    // A look before the body is read, so that a caller who is over costs no upload.
    fastify.addHook('onRequest', (request, _reply, done) => {
        if (request.routeOptions.config.rateLimit === false)
            return done();
        const refusal = limiter.refusal(subject(request), performance.now());
        if (refusal !== undefined)
            throw refuse(refusal);
        done();
    });
    // @fastify/rate-limit runs the step on every route of this scope and honours its per-route
    // `config.rateLimit`; the key it hands to its store is the exchange, the count comes from here.
    class Store {
        incr(exchange, done) {
            if (exchange.closed)
                throw new GatewayError('client_gone', 'The client has left.');
            const result = limiter.reserve(subject(exchange.request), performance.now());
            if ('scope' in result)
                throw refuse(result);
            exchange.reservation = result;
            if (result.quota !== undefined) {
                exchange.reply.headers({
                    'x-ratelimit-limit-requests': String(result.quota.limit),
                    'x-ratelimit-remaining-requests': String(result.quota.remaining),
                    'x-ratelimit-reset-requests': goDuration(result.quota.resetMs)
                });
            }
            done(null, { current: 1, ttl: 0 });
        }
        child() {
            return this;
        }
    }
    await fastify.register(rateLimit, {
        hook: 'preHandler',
        max: 1,
        store: Store,
        keyGenerator: request => request.exchange,
        addHeadersOnExceeding: {
            'x-ratelimit-limit': false,
            'x-ratelimit-remaining': false,
            'x-ratelimit-reset': false
        }
    });
    exchanges.onEnd('slot', exchange => exchange.reservation?.release());
    function refuse(refusal) {
        for (const listener of refusals)
            listener(refusal);
        return tooMany(refusal);
    }
};
function toPolicy(options) {
    const limits = (part) => options.enabled && part.enabled ? part : undefined;
    return { global: limits(options.global), per_key: limits(options.per_key) };
}
/** Whose limits count: the caller's, or the address's (an IPv6 network's) where nobody is known. */
function subject(request) {
    return request.caller?.id ?? `ip:${normalizeIP(request.ip)}`;
}
const UNITS = {
    requests_per_second: 'requests a second',
    requests_per_minute: 'requests a minute',
    max_concurrent: 'requests at the same time'
};
function tooMany({ scope, limit, max, retryAfterMs }) {
    const whose = scope === 'global' ? 'This server' : 'This API key';
    const seconds = Math.ceil(retryAfterMs / 1000);
    return new GatewayError('rate_limit_exceeded', `${whose} is limited to ${max} ${UNITS[limit]}. Please try again in ${seconds}s.`, {
        headers: {
            'retry-after': String(seconds),
            'retry-after-ms': String(Math.ceil(retryAfterMs)),
            ...(limit === 'max_concurrent'
                ? {}
                : {
                    'x-ratelimit-limit-requests': String(max),
                    'x-ratelimit-remaining-requests': '0',
                    'x-ratelimit-reset-requests': goDuration(retryAfterMs)
                })
        }
    });
}
/** A time as OpenAI writes it in its headers: `12ms`, `1.5s`, `6m0s`. */
export function goDuration(ms) {
    if (ms < 1000)
        return `${Math.ceil(ms)}ms`;
    const seconds = Math.ceil(ms / 100) / 10;
    const minutes = Math.floor(seconds / 60);
    return minutes === 0 ? `${seconds}s` : `${minutes}m${Math.ceil(seconds % 60)}s`;
}
export default fp(limitsPlugin, { name: 'limits', fastify: '5.x' });
