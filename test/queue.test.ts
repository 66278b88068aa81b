import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseConfig } from '../src/config.ts'
import type { GatewayError } from '../src/errors.ts'
import { Attained } from '../src/pool/attained.ts'
import { type Priority, Queue, type QueuePolicy, type Waiter } from '../src/pool/queue.ts'
import {
  chunk,
  DONE,
  eventually,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'

/** More calls than the backends can take: who waits, for how long, and who is turned away. */

/** A backend that ends answers when it is told, one for each call of `next`. */
async function held(t: TestContext) {
  const waiting: { body: string; end: () => void }[] = []
  let onCome = () => {}
  const state = { most: 0, under: 0 }
  const backend = await fakeBackend(t, ({ body }, response) => {
    state.under++
    state.most = Math.max(state.most, state.under)
    response.on('close', () => state.under--)
    const end = () => response.writeHead(200, { 'content-type': 'application/json' }).end('{}')
    waiting.push({ body, end })
    onCome()
  })
  return Object.assign(backend, {
    state,
    /** The body of the call that came first and is not answered; it is answered now. */
    async next() {
      while (waiting.length === 0) await new Promise<void>(resolve => (onCome = resolve))
      const { body, end } = waiting.shift()!
      end()
      return JSON.parse(body).user as string
    }
  })
}

type Gateway = Awaited<ReturnType<typeof startGateway>>

/** Resolves when so many calls wait. */
async function waiting(gateway: Gateway, count: number, priority: Priority = 'interactive') {
  await eventually(
    async () => (await gateway.metric('llmproxy_queue_waiting', { priority })) === count
  )
}

const keys = ['a', 'b', 'c'].map(name => ({ key: `sk-${name}`, name }))

function ask(
  gateway: { url: string },
  user: string,
  headers: Record<string, string> = {},
  signal?: AbortSignal
) {
  const key = { authorization: `Bearer sk-${user[0]}` }
  const body = { model: 'm', user }
  return post(`${gateway.url}/v1/embeddings`, body, { ...key, ...headers }, signal)
}

async function full(t: TestContext, config: Record<string, unknown> = {}, backends: object[] = []) {
  const backend = await held(t)
  const gateway = await startGateway(t, {
    backends: [{ name: 'gpu', url: backend.url, max_concurrent: 1 }, ...backends],
    auth: {
      enabled: true,
      skip_paths: ['/metrics'],
      keys: [...keys, { key: 'sk-z', name: 'z', priority: 'batch' }]
    },
    ...config
  })
  return { backend, gateway }
}

test('who comes when all are full waits, and goes on when there is room', async t => {
  const { backend, gateway } = await full(t)
  const answers = ['a1', 'a2', 'a3'].map(user => ask(gateway, user))
  await waiting(gateway, 2)
  const order = [await backend.next(), await backend.next(), await backend.next()]
  assert.deepEqual(
    order.slice(1),
    ['a1', 'a2', 'a3'].filter(user => user !== order[0])
  )
  for (const answer of answers) assert.equal((await answer).status, 200)
  assert.equal(backend.state.most, 1)
  const line = await gateway.logged({ msg: 'exchange' })
  assert.ok(
    gateway.lines.some(each => Number(each.queuedMs) > 0),
    JSON.stringify(line)
  )
  assert.equal(await gateway.metric('llmproxy_queue_wait_seconds_count', {}), 2)
})

test('callers take turns, and batches come after all others', async t => {
  const { backend, gateway } = await full(t)
  const first = ask(gateway, 'c0')
  await backend.request(0)
  const users = ['z1', 'a1', 'a2', 'a3', 'b1']
  const answers = []
  for (const [at, user] of users.entries()) {
    answers.push(ask(gateway, user, user === 'a2' ? { 'x-llmproxy-priority': 'batch' } : {}))
    await waiting(gateway, users.slice(1, at + 1).filter(each => each !== 'a2').length)
    await waiting(gateway, users.slice(0, at + 1).filter(each => /z|a2/.test(each)).length, 'batch')
  }
  const order = []
  for (let i = 0; i < 6; i++) order.push(await backend.next())
  await Promise.all([first, ...answers])
  assert.deepEqual(order, ['c0', 'a1', 'b1', 'a3', 'z1', 'a2'])
})

test('a backend of a higher tier takes what the first has no room for', async t => {
  const other = await held(t)
  const { backend, gateway } = await full(t, {}, [{ url: other.url, priority: 1 }])
  const answers = [ask(gateway, 'a1')]
  await backend.request(0)
  answers.push(ask(gateway, 'a2'))
  assert.equal(await other.next(), 'a2')
  assert.equal(await backend.next(), 'a1')
  await Promise.all(answers)
})

test('calls that wait go to a backend that a reload has brought', async t => {
  const other = await held(t)
  const { backend, gateway } = await full(t)
  const answers = [ask(gateway, 'a1')]
  await backend.request(0)
  answers.push(ask(gateway, 'a2'))
  await waiting(gateway, 1)
  const backends = `[{name: gpu, url: "${backend.url}", max_concurrent: 1}, {url: "${other.url}"}]`
  const auth = '{enabled: true, keys: [sk-a]}'
  await gateway.control.reload(parseConfig(`backends: ${backends}\nauth: ${auth}\n`, 'x.yaml', {}))
  assert.equal(await other.next(), 'a2')
  assert.equal(await backend.next(), 'a1')
  await Promise.all(answers)
})

test('another model does not take the place of one that is only waited for', async t => {
  const other = await held(t)
  const { backend, gateway } = await full(t, { routing: { model_fallbacks: { m: ['n'] } } }, [
    { url: other.url, models: ['n'] }
  ])
  const answers = [ask(gateway, 'a1')]
  await backend.request(0)
  answers.push(ask(gateway, 'a2'))
  await waiting(gateway, 1)
  assert.deepEqual([await backend.next(), await backend.next()], ['a1', 'a2'])
  await Promise.all(answers)
})

for (const users of ['b2 a3', 'a3 b2']) {
  test(`whoever nobody is left for is told so, while another model may serve others: ${users}`, async t => {
    const other = await held(t)
    const { backend, gateway } = await full(
      t,
      {
        routing: { model_fallbacks: { m: ['n'] } },
        admin: { enabled: true, token: 't' },
        auth: {
          enabled: true,
          skip_paths: ['/metrics'],
          keys: [
            { key: 'sk-a', name: 'a' },
            { key: 'sk-b', name: 'b', models: ['m'], priority: 'batch' }
          ]
        }
      },
      [{ name: 'small', url: other.url, models: ['n'], max_concurrent: 1 }]
    )
    const key = { authorization: 'Bearer sk-a' }
    const first = post(`${gateway.url}/v1/embeddings`, { model: 'n', user: 'a0' }, key)
    const second = ask(gateway, 'b1')
    await Promise.all([other.request(0), backend.request(0)])
    const answers: Record<string, Promise<Response>> = {}
    for (const user of users.split(' ')) {
      answers[user] = ask(gateway, user)
      await waiting(gateway, 1, user === 'a3' ? 'interactive' : 'batch')
    }
    await fetch(`${gateway.url}/admin/backends/gpu/drain`, {
      method: 'POST',
      headers: { authorization: 'Bearer t' }
    })
    assert.equal((await (await answers.b2!).json()).error.code, 'no_backend')
    assert.deepEqual([await other.next(), await other.next()], ['a0', 'a3'])
    assert.equal(await backend.next(), 'b1')
    for (const answer of [first, second, answers.a3!]) assert.equal((await answer).status, 200)
  })
}

test('who leaves the queue costs nothing, and holds nobody up', async t => {
  const { backend, gateway } = await full(t)
  const first = ask(gateway, 'a1')
  await backend.request(0)
  const leaver = new AbortController()
  const left = ask(gateway, 'a2', {}, leaver.signal)
  await waiting(gateway, 1)
  leaver.abort()
  await assert.rejects(left)
  await waiting(gateway, 0)
  const last = ask(gateway, 'a3')
  await waiting(gateway, 1)
  assert.deepEqual([await backend.next(), await backend.next()], ['a1', 'a3'])
  await Promise.all([first, last])
  assert.equal(backend.requests.length, 2)
})

test('the queue has an end, and waiting too', async t => {
  const { backend, gateway } = await full(t, {
    routing: { queue: { max_size: 1, timeout: '300ms' } }
  })
  const first = ask(gateway, 'a1')
  await backend.request(0)
  const late = ask(gateway, 'a2')
  await waiting(gateway, 1)
  const full503 = await ask(gateway, 'b1')
  for (const response of [full503, await late]) {
    assert.equal(response.status, 503)
    assert.ok(Number(response.headers.get('retry-after')) >= 1)
    assert.equal((await response.json()).error.code, 'overloaded')
  }
  assert.equal(await gateway.metric('llmproxy_queue_turned_away_total', { reason: 'full' }), 1)
  assert.equal(await gateway.metric('llmproxy_queue_turned_away_total', { reason: 'timeout' }), 1)
  await backend.next()
  assert.equal((await first).status, 200)
})

test('the time that a backend had a call is no time in the queue', async t => {
  let fail = () => {}
  const failing = await fakeBackend(t, (_request, response) => {
    fail = () => response.writeHead(500).end()
  })
  const retry = { enabled: true, max_retries: 1 }
  const { backend, gateway } = await full(
    t,
    { routing: { retry, queue: { timeout: '1500ms' }, circuit_breaker: { enabled: false } } },
    [{ name: 'bad', url: failing.url, priority: 1, max_concurrent: 1 }]
  )
  const answers = [ask(gateway, 'a1')]
  await backend.request(0)
  const leaver = new AbortController()
  const left = ask(gateway, 'b1', {}, leaver.signal)
  await failing.request(0)
  answers.push(ask(gateway, 'a2'))
  await waiting(gateway, 1)
  leaver.abort()
  await assert.rejects(left)
  await failing.request(1)
  await sleep(1600)
  fail()
  await waiting(gateway, 1)
  assert.deepEqual([await backend.next(), await backend.next()], ['a1', 'a2'])
  for (const answer of await Promise.all(answers)) assert.equal(answer.status, 200)
})

test('an Anthropic client reads that the server is overloaded', async t => {
  const { backend, gateway } = await full(t, { routing: { queue: { max_size: 0 } } })
  const first = ask(gateway, 'a1')
  await backend.request(0)
  const body = { model: 'm', max_tokens: 1, messages: [] }
  const response = await post(`${gateway.url}/v1/messages`, body, { 'x-api-key': 'sk-a' })
  assert.equal((await response.json()).error.type, 'overloaded_error')
  await backend.next()
  await first
})

test('a gateway that is closed lets nobody wait for ever', async t => {
  const { backend, gateway } = await full(t, { server: { drain_timeout: '50ms' } })
  void ask(gateway, 'a1').catch(() => {})
  await backend.request(0)
  const client = await rawClient(t, gateway.port)
  client.socket.write(rawPost('/v1/embeddings', '{"model":"m"}', ['authorization: Bearer sk-a']))
  await waiting(gateway, 1)
  await gateway.fastify.close()
  assert.match(client.received, /503/)
})

/** A call that is served when there is room. */
function waiter(caller: string, room: { left: number }, served: string[], more: object = {}) {
  return {
    caller,
    priority: 'interactive',
    lane: 'm',
    bytes: 1,
    since: 0,
    deadline: Number.POSITIVE_INFINITY,
    isReady: () => room.left > 0,
    proceed() {
      room.left--
      served.push(caller)
    },
    turnAway(_error: GatewayError) {},
    ...more
  } satisfies Waiter as Waiter
}

test('every worker must have a share of a backend', () => {
  const config = (workers: number) =>
    `server: {workers: ${workers}}\nbackends: [{url: "http://a", max_concurrent: 3}]\n`
  parseConfig(config(3), 'x.yaml', {})
  assert.throws(
    () => parseConfig(config(4), 'x.yaml', {}),
    /x\.yaml:2:\d+ backends\[0\]\.max_concurrent: must be at least as many as server\.workers.*3 for 4/
  )
})

function queueOf(t: TestContext, policy: Partial<QueuePolicy> = {}) {
  const queue = new Queue({ maxSize: 100, maxBytes: 1000, timeout: 600_000, ...policy })
  const joined: Waiter[] = []
  t.after(() => joined.forEach(each => void queue.leave(each)))
  const join = (each: Waiter, now: number) => {
    joined.push(each)
    return queue.join(each, now)
  }
  return { queue, join }
}

test('a call that cannot make it in time is refused at once, with the time that it would take', t => {
  const { queue, join } = queueOf(t)
  const room = { left: 0 }
  const served: string[] = []
  for (let at = 0; at < 20; at++) assert.equal(join(waiter(`c${at}`, room, served), 0), undefined)
  // A place every two seconds.
  for (const now of [2000, 4000, 6000, 8000]) {
    room.left = 1
    queue.serve(now)
  }
  assert.equal(served.length, 4)
  const hasty = waiter('late', room, served, { since: 8000, deadline: 8000 + 5000 })
  const error = join(hasty, 8000)!
  assert.equal(error.code, 'overloaded')
  assert.equal(error.headers['retry-after'], '34')
  assert.equal(queue.turnedAway.deadline, 1)
  const patient = waiter('late', room, served, { since: 8000, deadline: 8000 + 40_000 })
  assert.equal(join(patient, 8000), undefined)
  assert.equal(queue.position(patient, 8000), 16)
})

test('who floods waits behind his own: others are not told that they would wait for too long', t => {
  const { queue, join } = queueOf(t)
  const room = { left: 0 }
  const served: string[] = []
  queue.attained.add('flood', 500, 0)
  for (let at = 0; at < 50; at++) join(waiter('flood', room, served), 0)
  for (const now of [1000, 2000, 3000]) {
    room.left = 1
    queue.serve(now)
  }
  const normal = waiter('normal', room, served, { since: 3000, deadline: 3000 + 4000 })
  assert.equal(join(normal, 3000), undefined)
  assert.equal(queue.position(normal, 3000), 0)
  assert.ok(join(waiter('flood', room, served, { since: 3000, deadline: 20_000 }), 3000))
  room.left = 1
  queue.serve(4000)
  assert.equal(served.at(-1), 'normal')
})

test('after quiet times the queue takes calls as before', t => {
  const { queue, join } = queueOf(t, { timeout: 60_000 })
  const room = { left: 0 }
  const served: string[] = []
  for (const start of [0, 120_000, 10_000_000]) {
    for (const name of ['a', 'b', 'c']) {
      assert.equal(join(waiter(name, room, served, { since: start }), start), undefined)
    }
    room.left = 3
    queue.serve(start + 100)
  }
  assert.equal(served.length, 9)
})

test('in a full queue the longest line loses its latest call, batches first', t => {
  const { join } = queueOf(t, { maxSize: 4 })
  const room = { left: 0 }
  const lost: string[] = []
  const from = (caller: string, since: number, more: object = {}) =>
    join(
      waiter(caller, room, [], { since, turnAway: () => lost.push(`${caller}${since}`), ...more }),
      since
    )
  for (const since of [1, 2, 3, 4]) assert.equal(from('flood', since), undefined)
  assert.equal(from('flood', 5)!.code, 'overloaded')
  assert.equal(from('normal', 6), undefined)
  assert.deepEqual(lost, ['flood4'])
  assert.ok(from('batch', 7, { priority: 'batch' }))
  assert.equal(from('normal', 8), undefined)
  assert.deepEqual(lost, ['flood4', 'flood3'])
  assert.ok(from('normal', 9))
})

test('calls for other backends do not wait behind those that must', t => {
  const { queue, join } = queueOf(t)
  const served: string[] = []
  const [none, some] = [{ left: 0 }, { left: 1 }]
  join(waiter('a', none, served, { lane: 'slow' }), 0)
  join(waiter('b', some, served, { lane: 'fast' }), 0)
  queue.serve(1)
  assert.deepEqual(served, ['b'])
})

test('one that must wait again as it goes on does not keep the others from their turn', t => {
  const { queue, join } = queueOf(t)
  const room = { left: 1 }
  const served: string[] = []
  const again = waiter('again', room, served, {
    proceed() {
      served.push('again')
      if (served.length < 10) join(again, 1)
    }
  })
  join(waiter('batch', room, served, { priority: 'batch' }), 0)
  join(again, 0)
  queue.serve(1)
  assert.deepEqual(served, ['again', 'batch'])
  assert.equal(queue.size, 1)
})

test('a call that is too large for the queue drives nobody out of it', t => {
  const { queue, join } = queueOf(t)
  const room = { left: 0 }
  for (const since of [1, 2]) join(waiter('a', room, [], { since, bytes: 400 }), since)
  assert.equal(join(waiter('b', room, [], { since: 3, bytes: 1001 }), 3)!.code, 'overloaded')
  assert.equal(queue.size, 2)
})

test('one that fails as it goes on is told so, and holds nobody up', t => {
  const { queue, join } = queueOf(t)
  const served: string[] = []
  const codes: string[] = []
  const room = { left: 2 }
  const broken = {
    proceed() {
      room.left--
      throw new Error('broken')
    },
    turnAway: (error: GatewayError) => codes.push(error.code)
  }
  join(waiter('a', room, served, broken), 0)
  join(waiter('b', room, served), 0)
  queue.serve(1)
  assert.deepEqual([codes, served], [['internal_error'], ['b']])
})

test('nobody is put off for ever: a batch, or whoever has had much', t => {
  for (const more of [{ priority: 'batch' }, {}]) {
    const { queue, join } = queueOf(t)
    const room = { left: 0 }
    const served: string[] = []
    queue.attained.add('heavy', 1_000_000, 0)
    join(waiter('heavy', room, served, more), 0)
    let now = 0
    while (!served.includes('heavy')) {
      now += 1000
      assert.ok(now <= 35_000, `not served after ${now} ms`)
      join(waiter('others', room, served, { since: now }), now)
      room.left = 1
      queue.serve(now)
    }
  }
})

test('what callers have had is forgotten by half each minute, and of some only', () => {
  const attained = new Attained()
  attained.add('alice', 100, 0)
  assert.equal(attained.of('alice', 60_000), 50)
  for (let at = 0; at < 10_000; at++) attained.add(`c${at}`, 1, 0)
  assert.equal(attained.of('alice', 0), 0)
  // Who comes back begins with what the others have had, and not before them all.
  attained.add('carol', 40, 0)
  attained.enter('carol', 0)
  attained.enter('dave', 0)
  attained.enter('erin', 0)
  assert.equal(attained.of('erin', 0), 40)
  for (const each of ['carol', 'dave', 'erin']) attained.leave(each)
  // A call counts before it is known what it takes.
  const begun = attained.begin('bob', 0)
  assert.equal(attained.of('bob', 0), begun.tokens)
  const usage = { promptTokens: 30, cachedTokens: 10, completionTokens: 5, totalTokens: 35 }
  attained.end('bob', begun, { ...usage, exactness: 'exact' }, 0)
  assert.equal(attained.of('bob', 0), 30)
  // What is taken back of it is what is left of it, however long it took.
  const long = attained.begin('fred', 0)
  attained.end('fred', long, { ...usage, exactness: 'exact' }, 300_000)
  assert.equal(Math.round(attained.of('fred', 300_000)), 30)
})

/** A run ends when one of the ten has had so many responses, however long that takes. */
const RESPONSES = process.env.LONG ? 80 : 5
const SLOTS = 16

test('one caller floods, and ten hardly notice', async t => {
  let floods = 0
  let begun = 0
  const backend = await fakeBackend(t, async ({ body }, response) => {
    if (JSON.parse(body).user === 'flood') floods++
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    await sleep(40)
    response.write(chunk('word'))
    // Answers differ in length, so that places become free one after another.
    begun++
    await sleep(60 + 120 * ((begun * 0.618034) % 1))
    response.end(chunk('', { finish_reason: 'stop' }) + DONE)
  })
  const names = Array.from({ length: 10 }, (_, at) => `normal-${at}`)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, max_concurrent: SLOTS }],
    auth: { enabled: true, keys: [...names, 'flood'].map(name => ({ key: `sk-${name}`, name })) }
  })
  const call = async (user: string) => {
    const key = { authorization: `Bearer sk-${user}` }
    const body = { model: 'm', user, stream: true }
    const before = { floods, at: performance.now() }
    const response = await post(`${gateway.url}/v1/chat/completions`, body, key)
    const overtaken = floods - before.floods
    const reader = response.body!.getReader()
    await reader.read()
    const ms = performance.now() - before.at
    while (!(await reader.read()).done);
    return { ms, overtaken }
  }
  const run = async (flood: number) => {
    let isOver = false
    const waits: { overtaken: number; ms: number }[] = []
    const counts = new Map<string, number>()
    const work = async (name: string) => {
      while (!isOver) {
        const waited = await call(name)
        const count = (counts.get(name) ?? 0) + 1
        counts.set(name, count)
        if (name === 'flood') continue
        isOver ||= count === RESPONSES
        waits.push(waited)
        await sleep(200)
      }
    }
    await Promise.all([...names, ...Array(flood).fill('flood')].map(work))
    const p90 = (of: 'overtaken' | 'ms') =>
      waits.map(each => each[of]).sort((a, b) => a - b)[Math.floor(waits.length * 0.9)]!
    return { overtaken: p90('overtaken'), ms: p90('ms'), counts }
  }
  const calm = await run(0)
  const flooded = await run(100)
  const shares = names.map(name => flooded.counts.get(name)!)
  const sum = shares.reduce((all, each) => all + each, 0)
  const fairness = sum ** 2 / (shares.length * shares.reduce((all, each) => all + each ** 2, 0))
  t.diagnostic(
    `p90 of the time to the first token: ${calm.ms.toFixed(1)} ms without the flood, ` +
      `${flooded.ms.toFixed(1)} ms with it; calls of the flood that began meanwhile: ` +
      `${flooded.overtaken} of ${flooded.counts.get('flood')}; Jain's fairness index of the ten: ${fairness.toFixed(3)}`
  )
  assert.ok(fairness > 0.95)
  // Those that it took to get to the gateway, and not the hundred that had been waiting.
  assert.ok(flooded.overtaken <= 50, `${flooded.overtaken} calls of the flood went before`)
  // How long that takes is the machine's affair, unless it has nothing else to do.
  if (process.env.LONG) assert.ok(flooded.ms <= calm.ms * 1.5)
})
