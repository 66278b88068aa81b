import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Breaker, type BreakerPolicy, type CircuitTurn } from '../src/pool/breaker.ts'
import { RetryBudget } from '../src/pool/budget.ts'
import {
  type Answerer,
  answerChat,
  CHAT,
  chunk,
  closedPort,
  eventually,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  type TestGateway
} from './helper.ts'

const POLICY = { consecutiveFailures: 5, errorRatio: 0.5, openTime: 5_000 }

function breaker(policy: Partial<BreakerPolicy> = {}) {
  const turns: CircuitTurn[] = []
  const it = new Breaker()
  it.guard({ ...POLICY, ...policy }, turn => turns.push(turn))
  const fail = (now: number, times = 1) => {
    for (let time = 0; time < times; time++) it.failed(it.begin(now), now)
  }
  const succeed = (now: number) => it.succeeded(it.begin(now), now)
  return { it, turns, fail, succeed }
}

test('five failures in a row open a circuit, four do not', () => {
  const { it, turns, fail, succeed } = breaker()
  fail(0, 4)
  succeed(0)
  fail(0, 4)
  assert.equal(it.state(0), 'closed')
  fail(0)
  assert.equal(it.state(0), 'open')
  assert.deepEqual(turns, [{ state: 'open', reason: 'consecutive_failures', ms: 5_000 }])
  assert.ok(!it.admits(4_999))
  assert.ok(it.admits(5_000))
})

test('half of ten calls within 30 s open a circuit; of nine, or of older ones, they do not', () => {
  const half = (it: ReturnType<typeof breaker>, now: number, calls: number) => {
    for (let call = 0; call < calls; call++) {
      if (call % 2 === 0) it.succeed(now)
      else it.fail(now)
    }
  }
  const few = breaker()
  half(few, 0, 9)
  assert.equal(few.it.state(0), 'closed')
  few.fail(0)
  assert.deepEqual(few.turns, [{ state: 'open', reason: 'error_ratio', ms: 5_000 }])

  const old = breaker()
  half(old, 0, 9)
  half(old, 31_000, 9)
  assert.equal(old.it.state(31_000), 'closed')

  const recent = breaker()
  half(recent, 0, 4)
  half(recent, 16_000, 6)
  assert.equal(recent.it.state(16_000), 'open')

  const mostlyFine = breaker()
  for (let call = 0; call < 99; call++) mostlyFine[call % 3 === 0 ? 'fail' : 'succeed'](call)
  assert.deepEqual(mostlyFine.turns, [])
})

test('half open lets one probe through, and another one when nothing came of it', () => {
  const { it, fail } = breaker()
  fail(0, 5)
  const probe = it.begin(5_000)
  assert.equal(it.state(5_000), 'half_open')
  assert.ok(!it.admits(5_000))
  it.leave(probe)
  assert.ok(it.admits(5_000))
  const next = it.begin(5_000)
  assert.ok(!it.admits(9_000))
  it.answered(next)
  assert.equal(it.state(5_000), 'closed')
  assert.equal(it.opened, undefined)
})

test('an open time doubles up to a minute while probes fail, and begins anew after a success', () => {
  const { it, turns, fail, succeed } = breaker()
  fail(0, 5)
  let now = 0
  for (let probe = 0; probe < 6; probe++) {
    now += 100_000
    fail(now)
  }
  const waits = turns.map(turn => turn.state === 'open' && turn.ms)
  assert.deepEqual(waits, [5_000, 10_000, 20_000, 40_000, 60_000, 60_000, 60_000])
  now += 100_000
  succeed(now)
  assert.equal(it.state(now), 'closed')
  fail(now, 5)
  assert.deepEqual(turns.at(-1), { state: 'open', reason: 'consecutive_failures', ms: 5_000 })
})

