import type { FastifyBaseLogger, FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { Dialect } from './dialects/dialect.ts';
import { type GatewayError } from './errors.ts';
import type { Reservation } from './limits/memory.ts';
import type { Meter } from './metering/meter.ts';
import type { Audience } from './reporters/reporter.ts';
/**
 * A request and its answer. It begins in `onRequest` and ends exactly once, when the response
 * closes, however that comes: finished, refused, cut by the client, cut by the backend. Whatever
 * must be given back or written down hangs on that one moment, never on Fastify's `onResponse` or
 * `onError`, which do not run when a client leaves.
 */
/** What the finishers do, in this order, when an exchange ends. */
declare const STAGES: readonly ['metering', 'record', 'settle', 'slot', 'metrics', 'log'];
export type Stage = (typeof STAGES)[number];
export type Outcome = 'ok' | 'client_gone' | 'backend_failed' | 'timed_out' | 'rejected';
/** The tokens of one exchange. `exact`: the backend said so; `counted`: its deltas were counted. */
export interface Usage {
    promptTokens: number;
    completionTokens: number;
    totalTokens: number;
    cachedTokens?: number;
    reasoningTokens?: number;
    exactness: 'exact' | 'counted';
}
/** The owner of an API key. */
export interface Caller {
    /** Stable and safe to show: never the key. Limits and bills hang on it. */
    id: string;
    name?: string;
    userId?: string;
    /** Model names (`*` stands for any text) this caller may use; absent: all. */
    models?: string[];
}
/** One route that is forwarded to the backends. */
export interface Endpoint {
    method: 'GET' | 'POST' | 'DELETE';
    /** The route's pattern, as it stands in metrics and logs. */
    url: string;
    /** Stands before the client's path at the backend, for routes that leave `/v1` out. */
    upstreamPrefix?: string;
    dialect: Dialect;
    /** `json`: exactly one JSON object, kept as bytes; `stream`: passed through unread. */
    body: 'none' | 'json' | 'stream';
    /** The backend can be asked for usage with `stream_options.include_usage`. */
    asksForUsage?: boolean;
    /** Ollama's native routes stream unless told not to. */
    streamsByDefault?: boolean;
    /** Where the ids of stored responses stand, which bind later calls to the same backend. */
    makesResponses?: boolean;
}
/** The bytes to send when the backend is asked for usage, and what was found out about them. */
export interface UsageQuestion {
    bytes: Buffer;
    /** Set once the answer comes from a backend that was asked. */
    asked: boolean;
}
/** The request body: the bytes as they came, and the few members the gateway reads. */
export interface Payload {
    bytes: Buffer;
    model: string | undefined;
    stream: boolean;
    /** The client itself asked for a usage chunk. */
    includeUsage: boolean;
    previousResponseId: string | undefined;
}
/** What runs for an exchange and must stop with it. */
export interface Work {
    /** The response has closed: stops everything at once. */
    stop(): void;
    /** Ends the answer before its time, honestly. */
    interrupt(error: GatewayError): void;
}
export declare class Exchange {
    readonly id: string;
    readonly request: FastifyRequest;
    readonly reply: FastifyReply;
    readonly endpoint: Endpoint | undefined;
    /** Wall clock (Unix ms) and monotonic clock (ms) at the beginning. */
    readonly time: number;
    readonly startedAt: number;
    firstTokenAt: number;
    endedAt: number;
    lastTokenAt: number;
    attempts: number;
    /** Name and base URL of the backend of the latest attempt. */
    backend: string | undefined;
    backendUrl: string | undefined;
    outcome: Outcome;
    /** Code of the error the gateway answered with, or ended the stream with. */
    errorCode: string | undefined;
    usage: Usage | undefined;
    question: UsageQuestion | undefined;
    /** The backend this exchange must go to (name), because it holds the state the call is about. */
    pinned: string | undefined;
    /** Wants to know the `id` that the backend gives its answer, as soon as it is seen. */
    onAnswerId: ((id: string) => void) | undefined;
    /** What the plugins hold for it until it ends. */
    meter: Meter | undefined;
    reservation: Reservation | undefined;
    audience: Audience | undefined;
    /** Content deltas that passed, and the size of the request body in bytes. */
    deltas: number;
    payloadBytes: number;
    closed: boolean;
    /** Where it stands among the open ones. */
    place: number;
    /** What is under way for it. */
    work: Work | undefined;
    constructor(request: FastifyRequest, reply: FastifyReply);
    /** Ends it honestly now: with an error, or an error event and a broken connection. */
    interrupt(error: GatewayError): void;
    /** The status the client got; 499 when it left before there was one (nginx's number), 503 when it was cut. */
    get statusCode(): number;
    get durationMs(): number;
    /** Time to first token in ms; undefined when there was none. */
    get ttftMs(): number | undefined;
    /** Writes down that the exchange failed; the first reason stays. */
    fail(outcome: Outcome, error: GatewayError): void;
    /** The gateway answers with an error of its own; without an attempt that is a refusal. */
    answeredWith(error: GatewayError): void;
    /** The response is closed: stops what runs. Returns false when that was done before. */
    close(): boolean;
}
declare module 'fastify' {
    interface FastifyInstance {
        exchanges: Exchanges;
    }
    interface FastifyRequest {
        exchange: Exchange;
    }
    interface FastifyContextConfig {
        endpoint?: Endpoint;
    }
}
/** All open exchanges, and what is done at their end. */
export declare class Exchanges {
    #private;
    /**
     * Not a Set: of a Set that changes all the time V8 leaves old hash tables behind, each of which
     * holds the next one and with it every exchange in between, until the next full collection.
     */
    readonly open: Exchange[];
    /** How many of forwarded routes have begun since the start. */
    forwarded: number;
    constructor(log: FastifyBaseLogger);
    /** Adds a finisher. It runs once for every exchange and must not throw or wait. */
    onEnd(stage: Stage, finisher: (exchange: Exchange) => void): void;
    begin(request: FastifyRequest, reply: FastifyReply): Exchange;
    /** Resolves when no exchange is open. */
    drained(): Promise<void>;
}
/**
 * Gives every request of this scope an exchange. Plugins that need one call this first; only the
 * first call in a scope does anything.
 */
export declare function withExchanges(fastify: FastifyInstance): Exchanges;
export {};
