import assert from 'node:assert/strict'
import { test } from 'node:test'
import { H100 } from '../bench/engine.ts'
import { makeSessions } from '../bench/sessions.ts'
import { simulate } from '../bench/simulator.ts'
import { TRACES, type Trace } from '../bench/traces.ts'
import type { StrategyName } from '../src/pool/strategies.ts'

/** The strategies compared as in docs/routing.md, but for a short time and with one seed. */

const FLEET = Array.from({ length: 8 }, () => H100)

function shorter(name: string, warmUp: number, measured: number): Trace {
  return { ...TRACES.find(each => each.name === name)!, warmUp, measured }
}

for (const { name, load, robin, connections } of [
  // In the long run the leads are larger, as docs/routing.md has them.
  { name: 'chat', load: 1 / 2, robin: 1.4, connections: 1.5 },
  { name: 'agent', load: 2 / 3, robin: 3, connections: 3 }
]) {
  test(`least_wait keeps its lead in the ${name} trace`, () => {
    const trace = shorter(name, 300, 200)
    const sessions = makeSessions(trace, FLEET, load, 1)
    const under = (strategy: StrategyName) => simulate(trace, sessions, FLEET, strategy, 1)
    const wait = under('least_wait')
    for (const [strategy, lead] of [
      ['round_robin', robin],
      ['least_connections', connections]
    ] as const) {
      const { p90, hits } = under(strategy)
      assert.ok(p90 / wait.p90 > lead, `${wait.p90} s, and ${p90} s with ${strategy}`)
      assert.ok(wait.hits > hits + 0.2, `${wait.hits}, and ${hits} with ${strategy}`)
    }
    assert.deepEqual(under('least_wait'), wait, 'the same again')
  })
}

test('least_wait loses nothing where no prompt is like another', () => {
  const trace = shorter('no_reuse', 20, 30)
  const sessions = makeSessions(trace, FLEET, 2 / 3, 1)
  const p90 = (strategy: StrategyName) => simulate(trace, sessions, FLEET, strategy, 1).p90
  assert.ok(p90('least_wait') <= 1.1 * Math.min(p90('round_robin'), p90('least_connections')))
})