test('an answer that only begins closes a circuit, and does not shorten the next open time', () => {
  const { it, turns, fail } = breaker()
  fail(0, 5)
  const probe = it.begin(5_000)
  it.answered(probe)
  it.failed(probe, 6_000)
  fail(6_000, 4)
  assert.deepEqual(turns.at(-1), { state: 'open', reason: 'consecutive_failures', ms: 10_000 })
})

test('a probe whose attempt is over before it is judged still opens the circuit again', () => {
  const { it, turns, fail } = breaker()
  fail(0, 5)
  const probe = it.begin(5_000)
  it.leave(probe)
  it.failed(probe, 5_001)
  assert.deepEqual(turns.at(-1), { state: 'open', reason: 'probe_failed', ms: 10_000 })
})

test('calls from before a circuit opened say nothing of whether the backend has recovered', () => {
  const { it, fail } = breaker()
  const before = it.begin(0)
  fail(0, 5)
  it.succeeded(before, 1)
  assert.equal(it.state(1), 'open')
  const probe = it.begin(5_000)
  it.failed(before, 5_001)
  it.leave(before)
  assert.equal(it.state(5_001), 'half_open')
  assert.ok(!it.admits(5_001))
  it.succeeded(probe, 5_002)
  assert.equal(it.state(5_002), 'closed')
})

test('a call as a last resort closes a circuit when it succeeds, and keeps it as it is when not', () => {
  const { it, turns, fail, succeed } = breaker()
  fail(0, 5)
  fail(1_000, 20)
  assert.equal(turns.length, 1)
  assert.ok(it.admits(5_000))
  succeed(2_000)
  assert.equal(it.state(2_000), 'closed')
})

test('who asks for a rest gets it, up to a minute, and a probe after it', () => {
  const { it, turns, fail } = breaker()
  it.rest(0, 0)
  assert.equal(it.state(0), 'closed')
  it.rest(2_000, 0)
  assert.ok(it.isResting)
  it.rest(1_000, 500)
  assert.deepEqual(turns, [{ state: 'open', reason: 'retry_after', ms: 2_000 }])
  assert.ok(!it.admits(1_999))
  const probe = it.begin(2_000)
  it.rest(3_600_000, 2_001)
  it.leave(probe)
  assert.deepEqual(turns.at(-1), { state: 'open', reason: 'retry_after', ms: 60_000 })
  assert.ok(!it.admits(62_000))
  assert.ok(it.admits(62_001))
  fail(62_001)
  assert.deepEqual(turns.at(-1), { state: 'open', reason: 'probe_failed', ms: 5_000 })
})

test('without a policy nothing opens, and what was open closes', () => {
  const { it, fail } = breaker()
  fail(0, 5)
  it.guard(undefined)
  assert.ok(it.isClosed)
  fail(0, 50)
  it.rest(1_000, 0)
  assert.ok(it.isClosed)
})

const spent = (budget: RetryBudget, now: number, wanted: number) =>
  Array.from({ length: wanted }, () => budget.spend(now)).filter(Boolean).length

test('the budget has ten retries a second however few calls there are', () => {
  const budget = new RetryBudget()
  assert.equal(spent(budget, 0, 50), 10)
  assert.equal(budget.exhausted, 40)
  assert.equal(spent(budget, 500, 50), 5)
  assert.equal(spent(budget, 60_000, 50), 10)
})

test('of many calls a fifth is tried again, not that and the floor', () => {
  const budget = new RetryBudget()
  let retries = 0
  for (let now = 0; now < 10_000; now++) {
    budget.earn()
    if (budget.spend(now)) retries++
  }
  assert.ok(retries >= 2_000 && retries <= 2_010, String(retries))
})

test('a quiet day does not save up more than a hundred retries', () => {
  const budget = new RetryBudget()
  for (let call = 0; call < 100_000; call++) budget.earn()
  assert.equal(spent(budget, 0, 500), 100)
})

