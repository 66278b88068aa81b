import type { FastifyPluginAsync } from 'fastify';
import { type Payload } from '../exchange.ts';
/**
 * Keeps request bodies as the bytes that came, and reads beside them the few members the gateway
 * needs. On a `json` endpoint the body must be exactly one JSON object.
 *
 * Affects every route of the scope it is registered in: `request.body` is a Buffer there.
 *
 * @example
 * await fastify.register(payload)
 * fastify.post('/v1/chat/completions', { config: { endpoint } }, async request => request.payload.model)
 */
declare module 'fastify' {
    interface FastifyRequest {
        payload: Payload | undefined;
    }
}
declare const _default: FastifyPluginAsync;
export default _default;
