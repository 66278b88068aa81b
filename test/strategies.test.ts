import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { checkOptions } from '../src/options.ts'
import { Backend } from '../src/pool/backend.ts'
import { Load, Speeds } from '../src/pool/load.ts'
import { BackendsOptions, toPool } from '../src/pool/policy.ts'
import { Pool, type PoolConfig } from '../src/pool/pool.ts'
import { prefixesOf } from '../src/pool/prefixes.ts'
import { type Call, cachedTokens, strategies } from '../src/pool/strategies.ts'

/** How one of several backends is chosen; time is what the test says it is. */

const LONG = 'All happy families are alike. '.repeat(1000)

/** A pool of these backends, as it would be configured. */
function configOf(...backends: { name: string; weight?: number }[]): PoolConfig {
  const options = checkOptions(BackendsOptions, {
    backends: backends.map(each => ({ ...each, url: `http://${each.name}.invalid` })),
    routing: {
      load_balance: 'least_wait',
      circuit_breaker: { consecutive_failures: 2, error_ratio: 1, open_time: 1 }
    }
  })
  return toPool(options, undefined)
}

function backends(t: TestContext, ...weights: number[]): Backend[] {
  return weights.map((weight, index) => {
    const backend = new Backend(configOf({ name: 'ABCDEF'[index]!, weight }).backends[0]!)
    t.after(() => backend.live.destroy())
    return backend
  })
}

/** A call whose prompt has this text, of about a token for four bytes. */
function call(text = 'Hello', caller = 'one'): Call {
  const body = Buffer.from(JSON.stringify({ messages: [{ role: 'user', content: text }] }))
  return {
    model: 'm',
    promptTokens: body.length / 4,
    prefixes: prefixesOf(body, caller),
    affinity: undefined
  }
}

/** Sends a call to a backend, as the pool does. */
function send(backend: Backend, wanted: Call, now: number, isStream = true) {
  const { live } = backend
  live.begin()
  const tokens = wanted.promptTokens
  const cached = cachedTokens(backend, wanted)
  live.prefixes.add(wanted.prefixes!, tokens - cached.kept)
  return live.load.begin({ model: 'm', tokens, cached, isStream }, now)
}

const NOT_CACHED = { sent: 0, kept: 0, age: 0 }

function picks(strategy: keyof typeof strategies, candidates: Backend[], count: number): string {
  return Array.from({ length: count }, () => strategies[strategy](candidates, call(), 0).name).join(
    ''
  )
}

test('round_robin honours weights, smoothly', t => {
  assert.equal(picks('round_robin', backends(t, 1, 1, 1), 6), 'ABCABC')
  assert.equal(picks('round_robin', backends(t, 5, 1), 12), 'AAABAAAAABAA')
  assert.equal(picks('weighted', backends(t, 3, 2, 1), 6), 'ABACBA')
})

test('round_robin never loses a backend that was away', t => {
  const [a, b] = backends(t, 10, 1) as [Backend, Backend]
  picks('round_robin', [a, b], 5)
  for (let count = 0; count < 50; count++) assert.equal(strategies.round_robin([b], call(), 0), b)
  assert.match(picks('round_robin', [a, b], 22), /A.*B|B.*A/)
})

test('round_robin begins anew with other weights: nobody has to make up for the old ones', t => {
  const config = (...weights: number[]): PoolConfig => ({
    ...configOf(...weights.map((weight, at) => ({ name: 'ABC'[at]!, weight }))),
    loadBalance: 'round_robin'
  })
  const pool = new Pool(config(1000, 1))
  t.after(() => pool.destroy())
  picks('round_robin', pool.backends, 500)
  pool.update(config(1, 1))
  assert.equal(picks('round_robin', pool.backends, 4), 'ABAB')
  picks('round_robin', pool.backends, 1)
  pool.update(config(1))
  pool.update(config(1, 1))
  assert.equal(pool.backends[0]!.live.currentWeight, 0)
})

test('least_connections counts what is in flight, for each weight', t => {
  const [a, b] = backends(t, 2, 1) as [Backend, Backend]
  const order = Array.from({ length: 6 }, () => {
    const chosen = strategies.least_connections([a, b], call(), 0)
    chosen.live.inFlight++
    return chosen.name
  })
  assert.deepEqual([a.live.inFlight, b.live.inFlight], [4, 2], order.join(''))
})

