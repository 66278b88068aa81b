import { checkOptions } from '../src/options.ts'
import type { Candidate, Wanted } from '../src/pool/lineup.ts'
import { BackendsOptions, toPool } from '../src/pool/policy.ts'
import { Pool, type PoolConfig } from '../src/pool/pool.ts'
import type { StrategyName } from '../src/pool/strategies.ts'
import { Engine, type EngineRates } from './engine.ts'
import { Events } from './events.ts'
import { BYTES_PER_TOKEN, MODEL, type Session } from './sessions.ts'
import { seeded, type Trace } from './traces.ts'

/**
 * Replays a trace through the gateway's own code of src/pool, against servers that work in virtual time:
 * the same seed gives the same figures.
 */

export interface Figures {
  /** Time to first token (s). */
  p50: number
  p90: number
  p99: number
  /** Share of the prompt tokens that came out of caches. */
  hits: number
  /** Output tokens a second, of calls that ended in the time that is measured. */
  throughput: number
  /** Jain's index of the callers' mean times to first token: 1 when all wait alike. */
  fairness: number
  calls: number
  /** Mean tokens of prompts and answers. */
  input: number
  output: number
}

/** One strategy under one trace. */
export function simulate(
  trace: Trace,
  sessions: Session[],
  fleet: EngineRates[],
  strategy: StrategyName,
  seed: number
): Figures {
  const original = Math.random
  Math.random = seeded(seed + 1)
  try {
    return replay(trace, sessions, fleet, strategy)
  } finally {
    Math.random = original
  }
}

function replay(
  trace: Trace,
  sessions: Session[],
  fleet: EngineRates[],
  strategy: StrategyName
): Figures {
  const pool = new Pool(configure(fleet, strategy))
  const engines = new Map(
    pool.backends.map((backend, at) => [backend.live, new Engine(fleet[at]!)] as const)
  )
  const events = new Events()
  const from = trace.warmUp * 1000
  const to = from + trace.measured * 1000
  const times: number[] = []
  const ofCaller = new Map<number, number[]>()
  const cache = { prompt: 0, cached: 0 }
  let input = 0
  let output = 0
  let written = 0

  const call = (session: Session, at: number, now: number) => {
    const turn = session.turns[at]!
    const wanted: Wanted = {
      pinned: undefined,
      begun: undefined,
      model: MODEL,
      promptTokens: turn.bytes / BYTES_PER_TOKEN,
      mayUse: () => true,
      isStream: true,
      prefixes: turn.prefixes,
      affinity: undefined
    }
    const lineup = pool.enter()
    const chosen = lineup.pick([], wanted, now) as Candidate
    const { live } = chosen.backend
    live.begin()
    const job = live.load.begin(lineup.demand(chosen, wanted), now)
    const engine = engines.get(live)!
    const isCounted = now >= from && now < to
    if (isCounted) {
      input += turn.promptTokens
      output += turn.outputTokens
    }
    let firstTokenAt = 0
    const wasIdle = engine.isIdle
    engine.add({
      blocks: session.blocks,
      promptTokens: turn.promptTokens,
      outputTokens: turn.outputTokens,
      onFirst(first) {
        firstTokenAt = first
        job.begun(first)
        live.reputation.observeSuccess(first)
        live.reputation.observeLatency(first - now, first)
        if (!isCounted) return
        times.push(first - now)
        const own = ofCaller.get(session.caller) ?? []
        own.push(first - now)
        ofCaller.set(session.caller, own)
      },
      onEnd(last) {
        live.end()
        job.end()
        live.learn(job, {
          promptTokens: turn.promptTokens,
          completionTokens: turn.outputTokens,
          cachedTokens: undefined,
          firstTokenAt,
          lastTokenAt: last
        })
        pool.leave(lineup)
        if (last >= from && last < to) written += turn.outputTokens
        const next = at + 1
        if (next < session.turns.length) {
          const then = last + session.turns[next]!.gap
          if (then < to) events.add(then, () => call(session, next, then))
        }
      }
    })
    if (wasIdle) run(engine, now)
  }
  const run = (engine: Engine, now: number) => {
    if (engine.isIdle) return
    const end = engine.step(now)
    events.add(end, () => run(engine, end))
  }

  for (const session of sessions) {
    events.add(session.startsAt, () => call(session, 0, session.startsAt))
  }
  events.add(from, () => {
    for (const engine of engines.values()) engine.promptTokens = engine.cachedTokens = 0
  })
  events.add(to, () => {
    for (const engine of engines.values()) {
      cache.prompt += engine.promptTokens
      cache.cached += engine.cachedTokens
    }
  })
  events.run()
  void pool.destroy()
  times.sort((a, b) => a - b)
  const means = [...ofCaller.values()].map(own => own.reduce((a, b) => a + b, 0) / own.length)
  return {
    p50: quantile(times, 0.5) / 1000,
    p90: quantile(times, 0.9) / 1000,
    p99: quantile(times, 0.99) / 1000,
    hits: cache.cached / cache.prompt,
    throughput: written / trace.measured,
    fairness: jain(means),
    calls: times.length,
    input: input / times.length,
    output: output / times.length
  }
}

/** A pool as it would be configured. */
function configure(fleet: EngineRates[], loadBalance: StrategyName): PoolConfig {
  const backends = fleet.map((_rates, at) => {
    const name = `gpu-${at + 1}`
    return { name, url: `http://${name}.invalid`, models: [MODEL] }
  })
  const routing = { load_balance: loadBalance, circuit_breaker: { enabled: false } }
  return toPool(checkOptions(BackendsOptions, { backends, routing }), undefined)
}

function quantile(sorted: number[], part: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * part))] ?? 0
}

/** https://en.wikipedia.org/wiki/Fairness_measure */
function jain(values: number[]): number {
  const sum = values.reduce((a, b) => a + b, 0)
  const squares = values.reduce((a, b) => a + b * b, 0)
  return sum ** 2 / (values.length * squares)
}
