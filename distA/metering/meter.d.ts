import type { Dialect } from '../dialects/dialect.ts';
import type { Usage } from '../exchange.ts';
import { MemberNames } from './watcher.ts';
/** How the answer is cut into JSON texts: SSE events, lines, or one text. */
export type Framing = 'sse' | 'ndjson' | 'json';
/**
 * Reads the usage out of an answer that passes by. Bytes go on as they came and when they came; only
 * where the usage chunk was asked for by the gateway and not by the client, that one event is taken
 * out, and for that an event's beginning waits for its end.
 *
 * Event streams are read as https://html.spec.whatwg.org/multipage/server-sent-events.html says:
 * LF, CRLF or CR, one optional space after the colon, over any split of the bytes.
 *
 * @example
 * const meter = new Meter({ framing: 'sse', dialect: openai, takeOut: false })
 * meter.pass(Buffer.from('data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":1}}\n\n'))
 * meter.usage // { promptTokens: 2, completionTokens: 1, totalTokens: 3, exactness: 'exact' }
 */
export declare class Meter {
    #private;
    /** Events with a piece of the answer, and when the first and the last of them passed. */
    deltas: number;
    firstDeltaAt: number;
    lastDeltaAt: number;
    /** The stream said properly that it is over. */
    finished: boolean;
    /** The usage is the answer's last word, not a count on the way. */
    hasFinalUsage: boolean;
    /** The backend reported an error inside its answer. */
    failed: boolean;
    /** `id` of the answer, and who wants to know it as soon as it is seen. */
    id: string | undefined;
    onId: ((id: string) => void) | undefined;
    readonly framing: Framing;
    /**
     * @param options.takeOut takes the usage chunk out
     * @param options.mustEnd a stream that does not say that it is over is broken
     * @param options.names of the dialect, where many answers share them
     */
    constructor(options: {
        framing: Framing;
        dialect: Dialect;
        takeOut: boolean;
        mustEnd?: boolean;
        names?: MemberNames;
    });
    /** Looks at a chunk and returns what of it goes on now. */
    pass(chunk: Buffer): Buffer | undefined;
    /** The answer is over; returns what was held of an event that never ended. */
    end(): Buffer | undefined;
    breakOff(): string;
    isCutShort(): boolean;
    /** What the backend said, or undefined. */
    get usage(): Usage | undefined;
}