const OPEN = 'llmproxy_backend_circuit_state'
const RETRY = { enabled: true, initial_wait: '1ms', max_wait: '50ms' }
const refuse =
  (status: number, headers: Record<string, string> = {}): Answerer =>
  (_request, response) => {
    response.writeHead(status, { 'content-type': 'application/json', ...headers })
    response.end('{"error":{"message":"not now"}}')
  }

/** A backend that does what `answer` says at the time, beside a good one; both are called in turn. */
async function pair(t: TestContext, bad: Answerer, routing: object = {}, more: object = {}) {
  const fake = { answer: bad }
  const bads = await fakeBackend(t, (request, response, raw) => fake.answer(request, response, raw))
  const goods = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [
      { name: 'bad', url: bads.url },
      { name: 'good', url: goods.url }
    ],
    routing,
    ...more
  })
  return { fake, bads, goods, gateway }
}

async function call(
  { url }: TestGateway,
  times = 1,
  stream = false,
  content = 'Hello'
): Promise<number[]> {
  const statuses: number[] = []
  const messages = [{ role: 'user', content }]
  for (let each = 0; each < times; each++) {
    const response = await post(`${url}/v1/chat/completions`, { ...CHAT, messages, stream })
    await response.text().catch(() => {})
    statuses.push(response.status)
  }
  return statuses
}

const state = (gateway: TestGateway, backend = 'bad') => gateway.metric(OPEN, { backend })

test('a backend that fails five times gets no more calls; log, metrics and admin say why', async t => {
  const { bads, goods, gateway } = await pair(
    t,
    refuse(500),
    {},
    { admin: { enabled: true, token: 'secret-of-the-admin' } }
  )
  await call(gateway, 10)
  assert.equal(bads.requests.length, 5)
  assert.deepEqual(await call(gateway, 5), [200, 200, 200, 200, 200])
  assert.equal(bads.requests.length, 5)
  assert.equal(goods.requests.length, 10)
  const line = await gateway.logged({ msg: 'circuit opened' })
  assert.partialDeepStrictEqual(line, {
    level: 40,
    backend: 'bad',
    reason: 'consecutive_failures',
    ms: 5_000
  })
  assert.equal(await state(gateway), 2)
  assert.equal(await state(gateway, 'good'), 0)
  const labels = { backend: 'bad', reason: 'consecutive_failures' }
  assert.equal(await gateway.metric('llmproxy_backend_ejections_total', labels), 1)
  const { backends } = await (
    await fetch(`${gateway.url}/admin/backends`, {
      headers: { 'x-admin-token': 'secret-of-the-admin' }
    })
  ).json()
  assert.partialDeepStrictEqual(backends[0].circuit, {
    state: 'open',
    reason: 'consecutive_failures'
  })
  const left = Date.parse(backends[0].circuit.until) - Date.now()
  assert.ok(left > 0 && left <= 5_000, String(left))
  assert.deepEqual(backends[1].circuit, { state: 'closed', reason: null, until: null })
})

test('a backend that recovers gets one probe, and then more and more of its share', async t => {
  const held: (() => void)[] = []
  const { fake, bads, gateway } = await pair(t, refuse(500), {
    circuit_breaker: { open_time: '20ms' }
  })
  await call(gateway, 10)
  fake.answer = (request, response, raw) => {
    held.push(() => answerChat(request, response, raw))
  }
  await eventually(async () => (await state(gateway)) === 1)
  const probe = Promise.all([call(gateway), call(gateway)])
  await bads.request(5)
  await call(gateway, 5)
  assert.equal(bads.requests.length, 6, 'no second call before the first has come to something')
  fake.answer = answerChat
  held[0]!()
  assert.deepEqual(await probe, [[200], [200]])
  await gateway.logged({ msg: 'circuit closed', backend: 'bad', level: 30 })
  assert.equal(await state(gateway), 0)
  await call(gateway, 30)
  const more = bads.requests.length - 6
  assert.ok(more >= 1 && more <= 5, `about a tenth of 30: ${more}`)
})

