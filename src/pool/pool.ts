import { isDeepStrictEqual } from 'node:util'
import { untagged } from '../keys/key.ts'
import { Backend, type BackendConfig, Live, type TimeLimits } from './backend.ts'
import type { BreakerPolicy, CircuitTurn, OpenReason } from './breaker.ts'
import { RetryBudget } from './budget.ts'
import { Decisions } from './decisions.ts'
import { Hedges } from './hedge.ts'
import {
  type Candidate,
  type FallbackRule,
  Lineup,
  type RetryPolicy,
  type Wanted
} from './lineup.ts'
import { Speeds } from './load.ts'
import { contextOf, hasClosedList, isKnown, isListed, listModels, upstreamModel } from './models.ts'
import { Queue, type QueuePolicy } from './queue.ts'
import type { StrategyName } from './strategies.ts'

export interface PoolConfig {
  backends: BackendConfig[]
  loadBalance: StrategyName
  /** Strategies that can do so count what backends have in their caches. */
  prefixAffinity: boolean
  retry: RetryPolicy
  /** Calls whose first byte is late are made a second time. */
  hedges: boolean
  /** The first one that is for a model holds. */
  fallback: FallbackRule[]
  /** Which models take the place of one that nobody can serve, in this order. */
  modelFallbacks: Map<string, string[]>
  /** Model of requests that name none. */
  defaultModel?: string | undefined
  queue: QueuePolicy
  /** What calls for some models are allowed, over what backends are; the first entry that fits holds. */
  modelTimeouts: [pattern: string, Partial<TimeLimits>][]
  /** Requests are tried when health checks alone say that every backend is down. */
  panics: boolean
  /** Absent: no call is kept from a backend because others have failed. */
  breaker: BreakerPolicy | undefined
}

/** Is told of circuits that open and close. */
export type OnCircuit = (backend: string, turn: CircuitTurn) => void

/** Is told what becomes of backends. */
export interface PoolObserver {
  circuit: OnCircuit
  /** Connections to a backend cannot be opened, or can again: {@link Live.reach}. */
  reach(backend: string, live: Live): void
  /** Requests are tried although health checks say that every backend is down, or not any more. */
  panic(isPanicking: boolean): void
}

/** All backends, over all changes of the configuration. */
export class Pool {
  readonly decisions = new Decisions()
  readonly retryBudget = new RetryBudget()
  readonly hedges = new Hedges()
  /** How often another backend went on with an answer that had broken off, and how often none could. */
  readonly continuations = { continued: 0, failed: 0 }
  readonly queue: Queue
  #defaultModel: string | undefined
  #isServing = false
  #hasPanicked = false
  readonly #observer: PoolObserver | undefined
  /** Of all backends. */
  readonly #speeds = new Speeds()
  #current: Lineup
  /** Lineups that are in use; the current one is the last. */
  readonly #lineups = new Set<Lineup>()
  readonly #closing = new Set<Live>()

