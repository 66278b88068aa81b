import type { Backend, Live } from './backend.ts'
import type { RetryBudget } from './budget.ts'
import { type Candidate, type FailureKind, isAmong, type Lineup, type Wanted } from './lineup.ts'

/** A call of which an attempt has failed. */
interface Failed {
  lineup: Lineup
  wanted: Wanted
  /** Attempts so far, but for those that ran beside another one. */
  attempts: number
  /** The backend has had the request, or some of it. */
  isSent: boolean
  /** When the client will have waited for long enough (monotonic, ms). */
  deadline: number
}

/** Which backends a call has tried, and whether and when another one is tried. */
export class Retries {
  tried: readonly Candidate[] = []
  readonly #budget: RetryBudget
  /** Times before which backends asked not to be tried again. */
  #notBefore: Map<Live, number> | undefined
  #waits = 0

  constructor(budget: RetryBudget) {
    this.#budget = budget
  }

  /** A backend asks not to be tried again for so long (ms). */
  rest({ live }: Backend, ms: number): void {
    this.#notBefore ??= new Map()
    this.#notBefore.set(live, performance.now() + ms)
  }

  /** These have not failed: somebody else was faster. */
  forgive(candidates: readonly Candidate[]): void {
    this.tried = this.tried.filter(each => !candidates.includes(each))
  }

  /** Time in ms until another attempt may be made, or undefined if there is to be none. */
  plan(kind: FailureKind, failed: Failed): number | undefined {
    const { lineup, wanted, isSent } = failed
    const { enabled, retryOn, maxRetries, fallsBack } = lineup.retry
    const candidates = lineup.candidates(wanted)
    const others = candidates.filter(each => !isAmong(this.tried, each))
    // A connection that was refused has cost nobody anything.
    if (!isSent && others.length > 0) return 0
    if (wanted.begun !== undefined) return others.length > 0 && this.spend() ? 0 : undefined
    if (!retryOn.includes(kind)) return undefined
    if (enabled && failed.attempts <= maxRetries) {
      const wait = others.length > 0 ? 0 : this.#waitFor(candidates, failed)
      const isFree = wait === undefined || !isSent
      if (isFree || this.spend()) return wait
    }
    // Who says where calls go when a backend fails means them to go there: each tier is asked once.
    const { tier } = this.tried.at(-1)!
    if (!fallsBack || !others.some(each => each.tier !== tier)) return undefined
    this.tried = this.tried.concat(others.filter(each => each.tier === tier))
    return 0
  }

  spend(): boolean {
    return this.#budget.spend(performance.now())
  }

  /** After so long (ms) those may be tried again that do not ask for more. */
  wait(ms: number): void {
    this.#waits++
    this.tried = this.tried.filter(each => this.#askedWait(each.backend) > ms)
  }

  /** Time in ms until one that was tried before may be tried again, or undefined if that is too late. */
  #waitFor(candidates: Candidate[], { lineup, deadline }: Failed): number | undefined {
    const { maxWait, initialWait, multiplier } = lineup.retry
    const soonest = Math.min(...candidates.map(each => this.#askedWait(each.backend)))
    const wait = Math.max(Math.min(initialWait * multiplier ** this.#waits, maxWait), soonest)
    return soonest > maxWait || performance.now() + wait > deadline ? undefined : wait
  }

  /** How long (ms) the backend still asks not to be tried again. */
  #askedWait({ live }: Backend): number {
    return Math.max(0, (this.#notBefore?.get(live) ?? 0) - performance.now())
  }
}
