import { ServerResponse } from 'node:http';
import { Readable } from 'node:stream';
import type { Dispatcher } from 'undici';
import type { GatewayError } from '../errors.ts';
/** Looks at every chunk of an answer and says what of it goes on. */
export interface Tap {
    pass(chunk: Buffer): Buffer | undefined;
    /** The answer is over; returns what was kept back. */
    end(): Buffer | undefined;
    /** The answer broke off, and what was kept back is dropped; returns what must stand before another event. */
    breakOff(): string;
    /** Is it a stream of a kind that says that it is over, and has not said so? */
    isCutShort(): boolean;
}
/**
 * A backend's answer on its way to the client.
 *
 * It is a Readable for whoever wants one. Piped straight into an HTTP/1.1 response it writes the
 * backend's chunks there itself: nothing is queued in between, the backend waits while the client
 * does, and an answer that breaks can say so as its last words before the connection is cut.
 */
export declare class Answer extends Readable {
    #private;
    tap: Tap | undefined;
    /** What to tell a client whose stream breaks: an event in the dialect of its route. */
    lastWords: ((error: GatewayError) => string | undefined) | undefined;
    /** What is to be said of a stream that ends as if it were complete, and is not. */
    whenCutShort: (() => GatewayError) | undefined;
    /** How long (ms) a client may let bytes wait; 0: for ever. */
    stallTimeout: number;
    constructor(controller: Dispatcher.DispatchController);
    /** A chunk from the backend. */
    data(chunk: Buffer): void;
    /** It has been handed on: until somebody listens the backend waits. `complete`: nothing more will come. */
    offer(complete: boolean): void;
    /**
     * All bytes of an answer that was complete before it was handed on; undefined of any other. They are
     * for this response, which gets them without a stream in between.
     */
    takeWhole(response: ServerResponse): Buffer | undefined;
    /** The backend's answer is complete. */
    end(): void;
    /** The answer broke off, or must not go on. */
    break(error: GatewayError): void;
    pipe<T extends NodeJS.WritableStream>(to: T, options?: {
        end?: boolean;
    }): T;
    _read(): void;
    _destroy(error: Error | null, done: (error: Error | null) => void): void;
}