test('a probe that the client leaves is none: the next call is another one', async t => {
  const { fake, bads, gateway } = await pair(t, refuse(500), {
    circuit_breaker: { open_time: '20ms' }
  })
  await call(gateway, 10)
  fake.answer = () => {}
  await eventually(async () => (await state(gateway)) === 1)
  const text = rawPost('/v1/chat/completions', JSON.stringify(CHAT))
  while (bads.requests.length < 6) {
    const client = await rawClient(t, gateway.port, text)
    await Promise.race([bads.request(5), client.until(/200 OK/)])
    if (bads.requests.length === 6) client.socket.destroy()
  }
  await bads.requests[5]!.closed
  fake.answer = answerChat
  await call(gateway, 2)
  await gateway.logged({ msg: 'circuit closed' })
  assert.equal(bads.requests.length, 7)
})

test('a probe that fails doubles the open time', async t => {
  const { bads, gateway } = await pair(t, refuse(500), { circuit_breaker: { open_time: '20ms' } })
  await call(gateway, 10)
  await eventually(async () => (await state(gateway)) === 1)
  await call(gateway, 2)
  assert.equal(bads.requests.length, 6)
  await gateway.logged({ msg: 'circuit opened', reason: 'probe_failed', ms: 40 })
})

for (const status of [400, 404, 422, 429, 501]) {
  test(`a ${status} never counts against a backend`, async t => {
    const { bads, gateway } = await pair(t, refuse(status))
    await call(gateway, 30)
    assert.equal(bads.requests.length, 15)
    assert.equal(await state(gateway), 0)
  })
}

test('a 401 counts: the gateway has no key that the backend takes', async t => {
  const { bads, gateway } = await pair(t, refuse(401))
  await call(gateway, 30)
  assert.equal(bads.requests.length, 5)
  await gateway.logged({ msg: 'circuit opened' })
})

test('clients that leave never count, neither before an answer nor in it', async t => {
  let count = 0
  const { bads, gateway } = await pair(t, (_request, response) => {
    if (count++ % 2 === 0) return
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
  })
  const text = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }))
  while (bads.requests.length < 12) {
    const client = await rawClient(t, gateway.port, text)
    await Promise.race([bads.request(bads.requests.length), client.until(/data/)])
    client.socket.destroy()
  }
  await Promise.all(bads.requests.map(request => request.closed))
  assert.equal(await state(gateway), 0)
})

const BREAKS: Record<string, Answerer> = {
  'dies in the middle of a stream': (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'), () => setImmediate(() => raw.socket.destroy()))
  },
  'ends a stream without its end': (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(chunk('Hi'))
  },
  'closes the connection instead of an answer': (_request, _response, raw) => {
    raw.socket.destroy()
  },
  'answers with what is not HTTP': (_request, _response, raw) => {
    raw.socket.end('no HTTP at all\r\n\r\n')
  }
}
for (const [what, answer] of Object.entries(BREAKS)) {
  test(`a backend that ${what} has failed`, async t => {
    // A client has half a second for the last words of a stream that breaks.
    const { bads, gateway } = await pair(t, answer, {
      circuit_breaker: { consecutive_failures: 2 }
    })
    await call(gateway, 8, true)
    const line = await gateway.logged({ msg: 'circuit opened', backend: 'bad' })
    assert.equal(line.reason, 'consecutive_failures')
    // A kept connection that is closed at once is nobody's fault.
    assert.ok(bads.requests.length <= 3, String(bads.requests.length))
  })
}

test('a large request that a backend does not accept is sent to it once', async t => {
  const answer: Answerer = (_request, _response, raw) => void raw.socket.destroy()
  for (const stream of [true, false]) {
    const { bads, gateway } = await pair(t, answer, {
      circuit_breaker: { consecutive_failures: 2 }
    })
    await call(gateway, 8, stream, 'x'.repeat(2_000_000))
    await gateway.logged({ msg: 'circuit opened', reason: 'consecutive_failures' })
    assert.ok(bads.requests.length <= 3, String(bads.requests.length))
  }
})

