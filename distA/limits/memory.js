import { SlidingWindow, Slots, TokenBucket } from './rates.js';
const SWEEP_AT = 1024;
const MAX_SUBJECTS = 100_000;
/** Subjects that make room at a time, so that a sweep is rare. */
const EVICTED = MAX_SUBJECTS / 10;
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
export class MemoryLimiter {
    #policy;
    #global;
    #keys = new Map();
    #sweepAt = SWEEP_AT;
    constructor(policy) {
        this.#policy = policy;
        this.#global = new Account('global', policy.global);
    }
    /** New numbers for everybody; what was counted so far stays counted. */
    update(policy) {
        this.#policy = policy;
        this.#global.configure(policy.global);
        for (const account of this.#keys.values())
            account.configure(policy.per_key);
    }
    /** Would a reservation be refused? Takes nothing. */
    refusal(key, now) {
        return this.#global.refusal(now) ?? this.#keys.get(key)?.refusal(now);
    }
    reserve(key, now) {
        const account = this.#account(key, now);
        const refusal = this.#global.refusal(now) ?? account.refusal(now);
        if (refusal !== undefined)
            return refusal;
        this.#global.take(now);
        account.take(now);
        return new Reservation([this.#global, account], account.quota(now) ?? this.#global.quota(now));
    }
    /** Subjects remembered at the moment. */
    get size() {
        return this.#keys.size;
    }
    #account(key, now) {
        let account = this.#keys.get(key);
        if (account === undefined) {
            if (this.#keys.size >= this.#sweepAt)
                this.#sweep(now);
            account = new Account('per_key', this.#policy.per_key);
            this.#keys.set(key, account);
        }
        return account;
    }
    /** Forgets subjects that have everything back; if there are too many even so, the oldest ones. */
    #sweep(now) {
        for (const [key, account] of this.#keys)
            if (account.isIdle(now))
                this.#keys.delete(key);
        for (const [key, account] of this.#keys) {
            if (this.#keys.size <= MAX_SUBJECTS - EVICTED)
                break;
            if (account.slots.inUse === 0)
                this.#keys.delete(key);
        }
        this.#sweepAt = Math.min(MAX_SUBJECTS, Math.max(SWEEP_AT, this.#keys.size * 2));
    }
}
/** What was taken from some accounts. */
export class Reservation {
    quota;
    #accounts;
    constructor(accounts, quota) {
        this.#accounts = accounts;
        this.quota = quota;
    }
    /** Gives the slots back; does nothing a second time. */
    release() {
        for (const account of this.#accounts)
            account.release();
        this.#accounts = [];
    }
}
/** The counters of one subject. */
class Account {
    scope;
    slots = new Slots(0);
    #bucket;
    #window;
    constructor(scope, limits) {
        this.scope = scope;
        this.configure(limits);
    }
    configure(limits) {
        const perMinute = limits?.requests_per_minute ?? 0;
        const burst = limits?.burst_size ?? 0;
        const perSecond = limits?.requests_per_second || (burst > 0 ? perMinute / 60 : 0);
        this.slots.limit = limits?.max_concurrent ?? 0;
        if (perMinute === 0)
            this.#window = undefined;
        else if (this.#window === undefined)
            this.#window = new SlidingWindow(perMinute);
        else
            this.#window.limit = perMinute;
        if (perSecond === 0)
            this.#bucket = undefined;
        else if (this.#bucket === undefined)
            this.#bucket = new TokenBucket(perSecond, burst || perSecond * 2);
        else {
            this.#bucket.perSecond = perSecond;
            this.#bucket.burst = burst || perSecond * 2;
        }
    }
    refusal(now) {
        const { scope } = this;
        const minute = this.#window?.wait(now) ?? 0;
        const second = this.#bucket?.wait(now) ?? 0;
        if (minute > 0 && minute >= second) {
            const max = this.#window.limit;
            return { scope, limit: 'requests_per_minute', max, retryAfterMs: minute };
        }
        if (second > 0) {
            const max = this.#bucket.perSecond;
            return { scope, limit: 'requests_per_second', max, retryAfterMs: second };
        }
        if (this.slots.limit > 0 && this.slots.inUse >= this.slots.limit) {
            return { scope, limit: 'max_concurrent', max: this.slots.limit, retryAfterMs: 1000 };
        }
        return undefined;
    }
    take(now) {
        this.#window?.take(now);
        this.#bucket?.take(now);
        this.slots.inUse++;
    }
    release() {
        this.slots.inUse--;
    }
    quota(now) {
        const minute = this.#window?.remaining(now) ?? Number.POSITIVE_INFINITY;
        const second = this.#bucket?.remaining(now) ?? Number.POSITIVE_INFINITY;
        if (minute <= second) {
            const window = this.#window;
            return window && { limit: window.limit, remaining: minute, resetMs: window.reset(now) };
        }
        const bucket = this.#bucket;
        return { limit: bucket.burst, remaining: second, resetMs: bucket.reset(now) };
    }
    isIdle(now) {
        const back = (this.#window?.reset(now) ?? 0) + (this.#bucket?.reset(now) ?? 0);
        return this.slots.inUse === 0 && back <= 0;
    }
}
