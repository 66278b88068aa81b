import type { Backend } from './backend.ts'
import type { Cached } from './load.ts'
import type { Prefixes } from './prefixes.ts'

/** A call as strategies see it. */
export interface Call {
  model: string | undefined
  /** Tokens of its prompt, about. */
  promptTokens: number
  /** Made when it is first asked for; undefined where there is no prompt. */
  readonly prefixes: Prefixes | undefined
  /**
   * What became of the wish to go where the beginning of the prompt is in the cache: `hit`, `miss` (no
   * candidate has it) or `left` (waiting there would have cost more than reading it anew).
   */
  affinity: Affinity | undefined
}

export type Affinity = 'hit' | 'miss' | 'left'

/**
 * What candidates are compared by. The one with the lowest is chosen; of `current_weight` the one with the
 * highest, and by `weight` chance decides.
 */
export type ScoreUnit = 'current_weight' | 'weight' | 'in_flight/weight' | 'ttft_ms' | 'wait_ms'

/** Takes down how candidates compare; `cached`: tokens of the prompt in the cache of each. */
export interface Scores {
  note(
    unit: ScoreUnit,
    candidates: readonly Backend[],
    scores: readonly number[],
    cached?: readonly number[]
  ): void
  /** Chance has left this one out. */
  leaveOut(backend: Backend): void
}

/** Chooses one of the candidates, of which there is at least one. `now`: a monotonic clock in ms. */
export type Strategy = (candidates: Backend[], call: Call, now: number, scores?: Scores) => Backend

/** Waits that differ by less than a tenth and so many ms are the same: they are known no better. */
const NEAR_MS = 5
const NEAR = 1.1
/** What any call costs (ms): a backend that has nothing to do is not for free when it fails. */
const ROUND_TRIP = 10

/**
 * Smooth weighted round robin, as nginx does it: weights 5 and 1 give AABAAA, not AAAAAB.
 * A candidate's place is kept while it is away and never makes it ineligible.
 */
const roundRobin: Strategy = (candidates, _call, now, scores) => {
  let total = 0
  for (const backend of candidates) {
    const weight = weightOf(backend, now)
    backend.live.currentWeight += weight
    total += weight
  }
  const turns = candidates.map(({ live }) => live.currentWeight)
  scores?.note('current_weight', candidates, turns)
  const chosen = best(
    candidates,
    turns.map(turn => -turn)
  )
  chosen.live.currentWeight -= total
  return chosen
}

/**
 * Fewest in flight for its weight, where failures count as many times more, or what fails fast would
 * always have the fewest; among equals, weighted round robin.
 */
const leastConnections: Strategy = (candidates, call, now, scores) => {
  const load = ({ config, live }: Backend) =>
    ((live.inFlight + 1) / (config.weight * live.rampUp(now))) * live.reputation.aversion(now)
  const loads = candidates.map(load)
  scores?.note('in_flight/weight', candidates, loads)
  const least = Math.min(...loads)
  return roundRobin(
    candidates.filter((_backend, at) => loads[at]! <= least),
    call,
    now
  )
}

/**
 * The better of two that are drawn (https://www.eecs.harvard.edu/~michaelm/postscripts/tpds2001.pdf), by
 * time to first byte, times what is in flight. One that nothing is known of gets one call to show itself
 * and counts as an average one meanwhile; one that is idle is forgiven slowly and so gets another try.
 */
const latencyBased: Strategy = (candidates, _call, now, scores) => {
  const first = Math.floor(Math.random() * candidates.length)
  const second = Math.floor(Math.random() * (candidates.length - 1))
  const drawn = [
    candidates[first]!,
    candidates[second < first ? second : second + 1] ?? candidates[first]!
  ]
  const known = candidates
    .map(({ live }) => live.reputation.latency(now))
    .filter(ms => ms !== undefined)
  const average = known.length === 0 ? 1 : known.reduce((sum, ms) => sum + ms, 0) / known.length
  const times = drawn.map(({ live }) => {
    const ms = live.reputation.latency(now)
    if (ms === undefined && live.inFlight === 0) return 0
    return ((ms ?? average) * (live.inFlight + 1)) / live.rampUp(now)
  })
  for (const each of candidates) if (!drawn.includes(each)) scores?.leaveOut(each)
  scores?.note('ttft_ms', drawn, times)
  return best(drawn, times)
}