test('a backend that is silent for too long has failed', async t => {
  const { bads, gateway } = await pair(t, () => {}, { timeout: '30ms' })
  await call(gateway, 12)
  assert.equal(bads.requests.length, 5)
  assert.equal(await state(gateway), 2)
})

test('a ratio of failures is enough, without five in a row', async t => {
  let count = 0
  const { gateway } = await pair(
    t,
    (request, response, raw) =>
      (count++ % 3 === 0 ? answerChat : refuse(502))(request, response, raw),
    { circuit_breaker: { consecutive_failures: 100 } }
  )
  await call(gateway, 22)
  await gateway.logged({ msg: 'circuit opened', reason: 'error_ratio' })
})

for (const stream of [true, false]) {
  test(`${stream ? 'a stream' : 'an answer'} that comes to its end ends a row of failures`, async t => {
    let count = 0
    const { gateway } = await pair(
      t,
      (request, response, raw) =>
        (count++ % 2 === 0 ? answerChat : refuse(502))(request, response, raw),
      { circuit_breaker: { consecutive_failures: 2, error_ratio: 1 } }
    )
    await call(gateway, 12, stream)
    assert.equal(count, 6)
    assert.equal(await state(gateway), 0)
  })
}

for (const status of [429, 503]) {
  test(`a ${status} with Retry-After lets the backend rest for that time`, async t => {
    const { fake, bads, gateway } = await pair(t, refuse(status, { 'retry-after': '0.3' }))
    await call(gateway, 2)
    const line = await gateway.logged({ msg: 'circuit opened', reason: 'retry_after' })
    assert.equal(line.ms, 300)
    fake.answer = answerChat
    assert.deepEqual(await call(gateway, 4), [200, 200, 200, 200])
    assert.equal(bads.requests.length, 1)
    await eventually(async () => (await state(gateway)) !== 2)
    await call(gateway, 2)
    assert.equal(bads.requests.length, 2)
    assert.equal(await state(gateway), 0)
  })
}

test('nobody rests for longer than a minute', async t => {
  const { gateway } = await pair(t, refuse(429, { 'retry-after': '3600' }))
  await call(gateway, 2)
  assert.equal((await gateway.logged({ msg: 'circuit opened' })).ms, 60_000)
})

test('when all rest they are asked all the same: their answer is better than none', async t => {
  const busy = await Promise.all(
    [1, 2].map(() => fakeBackend(t, refuse(429, { 'retry-after': '60' })))
  )
  const gateway = await startGateway(t, { backends: busy.map(({ url }) => ({ url })) })
  assert.deepEqual(await call(gateway, 4), [429, 429, 429, 429])
  assert.equal(busy[0]!.requests.length + busy[1]!.requests.length, 4)
})

test('a backend that is alone is never kept from work', async t => {
  let status = 500
  const only = await fakeBackend(t, (request, response, raw) =>
    (status === 200 ? answerChat : refuse(status))(request, response, raw)
  )
  const gateway = await startGateway(t, { backends: [{ name: 'only', url: only.url }] })
  assert.deepEqual(await call(gateway, 20), Array(20).fill(500))
  assert.equal(only.requests.length, 20)
  assert.equal(await state(gateway, 'only'), 2)
  assert.equal((await fetch(`${gateway.url}/health/ready`)).status, 503)
  status = 200
  assert.deepEqual(await call(gateway), [200])
  assert.equal((await fetch(`${gateway.url}/health/ready`)).status, 200)
})

test('at most half of the pool is kept from work', async t => {
  const bads = await Promise.all([1, 2, 3].map(() => fakeBackend(t, refuse(500))))
  const good = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [...bads, good].map(({ url }, index) => ({ name: String(index), url }))
  })
  await call(gateway, 20)
  for (const name of ['0', '1', '2']) assert.equal(await state(gateway, name), 2)
  const before = bads.map(({ requests }) => requests.length)
  await call(gateway, 4)
  for (const [index, { requests }] of bads.entries()) {
    assert.equal(requests.length, before[index]! + 1)
  }
})

