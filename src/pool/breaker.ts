/** When a backend is held to be broken. Times in milliseconds. */
export interface BreakerPolicy {
  consecutiveFailures: number
  /** Failures among all calls of the last {@link HALF_WINDOW_MS} to twice that. */
  errorRatio: number
  /** How long no call goes there; doubled each time until a call succeeds. */
  openTime: number
}

export type CircuitState = 'closed' | 'half_open' | 'open'
export type OpenReason = 'consecutive_failures' | 'error_ratio' | 'probe_failed' | 'retry_after'

/** A circuit has opened, for `ms`, or closed. */
export type CircuitTurn = { state: 'open'; reason: OpenReason; ms: number } | { state: 'closed' }

/** A ratio of fewer calls than these says nothing. */
const MIN_CALLS = 10
const HALF_WINDOW_MS = 15_000
/** Nobody stays away longer (ms), whatever it asks for, unless `openTime` itself is longer. */
const MAX_OPEN_MS = 60_000

/**
 * Says by the calls a backend has had whether it should get more. `closed`: it should. `open`: not
 * before `until`. Then the next call is a probe, and until that one has come to something
 * (`half_open`) no other follows. All times are of one monotonic clock, in ms, passed in.
 *
 * What becomes of a call counts only in the era it began in: calls that were under way when the
 * circuit opened say nothing of whether the backend has recovered.
 */
export class Breaker {
  /** Without it the circuit stays closed. */
  #policy: BreakerPolicy | undefined
  #onTurn: ((turn: CircuitTurn) => void) | undefined
  #state: CircuitState = 'closed'
  #era = 0
  #until = 0
  #reason: OpenReason | undefined
  #consecutive = 0
  /** How often it has opened since a call succeeded. */
  #openings = 0
  /** Calls and failures of this half of the window, which began at `since`, and of the half before it. */
  #since = 0
  #calls = 0
  #failures = 0
  #callsBefore = 0
  #failuresBefore = 0

  guard(policy: BreakerPolicy | undefined, onTurn?: (turn: CircuitTurn) => void): void {
    this.#policy = policy
    this.#onTurn = onTurn
    if (policy === undefined && this.#state !== 'closed') this.#close()
  }

  get isClosed(): boolean {
    return this.#state === 'closed'
  }

  /** It asked to be left alone for a while, and that has not passed. */
  get isResting(): boolean {
    return this.#state === 'open' && this.#reason === 'retry_after'
  }

  /** Should it get a call? */
  admits(now: number): boolean {
    return this.#state === 'closed' || (this.#state === 'open' && now >= this.#until)
  }

  /** For whoever looks at it: an open circuit that would let a probe through is `half_open`. */
  state(now: number): CircuitState {
    return this.#state === 'open' && now >= this.#until ? 'half_open' : this.#state
  }

  /** Why it is not closed, and until when (monotonic, ms) no probe is made; undefined when it is. */
  get opened(): { reason: OpenReason; until: number } | undefined {
    return this.#reason && { reason: this.#reason, until: this.#until }
  }

  /** A call begins; returns its era. */
  begin(now: number): number {
    if (this.#state === 'open' && now >= this.#until) {
      this.#state = 'half_open'
      this.#era++
    }
    return this.#era
  }

  /** A call is over. If it was the probe and nothing came of it, the next call is one. */
  leave(era: number): void {
    if (this.#state === 'half_open' && era === this.#era) this.#state = 'open'
  }

  /** An answer has begun. That is enough of a probe: a stream may take minutes. */
  answered(era: number): void {
    if (this.#state === 'half_open' && era === this.#era) this.#close()
  }

  /** A call has come to its end. */
  succeeded(era: number, now: number): void {
    if (this.#policy === undefined || era !== this.#era) return
    if (this.#state !== 'closed') this.#close()
    this.#consecutive = 0
    this.#openings = 0
    this.#count(0, now)
  }

  failed(era: number, now: number): void {
    if (this.#policy === undefined || era !== this.#era) return
    if (this.#state !== 'closed') {
      // A call that was made as a last resort, before it was time for a probe, says nothing new.
      if (now >= this.#until) this.#openFor('probe_failed', now)
      return
    }
    this.#consecutive++
    this.#count(1, now)
    const calls = this.#calls + this.#callsBefore
    const failures = this.#failures + this.#failuresBefore
    if (this.#consecutive >= this.#policy.consecutiveFailures) {
      this.#openFor('consecutive_failures', now)
    } else if (calls >= MIN_CALLS && failures >= calls * this.#policy.errorRatio) {
      this.#openFor('error_ratio', now)
    }
  }

  /** The backend asks not to be called for `ms`; whoever has asked for more before is not called earlier. */
  rest(ms: number, now: number): void {
    if (this.#policy === undefined || ms === 0) return
    const rest = Math.min(ms, MAX_OPEN_MS)
    if (this.#state === 'open' && now < this.#until) {
      this.#until = Math.max(this.#until, now + rest)
    } else this.#open('retry_after', rest, now)
  }

  #openFor(reason: OpenReason, now: number): void {
    const { openTime } = this.#policy!
    const ms = Math.min(openTime * 2 ** this.#openings, Math.max(openTime, MAX_OPEN_MS))
    this.#openings++
    this.#open(reason, ms, now)
  }

  #open(reason: OpenReason, ms: number, now: number): void {
    this.#state = 'open'
    this.#era++
    this.#reason = reason
    this.#until = now + ms
    this.#forget()
    this.#onTurn?.({ state: 'open', reason, ms })
  }

  #close(): void {
    this.#state = 'closed'
    this.#reason = undefined
    this.#forget()
    this.#onTurn?.({ state: 'closed' })
  }

  /** Whoever is let in again begins anew. */
  #forget(): void {
    this.#consecutive = 0
    this.#calls = this.#failures = this.#callsBefore = this.#failuresBefore = 0
  }

  #count(failures: 0 | 1, now: number): void {
    const age = now - this.#since
    if (age > HALF_WINDOW_MS) {
      const isRecent = age <= 2 * HALF_WINDOW_MS
      this.#callsBefore = isRecent ? this.#calls : 0
      this.#failuresBefore = isRecent ? this.#failures : 0
      this.#calls = this.#failures = 0
      this.#since = now
    }
    this.#calls++
    this.#failures += failures
  }
}
