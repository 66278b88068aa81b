import { matchesModel, untagged } from '../keys/key.ts'
import type { Backend, TimeLimits } from './backend.ts'
import type { Choice, PassedOver } from './decisions.ts'
import type { Demand } from './load.ts'
import { isKnown, upstreamModel } from './models.ts'
import type { PoolConfig } from './pool.ts'
import {
  type Call,
  cachedTokens,
  REMEMBER_PREFIXES,
  type StrategyName,
  strategies
} from './strategies.ts'

/** When and how often another attempt is made. Times in milliseconds. */
export interface RetryPolicy {
  enabled: boolean
  maxRetries: number
  initialWait: number
  maxWait: number
  multiplier: number
  retryOn: readonly FailureKind[]
  /** Another tier is asked when one has failed. */
  fallsBack: boolean
}

/** How an attempt fails before the client has had a byte of an answer. */
export type FailureKind = 'connect_failure' | 'timeout' | '5xx' | '429'

/** The backends that some models' calls go to, by name: to the first of them that can take one. */
export interface FallbackRule {
  /** `*` stands for any text; an empty list for all models. */
  models: string[]
  order: string[]
}

/** What a call needs of its backend. */
export interface Wanted extends Call {
  /** Name of the backend that holds what it is about. */
  pinned: string | undefined
  isStream: boolean
  /** Another backend has begun with the answer: only one that can go on with the same model is wanted. */
  begun: { model: string | undefined } | undefined
  /** May the caller use this model in its place? */
  mayUse(model: string): boolean
}

/** A backend that can take a call. */
export interface Candidate {
  backend: Backend
  /** The model as callers call it: the one that is wanted, or one in its place. */
  model: string | undefined
  /** What this backend calls it. */
  upstream: string | undefined
  /** Those of a higher one are there for when those of lower ones are not. */
  tier: number
}

/** Tiers of one model: priorities and places in a rule are lower. */
const TIERS = 10_000

/**
 * The backends as one configuration has them, and how one of them is chosen. A request goes through
 * all its attempts with the lineup it began with.
 */
export class Lineup {
  readonly backends: Backend[]
  readonly retry: RetryPolicy
  readonly hedges: boolean
  /** Some of them take only so many calls at once. */
  readonly isBounded: boolean
  readonly strategy: StrategyName
  /** Requests under way with it. */
  requests = 0
  readonly #modelFallbacks: ReadonlyMap<string, readonly string[]>
  readonly #fallback: readonly FallbackRule[]
  readonly #modelTimeouts
  /** It is written down which backend was sent which prompts. */
  readonly #remembers: boolean
  readonly #panics: boolean

  constructor(backends: Backend[], config: PoolConfig) {
    this.backends = backends
    this.isBounded = backends.some(each => each.config.maxConcurrent > 0)
    this.retry = config.retry
    this.hedges = config.hedges
    this.#modelFallbacks = config.modelFallbacks
    this.#fallback = config.fallback
    this.#modelTimeouts = config.modelTimeouts
    this.strategy = config.loadBalance
    this.#panics = config.panics
    this.#remembers =
      config.prefixAffinity && backends.length > 1 && REMEMBER_PREFIXES.includes(config.loadBalance)
  }

