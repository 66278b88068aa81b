import { isDeepStrictEqual } from 'node:util'
import { Backend, type BackendConfig, type Live } from './backend.ts'
import type { BreakerPolicy, CircuitTurn } from './breaker.ts'
import { RetryBudget } from './budget.ts'
import { isKnown, serves } from './models.ts'
import { type StrategyName, strategies } from './strategies.ts'

/** When and how often another attempt is made. Times in milliseconds. */
export interface RetryPolicy {
  enabled: boolean
  maxRetries: number
  initialWait: number
  maxWait: number
  multiplier: number
  retryOn: readonly FailureKind[]
}

/** How an attempt fails before the client has had a byte of an answer. */
export type FailureKind = 'connect_failure' | 'timeout' | '5xx' | '429'

export interface PoolConfig {
  backends: BackendConfig[]
  loadBalance: StrategyName
  retry: RetryPolicy
  /** Absent: no call is kept from a backend because others have failed. */
  breaker: BreakerPolicy | undefined
}

/** What a call needs of its backend. */
export interface Wanted {
  /** Name of the backend that holds what it is about. */
  pinned: string | undefined
  model: string | undefined
}
/** Hears of circuits that open and close. */
export type OnCircuit = (backend: string, turn: CircuitTurn) => void

/**
 * The backends as one configuration has them, and how one of them is chosen. A request goes through
 * all its attempts with the lineup it began with.
 */
export class Lineup {
  readonly backends: Backend[]
  readonly retry: RetryPolicy
  /** Requests under way with it. */
  requests = 0
  readonly #strategy

  constructor(backends: Backend[], { retry, loadBalance }: PoolConfig) {
    this.backends = backends
    this.retry = retry
    this.#strategy = strategies[loadBalance]
  }

  /**
   * The backends that may be given this call. The one it is `pinned` to (by name) is the only one that can
   * serve a call about what it holds; if it has left any other may say so.
   */
  candidates({ pinned, model }: Wanted): Backend[] {
    const holder = pinned && this.backends.find(each => each.name === pinned)
    const able = (holder ? [holder] : this.backends).filter(
      each => each.available && (holder || model === undefined || serves(each, model))
    )
    // One of which nothing is known yet may not have the model: it is there for when nobody else is.
    const known = model === undefined ? able : able.filter(isKnown)
    return inService(known.length > 0 ? known : able)
  }

  /** The backend for the next attempt, or undefined when none that may be used is available. */
  pick(exclude: readonly Backend[], wanted: Wanted): Backend | undefined {
    const candidates = this.candidates(wanted).filter(each => !exclude.includes(each))
    return candidates.length < 2 ? candidates[0] : this.#strategy(candidates, performance.now())
  }
}

/** All backends, over all changes of the configuration. */
export class Pool {
  readonly retryBudget = new RetryBudget()
  readonly #onCircuit: OnCircuit
  #current: Lineup
  /** Lineups that are in use; the current one is the last. */
  readonly #lineups = new Set<Lineup>()
  readonly #closing = new Set<Live>()

  constructor(config: PoolConfig, onCircuit: OnCircuit = () => {}) {
    this.#onCircuit = onCircuit
    this.#current = new Lineup(
      config.backends.map(each => new Backend(each)),
      config
    )
    this.#lineups.add(this.#current)
    this.#guard(config)
  }

  /**
   * Takes over another configuration. A server that stays (same name and URL) keeps its connections,
   * its counts and what was learned; one that goes finishes its requests first.
   */
  update(config: PoolConfig): void {
    const before = this.#current
    const backends = config.backends.map(each => {
      const same = before.backends.find(backend => isSame(backend.config, each))
      if (same === undefined) return this.#renewed(each)
      return isDeepStrictEqual(same.config, each) ? same : new Backend(each, same.live)
    })
    this.#current = new Lineup(backends, config)
    this.#lineups.add(this.#current)
    this.#guard(config)
    this.#retire(before)
  }

  /** Connections are made anew, but what somebody wants of the server at this URL holds. */
  #renewed(config: BackendConfig): Backend {
    const backend = new Backend(config)
    const { name, url } = config
    const before = this.backends.find(each => each.name === name && each.config.url === url)
    if (before?.live.isDrained) backend.live.isDrained = true
    return backend
  }

  /** A request begins; it must {@link leave} the lineup when it is over. */
  enter(): Lineup {
    this.#current.requests++
    return this.#current
  }

  leave(lineup: Lineup): void {
    lineup.requests--
    this.#retire(lineup)
  }

  get backends(): Backend[] {
    return this.#current.backends
  }

  /** Names and state of all servers in use, those included that only finish their requests. */
  get all(): { name: string; live: Live }[] {
    const all = new Map<Live, string>()
    for (const lineup of this.#lineups)
      for (const each of lineup.backends) all.set(each.live, each.name)
    return [...all].map(([live, name]) => ({ name, live }))
  }

  /** Is there a backend for this model, whether or not it is available now? */
  serves(model: string): boolean {
    return this.backends.some(backend => serves(backend, model))
  }

  get available(): boolean {
    return this.backends.some(backend => backend.available)
  }

  async destroy(): Promise<void> {
    const all = new Set([...this.all.map(({ live }) => live), ...this.#closing])
    await Promise.all([...all].map(live => live.destroy()))
  }

  /** One that is alone gets every call: nobody else could. */
  #guard({ breaker }: PoolConfig): void {
    const policy = this.backends.length > 1 ? breaker : undefined
    for (const { name, live } of this.backends) {
      live.breaker.guard(policy, turn => this.#onCircuit(name, turn))
    }
  }

  /** Lets go of the servers that only this lineup has, when nothing is under way with it. */
  #retire(lineup: Lineup): void {
    if (lineup === this.#current || lineup.requests > 0) return
    this.#lineups.delete(lineup)
    const stays = new Set(this.all.map(({ live }) => live))
    for (const { live } of lineup.backends) if (!stays.has(live)) void this.#close(live)
  }

  async #close(live: Live): Promise<void> {
    this.#closing.add(live)
    await live.close()
    this.#closing.delete(live)
  }
}

/**
 * The backends whose circuits let calls through; at most half are kept from work. If more would be,
 * those that have failed count again, and if all asked to be left alone for a while, they do too: an
 * answer of theirs is better than none.
 */
function inService(backends: Backend[]): Backend[] {
  if (backends.every(each => each.live.breaker.isClosed)) return backends
  const now = performance.now()
  const ready = backends.filter(each => each.live.breaker.admits(now))
  if (ready.length * 2 >= backends.length) return ready
  const awake = backends.filter(
    ({ live: { breaker } }) => breaker.admits(now) || !breaker.isResting
  )
  return awake.length > 0 ? awake : backends
}

/** Connections can be kept: what they were opened with has not changed. */
function isSame(before: BackendConfig, after: BackendConfig): boolean {
  return (
    before.name === after.name &&
    before.url === after.url &&
    before.connectTimeout === after.connectTimeout
  )
}