test('half of the pool is kept from work while the other half is not', async t => {
  const bads = await Promise.all([1, 2].map(() => fakeBackend(t, refuse(500))))
  const goods = await Promise.all([1, 2].map(() => fakeBackend(t, answerChat)))
  const gateway = await startGateway(t, {
    backends: [...bads, ...goods].map(({ url }) => ({ url }))
  })
  await call(gateway, 20)
  assert.deepEqual(await call(gateway, 8), Array(8).fill(200))
  assert.deepEqual(
    bads.map(({ requests }) => requests.length),
    [5, 5]
  )
})

test('when all have failed they are tried again before it is time, and the first success brings one back', async t => {
  let status = 500
  const answer: Answerer = (request, response, raw) =>
    (status === 200 ? answerChat : refuse(status))(request, response, raw)
  const all = await Promise.all([1, 2].map(() => fakeBackend(t, answer)))
  const gateway = await startGateway(t, {
    backends: all.map(({ url }, index) => ({ name: String(index), url }))
  })
  await call(gateway, 10)
  assert.deepEqual([await state(gateway, '0'), await state(gateway, '1')], [2, 2])
  status = 200
  assert.deepEqual(await call(gateway, 2), [200, 200])
  assert.ok([await state(gateway, '0'), await state(gateway, '1')].includes(0))
})

test('circuit_breaker.enabled: false keeps nobody from work, a reload to it closes what is open', async t => {
  const { gateway, bads } = await pair(t, refuse(500), { circuit_breaker: { enabled: false } })
  await call(gateway, 20)
  assert.equal(bads.requests.length, 10)
  assert.equal(await state(gateway), 0)

  const { gateway: other, bads: others, goods } = await pair(t, refuse(500))
  await call(other, 10)
  assert.equal(await state(other), 2)
  const { parseConfig } = await import('../src/config.ts')
  const changed = {
    backends: [
      { name: 'bad', url: others.url },
      { name: 'good', url: goods.url }
    ],
    routing: { circuit_breaker: { enabled: false } }
  }
  await other.control.reload(parseConfig(JSON.stringify(changed), 'test', {}) as never)
  assert.equal(await state(other), 0)
  await call(other, 2)
  assert.equal(others.requests.length, 6)
})

test('a reload that changes something else keeps a circuit open', async t => {
  const { gateway, bads, goods } = await pair(t, refuse(500))
  await call(gateway, 10)
  const { parseConfig } = await import('../src/config.ts')
  const changed = {
    backends: [
      { name: 'bad', url: bads.url, weight: 3 },
      { name: 'good', url: goods.url }
    ]
  }
  await gateway.control.reload(parseConfig(JSON.stringify(changed), 'test', {}) as never)
  assert.equal(await state(gateway), 2)
  assert.deepEqual(await call(gateway, 4), [200, 200, 200, 200])
})

test('retries have a budget; without one the last answer is passed on with its body', async t => {
  const bads = await Promise.all([1, 2].map(() => fakeBackend(t, refuse(503))))
  const gateway = await startGateway(t, {
    backends: bads.map(({ url }) => ({ url })),
    routing: { retry: { ...RETRY, max_retries: 1 }, circuit_breaker: { enabled: false } }
  })
  const CALLS = 60
  const started = performance.now()
  const responses = await Promise.all(
    Array.from({ length: CALLS }, () => post(`${gateway.url}/v1/chat/completions`, CHAT))
  )
  for (const response of responses) {
    assert.equal(response.status, 503)
    assert.equal(await response.text(), '{"error":{"message":"not now"}}')
  }
  const retries = bads[0]!.requests.length + bads[1]!.requests.length - CALLS
  const seconds = (performance.now() - started) / 1000
  assert.ok(retries >= 10, String(retries))
  assert.ok(retries <= 10 + CALLS / 5 + 10 * seconds, String(retries))
  const exhausted = await gateway.metric('llmproxy_retry_budget_exhausted_total')
  assert.equal(exhausted, CALLS - retries)
})

