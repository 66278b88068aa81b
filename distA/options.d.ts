import { type Static, type TSchema, type TUnsafe, Type } from 'typebox';
import { type Issue } from './issues.ts';
/**
 * A length of time: text with a unit in a file (`100ms`, `30s`, `1m30s`), milliseconds in code.
 * `least` is 0 where 0 has a meaning of its own.
 */
export declare function Duration(defaultValue: string | undefined, description: string, least?: 0 | 1): TUnsafe<number>;
/** A size in bytes: text with a unit (`64MB`, 1 KB = 1024 bytes) or a number of bytes. */
export declare function Size(defaultValue: string, description: string): TUnsafe<number>;
/** An http or https URL. */
export declare function Url(description: string): Type.TString;
/** Headers that are sent along. Their values may be secret. */
export declare const HeadersToSend: Type.TRecord<"^.*$", Type.TString>;
/** A part of the original dialect that this version doesn't have: refused when it is switched on. */
export declare function NotBuilt(description: string): Type.TOptional<TUnsafe<unknown>>;
/** Options as they may be given: what has a default may be left out, a quantity may be text. */
export type Given<T> = T extends number ? number | string : T extends readonly (infer Item)[] ? readonly Given<Item>[] : T extends object ? {
    readonly [Name in keyof T]?: Given<T[Name]>;
} : T;
/** An object whose unknown members are refused, and which is there with its defaults if left out. */
export declare function Section<T extends Record<string, TSchema>>(properties: T, description: string): Type.TObject<T>;
/**
 * Reads a quantity such as `1m30s` or `64MB`.
 *
 * @returns milliseconds or bytes; undefined when the text isn't one.
 * @example
 * parseQuantity('1m30s', 'ms') // 90000
 * parseQuantity('64MB', 'bytes') // 67108864
 */
export declare function parseQuantity(text: string, unit: 'ms' | 'bytes'): number | undefined;
/** Thrown by {@link checkOptions}: all that is wrong, a line each. */
export declare class OptionsError extends Error {
    readonly issues: Issue[];
    constructor(issues: Issue[], name?: string);
}
/**
 * Checks options against their schema, fills in the defaults, turns quantities into numbers.
 * What was given is left as it is.
 *
 * @throws {OptionsError} with every issue at once
 * @example
 * const Options = Section({ timeout: Duration('3s', 'how long') }, 'an example')
 * checkOptions(Options, {}) // { timeout: 3000 }
 */
export declare function checkOptions<T extends TSchema>(schema: T, given: unknown, name?: string): Static<T>;
/** The issues of `options`, which is completed in place. */
export declare function findIssues(schema: TSchema, options: unknown): Issue[];
/** Is this an absolute http or https URL, without credentials (they belong into headers)? */
export declare function isHttpUrl(value: unknown): boolean;
