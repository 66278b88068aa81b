/** The three ways a limit is counted. Times are milliseconds of a monotonic clock. */
const GRAINS = 512;
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
export class SlidingWindow {
    windowMs;
    limit;
    #times = new Float64Array(8);
    #counts = new Float64Array(8);
    #head = 0;
    #size = 0;
    #total = 0;
    constructor(limit, windowMs = 60_000) {
        this.limit = limit;
        this.windowMs = windowMs;
    }
    /** Milliseconds until one more has room; 0: now. */
    wait(now) {
        this.#expire(now);
        if (this.#total < this.limit)
            return 0;
        let excess = this.#total - this.limit;
        for (let at = 0; at < this.#size; at++) {
            const index = (this.#head + at) % this.#times.length;
            excess -= this.#counts[index];
            if (excess < 0)
                return this.#times[index] + this.windowMs - now;
        }
        return this.windowMs;
    }
    take(now) {
        this.#expire(now);
        this.#total++;
        const last = (this.#head + this.#size - 1) % this.#times.length;
        if (this.#size > 0 && this.#grain(this.#times[last]) === this.#grain(now)) {
            this.#times[last] = now;
            this.#counts[last]++;
            return;
        }
        if (this.#size === this.#times.length)
            this.#grow();
        const next = (this.#head + this.#size) % this.#times.length;
        this.#times[next] = now;
        this.#counts[next] = 1;
        this.#size++;
    }
    remaining(now) {
        this.#expire(now);
        return Math.max(0, this.limit - this.#total);
    }
    /** Milliseconds until everything taken has come back. */
    reset(now) {
        this.#expire(now);
        if (this.#size === 0)
            return 0;
        return this.#times[(this.#head + this.#size - 1) % this.#times.length] + this.windowMs - now;
    }
    #grain(time) {
        return this.limit <= GRAINS ? time : Math.floor((time * GRAINS) / this.windowMs);
    }
    #expire(now) {
        while (this.#size > 0 && this.#times[this.#head] <= now - this.windowMs) {
            this.#total -= this.#counts[this.#head];
            this.#head = (this.#head + 1) % this.#times.length;
            this.#size--;
        }
    }
    #grow() {
        const length = Math.min(this.#times.length * 2, GRAINS + 2);
        const times = new Float64Array(length);
        const counts = new Float64Array(length);
        for (let at = 0; at < this.#size; at++) {
            const index = (this.#head + at) % this.#times.length;
            times[at] = this.#times[index];
            counts[at] = this.#counts[index];
        }
        this.#times = times;
        this.#counts = counts;
        this.#head = 0;
    }
}
/** A token bucket: `perSecond` on average, `burst` at once. */
export class TokenBucket {
    perSecond;
    burst;
    #tokens;
    #at = 0;
    constructor(perSecond, burst) {
        this.perSecond = perSecond;
        this.burst = burst;
        this.#tokens = burst;
    }
    wait(now) {
        this.#refill(now);
        return this.#tokens >= 1 ? 0 : ((1 - this.#tokens) / this.perSecond) * 1000;
    }
    take(now) {
        this.#refill(now);
        this.#tokens--;
    }
    remaining(now) {
        this.#refill(now);
        return Math.max(0, Math.floor(this.#tokens));
    }
    reset(now) {
        this.#refill(now);
        return ((this.burst - this.#tokens) / this.perSecond) * 1000;
    }
    #refill(now) {
        const elapsed = Math.max(0, now - this.#at);
        this.#tokens = Math.min(this.burst, this.#tokens + (elapsed / 1000) * this.perSecond);
        this.#at = Math.max(this.#at, now);
    }
}
/** At most `limit` in flight at a time. */
export class Slots {
    limit;
    inUse = 0;
    constructor(limit) {
        this.limit = limit;
    }
}
