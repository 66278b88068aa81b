import { Slots } from './rates.ts';
/** What one subject (everybody together, or one key) may do. 0: no such limit. */
export interface Limits {
    requests_per_second: number;
    requests_per_minute: number;
    burst_size: number;
    max_concurrent: number;
}
export type LimitName = 'requests_per_second' | 'requests_per_minute' | 'max_concurrent';
export type Scope = 'global' | 'per_key';
/** Who may do what. An absent part limits nothing. */
export interface Policy {
    global?: Limits | undefined;
    per_key?: Limits | undefined;
}
export interface Refusal {
    scope: Scope;
    limit: LimitName;
    /** The number that was reached. */
    max: number;
    retryAfterMs: number;
}
/** The state of the tightest request limit, for response headers. */
export interface Quota {
    limit: number;
    remaining: number;
    resetMs: number;
}
/**
 * Limits of one process, in memory. A reservation is one step over all limits: each has room and
 * all are taken, or nothing is.
 *
 * @example
 * const none = { requests_per_second: 0, requests_per_minute: 0, burst_size: 0, max_concurrent: 0 }
 * const limiter = new MemoryLimiter({ per_key: { ...none, max_concurrent: 1 } })
 * const first = limiter.reserve('alice', 0)
 * limiter.reserve('alice', 0) // { scope: 'per_key', limit: 'max_concurrent', max: 1, retryAfterMs: 1000 }
 */
export declare class MemoryLimiter {
    #private;
    constructor(policy: Policy);
    /** New numbers for everybody; what was counted so far stays counted. */
    update(policy: Policy): void;
    /** Would a reservation be refused? Takes nothing. */
    refusal(key: string, now: number): Refusal | undefined;
    reserve(key: string, now: number): Reservation | Refusal;
    /** Subjects remembered at the moment. */
    get size(): number;
}
/** What was taken from some accounts. */
export declare class Reservation {
    #private;
    readonly quota: Quota | undefined;
    constructor(accounts: readonly Account[], quota: Quota | undefined);
    /** Gives the slots back; does nothing a second time. */
    release(): void;
}
/** The counters of one subject. */
declare class Account {
    #private;
    readonly scope: Scope;
    readonly slots: Slots;
    constructor(scope: Scope, limits: Limits | undefined);
    configure(limits: Limits | undefined): void;
    refusal(now: number): Refusal | undefined;
    take(now: number): void;
    release(): void;
    quota(now: number): Quota | undefined;
    isIdle(now: number): boolean;
}
export {};