  constructor(config: PoolConfig, observer?: PoolObserver) {
    this.#observer = observer
    this.queue = new Queue(config.queue)
    this.#defaultModel = config.defaultModel
    this.#current = new Lineup(
      config.backends.map(each => this.#create(each)),
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
    welcome(backends, before.backends)
    // Places under other weights, or beside those that have left, would take many turns to make up for.
    for (const { live } of backends) live.currentWeight = 0
    this.#current = new Lineup(backends, config)
    this.#lineups.add(this.#current)
    this.queue.policy = config.queue
    this.#defaultModel = config.defaultModel
    this.#guard(config)
    this.#lookForPanic()
    this.#retire(before)
    this.#serveQueue()
  }

  #create(config: BackendConfig): Backend {
    return new Backend(config, new Live(config, this.#speeds))
  }

  /** Connections are made anew, but what somebody wants of the server at this URL holds. */
  #renewed(config: BackendConfig): Backend {
    const backend = this.#create(config)
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

  /** It has not begun yet, and goes on with what is configured now. */
  renew(lineup: Lineup): Lineup {
    if (lineup === this.#current) return lineup
    const renewed = this.enter()
    this.leave(lineup)
    return renewed
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

  candidates(wanted: Wanted): Candidate[] {
    return this.#current.candidates(wanted)
  }

  /**
   * Is there a backend for this model, or for one that may take its place, whether or not it is available now? A backend
   * that could not be asked for its models has none, if it is known what others have.
   */
  serves(model: string, wanted: Wanted): boolean {
    const { backends } = this
    const isAnyAsked = !backends.every(isUnasked)
    return this.#current
      .names(model, wanted)
      .some(each =>
        backends.some(
          backend =>
            upstreamModel(backend, each) !== undefined && !(isAnyAsked && isUnasked(backend))
        )
      )
  }

  /** The longest context (tokens) of the model at a backend that may get the request; undefined: none is known. */
  contextLength(wanted: Wanted): number | undefined {
    const known = this.candidates(wanted).flatMap(({ backend, upstream = '' }) => {
      const card =
        backend.live.models?.get(upstream) ?? backend.live.models?.get(untagged(upstream))
      return card === undefined ? [] : contextOf(card)
    })
    return known.length === 0 ? undefined : Math.max(...known)
  }

  /** Whether each backend that may get the request is known to read `max_completion_tokens`. */
  readsCompletionLimit(wanted: Wanted): boolean {
    const candidates = this.candidates(wanted)
    return candidates.length > 0 && candidates.every(each => each.backend.readsCompletionLimit)
  }

  /** The model that requests without one get: the configured one, or the only one there is, where that is known. */
  get impliedModel(): string | undefined {
    if (this.#defaultModel !== undefined) return this.#defaultModel
    if (!this.backends.every(hasClosedList)) return undefined
    const [model, another] = this.#modelNames()
    return another === undefined ? model : undefined
  }

  /** Whether backends have different models, so that a request must name one. */
  get hasSeveralModels(): boolean {
    return this.backends.length > 1 && this.#modelNames().length > 1
  }

  /** Names of models, without further names of the same. */
  #modelNames(): string[] {
    const isAlias = (id: string) =>
      this.backends.some(({ live }) => live.models?.get(id)?.alias_of !== undefined)
    return (listModels(this.backends) ?? []).map(({ id }) => id).filter(id => !isAlias(id))
  }

  /** Whether a backend or a fallback has a model of this very name, so that callers cannot invent more of them. */
  lists(model: string): boolean {
    return this.backends.some(each => isListed(each, model)) || this.#current.hasFallbacks(model)
  }

  /** The backends that can be called, as far as is known. */
  get callable(): Backend[] {
    return this.backends.filter(({ live }) => live.trouble === undefined && !live.isDrained)
  }

  /** Whether requests are tried although health checks say that every backend is down. */
  get isPanicking(): boolean {
    return this.#current.isPanicking
  }

  /** Whether a request may succeed. */
  get available(): boolean {
    return this.callable.length > 0 || this.isPanicking
  }

  async destroy(): Promise<void> {
    const all = new Set([...this.all.map(({ live }) => live), ...this.#closing])
    await Promise.all([...all].map(live => live.destroy()))
  }

  /** The circuit of one that is alone keeps no call from it, but shows that it is down. */
  #guard({ breaker: policy }: PoolConfig): void {
    for (const { name, live } of this.backends) {
      let reason: OpenReason | undefined = policy && live.breaker.opened?.reason
      live.breaker.guard(policy, turn => {
        if (turn.state === 'open') reason = turn.reason
        // Who only asked for a rest is as warm as before.
        else if (reason && reason !== 'retry_after') live.comeBack(performance.now())
        this.#observer?.circuit(name, turn)
        this.#lookForPanic()
      })
      live.reach.onTurn = () => {
        const { failure } = live.reach
        if (failure !== undefined) live.fail(failure)
        this.#observer?.reach(name, live)
        this.#lookForPanic()
      }
      live.onTurn = () => this.#lookForPanic()
      live.onEnd = () => this.#serveQueue()
    }
  }

  #lookForPanic(): void {
    const { isPanicking } = this
    if (isPanicking === this.#hasPanicked) return
    this.#hasPanicked = isPanicking
    this.#observer?.panic(isPanicking)
  }

  /** Not at once: whoever has just ended is still being told of it. */
  #serveQueue(): void {
    if (this.queue.size === 0 || this.#isServing) return
    this.#isServing = true
    queueMicrotask(() => {
      this.#isServing = false
      this.queue.serve(performance.now())
    })
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

/** Nothing is known of its models, and it cannot be asked. */
function isUnasked(backend: Backend): boolean {
  return backend.live.reach.failure !== undefined && !isKnown(backend)
}

/** New servers warm up beside those that stay. */
function welcome(backends: readonly Backend[], before: readonly Backend[]): void {
  const isOld = ({ config }: Backend) => before.some(each => each.config.url === config.url)
  if (!backends.some(isOld)) return
  for (const each of backends) if (!isOld(each)) each.live.comeBack(performance.now())
}

/** Connections can be kept: what they were opened with has not changed. */
function isSame(before: BackendConfig, after: BackendConfig): boolean {
  return (
    before.name === after.name &&
    before.url === after.url &&
    before.longestConnect === after.longestConnect
  )
}
