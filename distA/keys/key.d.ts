import { type Static, Type } from 'typebox';
import { GatewayError } from '../errors.ts';
import type { Caller } from '../exchange.ts';
/** What a key source knows about one key. All but `id` may be missing. */
export interface KeyRecord {
    id: string;
    name?: string | undefined;
    userId?: string | undefined;
    status: KeyStatus;
    /** Unix milliseconds. */
    startsAt?: number | undefined;
    expiresAt?: number | undefined;
    allowedIps?: string[] | undefined;
    deniedIps?: string[] | undefined;
    models?: string[] | undefined;
    /** What is left to spend, where the source says so; 0 or less refuses. */
    quotaLeft?: number | undefined;
}
export type KeyStatus = 'active' | 'disabled' | 'expired' | 'quota_exceeded';
/** Where keys are looked up. */
export interface KeySource {
    readonly name: string;
    /**
     * @returns the key's record, a GatewayError that refuses it, or undefined for an unknown key
     * @throws when the source can't tell (it is down): the caller gets 503, not 401
     */
    lookup(key: string, hash: string): Promise<KeyRecord | GatewayError | undefined>;
}
/** `auth.status_codes`: what each status of a key answers. */
export declare const StatusCodes: Type.TObject<{
    active: Type.TObject<{
        allow: Type.TBoolean;
        http_code: Type.TInteger;
        message: Type.TString;
    }>;
    disabled: Type.TObject<{
        allow: Type.TBoolean;
        http_code: Type.TInteger;
        message: Type.TString;
    }>;
    expired: Type.TObject<{
        allow: Type.TBoolean;
        http_code: Type.TInteger;
        message: Type.TString;
    }>;
    quota_exceeded: Type.TObject<{
        allow: Type.TBoolean;
        http_code: Type.TInteger;
        message: Type.TString;
    }>;
    not_found: Type.TObject<{
        allow: Type.TBoolean;
        http_code: Type.TInteger;
        message: Type.TString;
    }>;
}>;
export type StatusCodes = Static<typeof StatusCodes>;
/** The refusal of a key that has this status, or undefined when the status lets it pass. */
export declare function statusRefusal(status: KeyStatus | 'not_found', codes: StatusCodes): GatewayError | undefined;
/**
 * Decides whether a key may be used now, from this address.
 *
 * @example
 * checkKey({ id: 'k', status: 'active', expiresAt: 0 }, { ip: '::1', now: 1, codes }) // GatewayError
 */
export declare function checkKey(record: KeyRecord, { ip, now, codes }: {
    ip: string;
    now: number;
    codes: StatusCodes;
}): GatewayError | undefined;
export declare function toCaller(record: KeyRecord): Caller;
/** SHA-256 of a key as lower-case hexadecimal digits: the only form in which keys are kept. */
export declare function hashKey(key: string): string;
/**
 * A key's status from text (`active`, `enabled`, `disabled` ...) or the number of the original
 * (0 active, 1 disabled, 2 quota exceeded, 3 expired).
 *
 * @returns undefined for anything else, which must not pass
 */
export declare function parseStatus(status: unknown): KeyStatus | undefined;
/**
 * A point in time as Unix milliseconds, from ISO 8601 text or Unix seconds (number or digits).
 *
 * @returns NaN for anything else
 */
export declare function parseTime(time: unknown): number;
/** Is this an address or a network (`10.0.0.0/8`, `2001:db8::/32`)? */
export declare function isNetwork(text: unknown): boolean;
/** Does one of the patterns (`*` stands for any text) name this model? */
export declare function matchesModel(patterns: string[], model: string): boolean;
