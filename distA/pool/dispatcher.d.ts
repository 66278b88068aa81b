import type { FastifyBaseLogger } from 'fastify';
import type { Dispatcher } from 'undici';
import type { Exchange } from '../exchange.ts';
import type { Answer } from './answer.ts';
import { type AttemptResult, type Head, type Headers } from './attempt.ts';
import type { Pool } from './pool.ts';
/** The exchange a request belongs to, as a property of its headers: reply-from hands it through. */
export declare const EXCHANGE: unique symbol;
type Options = Dispatcher.DispatchOptions & {
    headers: Headers & {
        [EXCHANGE]?: Exchange;
    };
};
type Done = (error: null, answer: Head & {
    body: Answer;
}) => void;
type OnAttempt = (backend: string, result: AttemptResult) => void;
/**
 * What @fastify/reply-from takes as its `undici` option: it sends a request to a backend of the
 * pool, and to another one as long as the client has not had a byte of an answer, and calls back
 * once, with the answer that is the client's.
 */
export declare function createDispatcher(pool: Pool, onAttempt: OnAttempt, log: FastifyBaseLogger): {
    request: (options: Options, done: Done) => void;
    close: () => void;
    destroy: () => void;
};
export {};