test('latency_based prefers the fast, shuns the failing, and tries the idle again', t => {
  const [a, b] = backends(t, 1, 1) as [Backend, Backend]
  a.live.reputation.observeLatency(100, 0)
  b.live.reputation.observeLatency(1000, 0)
  assert.equal(strategies.latency_based([a, b], call(), 0), a)
  a.live.reputation.observeLatency(10_000, 1)
  assert.equal(strategies.latency_based([a, b], call(), 1), b, 'a failure counts as a long latency')
  b.live.reputation.observeLatency(1000, 60_000)
  assert.equal(
    strategies.latency_based([a, b], call(), 60_000),
    a,
    'after a minute it gets another try'
  )
})

test('latency_based gives an unknown backend its first call', t => {
  const [a, b] = backends(t, 1, 1) as [Backend, Backend]
  a.live.reputation.observeLatency(1, 0)
  assert.equal(strategies.latency_based([a, b], call(), 0), b)
})

test('random honours weights', t => {
  const chosen = picks('random', backends(t, 9, 1), 2000)
  const share = chosen.replaceAll('B', '').length / chosen.length
  assert.ok(share > 0.85 && share < 0.95, String(share))
})

test('latency_based compares two, and never one with itself', t => {
  const [a, b, c] = backends(t, 1, 1, 1) as [Backend, Backend, Backend]
  a.live.reputation.observeLatency(10, 0)
  b.live.reputation.observeLatency(20, 0)
  c.live.reputation.observeLatency(30, 0)
  const chosen = picks('latency_based', [a, b, c], 600)
  assert.doesNotMatch(chosen, /C/, 'the slowest loses every comparison')
  const share = chosen.replaceAll('B', '').length / chosen.length
  assert.ok(share > 0.58 && share < 0.75, `two of three draws have the fastest: ${share}`)
})

test('a latency above what is expected counts at once, one below it bit by bit', t => {
  const [a] = backends(t, 1) as [Backend]
  a.live.reputation.observeLatency(100, 0)
  a.live.reputation.observeLatency(5000, 1)
  assert.equal(a.live.reputation.latency(1), 5000)
  a.live.reputation.observeLatency(100, 2)
  assert.ok(a.live.reputation.latency(2)! > 3000)
})

test('least_connections shuns what fails fast, at any rate of calls and without a breaker', t => {
  for (const callsPerSecond of [2, 20, 200]) {
    const [failing, ...good] = backends(t, 1, 1, 1) as [Backend, Backend, Backend]
    const ends: { at: number; backend: Backend }[] = []
    let [late, failed] = [0, 0]
    const until = 120_000
    for (let now = 0; now < until; now += 1000 / callsPerSecond) {
      while (ends.length > 0 && ends[0]!.at <= now) {
        const { backend } = ends.shift()!
        backend.live.end()
        backend.live.reputation.observeSuccess(now)
      }
      const chosen = strategies.least_connections([failing, ...good], call(), now)
      if (now > 2000) late++
      if (chosen === failing) {
        failing.live.reputation.observeFailure(10_000, now)
        if (now > 2000) failed++
      } else {
        chosen.live.begin()
        ends.push({ at: now + 10_000, backend: chosen })
      }
    }
    assert.ok(failed / late < 0.02, `${failed} of ${late} at ${callsPerSecond} a second`)
  }
})

test('one failure among successes costs a backend little, and a recovered one is tried again', t => {
  const [a, b] = backends(t, 1, 1) as [Backend, Backend]
  a.live.reputation.observeFailure(10_000, 0)
  for (let call = 0; call < 5; call++) a.live.reputation.observeSuccess(1)
  assert.ok(a.live.reputation.aversion(1) < 1.1)
  for (let call = 0; call < 10; call++) b.live.reputation.observeFailure(10_000, 1)
  a.live.inFlight = 9
  assert.equal(strategies.least_connections([a, b], call(), 2), a)
  assert.equal(strategies.least_connections([a, b], call(), 120_000), b)
})

