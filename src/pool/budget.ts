/** So many calls allow one retry. */
const CALLS_PER_RETRY = 5
/** Retries in a second, however few calls there are; no more of them are saved up. */
const FLOOR = 10
/** Calls that are remembered. */
const MOST_CALLS = 500

/**
 * How many calls may be tried again: a fifth of all, or ten a second where that is more. When every
 * backend fails, retries would otherwise multiply the load that they fail under.
 *
 * Two buckets, and a retry takes from both: so the larger of the two rates holds, not their sum.
 * Times are of a monotonic clock, in ms, passed in.
 */
export class RetryBudget {
  /** Retries that were not made for want of budget. */
  exhausted = 0
  #calls = 0
  #floor = FLOOR
  #at = 0

  /** A call is made for the first time. */
  earn(): void {
    if (this.#calls < MOST_CALLS) this.#calls++
  }

  /** May another one be tried again? */
  spend(now: number): boolean {
    this.#floor = Math.min(FLOOR, this.#floor + ((now - this.#at) / 1000) * FLOOR)
    this.#at = now
    if (this.#calls < CALLS_PER_RETRY && this.#floor < 1) {
      this.exhausted++
      return false
    }
    this.#calls = Math.max(0, this.#calls - CALLS_PER_RETRY)
    this.#floor = Math.max(0, this.#floor - 1)
    return true
  }
}
