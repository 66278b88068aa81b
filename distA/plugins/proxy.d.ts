import type { FastifyPluginAsync } from 'fastify';
import type { Static } from 'typebox';
import { type Exchange } from '../exchange.ts';
import type { Answer } from '../pool/answer.ts';
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
export declare const ProxyOptions: import("typebox").TObject<{
    write_timeout: import("typebox").TUnsafe<number>;
}>;
export type ProxyOptions = Static<typeof ProxyOptions>;
/** Sees every answer before it is sent; may return a stream to send in its place. */
export type AnswerHook = (exchange: Exchange, answer: Answer) => NodeJS.ReadableStream | undefined;
declare module 'fastify' {
    interface FastifyInstance {
        answerHooks: AnswerHook[];
    }
    interface FastifyReply {
        /** Sends the request to a backend and its answer to the client. */
        forward(): FastifyReply;
    }
}
declare const _default: FastifyPluginAsync<{
    readonly write_timeout?: string | number;
}>;
export default _default;