test('the wait is the prompts to be read and a token of each answer', () => {
  const load = new Load(new Speeds())
  const demand = { model: 'm', tokens: 8000, cached: NOT_CACHED, isStream: true }
  const first = load.begin(demand, 0)
  const second = load.begin({ ...demand, cached: { sent: 4000, kept: 4000, age: 1 } }, 0)
  assert.equal(load.wait(0), 1500)
  first.begun(1000)
  assert.equal(load.wait(1000), 530)
  second.end()
  assert.equal(load.wait(1000), 30)
  first.end()
  first.end()
  assert.equal(load.wait(1000), 0)
})

test('the wait grows while the first in the queue is late', () => {
  const load = new Load(new Speeds())
  const demand = { model: 'm', tokens: 8000, cached: NOT_CACHED, isStream: true }
  const stuck = load.begin(demand, 0)
  assert.equal(load.wait(1000), 1000)
  assert.equal(load.wait(6000), 6000)
  const overtakes = load.begin(demand, 6000)
  overtakes.begun(6500)
  assert.equal(load.wait(7000), 1030, 'it does not keep others from their answers')
  stuck.end()
  overtakes.end()
  assert.equal(load.wait(7000), 0)
})

test('a prompt without a stream counts as read when it should have been', () => {
  const load = new Load(new Speeds())
  const job = load.begin({ model: 'm', tokens: 8000, cached: NOT_CACHED, isStream: false }, 0)
  assert.equal(load.wait(999), 1000)
  assert.equal(load.wait(1000), 30)
  job.end()
  assert.equal(load.wait(1001), 0)
})

test('speeds are learned from answers, of each model', () => {
  const load = new Load(new Speeds())
  const answer = (model: string, rate: number, tpot: number, now: number) => {
    const job = load.begin({ model, tokens: 4000, cached: NOT_CACHED, isStream: true }, now)
    const firstTokenAt = now + 4000 / rate
    job.begun(firstTokenAt)
    job.end()
    job.learn({
      promptTokens: 4000,
      completionTokens: 101,
      cachedTokens: undefined,
      firstTokenAt,
      lastTokenAt: firstTokenAt + 100 * tpot
    })
  }
  for (let count = 0; count < 100; count++) {
    answer('small', 20, 10, count * 10_000)
    answer('large', 2, 50, count * 10_000)
  }
  const near = (value: number, wanted: number) =>
    assert.ok(Math.abs(value / wanted - 1) < 0.1, `${value}, not ${wanted}`)
  near(load.speedWith('small').prefillRate, 20)
  near(load.speedWith('small').tpot, 10)
  near(load.speedWith('large').prefillRate, 2)
  near(load.speedWith('large').tpot, 50)
  assert.notEqual(load.speedWith('unheard of').prefillRate, 8, 'as others are')
})

test('one answer that stood still, or came at once, says little of a speed', () => {
  const load = new Load(new Speeds())
  const answer = (ttft: number, tokens: number, writing: number) => {
    const job = load.begin({ model: 'm', tokens: 4000, cached: NOT_CACHED, isStream: true }, 0)
    job.begun(ttft)
    job.end()
    job.learn({
      promptTokens: 4000,
      completionTokens: tokens,
      cachedTokens: undefined,
      firstTokenAt: ttft,
      lastTokenAt: ttft + writing
    })
  }
  for (let count = 0; count < 200; count++) answer(500, 101, 3000)
  // Its reader was asleep for four minutes.
  answer(500, 2, 240_000)
  assert.ok(load.speedWith('m').tpot < 40, `${load.speedWith('m').tpot} ms`)
  for (const [ttft, tokens, writing] of [
    [0, 1, 0],
    [600_000, 1_000_000, 0.001]
  ] as const) {
    answer(ttft, tokens, writing)
  }
  const { tpot, prefillRate } = load.speedWith('m')
  assert.ok(tpot > 28 && tpot < 40, `${tpot} ms`)
  assert.ok(prefillRate > 7 && prefillRate < 9, `${prefillRate} tokens a ms`)
})

test('speeds of models that answer are kept, and of no more than 64', () => {
  const load = new Load(new Speeds())
  for (let model = 0; model < 100; model++) {
    const demand = { model: `m${model}`, tokens: 800, cached: NOT_CACHED, isStream: true }
    const job = load.begin(demand, 0)
    job.begun(1)
    job.end()
    const facts = { promptTokens: 800, completionTokens: 1, cachedTokens: undefined }
    if (model !== 99) job.learn({ ...facts, firstTokenAt: 1, lastTokenAt: 1 })
  }
  assert.equal(load.speeds.entries().length, 64)
  assert.ok(!load.speeds.entries().some(([model]) => model === 'm99'))
})

