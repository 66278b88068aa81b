import type { Socket } from 'node:net';
import type { Dispatcher } from 'undici';
import { GatewayError } from '../errors.ts';
import { Answer } from './answer.ts';
import type { Backend, BackendHandler } from './backend.ts';
import type { FailureKind } from './pool.ts';
import { Refusal } from './refusal.ts';
export type Headers = Record<string, string | string[] | undefined>;
/** The head of an answer. */
export interface Head {
    statusCode: number;
    headers: Headers;
}
/** What became of an attempt: a status class, or how it failed. */
export type AttemptResult = FailureKind | '2xx' | '3xx' | '4xx' | 'cancelled';
/** How far an attempt came before it failed. */
export interface Progress {
    /** The backend has had the request, or some of it. */
    isSent: boolean;
    /** It went over a connection that had served other requests before. */
    isReused: boolean;
}
/** What an attempt tells the delivery it belongs to. */
export interface AttemptOwner {
    /** This is the client's answer. */
    deliver(attempt: Attempt, head: Head, answer: Answer): void;
    /** The backend refuses; returns whether another attempt is made, else the refusal is delivered. */
    refused(attempt: Attempt, kind: FailureKind, refusal: Refusal): boolean;
    /** It failed before there was anything to pass on. */
    failed(attempt: Attempt, kind: FailureKind, error: Error, progress: Progress): void;
    /** The answer broke off after some of it was passed on. */
    broke(attempt: Attempt, kind: FailureKind, error: GatewayError): void;
    /** The backend seems not to take `stream_options` and should be asked without. */
    again(attempt: Attempt): void;
    /** The request was sent with a question for usage, or is repeated without it. */
    readonly question: 'asked' | 'withdrawn' | undefined;
    count(attempt: Attempt, result: AttemptResult): void;
}
/** One try at one backend. */
export declare class Attempt implements BackendHandler {
    #private;
    socket: Socket | undefined;
    readonly backend: Backend;
    constructor(owner: AttemptOwner, backend: Backend);
    start(options: Dispatcher.DispatchOptions, fresh: boolean): void;
    /** Closes the connection, in whatever phase it is. */
    cancel(): void;
    /**
     * The exchange is over. V8 promotes what is in flight to its old generation, where the dead keep
     * each other alive until a full collection: whatever is let go of here dies young.
     */
    letGo(): void;
    onRequestStart(controller: Dispatcher.DispatchController): void;
    onResponseStart(controller: Dispatcher.DispatchController, statusCode: number, headers: Headers): void;
    onResponseData(controller: Dispatcher.DispatchController, chunk: Buffer): void;
    onResponseEnd(): void;
    onResponseError(_controller: Dispatcher.DispatchController, error: Error): void;
}
