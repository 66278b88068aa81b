import assert from 'node:assert/strict'
import type { ServerResponse } from 'node:http'
import { describe, type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Attempt } from '../src/pool/attempt.ts'
import { Live } from '../src/pool/backend.ts'
import type { Explanation } from '../src/pool/decisions.ts'
import { FirstBytes, Hedges } from '../src/pool/hedge.ts'
import { Race } from '../src/pool/race.ts'
import {
  type Answerer,
  answerChat,
  CHAT,
  type FakeBackend,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  type SeenRequest,
  startGateway,
  type TestGateway
} from './helper.ts'

/** A second attempt beside one whose first byte is late: which of them answers, and what of the other is left. */

const STREAM = { ...CHAT, stream: true }
/** The next call is the fiftieth: a hedge may be made, and none of these was. */
const TRAINING = 49

test('what is late is learned from twenty first bytes and more, and forgotten in time', () => {
  const times = new FirstBytes()
  for (let count = 0; count < 19; count++) times.observe(100)
  assert.equal(times.late, undefined)
  times.observe(5000)
  assert.ok(within(times.late, 100), `${times.late} ms`)
  times.observe(5000)
  assert.ok(within(times.late, 5000), `${times.late} ms: two of 21 are more than 5 %`)

  for (let count = 0; count < 10_000; count++) times.observe(count % 100)
  assert.ok(within(times.late, 95), `${times.late} ms`)
  for (let count = 0; count < 600; count++) times.observe(1000 + (count % 100))
  assert.ok(within(times.late, 1095), `${times.late} ms after the backend has become slow`)
  for (const odd of [0, 0.1, 1e9]) times.observe(odd)
  assert.ok(within(times.late, 1095))
})

/** Not under what is right, and at most a bucket over it. */
function within(ms: number | undefined, right: number): boolean {
  return ms !== undefined && ms >= right * 0.99 && ms <= right * 1.11
}

test('one call in fifty may be hedged, and at most ten are saved up', () => {
  const hedges = new Hedges()
  const spent = () => {
    let count = 0
    while (hedges.spend()) count++
    return count
  }
  for (let call = 0; call < 49; call++) hedges.earn()
  assert.equal(spent(), 0)
  hedges.earn()
  assert.equal(spent(), 1)
  for (let call = 0; call < 10_000; call++) hedges.earn()
  assert.equal(spent(), 10)
})

test('of a first attempt that lost it is known that it took longer', () => {
  const live = () => new Live({ url: 'http://127.0.0.1:1', longestConnect: 1 })
  const hedges = new Hedges()
  const [slow, fast] = [live(), live()]
  const attempt = (backend: Live, age: number) => {
    const candidate = { backend: { live: backend }, model: 'm', upstream: 'm', tier: 0 }
    const stopped: string[] = []
    const cancel = (how: string) => stopped.push(how)
    return { candidate, backend: candidate.backend, age, isPending: true, cancel, stopped }
  }
  for (let call = 0; call < 18; call++) hedges.observe(slow, 'm', 10)
  for (let call = 0; call < 2; call++) {
    const [first, second] = [attempt(slow, 500), attempt(fast, 5)]
    let lateOne: unknown
    const run = new Race({ late: () => lateOne as Attempt }, hedges)
    run.begin(first as unknown as Attempt)
    lateOne = second
    run.hedge(first as unknown as Attempt)
    run.win(second as unknown as Attempt, true)
    assert.deepEqual(first.stopped, ['hedged'])
  }
  assert.ok(within(hedges.lateAfter(slow, 'm'), 500))
  assert.equal(hedges.lateAfter(fast, 'm'), undefined)
  assert.ok(slow.reputation.latency(performance.now())! > 400)
  assert.deepEqual(hedges.results, { won: 2, lost: 0 })
})

/** What one of two backends does with the calls of `user`, after having learned. */
interface Run {
  gateway: TestGateway
  backends: Record<'a' | 'b', FakeBackend>
  /** Resolve with the backends that get the call, in turn. */
  reached: Promise<'a' | 'b'>[]
  /** How the first and the second of them answer it. */
  answers: Answerer[]
}

const never: Answerer = () => {}

