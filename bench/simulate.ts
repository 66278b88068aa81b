import { parseArgs } from 'node:util'
import type { StrategyName } from '../src/pool/strategies.ts'
import { type EngineRates, H100 } from './engine.ts'
import { insert } from './report.ts'
import { makeSessions } from './sessions.ts'
import { type Figures, simulate } from './simulator.ts'
import { TRACES, type Trace } from './traces.ts'

/**
 * Compares the strategies: what the calls of each trace wait for their first token, on eight servers in
 * virtual time. Each has five seeds; what is shown is the one with the worst p90.
 *
 *   node -C llmproxy-source bench/simulate.ts [--trace chat] [--strategy least_wait] [--seeds 5] [--save]
 */

const { values: options } = parseArgs({
  options: {
    trace: { type: 'string' },
    strategy: { type: 'string', multiple: true },
    seeds: { type: 'string', default: '5' },
    save: { type: 'boolean', default: false }
  }
})

const EQUAL = Array.from({ length: 8 }, () => H100)
/** As when 220 GB of each machine's main memory go on where the GPUs' ends. */
const OFFLOADING = EQUAL.map(rates => ({ ...rates, blocks: rates.blocks * 4 }))
/** Two of the eight have half the speed, and nobody has said so. */
const MIXED = EQUAL.map((rates, at) => (at < 2 ? half(rates) : rates))
const PAGE = '../docs/routing.md'
const SHOWN: StrategyName[] = [
  'round_robin',
  'random',
  'least_connections',
  'latency_based',
  'prefix_affinity',
  'least_wait'
]

/** Part of what the fleet could read without any cache. */
const HALF_FULL = 1 / 3
const FULL = 2 / 3

const [chat, agent, noReuse] = TRACES as [Trace, Trace, Trace]
const scenarios: { name: string; trace: Trace; fleet: EngineRates[]; load: number }[] = [
  { name: 'chat 1/3', trace: chat, fleet: EQUAL, load: HALF_FULL },
  { name: 'chat 2/3', trace: chat, fleet: EQUAL, load: FULL },
  { name: 'chat 2/3, 4 x cache', trace: chat, fleet: OFFLOADING, load: FULL },
  { name: 'agent 1/3', trace: agent, fleet: EQUAL, load: HALF_FULL },
  { name: 'agent 2/3', trace: agent, fleet: EQUAL, load: FULL },
  { name: 'no_reuse 2/3', trace: noReuse, fleet: EQUAL, load: FULL },
  { name: 'chat 1/3, two slow', trace: chat, fleet: MIXED, load: HALF_FULL }
]

const rows: string[] = [
  '| trace | strategy | TTFT p50 | p90 | p99 | from caches | tokens/s | fairness |',
  '|---|---|--:|--:|--:|--:|--:|--:|'
]
for (const { name, trace, fleet, load } of scenarios) {
  if (options.trace !== undefined && !name.startsWith(options.trace)) continue
  const worst = new Map<StrategyName, Figures>()
  for (let seed = 1; seed <= Number(options.seeds); seed++) {
    const sessions = makeSessions(trace, fleet, load, seed)
    for (const strategy of SHOWN.filter(each => options.strategy?.includes(each) ?? true)) {
      const figures = simulate(trace, sessions, fleet, strategy, seed)
      const before = worst.get(strategy)
      if (before === undefined || figures.p90 > before.p90) worst.set(strategy, figures)
    }
  }
  for (const [strategy, figures] of worst) rows.push(row(name, strategy, figures))
  const { calls, input, output } = [...worst.values()][0]!
  console.error(`${name}: ${calls} calls, ${input.toFixed(0)} tokens in, ${output.toFixed(0)} out`)
}
const table = rows.join('\n')
console.log(table)
if (options.save) insert(PAGE, 'simulation', table)

function row(trace: string, strategy: StrategyName, figures: Figures): string {
  const { p50, p90, p99, hits, throughput, fairness } = figures
  const cells = [
    trace,
    `\`${strategy}\``,
    `${p50.toFixed(2)} s`,
    `${p90.toFixed(2)} s`,
    `${p99.toFixed(2)} s`,
    `${(hits * 100).toFixed(0)} %`,
    throughput.toFixed(0),
    fairness.toFixed(3)
  ]
  return `| ${cells.join(' | ')} |`
}

function half(rates: EngineRates): EngineRates {
  return {
    ...rates,
    prefill: rates.prefill / 2,
    step: rates.step * 2,
    context: rates.context * 2
  }
}
