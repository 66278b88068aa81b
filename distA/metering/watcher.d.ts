/**
 * Watches one JSON text go by, in pieces of any size, and notes the few members that metering needs:
 * without parsing the text, without keeping it, and without being fooled by text inside strings.
 *
 * Members are told apart by name and depth: `usage` at the top or inside a top-level `message` or
 * `response`; Ollama's counts, `id`, `type`, `done` and `error` at the top; `choices` when it is
 * empty; and whether one of the delta members, anywhere, has text.
 */
/** What was seen in one JSON text. */
export interface Seen {
    /** The usage object, as JSON. */
    usage: string | undefined;
    promptEvalCount: number | undefined;
    evalCount: number | undefined;
    id: string | undefined;
    type: string | undefined;
    /** One of the delta members had text. */
    delta: boolean;
    /** How many such texts there were, and where the first stands in the piece that was fed. */
    texts: number;
    textBegin: number;
    textEnd: number;
    /** `choices` was there and empty. */
    noChoices: boolean;
    /** A `finish_reason` was given, anywhere. */
    finishReason: boolean;
    /** `done` was true. */
    done: boolean;
    /** There was an `error`, an object or text. */
    error: boolean;
}
/** The members a watcher looks for; the same for all answers of one dialect. */
export declare class MemberNames {
    #private;
    /** @param deltaMembers names of the members whose text is a piece of the answer */
    constructor(deltaMembers: readonly string[]);
    codeOf(name: string): number;
    /** The same from bytes, without making a string: this runs a dozen times for each token. */
    code(bytes: Buffer, begin: number, end: number): number;
}
/**
 * @example
 * const watcher = new JsonWatcher(new MemberNames(['content']))
 * const text = Buffer.from('{"delta": {"content": "Hi"}, "usage": {"total_tokens": 3}}')
 * watcher.feed(text, 0, text.length)
 * watcher.seen // { delta: true, usage: '{"total_tokens": 3}', ... }
 */
export declare class JsonWatcher {
    #private;
    seen: Seen;
    constructor(names: MemberNames);
    /** Gets ready for another text. */
    reset(): void;
    feed(bytes: Buffer, from: number, to: number): void;
}
