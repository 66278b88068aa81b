import type { Usage } from '../exchange.ts';
/** The counts of all APIs, by the names of the wire; the last one above 0 stays. */
export type Counts = Record<string, number>;
/** Adds what a usage object (JSON) says. */
export declare function addCounts(counts: Counts, json: string): void;
/**
 * One shape for all. Cached tokens are part of the prompt in OpenAI's counts and beside it in
 * Anthropic's; here they are always part of it.
 */
export declare function toUsage(counts: Counts): Usage | undefined;
