import type { ErrorObject } from 'ajv';
/** What is wrong with options, in words: the member, what was expected, and what was there. */
/** One thing that is wrong. */
export interface Issue {
    path: (string | number)[];
    message: string;
}
/** `['backends', 0, 'url']` as `backends[0].url:` */
export declare function formatPath(path: (string | number)[]): string;
/** A rule that no two items of a list have the same. */
export interface Distinct {
    by(item: Record<string, unknown> | string): unknown;
    /** What it is, in words. */
    what: string;
}
/** Index of the first item that repeats one before it, and the index of that one. */
export declare function findRepeated(items: unknown[], { by }: Distinct): [number, number] | undefined;
/** An error of the validator as a sentence about one member. */
export declare function toIssue(error: ErrorObject, root: object): Issue;
interface Described {
    type?: string | string[];
    unit?: 'ms' | 'bytes';
    secret?: true;
    enum?: unknown[];
    minimum?: number;
    maximum?: number;
    exclusiveMinimum?: number;
    minLength?: number;
    minItems?: number;
    anyOf?: Described[];
    const?: unknown;
    format?: string;
    expects?: string;
    items?: Described;
    shorthand?: string;
    properties?: Record<string, Described>;
    distinct?: Distinct[];
    later?: readonly string[];
}
/** What a schema asks for, in words. */
export declare function expected(schema: Described): string;
export {};
