import type { FastifyInstance } from 'fastify';
import type { Endpoint } from '../exchange.ts';
/**
 * Declares routes that are forwarded to the backends. Only paths that are declared reach one: the
 * control paths of an inference server never do.
 */
export declare function forwarded(fastify: FastifyInstance, endpoints: Endpoint[]): Promise<void>;