test('a refused connection is free: it goes to another backend however often', async t => {
  const good = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: `http://127.0.0.1:${await closedPort()}` }, { url: good.url }],
    routing: { retry: RETRY, circuit_breaker: { enabled: false } }
  })
  const responses = await Promise.all(
    Array.from({ length: 60 }, () => post(`${gateway.url}/v1/chat/completions`, CHAT))
  )
  assert.ok(responses.every(({ status }) => status === 200))
  assert.equal(await gateway.metric('llmproxy_retry_budget_exhausted_total'), 0)
})

test('no backend is asked twice while another is left', async t => {
  const all = await Promise.all([1, 2, 3].map(() => fakeBackend(t, refuse(502))))
  const gateway = await startGateway(t, {
    backends: all.map(({ url }) => ({ url })),
    routing: { retry: { ...RETRY, max_retries: 2 } }
  })
  assert.deepEqual(await call(gateway), [502])
  assert.deepEqual(
    all.map(({ requests }) => requests.length),
    [1, 1, 1]
  )
})

test('when all rest for a moment a retry waits for the first of them', async t => {
  const answers = [0, 0]
  const busy = await Promise.all(
    answers.map((_, index) =>
      fakeBackend(t, (request, response, raw) =>
        (answers[index]!++ > 0 ? answerChat : refuse(429, { 'retry-after': '0.03' }))(
          request,
          response,
          raw
        )
      )
    )
  )
  const gateway = await startGateway(t, {
    backends: busy.map(({ url }) => ({ url })),
    routing: { retry: RETRY }
  })
  assert.deepEqual(await call(gateway), [200])
  assert.equal((await gateway.logged({ msg: 'exchange' })).attempts, 3)
})

test('a refused connection is free also where the same backend is tried again', async t => {
  const gateway = await startGateway(t, {
    backends: [{ url: `http://127.0.0.1:${await closedPort()}` }],
    routing: { retry: { ...RETRY, max_retries: 1 } }
  })
  await Promise.all(Array.from({ length: 60 }, () => call(gateway)))
  const labels = { result: 'connect_failure' }
  assert.equal(await gateway.metric('llmproxy_attempts_total', labels), 120)
  assert.equal(await gateway.metric('llmproxy_retry_budget_exhausted_total'), 0)
})

test('an idle connection that is closed as it is used again is no failure', async t => {
  const used = new WeakSet()
  const { bads, gateway } = await pair(
    t,
    (request, response, raw) => {
      if (used.has(raw.socket)) return raw.socket.destroy()
      used.add(raw.socket)
      return answerChat(request, response, raw)
    },
    { circuit_breaker: { consecutive_failures: 1 } }
  )
  assert.deepEqual(await call(gateway, 8), Array(8).fill(200))
  assert.ok(bads.requests.length > 4, 'some were sent twice')
  assert.ok(!gateway.lines.some(({ msg }) => msg === 'circuit opened'))
})

test('a probe that is a request at fault is none: the next call is another one', async t => {
  const { fake, bads, gateway } = await pair(t, refuse(500), {
    circuit_breaker: { open_time: '20ms' }
  })
  await call(gateway, 10)
  await eventually(async () => (await state(gateway)) === 1)
  // Its body does not come to an end.
  fake.answer = (_request, response) => response.writeHead(404).write('no')
  const text = rawPost('/v1/chat/completions', JSON.stringify(CHAT))
  const clients = [await rawClient(t, gateway.port, text), await rawClient(t, gateway.port, text)]
  await Promise.all(clients.map(client => client.until(/200 OK|404 Not Found/)))
  fake.answer = answerChat
  await call(gateway, 2)
  await gateway.logged({ msg: 'circuit closed' })
  assert.equal(bads.requests.length, 7)
})