for (const strategy of ['least_wait', 'prefix_affinity'] as const) {
  test(`${strategy} goes where the beginning of the prompt is, unless waiting there costs more`, t => {
    const [a, b] = backends(t, 1, 1) as [Backend, Backend]
    send(b, call(LONG), 0).end()
    b.live.end()
    const next = () => call(`${LONG} But each unhappy one is so in its own way.`)
    for (let count = 0; count < 10; count++) {
      const wanted = next()
      assert.equal(strategies[strategy]([a, b], wanted, 0), b)
      assert.equal(wanted.affinity, 'hit')
    }
    // 7,500 tokens are read in about a second; 20 times as many in 20.
    send(b, call(`Everything was in confusion. ${LONG.repeat(20)}`), 0)
    const left = next()
    assert.equal(strategies[strategy]([a, b], left, 0), a)
    assert.equal(left.affinity, 'left')
  })

  test(`${strategy} knows nothing of another caller's prompts, or of short ones`, t => {
    const [a, b] = backends(t, 1, 1) as [Backend, Backend]
    send(b, call(LONG, 'one'), 0).end()
    send(b, call('Hello', 'one'), 0).end()
    a.live.inFlight = 0
    b.live.inFlight = 1
    for (const wanted of [call(LONG, 'two'), call('Hello', 'one')]) {
      strategies[strategy]([a, b], wanted, 0)
      assert.equal(wanted.affinity, 'miss')
    }
  })

  test(`${strategy} leaves one that fails, whatever it has`, t => {
    const [a, b] = backends(t, 1, 1) as [Backend, Backend]
    send(b, call(LONG), 0).end()
    for (let count = 0; count < 10; count++) b.live.reputation.observeFailure(10_000, 0)
    assert.equal(strategies[strategy]([a, b], call(LONG), 0), a)
  })
}

test('what a backend keeps is learned: from what it says, or from the time it takes', t => {
  for (const isSaid of [true, false]) {
    const [a] = backends(t, 1) as [Backend]
    let now = 0
    /** Its cache holds 50,000 tokens, and it reads 8 in a ms. */
    const ask = (wanted: Call, isCached: boolean) => {
      const job = send(a, wanted, now)
      const tokens = wanted.promptTokens
      now += (isCached ? 64 : tokens) / 8
      job.begun(now)
      a.live.end()
      job.end()
      a.live.learn(job, {
        promptTokens: tokens,
        completionTokens: 1,
        cachedTokens: isSaid && isCached ? tokens - 64 : undefined,
        firstTokenAt: now,
        lastTokenAt: now
      })
    }
    for (let round = 0; round < 20; round++) {
      ask(call(LONG), false)
      ask(call(LONG), true)
      for (let other = 0; other < 10; other++) ask(call(`${round} ${other} ${LONG}`), false)
    }
    const { promptTokens } = call(LONG)
    const old = cachedTokens(a, call(LONG))
    assert.ok(old.age > 50_000 && old.sent > promptTokens - 1)
    assert.ok(old.kept < promptTokens / 4, `${old.kept} after ${old.age} tokens, said: ${isSaid}`)
    ask(call(LONG), false)
    const young = cachedTokens(a, call(LONG))
    assert.ok(young.kept > promptTokens * 0.8, `${young.kept} after ${young.age} tokens`)
  }
})

test('least_wait honours weights, whether backends are busy or not', t => {
  const share = (isBusy: boolean) => {
    const [a, b] = backends(t, 3, 1) as [Backend, Backend]
    let toA = 0
    for (let count = 0; count < 1000; count++) {
      const wanted = call(`${count} ${LONG.slice(0, 4000)}`)
      const chosen = strategies.least_wait([a, b], wanted, 0)
      const job = send(chosen, wanted, 0)
      if (!isBusy) job.end()
      if (chosen === a) toA++
    }
    return toA / 1000
  }
  for (const part of [share(true), share(false)]) assert.ok(part > 0.7 && part < 0.8, String(part))
})

test('least_wait spreads equals at random', t => {
  const chosen = picks('least_wait', backends(t, 1, 1, 1), 300)
  for (const name of 'ABC') assert.ok(chosen.split(name).length > 60, chosen)
})

