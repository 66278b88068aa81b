import type { Dispatcher } from 'undici';
import { Answer } from './answer.ts';
import type { Head } from './attempt.ts';
/** A backend's error answer that is kept while others are tried, in case none does better. */
export declare class Refusal {
    #private;
    readonly head: Head;
    readonly chunks: Buffer[];
    constructor(head: Head, controller: Dispatcher.DispatchController);
    /** Keeps a chunk; returns false, and does not, when it would be too much. */
    data(chunk: Buffer): boolean;
    end(): void;
    lose(): void;
    /** Calls back once, when all of it has come, or it is certain that it won't within `ms`. */
    whenSettled(ms: number, callback: (isComplete: boolean) => void): void;
    get text(): string;
    toAnswer(): Answer;
}
