import { resolve } from 'node:path'
import type { FastifyBaseLogger } from 'fastify'
import { Counter, type Moment, type Period, type Spending } from './counter.ts'
import { isNothing, none, sumOf, toBook } from './hold.ts'
import type { Limits } from './limits.ts'
import { Periods } from './period.ts'
import { Quotas } from './quotas.ts'
import type { SlidingWindow } from './rates.ts'
import {
  type Account,
  type Amount,
  type Call,
  type Hold,
  isAddress,
  type Lease,
  type Left,
  type LimitStore,
  MAX_ADDRESSES,
  NOTHING,
  type Refusal
} from './store.ts'

/** Below this number of subjects no idle ones are looked for. */
const LOOK_FROM = 1024
/** Subjects that a request looks at, more than it can add. */
const LOOKS = 8
/** A request of which nothing is known yet. */
const LOOK = { hold: NOTHING, least: NOTHING }

/** The clocks: monotonic (ms) and of the wall (Unix ms). */
export interface Clock {
  now(): number
  time(): number
}

export const CLOCK: Clock = { now: () => performance.now(), time: () => Date.now() }

/**
 * Limits of one process, in memory. What was spent of quotas is written to a file, if there is one.
 *
 * @example
 * const store = new MemoryStore(new Periods('UTC'))
 * const limits = { ...noLimits, max_concurrent: 1 }
 * const nothing = { tokens: 0, cost: 0 }
 * const call = { accounts: [toAccount('per_key', 'alice', limits)], hold: nothing, least: nothing }
 * const lease = store.reserve(call)
 * store.reserve(call) // { scope: 'per_key', limit: 'max_concurrent', max: 1, retryAfterMs: 1000 }
 * store.settle(lease, nothing)
 */
export class MemoryStore implements LimitStore {
  #periods: Periods
  readonly #quotas: Quotas | undefined
  readonly #clock: Clock
  readonly #counters = new Map<string, Counter>()
  /** Where the search for idle subjects goes on. */
  #looking: Iterator<[string, Counter]> = this.#counters.entries()

  constructor(periods: Periods, quotas?: Quotas, clock = CLOCK) {
    this.#periods = periods
    this.#quotas = quotas
    this.#clock = clock
    if (quotas !== undefined) quotas.counted = () => this.#spendings()
  }

  /** Subjects that are remembered at the moment. */
  get size(): number {
    return this.#counters.size
  }

  readonly isLocal = true

  look(accounts: readonly Account[], uploading: readonly number[] = []): Refusal | undefined {
    const time = this.#clock.time()
    const now = this.#clock.now()
    for (let at = 0; at < accounts.length; at++) {
      const account = accounts[at]!
      // Looking makes no counter that would have to be kept.
      const counter = this.#counters.get(account.name) ?? new Counter(account)
      const moment = this.#at(account, time, now)
      const refusal = counter.refusal(account, LOOK, moment, uploading[at])
      if (refusal !== undefined) return refusal
    }
    return undefined
  }

