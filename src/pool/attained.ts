import type { Usage } from '../exchange.ts'

/** What a caller has had is half as much after this time (ms). */
const HALF_LIFE = 60_000
/** How much the latest call counts for what a call is thought to have. */
const ALPHA = 0.05
/** What is written is dearer than what is read. */
const OUTPUT_WEIGHT = 2
/** Of more callers than these the ones that were served longest ago are forgotten. */
const MAX_CALLERS = 10_000

/** Tokens that were had at some time (monotonic, ms). */
export interface Share {
  tokens: number
  at: number
}

/**
 * What callers have had of the backends lately, in tokens: whoever has had least comes first (least
 * attained service), and what was had is forgotten by half each minute. Whoever comes back after a while does
 * not go before all others for it: he begins with what those have had who have calls now (virtual token
 * counter, https://arxiv.org/abs/2401.00588). Times are of a monotonic clock, in ms, passed in.
 *
 * @example
 * const attained = new Attained()
 * attained.add('alice', 100, 0)
 * attained.of('alice', 60_000) // 50
 */
export class Attained {
  readonly #callers = new Map<string, Share>()
  /** How many calls of each wait or are under way. */
  readonly #active = new Map<string, number>()
  #typical = 1

  of(caller: string, now: number): number {
    const had = this.#callers.get(caller)
    return had === undefined ? 0 : leftOf(had, now)
  }

  /** A call comes; it must {@link leave} in the end. */
  enter(caller: string, now: number): void {
    const calls = this.#active.get(caller) ?? 0
    if (calls === 0 && this.#active.size > 0) {
      const least = Math.min(...[...this.#active.keys()].map(each => this.of(each, now)))
      this.add(caller, Math.max(0, least - this.of(caller, now)), now)
    }
    this.#active.set(caller, calls + 1)
  }

  leave(caller: string): void {
    const calls = this.#active.get(caller)! - 1
    if (calls > 0) this.#active.set(caller, calls)
    else this.#active.delete(caller)
  }

  /** A call is given to a backend: it counts as a typical one until it is over. Returns what it counts as. */
  begin(caller: string, now: number): Share {
    this.add(caller, this.#typical, now)
    return { tokens: this.#typical, at: now }
  }

  /** It is over, and has had what it has had. */
  end(caller: string, begun: Share, usage: Usage | undefined, now: number): void {
    const { promptTokens = 0, cachedTokens = 0, completionTokens = 0 } = usage ?? {}
    const tokens = promptTokens - cachedTokens + completionTokens * OUTPUT_WEIGHT
    if (tokens > 0) this.#typical += (tokens - this.#typical) * ALPHA
    this.add(caller, tokens - leftOf(begun, now), now)
  }

  /** Adds tokens, or takes back what was too much. */
  add(caller: string, tokens: number, now: number): void {
    const had = Math.max(0, this.of(caller, now) + tokens)
    this.#callers.delete(caller)
    this.#callers.set(caller, { tokens: had, at: now })
    if (this.#callers.size > MAX_CALLERS) {
      this.#callers.delete(this.#callers.keys().next().value!)
    }
  }
}

function leftOf({ tokens, at }: Share, now: number): number {
  return tokens * 2 ** ((at - now) / HALF_LIFE)
}
