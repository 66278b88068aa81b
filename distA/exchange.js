import { randomUUID } from 'node:crypto';
import { toGatewayError } from './errors.js';
/**
 * A request and its answer. It begins in `onRequest` and ends exactly once, when the response
 * closes, however that comes: finished, refused, cut by the client, cut by the backend. Whatever
 * must be given back or written down hangs on that one moment, never on Fastify's `onResponse` or
 * `onError`, which do not run when a client leaves.
 */
/** What the finishers do, in this order, when an exchange ends. */
const STAGES = ['metering', 'record', 'settle', 'slot', 'metrics', 'log'];
export class Exchange {
    id = newRequestId();
    request;
    reply;
    endpoint;
    /** Wall clock (Unix ms) and monotonic clock (ms) at the beginning. */
    time = Date.now();
    startedAt = performance.now();
    firstTokenAt = 0;
    endedAt = 0;
    lastTokenAt = 0;
    attempts = 0;
    /** Name and base URL of the backend of the latest attempt. */
    backend;
    backendUrl;
    outcome = 'ok';
    /** Code of the error the gateway answered with, or ended the stream with. */
    errorCode;
    usage;
    question;
    /** The backend this exchange must go to (name), because it holds the state the call is about. */
    pinned;
    /** Wants to know the `id` that the backend gives its answer, as soon as it is seen. */
    onAnswerId;
    /** What the plugins hold for it until it ends. */
    meter;
    reservation;
    audience;
    /** Content deltas that passed, and the size of the request body in bytes. */
    deltas = 0;
    payloadBytes = 0;
    closed = false;
    /** Where it stands among the open ones. */
    place = 0;
    /** What is under way for it. */
    work;
    constructor(request, reply) {
        this.request = request;
        this.reply = reply;
        this.endpoint = request.routeOptions.config.endpoint;
    }
    /** Ends it honestly now: with an error, or an error event and a broken connection. */
    interrupt(error) {
        this.fail('timed_out', error);
        if (this.work === undefined)
            this.reply.raw.destroy();
        else
            this.work.interrupt(error);
    }
    /** The status the client got; 499 when it left before there was one (nginx's number), 503 when it was cut. */
    get statusCode() {
        if (this.reply.raw.headersSent)
            return this.reply.statusCode;
        return this.outcome === 'client_gone' ? 499 : 503;
    }
    get durationMs() {
        return (this.endedAt || performance.now()) - this.startedAt;
    }
    /** Time to first token in ms; undefined when there was none. */
    get ttftMs() {
        return this.firstTokenAt === 0 ? undefined : this.firstTokenAt - this.startedAt;
    }
    /** Writes down that the exchange failed; the first reason stays. */
    fail(outcome, error) {
        if (this.outcome !== 'ok')
            return;
        this.outcome = outcome;
        this.errorCode = error.code;
    }
    /** The gateway answers with an error of its own; without an attempt that is a refusal. */
    answeredWith(error) {
        this.errorCode ??= error.code;
        if (this.attempts === 0)
            this.outcome = 'rejected';
    }
    /** The response is closed: stops what runs. Returns false when that was done before. */
    close() {
        if (this.closed)
            return false;
        this.closed = true;
        this.endedAt = performance.now();
        if (this.outcome === 'ok') {
            if (!this.reply.raw.writableEnded)
                this.outcome = 'client_gone';
            else if (this.attempts > 0 && this.statusCode >= 500)
                this.outcome = 'backend_failed';
        }
        this.work?.stop();
        return true;
    }
}
/** All open exchanges, and what is done at their end. */
export class Exchanges {
    /**
     * Not a Set: of a Set that changes all the time V8 leaves old hash tables behind, each of which
     * holds the next one and with it every exchange in between, until the next full collection.
     */
    open = [];
    /** How many of forwarded routes have begun since the start. */
    forwarded = 0;
    #finishers = new Map();
    #log;
    #ordered = [];
    #whenEmpty;
    constructor(log) {
        this.#log = log;
    }
    /** Adds a finisher. It runs once for every exchange and must not throw or wait. */
    onEnd(stage, finisher) {
        const ofStage = this.#finishers.get(stage) ?? [];
        ofStage.push(finisher);
        this.#finishers.set(stage, ofStage);
        this.#ordered = STAGES.flatMap(each => this.#finishers.get(each) ?? []);
    }
    begin(request, reply) {
        const exchange = new Exchange(request, reply);
        exchange.place = this.open.push(exchange) - 1;
        if (exchange.endpoint !== undefined)
            this.forwarded++;
        reply.raw.once('close', () => this.#end(exchange));
        return exchange;
    }
    /** Resolves when no exchange is open. */
    async drained() {
        if (this.open.length === 0)
            return;
        await new Promise(resolve => {
            this.#whenEmpty = resolve;
        });
    }
    #end(exchange) {
        if (!exchange.close())
            return;
        for (const finish of this.#ordered) {
            try {
                finish(exchange);
            }
            catch (error) {
                this.#log.error({ err: error, requestId: exchange.id }, 'a finisher failed');
            }
        }
        const last = this.open.pop();
        if (last !== exchange) {
            this.open[exchange.place] = last;
            last.place = exchange.place;
        }
        if (this.open.length === 0)
            this.#whenEmpty?.();
    }
}
/**
 * Gives every request of this scope an exchange. Plugins that need one call this first; only the
 * first call in a scope does anything.
 */
export function withExchanges(fastify) {
    if (fastify.hasDecorator('exchanges') && fastify.exchanges instanceof Exchanges) {
        return fastify.exchanges;
    }
    const exchanges = new Exchanges(fastify.log);
    fastify.decorate('exchanges', exchanges);
    if (!fastify.hasRequestDecorator('exchange')) {
        fastify.decorateRequest('exchange', null);
    }
    fastify.addHook('onRequest', (request, reply, done) => {
        request.exchange = exchanges.begin(request, reply);
        reply.header('x-llmproxy-request-id', request.exchange.id);
        done();
    });
    fastify.addHook('onError', (request, _reply, error, done) => {
        request.exchange.answeredWith(toGatewayError(error));
        done();
    });
    return exchanges;
}
/**
 * `req_` and 32 hexadecimal digits that begin with the time (a UUIDv7, RFC 9562), so that ids sort
 * by age.
 */
function newRequestId(now = Date.now()) {
    // A random UUID has the same variant bits at the same place, and its randomness is drawn in stock.
    const random = randomUUID();
    const time = now.toString(16).padStart(12, '0');
    return `req_${time}7${random.slice(15, 18)}${random.slice(19, 23)}${random.slice(24)}`;
}