  reserve(call: Call): Lease | Refusal {
    const { accounts, hold, force } = call
    // Not while they are being taken from: what is idle now may be about to be taken.
    if (this.#counters.size >= LOOK_FROM) this.#removeSome()
    const counters = accounts.map(account => this.#counter(account))
    const time = this.#clock.time()
    const now = this.#clock.now()
    for (let at = 0; at < accounts.length && !force; at++) {
      const account = accounts[at]!
      const refusal = counters[at]!.refusal(account, call, this.#at(account, time, now))
      if (refusal !== undefined) return refusal
    }
    for (let at = 0; at < accounts.length; at++) counters[at]!.take(accounts[at]!, call, now)
    return {
      accounts,
      held: { ...hold },
      spent: { ...NOTHING },
      isOpen: true,
      requests: tightest(counters.map((each, index) => each.requestsLeft(accounts[index]!, now))),
      tokens: tightest(counters.map((each, index) => each.tokensLeft(accounts[index]!, now)))
    }
  }

  async extend(lease: Lease, spent: Amount, more: Hold, force: boolean): Promise<boolean> {
    return this.extendNow(lease, spent, more, force)
  }

  extendNow(lease: Lease, spent: Amount, more: Hold, force: boolean): boolean {
    this.#book(lease, spent)
    const hasRoom =
      force ||
      lease.accounts.every(account =>
        this.#counter(account).hasRoom(account, more, this.#at(account))
      )
    if (hasRoom) this.#hold(lease, more)
    return hasRoom
  }

  async book(lease: Lease, spent: Amount): Promise<void> {
    this.#book(lease, spent)
    await this.#quotas?.written()
  }

  settle(lease: Lease, spent: Amount): void {
    if (!lease.isOpen) return
    lease.isOpen = false
    this.#book(lease, spent)
    this.#hold(lease, none(lease.held))
    for (const account of lease.accounts) this.#counter(account).release()
  }

  update({ periods }: { periods: Periods }): void {
    this.#periods = periods
  }

  async close(): Promise<void> {
    await this.#quotas?.close()
  }

  /** All that is counted. */
  counters(): Iterable<Counter> {
    return this.#counters.values()
  }

  /** What an account has spent of its quota. */
  spent(account: Account): Amount {
    return this.#counter(account).spent(account, this.#at(account))
  }

  /** Somebody else knows better what an account has spent of its quota. */
  know(account: Account, { tokens, cost }: Amount): void {
    if (account.limits.total_quota === 0) return
    if (tokens === 0 && cost === 0 && account.spent === undefined) return
    this.#counter(account).spending = { ...this.#at(account).period, tokens, cost }
  }

  /** What an account has; its windows as ages (ms) and amounts. */
  seed(account: Account) {
    const { slots, held, requests, tokens } = this.#counter(account)
    const now = this.#clock.now()
    const ages = (window: SlidingWindow) =>
      window.entries(now).map(([time, amount]) => [now - time, amount])
    return {
      slots,
      held: { ...held },
      requests: ages(requests),
      tokens: ages(tokens),
      known: this.spent(account)
    }
  }

  periodOf({ quota_reset_period }: Limits): Period {
    return this.#periods.at(quota_reset_period, this.#clock.time())
  }

  /** What has been spent since the last time is not held any more, but spent. */
  #book(lease: Lease, spent: Amount): void {
    const { delta, less } = toBook(lease, spent)
    if (delta.tokens === 0 && delta.cost === 0) return
    for (const account of lease.accounts) {
      const { limits } = account
      if (limits.tokens_per_minute === 0 && limits.total_quota === 0) continue
      const counter = this.#counter(account)
      counter.spend(account, delta, this.#at(account))
      const { spending } = counter
      if (limits.total_quota > 0 && spending) this.#quotas?.note(account.name, spending)
    }
    lease.spent = { ...spent }
    this.#hold(lease, less)
  }

  #hold(lease: Lease, more: Hold): void {
    if (isNothing(more)) return
    lease.held = sumOf(lease.held, more)
    for (const account of lease.accounts) this.#counter(account).hold(account, more)
  }

  *#spendings(): Generator<[string, Spending]> {
    for (const [id, { account, spending }] of this.#counters) {
      if (account.limits.total_quota > 0 && spending) yield [id, spending]
    }
  }

  #at({ limits }: Account, time = this.#clock.time(), now = this.#clock.now()): Moment {
    return { now, time, period: this.#periods.at(limits.quota_reset_period, time) }
  }

  #counter(account: Account): Counter {
    const id = account.name
    const known = this.#counters.get(id)
    if (known !== undefined) {
      known.account = account
      return known
    }
    const counter = new Counter(account)
    counter.spending = this.#quotas?.take(id)
    this.#counters.set(id, counter)
    return counter
  }

  /** Looks at a few subjects, and removes those that are idle or, above the maximum, can be spared. */
  #removeSome(): void {
    const now = this.#clock.now()
    const time = this.#clock.time()
    // API keys and users with a live quota may be more: as many exist as the operator has created.
    const max = MAX_ADDRESSES - LOOKS
    for (let looks = 0; looks < LOOKS; looks++) {
      const { value, done } = this.#looking.next()
      if (done) {
        this.#looking = this.#counters.entries()
        return
      }
      const [id, counter] = value
      const isOver = this.#counters.size > max
      const isSpare = isAddress(id) ? counter.slots === 0 : !counter.isNeeded(time)
      if (counter.isIdle(now, time) || (isOver && isSpare)) this.#remove(id, counter)
    }
  }

  #remove(id: string, { spending }: Counter): void {
    this.#counters.delete(id)
    if (spending === undefined) return
    if (isAddress(id)) this.#quotas?.forget(id)
    else this.#quotas?.keep(id, spending)
  }
}

/** Counts in this process; what was spent of quotas outlives a restart in a file, where there is a directory. */
export async function openMemoryStore(
  timeZone: string,
  dataDir: string | undefined,
  log: FastifyBaseLogger
): Promise<MemoryStore> {
  const periods = new Periods(timeZone)
  if (dataDir === undefined) return new MemoryStore(periods)
  return new MemoryStore(periods, await Quotas.open(resolve(dataDir, 'limits.db'), log))
}

export function tightest(all: (Left | undefined)[]): Left | undefined {
  return all.reduce(
    (least, each) => (each && !(least && least.remaining <= each.remaining) ? each : least),
    undefined
  )
}