  /**
   * The backends that may be given this call. The one it is `pinned` to (by name) is the only one that can
   * serve a call about what it holds; if it has left any other may say so. `choice` takes down why the
   * others are passed over.
   */
  candidates(wanted: Wanted, choice?: Choice): Candidate[] {
    const { pinned, model } = wanted
    const holder = pinned && this.backends.find(each => each.name === pinned)
    if (holder) return this.#holding(holder, model, choice)
    const all =
      model === undefined
        ? this.#serving(undefined, 0, choice)
        : this.names(model, wanted).flatMap((each, at) => this.#serving(each, at * TIERS, choice))
    const able = ableToGoOn(all, wanted, choice)
    return left(able, inService(able), 'circuit_open', choice)
  }

  /** Whether health checks alone say that every backend is down, so that requests are tried nevertheless. */
  get isPanicking(): boolean {
    const { backends } = this
    return this.#panics && !backends.some(each => each.available) && backends.some(isOnlyUnhealthy)
  }

  /** Could another backend go on with what this one begins to write? */
  continues({ backend, model }: Candidate): boolean {
    return this.backends.some(
      each =>
        each !== backend &&
        each.config.continuation !== undefined &&
        (model === undefined || upstreamModel(each, model) !== undefined)
    )
  }

  /** Whether other models may take the place of this one. */
  hasFallbacks(model: string): boolean {
    return this.#modelFallbacks.has(untagged(model))
  }

  /** The model, and those that may take its place for this caller. */
  names(model: string, wanted: Wanted): string[] {
    const others = this.#modelFallbacks.get(untagged(model)) ?? []
    return [model, ...others.filter(each => wanted.mayUse(each))]
  }

  /**
   * The backend for the next attempt; `full` when all that may be used are, undefined when none is
   * available.
   */
  pick(
    tried: readonly Candidate[],
    wanted: Wanted,
    now = performance.now(),
    choice?: Choice
  ): Candidate | 'full' | undefined {
    const able = this.#untried(tried, wanted, choice)
    const roomy = able.filter(each => each.backend.hasRoom)
    const candidates = left(able, roomy, 'full', choice)
    if (candidates.length === 0) return able.length > 0 ? 'full' : undefined
    const chosen = this.#best(candidates, wanted, now, choice)
    choice?.choose(chosen.backend, chosen.model)
    return chosen
  }

  #best(candidates: Candidate[], wanted: Wanted, now: number, choice?: Choice): Candidate {
    if (candidates.length === 1) return candidates[0]!
    const tier = Math.min(...candidates.map(each => each.tier))
    const lowest = candidates.filter(each => each.tier === tier)
    const first = left(candidates, lowest, 'higher_tier', choice)
    if (first.length === 1) return first[0]!
    if (choice !== undefined) choice.model = first[0]!.model
    const chosen = strategies[this.strategy](
      first.map(each => each.backend),
      this.#remembers ? wanted : blind(wanted),
      now,
      choice
    )
    return first.find(each => each.backend === chosen)!
  }

  /** What a call asks of the backend that it is sent to, which from now on has its prompt. */
  demand({ backend }: Candidate, wanted: Wanted): Demand {
    const { model = '', promptTokens: tokens, isStream } = wanted
    const seen = this.#remembers ? wanted : blind(wanted)
    const cached = cachedTokens(backend, seen)
    if (seen.prefixes !== undefined) {
      backend.live.prefixes.add(seen.prefixes, tokens - cached.kept)
    }
    return { model, tokens, cached, isStream }
  }

  /** Has one of them room for it, or is there nothing to wait for? */
  isReady(tried: readonly Candidate[], wanted: Wanted): boolean {
    const able = this.#untried(tried, wanted)
    return able.length === 0 || able.some(each => each.backend.hasRoom)
  }

  /** How long this candidate is waited for. */
  timeLimits({ backend, model = '' }: Candidate): TimeLimits {
    const ofModel = this.#modelTimeouts.find(([pattern]) => matchesModel([pattern], model))?.[1]
    return ofModel === undefined ? backend.config : { ...backend.config, ...ofModel }
  }