/** Two backends that answer fast, and calls enough to know that, and to allow a hedge. */
async function race(
  t: TestContext,
  answers: Answerer[],
  { backends: more = {}, ...config }: Record<string, unknown> & { backends?: object } = {}
): Promise<Run> {
  const came = Array.from({ length: 3 }, () => Promise.withResolvers<'a' | 'b'>())
  let at = 0
  const answer =
    (name: 'a' | 'b'): Answerer =>
    (request, response, raw) => {
      if (!request.body.includes('"user":"late"')) return answerChat(request, response, raw)
      came[at]?.resolve(name)
      return answers[at++]?.(request, response, raw)
    }
  const backends = { a: await fakeBackend(t, answer('a')), b: await fakeBackend(t, answer('b')) }
  const gateway = await startGateway(t, {
    backends: Object.entries(backends).map(([name, { url }]) => ({ name, url, ...more })),
    routing: { hedge: { enabled: true } },
    ...config
  })
  for (let call = 0; call < TRAINING; call++) await (await ask(gateway, 'fast')).text()
  return { gateway, backends, answers, reached: came.map(({ promise }) => promise) }
}

/** Answers as soon as the second backend has the call too. */
function afterSecond(run: Run, answer: Answerer): Answerer {
  return async (...call) => {
    await run.reached[1]
    await answer(...call)
  }
}

function ask(gateway: { url: string }, user: string, body: object = STREAM) {
  return post(`${gateway.url}/v1/chat/completions`, { ...body, user })
}

const results = async ({ gateway }: Run) => ({
  won: await gateway.metric('llmproxy_hedges_total', { result: 'won' }),
  lost: await gateway.metric('llmproxy_hedges_total', { result: 'lost' })
})

const lateLine = ({ gateway }: Run, response: Response) =>
  gateway.logged({ msg: 'exchange', requestId: response.headers.get('x-llmproxy-request-id') })

const seen = ({ backends }: Run, name: 'a' | 'b'): SeenRequest =>
  backends[name].requests.find(({ body }) => body.includes('late'))!

test('the second answers: the first is stopped at once, and costs nothing', async t => {
  const admin = { enabled: true, token: 'token' }
  const run = await race(t, [never, answerChat], { admin })
  const response = await ask(run.gateway, 'late')
  assert.match(await response.text(), /\[DONE\]/)
  const [first, second] = await Promise.all(run.reached.slice(0, 2))
  await seen(run, first!).closed
  const line = await lateLine(run, response)
  assert.deepEqual(
    { backend: line.backend, attempts: line.attempts, outcome: line.outcome },
    { backend: second, attempts: 2, outcome: 'ok' }
  )
  assert.deepEqual([line.promptTokens, line.completionTokens, line.exactness], [12, 3, 'exact'])
  assert.deepEqual(await results(run), { won: 1, lost: 0 })
  const explained = await fetch(`${run.gateway.url}/admin/explain/${line.requestId}`, {
    headers: { 'x-admin-token': 'token' }
  })
  const explanation = (await explained.json()) as Explanation
  assert.deepEqual(
    explanation.attempts.map(({ backend, outcome }) => [backend, outcome]),
    [
      [first, 'hedged'],
      [second, '2xx']
    ]
  )
  const attempts = (backend: string, result: string) =>
    run.gateway.metric('llmproxy_attempts_total', { backend, result })
  assert.equal(await attempts(first!, 'hedged'), 1)
  assert.equal(await attempts(second!, 'hedged'), 0)
  for (const result of ['cancelled', 'timeout', 'connect_failure']) {
    assert.equal(await attempts(first!, result), 0, result)
  }
  assert.equal(await run.gateway.metric('llmproxy_backend_in_flight', { backend: first! }), 0)
  assert.ok(!run.gateway.lines.some(({ msg }) => msg === 'attempt failed'))
})

test('the first answers after all: the second is stopped', async t => {
  const go = Promise.withResolvers<void>()
  const run = await race(t, [
    async (...call) => {
      await go.promise
      await answerChat(...call)
    },
    never
  ])
  const answered = ask(run.gateway, 'late')
  const [first, second] = await Promise.all(run.reached.slice(0, 2))
  go.resolve()
  const response = await answered
  assert.match(await response.text(), /\[DONE\]/)
  await seen(run, second!).closed
  const line = await lateLine(run, response)
  assert.equal(line.backend, first)
  assert.equal(line.attempts, 2)
  assert.deepEqual(await results(run), { won: 0, lost: 1 })
})

