import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { mkdir, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyBaseLogger } from 'fastify'
import type { KeyNews } from '../keys/key.ts'
import { Complaint } from '../logs/complaint.ts'
import { Redis } from '../store/redis.ts'
import type { CacheOptions } from '../store/storage.ts'
import { none, toBook } from './hold.ts'
import { bucketOf } from './limits.ts'
import { CLOCK, MemoryStore, tightest } from './memory.ts'
import {
  type Answers,
  DamagedKeyError,
  Orders,
  type Refused,
  toLeft,
  toNews,
  toOrder,
  toTold
} from './orders.ts'
import {
  type Account,
  type Amount,
  type Call,
  type Hold,
  isRefusal,
  type Lease,
  type LimitStore,
  NOTHING,
  type Refusal,
  StoreError,
  type StoreSettings
} from './store.ts'

/** How often (ms) a replica says that it lives; it is taken for dead after 8 s. */
const BEAT_INTERVAL = 500
/** How long (ms) Redis may take for one step of a call. */
const STEP_TIMEOUT = 1_000
/** How often a start asks for a Redis that does not answer. */
const START_TRIES = 3
/** How long (ms) closing waits for what has been sent. */
const CLOSE_TIMEOUT = 1_000
const SEEDS = 100
/** So many accounts are told of at once, and calls go on behind that; of more, step by step before. */
const SEEDS_AT_ONCE = 1_000
/** Accounts that are remembered while Redis is away; of more it is not told. */
const MAX_UNSURE = 100_000

export interface RedisStoreOptions extends StoreSettings {
  cache: CacheOptions
  /** Begins all names. */
  prefix: string
  log: FastifyBaseLogger
  /** Where it is remembered how many processes there are, for a start without Redis. */
  file?: string | undefined
  /** Something could not be asked of Redis. */
  onTrouble?: () => void
  /** Takes over what was said of keys since the last time, or in 30 days; where that fails, it is told again. */
  onKeyNews?: (news: KeyNews[]) => Promise<void>
  /** For tests: the time (Unix ms) in place of Redis' clock and this machine's. */
  time?: () => number
}

interface RedisLease extends Lease {
  held: Hold
  /** The same in the mirror. */
  readonly mirror: Lease
  /** While more is asked for. */
  extending?: Promise<boolean> | undefined
}

/** What Redis has not heard of. */
interface Debt extends Amount {
  requests: number
}
interface Owed extends Debt {
  account: Account
}

/**
 * Limits that several processes hold together, in Redis; one round trip a call.
 *
 * Beside it each process counts in memory what it lets through itself. By that it goes on while Redis is
 * away, with its share of every limit (the whole divided by the processes that were last seen), and from
 * that Redis gets back what it has lost. Where only the key of one account is damaged, only requests of that account
 * are decided like that.
 */
export class RedisStore implements LimitStore {
  #options: RedisStoreOptions
  readonly #redis: Redis
  readonly #orders: Orders
  readonly #mirror: MemoryStore
  /** Accounts that Redis may see differently. */
  readonly #unsure = new Map<string, Owed>()
  /** Debts that Redis has heard of if it has heard the order of this number. */
  #unclear: { number: number; accounts: readonly Account[]; debt: Debt; isSeed: boolean }[] = []
  /** Number of the last order. */
  #last = 0
  /** Accounts of which Redis has lost everything. */
  readonly #lost = new Set<string>()
  #epoch = ''
  #isJoined = false
  #isSilent = false
  #replicas = 1
  #heardSince = 0
  /** How much (ms) Redis' clock is ahead of this machine's: quotas are renewed by it. */
  #ahead = 0
  #beating: Promise<void> | undefined
  readonly #timer: NodeJS.Timeout
  readonly #settling = new Set<Promise<void>>()
  readonly #damaged: Complaint

