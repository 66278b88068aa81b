/** How rates are counted. Times are milliseconds of a monotonic clock. */

const GRAINS = 512
const EMPTY = new Float64Array(0)

/**
 * At most `limit` in any window, exactly: no burst at a window's border.
 *
 * Up to 512 entries each has its own time. Above that, entries of the same 1/512 of the window share the
 * time of the latest of them: still never more than `limit` in any window, a place comes back at most
 * 1/512 of the window late (0.12 s a minute), and memory stays below 9 KB for any limit.
 *
 * @example
 * const window = new SlidingWindow(2)
 * window.take(0)
 * window.take(1000)
 * window.wait(2000) // 58000
 */
export class SlidingWindow {
  readonly windowMs: number
  limit: number
  #times = EMPTY
  #counts = EMPTY
  #head = 0
  #size = 0
  #total = 0
  #isCoarse = false

  constructor(limit: number, windowMs = 60_000) {
    this.limit = limit
    this.windowMs = windowMs
  }

  /** Milliseconds until `amount` more have room; 0: now. More than the limit have when nothing else is there. */
  wait(now: number, amount = 1): number {
    this.#expire(now)
    let excess = this.#total + Math.min(amount, this.limit) - this.limit
    if (excess <= 0) return 0
    for (let at = 0; at < this.#size; at++) {
      const index = (this.#head + at) % this.#times.length
      excess -= this.#counts[index]!
      if (excess <= 0) return this.windowMs - (now - this.#times[index]!)
    }
    return this.windowMs
  }

  take(now: number, amount = 1): void {
    this.#expire(now)
    this.#total += amount
    const last = (this.#head + this.#size - 1) % this.#times.length
    if (this.#size > 0 && this.#grain(this.#times[last]!) === this.#grain(now)) {
      this.#times[last] = now
      this.#counts[last]! += amount
      return
    }
    if (this.#size === this.#times.length) this.#grow()
    const next = (this.#head + this.#size) % this.#times.length
    this.#times[next] = now
    this.#counts[next] = amount
    this.#size++
  }

  remaining(now: number): number {
    this.#expire(now)
    return Math.max(0, this.limit - this.#total)
  }

  /** Milliseconds until everything taken has come back. */
  reset(now: number): number {
    this.#expire(now)
    if (this.#size === 0) return 0
    // In this order: a sum of the two could round to a little more than the window.
    return this.windowMs - (now - this.#times[(this.#head + this.#size - 1) % this.#times.length]!)
  }

  /** What was taken and when, oldest first. */
  entries(now: number): [time: number, amount: number][] {
    this.#expire(now)
    return Array.from({ length: this.#size }, (_, at) => {
      const index = (this.#head + at) % this.#times.length
      return [this.#times[index]!, this.#counts[index]!]
    })
  }

  #grain(time: number): number {
    return this.#isCoarse ? Math.floor((time * GRAINS) / this.windowMs) : time
  }

  #expire(now: number): void {
    while (this.#size > 0 && this.#times[this.#head]! <= now - this.windowMs) {
      this.#total -= this.#counts[this.#head]!
      this.#head = (this.#head + 1) % this.#times.length
      this.#size--
    }
    if (this.#size === 0) this.#isCoarse = false
  }

  /** Makes room for one more. Of many, those that were noted one by one share their grains from now on. */
  #grow(): void {
    if (this.#size >= GRAINS) this.#isCoarse = true
    const length = Math.min(Math.max(8, this.#times.length * 2), GRAINS + 2)
    const times = new Float64Array(length)
    const counts = new Float64Array(length)
    let last = -1
    for (let at = 0; at < this.#size; at++) {
      const index = (this.#head + at) % this.#times.length
      const time = this.#times[index]!
      if (last < 0 || this.#grain(times[last]!) !== this.#grain(time)) last++
      times[last] = time
      counts[last]! += this.#counts[index]!
    }
    this.#times = times
    this.#counts = counts
    this.#head = 0
    this.#size = last + 1
  }
}

/** A token bucket: `perSecond` on average, `burst` at once. */
export class TokenBucket {
  perSecond: number
  burst: number
  #tokens: number
  #at = 0

  constructor(perSecond: number, burst: number) {
    this.perSecond = perSecond
    this.burst = burst
    this.#tokens = burst
  }

  wait(now: number): number {
    this.#refill(now)
    return this.#tokens >= 1 ? 0 : ((1 - this.#tokens) / this.perSecond) * 1000
  }

  take(now: number): void {
    this.#refill(now)
    this.#tokens--
  }

  remaining(now: number): number {
    this.#refill(now)
    return Math.max(0, Math.floor(this.#tokens))
  }

  reset(now: number): number {
    this.#refill(now)
    return ((this.burst - this.#tokens) / this.perSecond) * 1000
  }

  #refill(now: number): void {
    const elapsed = Math.max(0, now - this.#at)
    this.#tokens = Math.min(this.burst, this.#tokens + (elapsed / 1000) * this.perSecond)
    this.#at = Math.max(this.#at, now)
  }
}