test('a whole answer, a second tier, a full pool and a pool without it: nothing is hedged', async t => {
  const slow: Answerer = async (...call) => {
    await sleep(60)
    await answerChat(...call)
  }
  const whole = await race(t, [slow])
  await (await ask(whole.gateway, 'late', CHAT)).text()
  const off = await race(t, [slow], { routing: {} })
  await (await ask(off.gateway, 'late')).text()
  const tiers = await fakeBackend(t, (request, response, raw) =>
    request.body.includes('late')
      ? slow(request, response, raw)
      : answerChat(request, response, raw)
  )
  const spare = await fakeBackend(t, answerChat)
  const two = await startGateway(t, {
    backends: [{ url: tiers.url }, { url: spare.url, priority: 1 }],
    routing: { hedge: { enabled: true } }
  })
  for (let call = 0; call < TRAINING; call++) await (await ask(two, 'fast')).text()
  await (await ask(two, 'late')).text()
  assert.equal(spare.requests.length, 0)

  const held = Promise.withResolvers<void>()
  const holds: Answerer = async (...call) => {
    await held.promise
    await answerChat(...call)
  }
  const full = await race(t, [holds, slow], { backends: { max_concurrent: 1 } })
  const holding = ask(full.gateway, 'late', CHAT)
  await full.reached[0]
  await (await ask(full.gateway, 'late')).text()
  held.resolve()
  await holding
  for (const { gateway } of [whole, off, { gateway: two }, full]) {
    for (const line of gateway.lines.filter(({ msg }) => msg === 'exchange')) {
      assert.equal(line.attempts, 1)
    }
  }
})

test('the budget: of five late calls in a row one is hedged', async t => {
  const slow: Answerer = async (...call) => {
    await sleep(60)
    await answerChat(...call)
  }
  const run = await race(t, [])
  run.answers.push(afterSecond(run, answerChat), ...Array(5).fill(slow))
  for (let call = 0; call < 5; call++) await (await ask(run.gateway, 'late')).text()
  const { won, lost } = await results(run)
  assert.equal(won + lost, 1)
})

describe('one of the two fails', { concurrency: true }, () => {
  const gate = () => {
    const { promise, resolve } = Promise.withResolvers<void>()
    const after =
      (answer: Answerer): Answerer =>
      async (...call) => {
        await promise
        await answer(...call)
      }
    return { open: resolve, after }
  }
  const refuses = (_request: SeenRequest, response: ServerResponse) => {
    response
      .writeHead(500, { 'content-type': 'application/json' })
      .end('{"error":{"message":"no"}}')
  }
  const dies: Answerer = (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' }).flushHeaders()
    setImmediate(() => raw.socket.destroy())
  }

  for (const [how, fails] of Object.entries({ refuses, dies })) {
    test(`the first ${how}, and the second answers`, async t => {
      const [one, two] = [gate(), gate()]
      const run = await race(t, [one.after(fails), two.after(answerChat)])
      const answered = ask(run.gateway, 'late')
      await Promise.all(run.reached.slice(0, 2))
      one.open()
      await run.gateway.logged({ msg: 'attempt failed' })
      two.open()
      const response = await answered
      assert.match(await response.text(), /\[DONE\]/)
      assert.equal((await lateLine(run, response)).backend, await run.reached[1])
      assert.deepEqual(await results(run), { won: 1, lost: 0 })
    })

    test(`the second ${how}, and the first answers`, async t => {
      const one = gate()
      const run = await race(t, [one.after(answerChat), fails])
      const answered = ask(run.gateway, 'late')
      await run.gateway.logged({ msg: 'attempt failed' })
      one.open()
      const response = await answered
      assert.match(await response.text(), /\[DONE\]/)
      assert.equal((await lateLine(run, response)).backend, await run.reached[0])
      assert.deepEqual(await results(run), { won: 0, lost: 1 })
    })

    test(`both do: the second ${how} last, and that is what the client is told`, async t => {
      const two = gate()
      const run = await race(t, [])
      run.answers.push(afterSecond(run, refuses), two.after(fails))
      const answered = ask(run.gateway, 'late')
      await run.gateway.logged({ msg: 'attempt failed' })
      two.open()
      const response = await answered
      assert.equal(response.status, 500)
      assert.match(await response.text(), /"no"/)
      const line = await lateLine(run, response)
      assert.deepEqual([line.attempts, line.outcome], [2, 'backend_failed'])
    })
  }

  test('after both a third attempt is made, if there may be retries', async t => {
    const run = await race(t, [], {
      routing: {
        hedge: { enabled: true },
        retry: { enabled: true, max_retries: 1, initial_wait: '1ms' }
      }
    })
    const refusesToo: Answerer = (_request, response) => {
      response.writeHead(500, { 'content-type': 'application/json' })
      response.end('{"error":{"message":"another failure"}}')
    }
    run.answers.push(afterSecond(run, refuses), refusesToo, answerChat)
    const response = await ask(run.gateway, 'late')
    assert.match(await response.text(), /\[DONE\]/)
    assert.equal((await lateLine(run, response)).attempts, 3)
  })
})