  constructor(options: RedisStoreOptions) {
    this.#options = options
    const { cache, time } = options
    this.#redis = new Redis({
      ...cache,
      read_timeout: Math.min(cache.read_timeout, STEP_TIMEOUT),
      dial_timeout: Math.min(cache.dial_timeout, STEP_TIMEOUT)
    })
    const redisTime = () => CLOCK.time() + this.#ahead
    const clock = time === undefined ? { now: CLOCK.now, time: redisTime } : { now: time, time }
    this.#mirror = new MemoryStore(options.periods, undefined, clock)
    this.#orders = new Orders(this.#redis, options.prefix, randomUUID(), time)
    if (options.file !== undefined) this.#replicas = readCount(options.file)
    this.#damaged = new Complaint((orders, reason) => {
      const { log, onError } = this.#options
      log.error({ orders, reason, on_store_error: onError }, 'limits: a key in Redis is damaged')
    })
    this.#timer = setInterval(() => void this.beat(), BEAT_INTERVAL).unref()
  }

  /** Is Redis there, and does it know this process? */
  get isJoined(): boolean {
    return this.#isJoined
  }

  readonly isLocal = false

  async look(
    accounts: readonly Account[],
    uploading: readonly number[]
  ): Promise<Refusal | undefined> {
    if (!this.#isJoined) return undefined
    const looked = { hold: NOTHING, least: NOTHING, uploading }
    const answer = await this.#step('look', accounts, looked).catch(() => undefined)
    return answer?.refused && toRefusal(answer.refused)
  }

  async reserve(call: Call): Promise<Lease | Refusal> {
    if (!this.#isJoined) return this.#alone(call)
    const { accounts, ...order } = call
    const number = ++this.#last
    let answer: Answers['reserve']
    try {
      answer = await this.#step('reserve', accounts, { number, ...order })
    } catch (error) {
      if (error instanceof DamagedKeyError) return this.#aside(call)
      // Redis may have granted it: what it thinks of these has to be put right in any case.
      this.#owe(accounts, NO_DEBT)
      return this.#alone(call, debt => this.#note(error, number, accounts, debt))
    }
    if ('refused' in answer) {
      return toRefusal(answer.refused)
    }
    const states = answer.accounts
    const mirror = this.#mirror.reserve({ ...call, force: true }) as Lease
    for (const [index, account] of accounts.entries()) {
      const { spent_tokens: tokens, spent_cost: cost } = states[index]!
      this.#mirror.know(account, { tokens, cost })
    }
    return {
      ...mirror,
      mirror,
      requests: tightest(states.map(each => toLeft(each.requests))),
      tokens: tightest(states.map(each => toLeft(each.tokens)))
    } as RedisLease
  }

  update(settings: StoreSettings): void {
    this.#options = { ...this.#options, ...settings }
    this.#mirror.update(settings)
  }

  extend(given: Lease, spent: Amount, more: Hold, force: boolean): Promise<boolean> {
    const lease = given as RedisLease
    const extend = () => this.#extend(lease, spent, more, force)
    const extending = (lease.extending?.then(extend) ?? extend()).finally(() => {
      if (lease.extending === extending) lease.extending = undefined
      lease.held = lease.mirror.held
      lease.spent = lease.mirror.spent
    })
    lease.extending = extending
    return extending
  }

  async book(lease: Lease, spent: Amount): Promise<void> {
    await this.extend(lease, spent, NOTHING, true)
  }

  settle(given: Lease, spent: Amount): void {
    const lease = given as RedisLease
    if (!lease.isOpen) return
    lease.isOpen = false
    // What is being asked for must be known before it can be given back.
    const settling =
      lease.extending?.then(() => this.#settle(lease, spent)) ?? this.#settle(lease, spent)
    this.#settling.add(settling)
    void settling.then(() => this.#settling.delete(settling))
  }

  /** Tells all replicas of keys, by their hashes, that were changed; with `validFor`: that die in so many ms. */
  async tell(hashes: readonly string[], validFor?: number): Promise<void> {
    await this.#step('tell', [], toTold(hashes, validFor))
  }

  /** Joins the others; what cannot be reached is tried again, and then goes on without. */
  async start(): Promise<void> {
    for (let tries = 0; tries < START_TRIES && !this.#isJoined; tries++) await this.beat()
  }

  /** Says that this process lives, and joins the others if they do not know it. */
  beat(): Promise<void> {
    this.#beating ??= this.#beat()
      .catch(error => this.#fail(error as Error))
      .finally(() => {
        this.#beating = undefined
      })
    return this.#beating
  }

  async close(): Promise<void> {
    clearInterval(this.#timer)
    this.#damaged.end()
    const sent = Promise.all([...this.#settling, this.#beating])
    await Promise.race([sent, sleep(CLOSE_TIMEOUT, undefined, { ref: false })])
    if (this.#isJoined) await this.#step('leave', [], {}).catch(() => {})
    // What ends after a reload to another store has nobody to tell.
    this.#isJoined = false
    await this.#redis.close()
  }

  async #extend(lease: RedisLease, spent: Amount, more: Hold, force: boolean): Promise<boolean> {
    const { accounts, mirror } = lease
    const { delta, less } = toBook(mirror, spent)
    const debt = { ...delta, requests: 0 }
    let isDamaged = false
    if (!this.#isJoined) this.#owe(accounts, debt)
    else {
      const number = ++this.#last
      try {
        const order = { number, spent: delta, less, more, force }
        const { held } = await this.#step('extend', accounts, order)
        return this.#mirror.extendNow(mirror, spent, held ? more : NOTHING, true) && held
      } catch (error) {
        isDamaged = error instanceof DamagedKeyError
        if (!isDamaged) this.#note(error, number, accounts, debt)
      }
    }
    const { onError } = this.#options
    const held = this.#mirror.extendNow(mirror, spent, more, force || onError === 'allow')
    if (isDamaged) {
      const order = { spent: delta, less, more: held ? more : NOTHING, force: true }
      await this.#tellEach('extend', accounts, order, debt)
    }
    return held
  }

  async #settle({ accounts, mirror }: RedisLease, spent: Amount): Promise<void> {
    const { delta } = toBook(mirror, spent)
    const less = none(mirror.held)
    this.#mirror.settle(mirror, spent)
    const debt = { ...delta, requests: 0 }
    if (!this.#isJoined) return this.#owe(accounts, debt)
    const number = ++this.#last
    try {
      await this.#step('settle', accounts, { number, spent: delta, less })
    } catch (error) {
      if (!(error instanceof DamagedKeyError)) this.#note(error, number, accounts, debt)
      else await this.#tellEach('settle', accounts, { spent: delta, less }, debt)
    }
  }

  /** The key of an account is damaged: this process decides, and Redis counts the other accounts. */
  async #aside(call: Call): Promise<Lease | Refusal> {
    const lease = this.#alone(call, () => {})
    if (isRefusal(lease)) return lease
    const { accounts, ...order } = call
    await this.#tellEach('reserve', accounts, { ...order, force: true }, debtOf(call))
    return lease
  }

  /** Tells Redis of each account by itself what it could not do for all of them together. */
  async #tellEach(
    op: 'reserve' | 'extend' | 'settle',
    accounts: readonly Account[],
    order: object,
    debt: Debt
  ): Promise<void> {
    if (!this.#isJoined) return this.#owe(accounts, debt)
    const telling = accounts.map(async account => {
      const number = ++this.#last
      try {
        await this.#step(op, [account], { ...order, number })
      } catch (error) {
        this.#note(error, number, [account], debt)
      }
    })
    await Promise.all(telling)
  }

  /** Without Redis; `note` takes down what it has to hear when it is back. */
  #alone(call: Call, note = (debt: Debt) => this.#owe(call.accounts, debt)): Lease | Refusal {
    const { onError } = this.#options
    if (onError === 'deny' && !call.isBooking) throw new StoreError('Redis cannot be asked')
    const force = call.force || onError === 'allow'
    const accounts = call.accounts.map(account => this.#shareOf(account))
    const mirror = this.#mirror.reserve({ ...call, accounts, force })
    if (isRefusal(mirror)) {
      const account = call.accounts.find(({ scope }) => scope === mirror.scope)!
      const { limits } = account
      const max = {
        ...limits,
        requests_per_second: bucketOf(limits).perSecond,
        reserved_quota: limits.total_quota
      }[mirror.limit]
      return { ...mirror, max }
    }
    note(debtOf(call))
    return { ...mirror, accounts: call.accounts, mirror } as RedisLease
  }

  /** What this process may let through by itself. */
  #shareOf(account: Account): Account {
    const { limits } = account
    const share = (limit: number) =>
      limit === 0 ? 0 : Math.max(1, Math.floor(limit / this.#replicas))
    const spent = this.#mirror.spent(account)[limits.quota_unit]
    const left = Math.max(0, limits.total_quota - spent)
    return {
      ...account,
      limits: {
        ...limits,
        requests_per_second: limits.requests_per_second / this.#replicas,
        requests_per_minute: share(limits.requests_per_minute),
        burst_size: share(limits.burst_size),
        tokens_per_minute: share(limits.tokens_per_minute),
        max_concurrent: share(limits.max_concurrent),
        total_quota: limits.total_quota === 0 ? 0 : spent + left / this.#replicas
      }
    }
  }

  /** An order has failed that was to tell Redis of a debt. */
  #note(
    error: unknown,
    number: number,
    accounts: readonly Account[],
    debt: Debt,
    isSeed = false
  ): void {
    const isUndone = error instanceof UnheardError || error instanceof DamagedKeyError
    if (isUndone) this.#owe(accounts, debt)
    else this.#unclear.push({ number, accounts, debt, isSeed })
  }

  /** Redis has heard all orders up to this one. */
  #clear(last: number): void {
    const unclear = this.#unclear
    this.#unclear = []
    for (const { number, accounts, debt, isSeed } of unclear) {
      const isHeard = number <= last
      this.#owe(accounts, isHeard ? NO_DEBT : debt)
      if (isHeard && isSeed) for (const each of accounts) this.#lost.delete(each.name)
    }
  }

  #owe(accounts: readonly Account[], { requests, tokens, cost }: Debt): void {
    for (const account of accounts) {
      const id = account.name
      if (this.#unsure.size >= MAX_UNSURE && !this.#unsure.has(id)) continue
      const owed = this.#unsure.get(id) ?? { ...NO_DEBT, account }
      owed.account = account
      owed.requests += requests
      owed.tokens += tokens
      owed.cost += cost
      this.#unsure.set(id, owed)
    }
  }

  /** From now on this process counts by itself, until it has joined again. */
  #fail(error: Error): void {
    const { log, onTrouble } = this.#options
    onTrouble?.()
    if (!this.#isSilent) {
      this.#isSilent = true
      log.error(
        { reason: error.message, on_store_error: this.#options.onError },
        'limits: Redis is away'
      )
    }
    if (!this.#isJoined) return
    this.#isJoined = false
    for (const { account } of this.#mirror.counters()) this.#owe([account], NO_DEBT)
  }

  async #beat(): Promise<void> {
    if (!this.#isJoined) return this.#join()
    if (await this.#hear()) return
    this.#fail(new UnheardError())
    await this.#join()
  }

  /** @returns whether Redis knows this process */
  async #hear(): Promise<boolean> {
    // Rather too early than too late: a key that was made anew must not be taken for the one that was deleted.
    const askedAt = CLOCK.time()
    const answer = await this.#orders.ask('beat', [], { since: this.#heardSince })
    if ('lost' in answer) return false
    const { replicas, now, heard, news } = answer
    if (replicas !== this.#replicas) void this.#remember(replicas)
    this.#replicas = replicas
    this.#ahead = now - askedAt
    const { onKeyNews, log } = this.#options
    try {
      // Redis' Lua makes an object of an empty list.
      if (Array.isArray(news)) await onKeyNews?.(toNews(news, this.#ahead))
      this.#heardSince = heard
    } catch (error) {
      log.error(
        { reason: (error as Error).message },
        'a key that was revoked elsewhere is not yet here'
      )
      return true
    }
    return heard < now ? this.#hear() : true
  }

  /** A start without Redis has to know it. */
  async #remember(replicas: number): Promise<void> {
    const { file, log } = this.#options
    if (file === undefined) return
    try {
      await mkdir(dirname(file), { recursive: true })
      await writeFile(file, `${replicas}\n`)
    } catch (error) {
      log.warn({ reason: (error as Error).message }, 'limits: the number of processes is not kept')
    }
  }

  /** Tells Redis what this process has, and what it has not heard of. */
  async #join(): Promise<void> {
    const number = ++this.#last
    const order = { number, fresh: randomUUID() }
    const answer = await this.#orders.ask('join', [], order)
    if ('lost' in answer) throw new UnheardError()
    const { epoch, now, last } = answer
    this.#clear(last)
    this.#ahead = now - CLOCK.time()
    if (this.#epoch !== '' && this.#epoch !== epoch) {
      for (const { account } of this.#mirror.counters()) {
        this.#lost.add(account.name)
        this.#owe([account], NO_DEBT)
      }
    }
    this.#epoch = epoch
    while (this.#unsure.size > SEEDS_AT_ONCE) await this.#seedSome()
    const seeding: Promise<void>[] = []
    while (this.#unsure.size > 0) seeding.push(this.#seedSome())
    // Not when that is answered: under load there would always be more to tell. What comes now is heard behind it.
    this.#isJoined = true
    await Promise.all(seeding)
    if (this.#isSilent) this.#options.log.info('limits: Redis is back')
    this.#isSilent = false
    await this.#hear()
  }

  async #seedSome(): Promise<void> {
    const some = [...this.#unsure].slice(0, SEEDS)
    const seeds = some.map(([id, { account, ...owed }]) => {
      this.#unsure.delete(id)
      const { known, ...own } = this.#mirror.seed(account)
      const isLost = this.#lost.has(id)
      return {
        account,
        own: {
          ...own,
          // What is owed is part of what is known here, and is added to what Redis has.
          known: isLost
            ? known
            : { tokens: known.tokens - owed.tokens, cost: known.cost - owed.cost },
          requests: isLost ? own.requests : [[0, owed.requests]],
          tokens: isLost ? own.tokens : [[0, owed.tokens]],
          owed: isLost ? NOTHING : owed
        }
      }
    })
    const number = ++this.#last
    try {
      const accounts = seeds.map(({ account, own }) => ({ ...this.#toOrder(account), own }))
      const names = seeds.map(({ account }) => account)
      const answer = await this.#orders.ask('seed', names, { number, accounts })
      if ('lost' in answer) throw new UnheardError()
      for (const [id] of some) this.#lost.delete(id)
    } catch (error) {
      for (const [, { account, ...owed }] of some) this.#note(error, number, [account], owed, true)
      throw error
    }
  }

  /** @throws when Redis cannot be asked, or does not know this process */
  async #step<Op extends keyof Answers>(
    op: Op,
    accounts: readonly Account[],
    order: object
  ): Promise<Answers[Op]> {
    try {
      const orders = accounts.map(each => this.#toOrder(each))
      const answer = await this.#orders.ask(op, accounts, { ...order, accounts: orders })
      if ('lost' in answer) throw new UnheardError()
      return answer
    } catch (error) {
      if (error instanceof DamagedKeyError) {
        this.#options.onTrouble?.()
        this.#damaged.add(1, error.message)
        throw error
      }
      this.#fail(error as Error)
      void this.beat()
      throw error
    }
  }

  #toOrder(account: Account): object {
    return toOrder(account, this.#mirror.periodOf(account.limits))
  }
}

/** Redis has not done what it was asked to. */
class UnheardError extends Error {
  override readonly message = 'it does not know this process any more'
}

function toRefusal({ wait, ...refused }: Refused): Refusal {
  return { ...refused, retryAfterMs: wait < 0 ? Number.POSITIVE_INFINITY : wait }
}

const NO_DEBT: Debt = { requests: 0, tokens: 0, cost: 0 }

function debtOf({ isBooking }: Call): Debt {
  return { ...NO_DEBT, requests: isBooking ? 0 : 1 }
}

function readCount(file: string): number {
  try {
    return Math.max(1, Number.parseInt(readFileSync(file, 'utf8'), 10) || 1)
  } catch {
    return 1
  }
}
