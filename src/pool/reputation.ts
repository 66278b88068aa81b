/** How fast old latencies are forgotten, and how much a new one counts. */
const FORGET_MS = 15_000
const ALPHA = 0.3
/** Of calls that fail each counts half; how fast (ms) that is forgotten; most it can make of a cost. */
const FAILURE_ALPHA = 0.5
const FORGET_FAILURES_MS = 90_000
const MOST_AVERSION = 10_000

/** What calls were like lately: how fast a backend was, and how often it failed. Times in ms, monotonic. */
export class Reputation {
  #latency = 0
  #latencyAt: number | undefined
  /** Share of calls that have failed, as of a time. */
  #failures = 0
  #failuresAt = 0

  /** How many times more a call there should seem to cost than it does, since others have failed. */
  aversion(now: number): number {
    const failures = this.#failuresNow(now)
    return Math.min((1 - failures) ** -3, MOST_AVERSION)
  }

  /** A call was answered. */
  observeSuccess(now: number): void {
    this.#observeOutcome(0, now)
  }

  /** A call has failed, which counts as if its first byte had taken so long (ms). */
  observeFailure(ms: number, now: number): void {
    this.#observeOutcome(1, now)
    this.observeLatency(ms, now)
  }

  /** A time to first byte in ms. A slower one than expected counts at once, a faster one little by little. */
  observeLatency(ms: number, now: number): void {
    const before = this.latency(now)
    this.#latency = before === undefined || ms > before ? ms : before * (1 - ALPHA) + ms * ALPHA
    this.#latencyAt = now
  }

  /**
   * Expected latency (ms), forgotten while nothing is observed, so that a slow one is tried again;
   * undefined before the first observation.
   */
  latency(now: number): number | undefined {
    if (this.#latencyAt === undefined) return undefined
    return this.#latency * Math.exp(-(now - this.#latencyAt) / FORGET_MS)
  }

  #observeOutcome(failures: 0 | 1, now: number): void {
    this.#failures = this.#failuresNow(now) * (1 - FAILURE_ALPHA) + failures * FAILURE_ALPHA
    this.#failuresAt = now
  }

  #failuresNow(now: number): number {
    if (this.#failures === 0) return 0
    return this.#failures * Math.exp((this.#failuresAt - now) / FORGET_FAILURES_MS)
  }
}
