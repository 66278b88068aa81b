import { isNothing, type Share, shareOf } from './hold.ts'
import { bucketOf, type Limits } from './limits.ts'
import { SlidingWindow, TokenBucket } from './rates.ts'
import {
  type Account,
  type Amount,
  type Call,
  type Hold,
  type Left,
  type LimitName,
  NOTHING,
  type Refusal
} from './store.ts'

/** When it is worth asking again (ms) for what comes back as soon as a running call ends. */
const RETRY = 1_000

/** Maximum time (ms) that a clock may be behind the clock by which a period began. */
export const SKEW = 60_000

/** What one subject has spent in the period of its quota. */
export interface Spending extends Amount {
  /** Where the period begins and ends (Unix ms). */
  start: number
  end: number
  /** Spending of the period before, for a clock that was ahead and returns. */
  before?: Omit<Spending, 'before'> | undefined
}

export interface Period {
  start: number
  end: number
}

/** The time of one step: of a monotonic clock (ms), and of the wall (Unix ms). */
export interface Moment {
  now: number
  time: number
  period: Period
}

/** What one subject has taken, and whether it may take more. */
export class Counter {
  /** As it was last asked for. */
  account: Account
  slots = 0
  readonly held: Share = { tokens: 0, cost: 0, window: 0 }
  readonly requests = new SlidingWindow(0)
  readonly tokens = new SlidingWindow(0)
  spending: Spending | undefined
  #bucket: TokenBucket | undefined

  constructor(account: Account) {
    this.account = account
  }

  /**
   * Returns why a call has no room: the limit that it has to wait for longest. `least`: the amount that it needs however
   * wrong the estimates are.
   */
  refusal(
    account: Account,
    { hold, least, onlyRates }: Omit<Call, 'accounts'>,
    at: Moment,
    uploading = 0
  ): Refusal | undefined {
    const { scope, limits } = account
    const { requests_per_minute, tokens_per_minute, max_concurrent, total_quota } = limits
    let longest: Refusal | undefined
    const bucket = this.#bucketOf(limits)
    if (bucket) {
      const wait = bucket.wait(at.now)
      longest = longer(longest, scope, 'requests_per_second', bucket.perSecond, wait)
    }
    if (requests_per_minute > 0) {
      this.requests.limit = requests_per_minute
      const wait = this.requests.wait(at.now)
      longest = longer(longest, scope, 'requests_per_minute', requests_per_minute, wait)
    }
    if (onlyRates) return longest
    if (tokens_per_minute > 0) {
      const isTooLarge = shareOf(limits, least).window > tokens_per_minute
      const share = shareOf(limits, hold)
      const wait = isTooLarge ? Number.POSITIVE_INFINITY : this.#tokenWait(limits, share, at.now)
      longest = longer(longest, scope, 'tokens_per_minute', tokens_per_minute, wait)
    }
    if (max_concurrent > 0 && this.slots + uploading >= max_concurrent) {
      longest = longer(longest, scope, 'max_concurrent', max_concurrent, RETRY)
    }
    return total_quota > 0 ? this.#quotaRefusal(account, { hold, least }, at, longest) : longest
  }