const random: Strategy = (candidates, _call, now, scores) => {
  const weights = candidates.map(backend => weightOf(backend, now))
  scores?.note('weight', candidates, weights)
  let point = Math.random() * weights.reduce((sum, weight) => sum + weight, 0)
  for (const [at, backend] of candidates.entries()) {
    point -= weights[at]!
    if (point < 0) return backend
  }
  return candidates[0]!
}

/**
 * Where the first token will come soonest: after the prompts that are still to be read, a token of each
 * answer that is being written, and the part of this prompt that the backend does not have in its cache.
 */
const leastWait: Strategy = (candidates, call, now, scores) => {
  const shared = candidates.map(backend => cachedTokens(backend, call).kept)
  const waits = candidates.map((backend, at) => {
    const { config, live } = backend
    const wait = live.load.wait(now) / (config.weight * live.rampUp(now))
    const own = live.load.prefill(call.model ?? '', call.promptTokens - shared[at]!)
    return (wait + own + ROUND_TRIP) * live.reputation.aversion(now)
  })
  scores?.note('wait_ms', candidates, waits, shared)
  const near = Math.min(...waits) * NEAR + NEAR_MS
  const chosen = random(
    candidates.filter((_backend, at) => waits[at]! <= near),
    call,
    now
  )
  note(call, shared, shared[candidates.indexOf(chosen)]!)
  return chosen
}

/**
 * Where the longest beginning of the prompt is in the cache, as long as waiting there does not cost more
 * than it saves; else the fewest connections.
 */
const prefixAffinity: Strategy = (candidates, call, now, scores) => {
  const shared = candidates.map(backend => cachedTokens(backend, call).kept)
  const most = Math.max(...shared)
  const waits = candidates.map(
    ({ config, live }) =>
      ((live.load.wait(now) + ROUND_TRIP) / (config.weight * live.rampUp(now))) *
      live.reputation.aversion(now)
  )
  const holderWaits = waits.filter((_wait, at) => shared[at] === most)
  const holder = best(
    candidates.filter((_backend, at) => shared[at] === most),
    holderWaits
  )
  const saved = holder.live.load.prefill(call.model ?? '', most)
  const isWorthIt = most > 0 && Math.min(...holderWaits) - Math.min(...waits) <= saved
  if (isWorthIt) scores?.note('wait_ms', candidates, waits, shared)
  const chosen = isWorthIt ? holder : leastConnections(candidates, call, now, scores)
  note(call, shared, shared[candidates.indexOf(chosen)]!)
  return chosen
}

export const strategies = {
  round_robin: roundRobin,
  weighted: roundRobin,
  least_connections: leastConnections,
  latency_based: latencyBased,
  random,
  prefix_affinity: prefixAffinity,
  least_wait: leastWait
} satisfies Record<string, Strategy>

export type StrategyName = keyof typeof strategies

/** Those that want to know which backend was sent which prompts. */
export const REMEMBER_PREFIXES: readonly StrategyName[] = ['prefix_affinity', 'least_wait']

/** What this backend should have of the prompt in its cache, in tokens. */
export function cachedTokens({ live }: Backend, { prefixes, promptTokens }: Call): Cached {
  if (prefixes === undefined || prefixes.bytes === 0) return NOT_CACHED
  const { sent, kept, age } = live.prefixes.shared(prefixes)
  const ratio = promptTokens / prefixes.bytes
  return { sent: sent * ratio, kept: kept * ratio, age }
}

const NOT_CACHED: Cached = { sent: 0, kept: 0, age: 0 }

function note(call: Call, shared: number[], chosen: number): void {
  const most = Math.max(...shared)
  if (call.prefixes === undefined) return
  if (most === 0) call.affinity = 'miss'
  else call.affinity = chosen === most ? 'hit' : 'left'
}

/** Its share of the calls: less while it has just come (back). */
function weightOf({ config, live }: Backend, now: number): number {
  return config.weight * live.rampUp(now)
}

/** The first of those with the lowest cost. */
function best(candidates: readonly Backend[], costs: readonly number[]): Backend {
  let chosen = 0
  for (let at = 1; at < costs.length; at++) if (costs[at]! < costs[chosen]!) chosen = at
  return candidates[chosen]!
}