test('each is asked for usage in its own way, and the answer is read as its backend was asked', async t => {
  const noOptions: Answerer = (request, response, raw) => {
    if (!request.body.includes('stream_options')) return void answerChat(request, response, raw)
    response.writeHead(400, { 'content-type': 'application/json' })
    response.end('{"error":{"message":"stream_options is not known"}}')
  }
  const open = Promise.withResolvers<void>()
  const asked: Answerer = async (...call) => {
    await open.promise
    await answerChat(...call)
  }
  const first = await race(t, [asked, noOptions, never])
  const answered = ask(first.gateway, 'late')
  await first.reached[2]
  open.resolve()
  const events = await (await answered).text()
  assert.match(events, /"!"[\s\S]*\[DONE\]/)
  assert.ok(!events.includes('usage'), 'what only the gateway has asked for is taken out')
  assert.deepEqual(await results(first), { won: 0, lost: 1 })

  const run = await race(t, [never, noOptions, noOptions])
  const response = await ask(run.gateway, 'late')
  const text = await response.text()
  assert.match(text, /"!"[\s\S]*\[DONE\]/)
  const line = await lateLine(run, response)
  assert.equal(line.backend, await run.reached[1])
  assert.deepEqual(await results(run), { won: 1, lost: 0 })
})

test('a client that leaves stops both', async t => {
  const run = await race(t, [never, never])
  const body = JSON.stringify({ ...STREAM, user: 'late' })
  const client = await rawClient(t, run.gateway.port, rawPost('/v1/chat/completions', body))
  await Promise.all(run.reached.slice(0, 2))
  client.socket.destroy()
  await Promise.all([seen(run, 'a').closed, seen(run, 'b').closed])
  const line = await run.gateway.logged({ msg: 'exchange', outcome: 'client_gone' })
  assert.equal(line.attempts, 2)
  assert.deepEqual(await results(run), { won: 0, lost: 1 })
})

test('neither answers in time: the client is told once, and both are stopped', async t => {
  for (const [limit, headers] of [
    ['500ms', {}],
    ['1m', { 'x-request-timeout': '0.5' }]
  ] as const) {
    const run = await race(t, [never, never], {
      routing: { timeout: limit, hedge: { enabled: true } }
    })
    const body = { ...STREAM, user: 'late' }
    const response = await post(`${run.gateway.url}/v1/chat/completions`, body, headers)
    assert.equal(response.status, 504)
    assert.match(await response.text(), /"backend_timeout"/)
    await Promise.all([seen(run, 'a').closed, seen(run, 'b').closed])
    const line = await lateLine(run, response)
    assert.deepEqual([line.attempts, line.outcome], [2, 'timed_out'])
    assert.deepEqual(await results(run), { won: 0, lost: 1 })
  }
})

test('a client that hears heartbeats gets the answer of whoever answers', async t => {
  const run = await race(
    t,
    [
      never,
      async (...call) => {
        await sleep(60)
        await answerChat(...call)
      }
    ],
    { server: { heartbeat: '20ms' } }
  )
  const response = await ask(run.gateway, 'late')
  assert.match(await response.text(), /^:\n\n[\s\S]*\[DONE\]/)
  assert.deepEqual(await results(run), { won: 1, lost: 0 })
})