test('least_wait prefers what has shown to be faster', t => {
  const [slow, fast] = backends(t, 1, 1) as [Backend, Backend]
  for (const speed of slow.live.load.learners('m')) speed.prefillRate = 1
  for (const speed of fast.live.load.speeds.learners('m')) speed.prefillRate = 10
  for (let count = 0; count < 20; count++) {
    assert.equal(strategies.least_wait([slow, fast], call(`${count}${LONG}`), 0), fast)
  }
})

/** A pool of these backends. */
function poolOf(t: TestContext, ...names: string[]) {
  const toConfig = (...each: string[]) => configOf(...each.map(name => ({ name })))
  const pool = new Pool(toConfig(...names))
  t.after(() => pool.destroy())
  const warm = () =>
    Object.fromEntries(
      pool.backends.map(({ name, live }) => [name, live.rampUp(performance.now()) === 1])
    )
  return { pool, warm, update: (...each: string[]) => pool.update(toConfig(...each)) }
}

test('a backend that is new beside others begins slowly, and counts as fast as they are', t => {
  const { pool, warm, update } = poolOf(t, 'a', 'b')
  assert.deepEqual(warm(), { a: true, b: true }, 'not at boot')
  const { load } = pool.backends[0]!.live
  for (const speed of load.learners('m')) speed.prefillRate = 2
  update('a', 'b', 'c')
  assert.deepEqual(warm(), { a: true, b: true, c: false })
  assert.equal(pool.backends[2]!.live.load.speedWith('m').prefillRate, 2)
  update('d', 'e')
  assert.deepEqual(warm(), { d: true, e: true }, 'not when all are new')
})

test('a backend that comes back begins slowly, and without its cache', t => {
  const { pool, warm } = poolOf(t, 'a', 'b', 'c', 'd')
  const [drained, unhealthy, failing, resting] = pool.backends as [
    Backend,
    Backend,
    Backend,
    Backend
  ]
  for (const { live } of pool.backends) live.prefixes.add(call(LONG).prefixes!, 1)
  drained.live.isDrained = true
  drained.live.isDrained = false
  unhealthy.live.turn(false)
  unhealthy.live.turn(true)
  const { breaker } = failing.live
  breaker.failed(breaker.begin(0), 0)
  breaker.failed(breaker.begin(0), 0)
  assert.equal(breaker.isClosed, false)
  breaker.answered(breaker.begin(10_000))
  resting.live.breaker.rest(1, 0)
  resting.live.breaker.answered(resting.live.breaker.begin(10_000))
  assert.equal(resting.live.breaker.isClosed, true)
  assert.deepEqual(warm(), { a: false, b: false, c: false, d: true })
  assert.deepEqual(
    pool.backends.map(({ live }) => live.prefixes.size > 0),
    [false, false, false, true]
  )
})

test('its share grows from a tenth to all of it within 30 s, whatever the strategy', t => {
  // Evenly spread, so that the shares are not chance's.
  let drawn = 0
  t.mock.method(Math, 'random', () => {
    drawn += 0.618034
    return drawn % 1
  })
  for (const strategy of ['round_robin', 'random', 'least_connections', 'least_wait'] as const) {
    const [old, fresh] = backends(t, 1, 1) as [Backend, Backend]
    fresh.live.comeBack(0)
    const share = (now: number) => {
      const jobs = Array.from({ length: 200 }, (_, count) => {
        const wanted = call(`${now} ${count} ${LONG.slice(0, 2000)}`)
        const chosen = strategies[strategy]([old, fresh], wanted, now)
        return { chosen, job: send(chosen, wanted, now) }
      })
      for (const { chosen, job } of jobs) {
        job.end()
        chosen.live.end()
      }
      return jobs.filter(({ chosen }) => chosen === fresh).length / jobs.length
    }
    const [begin, middle, end] = [share(0), share(15_000), share(30_000)]
    assert.ok(begin > 0.03 && begin < 0.17, `${strategy}: ${begin} at first`)
    assert.ok(middle > 0.25 && middle < 0.42, `${strategy}: ${middle} after 15 s`)
    assert.ok(end > 0.4 && end < 0.6, `${strategy}: ${end} after 30 s`)
  }
})
