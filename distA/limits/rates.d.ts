/** The three ways a limit is counted. Times are milliseconds of a monotonic clock. */
/**
 * At most `limit` in any window, exactly: no burst at a window's border.
 *
 * Up to 512 requests a window each has its own time. Above that, requests of the same 1/512 of the
 * window share the time of the latest of them: still never more than `limit` in any window, a place
 * comes back at most 1/512 of the window late (0.12 s a minute), and memory stays below 9 KB for
 * any limit.
 *
 * @example
 * const window = new SlidingWindow(2)
 * window.take(0)
 * window.take(1000)
 * window.wait(2000) // 58000
 */
export declare class SlidingWindow {
    #private;
    readonly windowMs: number;
    limit: number;
    constructor(limit: number, windowMs?: number);
    /** Milliseconds until one more has room; 0: now. */
    wait(now: number): number;
    take(now: number): void;
    remaining(now: number): number;
    /** Milliseconds until everything taken has come back. */
    reset(now: number): number;
}
/** A token bucket: `perSecond` on average, `burst` at once. */
export declare class TokenBucket {
    #private;
    perSecond: number;
    burst: number;
    constructor(perSecond: number, burst: number);
    wait(now: number): number;
    take(now: number): void;
    remaining(now: number): number;
    reset(now: number): number;
}
/** At most `limit` in flight at a time. */
export declare class Slots {
    limit: number;
    inUse: number;
    constructor(limit: number);
}