  /** Returns why the quota has no room, or `longest` if that has to be waited for longer. */
  #quotaRefusal(
    account: Account,
    { hold, least }: Pick<Call, 'hold' | 'least'>,
    at: Moment,
    longest: Refusal | undefined
  ): Refusal | undefined {
    const { scope, limits } = account
    const { total_quota, quota_unit } = limits
    const share = shareOf(limits, hold)
    const spent = this.spent(account, at)[quota_unit]
    const hasQuota = (held: Amount) => {
      // An estimate alone rejects nothing permanently.
      const isFresh = spent === 0 && held[quota_unit] === 0
      return this.#hasQuota(account, isFresh ? shareOf(limits, least) : share, at, held)
    }
    if (hasQuota(this.held)) return longest
    const [limit, wait] = hasQuota(NOTHING)
      ? (['reserved_quota', RETRY] as const)
      : (['total_quota', at.period.end - at.time] as const)
    const refusal = longer(longest, scope, limit, total_quota, wait)
    if (refusal === longest) return longest
    return { ...refusal!, left: total_quota - spent, needed: share[quota_unit] }
  }

  /** Is there room to hold so much more? */
  hasRoom(account: Account, more: Hold, at: Moment): boolean {
    const share = shareOf(account.limits, more)
    if (this.#tokenWait(account.limits, share, at.now) > 0) return false
    // A part of a quota that is reserved already needs no more of it.
    return share[account.limits.quota_unit] === 0 || this.#hasQuota(account, share, at)
  }

  take(account: Account, { hold, isBooking }: Omit<Call, 'accounts'>, now: number): void {
    const { limits } = account
    if (limits.requests_per_minute > 0 && !isBooking) this.requests.take(now)
    if (!isBooking) this.#bucketOf(limits)?.take(now)
    this.slots++
    if (!isNothing(hold)) this.hold(account, hold)
  }

  /** Holds more, or with negative amounts less. */
  hold({ limits }: Account, more: Hold): void {
    const { tokens, cost, window } = shareOf(limits, more)
    this.held.tokens += tokens
    this.held.cost += cost
    this.held.window += window
  }

  release(): void {
    this.slots--
    // What is left over is what floating point numbers leave over.
    if (this.slots === 0) Object.assign(this.held, NOTHING, { window: 0 })
  }

  /** Books what was spent. */
  spend(account: Account, { tokens, cost }: Amount, at: Moment): void {
    const { tokens_per_minute, total_quota } = account.limits
    if (tokens_per_minute > 0 && tokens > 0) this.tokens.take(at.now, tokens)
    if (total_quota === 0) return
    // A model that nobody has is asked for, and nothing is spent: that need not be remembered.
    if (tokens === 0 && cost === 0 && this.spending === undefined) return
    const spent = this.spent(account, at)
    const amount = { tokens: spent.tokens + tokens, cost: spent.cost + cost }
    this.spending = { ...this.#periodAfter(at), ...amount }
  }

  /** What was spent in this period. */
  spent(account: Account, at: Moment): Amount {
    const { spending } = this
    const { period } = at
    if (spending === undefined) return spentBefore(account, period)
    if (!isAhead(spending, at)) return spending.start >= period.start ? spending : NOTHING
    // The clock was ahead when this was spent, so it was spent in this period.
    const { before } = spending
    const isOfPeriod = before !== undefined && !isAhead(before, at) && before.start >= period.start
    const { tokens, cost } = isOfPeriod ? before : NOTHING
    return { tokens: tokens + spending.tokens, cost: cost + spending.cost }
  }

  /** The period that the next amount counts in, and what was spent in the period before. */
  #periodAfter(at: Moment): Period & Pick<Spending, 'before'> {
    const { spending } = this
    const { start, end } = at.period
    if (spending === undefined || isAhead(spending, at)) return { start, end }
    const { before, ...last } = spending
    if (last.start < start) return { start, end, before: last }
    return { start: last.start, end: Math.max(last.end, end), before }
  }

  requestsLeft({ limits }: Account, now: number): Left | undefined {
    const { requests_per_minute: limit } = limits
    this.requests.limit = limit
    const ofMinute = limit > 0 ? this.requests.remaining(now) : Number.POSITIVE_INFINITY
    const bucket = this.#bucketOf(limits)
    const ofBucket = bucket?.remaining(now) ?? Number.POSITIVE_INFINITY
    if (bucket && ofBucket < ofMinute) {
      return { limit: bucket.burst, remaining: ofBucket, resetMs: bucket.reset(now) }
    }
    return limit > 0 ? { limit, remaining: ofMinute, resetMs: this.requests.reset(now) } : undefined
  }

  tokensLeft({ limits }: Account, now: number): Left | undefined {
    const { tokens_per_minute: limit } = limits
    if (limit === 0) return undefined
    this.tokens.limit = limit
    const remaining = Math.max(0, this.tokens.remaining(now) - this.held.window)
    return { limit, remaining, resetMs: this.tokens.reset(now) }
  }

  /** Has everything come back? Then it can be forgotten. */
  isIdle(now: number, time: number): boolean {
    const back = this.requests.reset(now) + this.tokens.reset(now) + (this.#bucket?.reset(now) ?? 0)
    return back <= 0 && !this.isNeeded(time)
  }

  /** Would more be lost with it than what comes back in a minute? */
  isNeeded(time: number): boolean {
    const isSpent = this.spending !== undefined && this.spending.end > time
    // What was spent before must not be counted again in the next period.
    return this.slots > 0 || isSpent || this.account.spent !== undefined
  }

  /** What is held counts as if it were spent now. More than all of the limit needs the limit alone. */
  #tokenWait({ tokens_per_minute: limit }: Limits, { window }: Share, now: number): number {
    if (limit === 0) return 0
    this.tokens.limit = limit
    const wanted = Math.min(window, limit) + this.held.window
    return wanted > limit ? RETRY : this.tokens.wait(now, wanted)
  }

  /** A call that spends nothing has room as long as anything is left. */
  #hasQuota(account: Account, more: Amount, at: Moment, held: Amount = this.held): boolean {
    const { total_quota, quota_unit } = account.limits
    if (total_quota === 0) return true
    const left = total_quota - this.spent(account, at)[quota_unit] - held[quota_unit]
    return more[quota_unit] > 0 ? more[quota_unit] <= left : left > 0
  }

  #bucketOf(limits: Limits): TokenBucket | undefined {
    const { perSecond, burst } = bucketOf(limits)
    if (perSecond === 0) {
      this.#bucket = undefined
      return undefined
    }
    this.#bucket ??= new TokenBucket(perSecond, burst)
    this.#bucket.perSecond = perSecond
    this.#bucket.burst = burst
    return this.#bucket
  }
}

/** Returns the refusal that has to be waited for longer. */
function longer(
  longest: Refusal | undefined,
  scope: Refusal['scope'],
  limit: LimitName,
  max: number,
  retryAfterMs: number
): Refusal | undefined {
  const isLonger = retryAfterMs > (longest?.retryAfterMs ?? 0)
  return isLonger ? { scope, limit, max, retryAfterMs } : longest
}

/** Whether a period began in the future: the clock was ahead then, and by more than clocks differ. */
function isAhead({ start }: Period, { time }: Moment): boolean {
  return start > time + SKEW
}

/** What an account had spent before it was first counted, if that was in this period. */
export function spentBefore({ limits, spent }: Account, period: Period): Amount {
  if (spent === undefined || (spent.at !== undefined && spent.at < period.start)) return NOTHING
  return { ...NOTHING, [limits.quota_unit]: spent.amount }
}