  /** The one that holds what a call is about. */
  #holding(holder: Backend, model: string | undefined, choice?: Choice): Candidate[] {
    for (const each of this.backends) {
      if (each !== holder) choice?.passOver(each, model, 'pinned_elsewhere')
    }
    if (!this.#isOpen(holder)) {
      choice?.passOver(holder, model, whyUnavailable(holder))
      return []
    }
    const upstream = model && (upstreamModel(holder, model) ?? model)
    return [{ backend: holder, model, upstream, tier: 0 }]
  }

  /** Those that have this model, in tiers that begin at `base`. */
  #serving(model: string | undefined, base: number, choice?: Choice): Candidate[] {
    const rule = this.#ruleFor(model)
    const able: Candidate[] = []
    for (const backend of this.backends) {
      const upstream = model && upstreamModel(backend, model)
      const place = rule === undefined ? backend.config.priority : rule.order.indexOf(backend.name)
      if (model && upstream === undefined) choice?.passOver(backend, model, 'no_model')
      else if (place === -1) choice?.passOver(backend, model, 'not_in_rule')
      else if (!this.#isOpen(backend)) choice?.passOver(backend, model, whyUnavailable(backend))
      else able.push({ backend, model, upstream, tier: base + place })
    }
    // One of which nothing is known yet may not have the model: it is there for when nobody else is.
    // Whoever a rule names is meant.
    if (model === undefined || rule !== undefined) return able
    const known = able.filter(each => isKnown(each.backend))
    return known.length > 0 ? left(able, known, 'not_known_to_have_it', choice) : able
  }

  /** Another model takes the place of one that nobody can serve, not of one that must be waited for. */
  #untried(tried: readonly Candidate[], wanted: Wanted, choice?: Choice): Candidate[] {
    const all = this.candidates(wanted, choice)
    // Nothing can be left out, as for most requests.
    if (all.length === 1 && tried.length === 0) return all
    const untried = all.filter(each => !isAmong(tried, each))
    const ofFirst = untried.filter(each => each.model === untried[0]!.model)
    return left(left(all, untried, 'tried', choice), ofFirst, 'other_model', choice)
  }

  /** May it be given work? */
  #isOpen(backend: Backend): boolean {
    return backend.available || (isOnlyUnhealthy(backend) && this.isPanicking)
  }

  #ruleFor(model = ''): FallbackRule | undefined {
    return this.#fallback.find(({ models }) => models.length === 0 || matchesModel(models, model))
  }
}

export function isAmong(candidates: readonly Candidate[], one: Candidate): boolean {
  const { backend, upstream } = one
  return candidates.some(each => each.backend.live === backend.live && each.upstream === upstream)
}

function ableToGoOn(all: Candidate[], { begun }: Wanted, choice?: Choice): Candidate[] {
  if (begun === undefined) return all
  const able = all.filter(
    each => each.backend.config.continuation !== undefined && each.model === begun.model
  )
  return left(all, able, 'cannot_go_on', choice)
}

/** Takes down why some are no more among those that are left, which are in the same order. */
function left(
  before: Candidate[],
  after: Candidate[],
  why: PassedOver,
  choice: Choice | undefined
): Candidate[] {
  if (choice === undefined || after.length === before.length) return after
  let at = 0
  for (const each of before) {
    if (each === after[at]) at++
    else choice.passOver(each.backend, each.model, why)
  }
  return after
}

function whyUnavailable({ live }: Backend): PassedOver {
  return live.isDrained ? 'drained' : 'unhealthy'
}

function isOnlyUnhealthy({ live }: Backend): boolean {
  return !live.healthy && !live.isDrained && live.seenTrouble === undefined
}

/**
 * The candidates whose circuits let calls through; at most half are kept from work, unless another tier
 * can take the calls. If more would be, those that have failed count again, and if all asked to be left alone
 * for a while, they do too: an answer of theirs is better than none.
 */
function inService(candidates: Candidate[]): Candidate[] {
  if (candidates.every(({ backend }) => backend.live.breaker.isClosed)) return candidates
  const now = performance.now()
  const admits = ({ backend }: Candidate) => backend.live.breaker.admits(now)
  const ready = candidates.filter(admits)
  const hasTiers = candidates.some(each => each.tier !== candidates[0]!.tier)
  if (ready.length > 0 && (hasTiers || ready.length * 2 >= candidates.length)) return ready
  const awake = candidates.filter(each => admits(each) || !each.backend.live.breaker.isResting)
  return awake.length > 0 ? awake : candidates
}

/** The call without its prompt. */
function blind({ model, promptTokens }: Call): Call {
  return { model, promptTokens, prefixes: undefined, affinity: undefined }
}
