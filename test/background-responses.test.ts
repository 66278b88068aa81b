import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { type TestContext, test } from 'node:test'
import Fastify from 'fastify'
import gateway from '../src/app.ts'
import { charge } from '../src/metering/billed.ts'
import { StoredResponses } from '../src/routes/stored-responses.ts'
import { UnreadResponses } from '../src/routes/unread-responses.ts'
import { eventually, fakeBackend, post, startGateway } from './helper.ts'
import { folder } from './process.ts'
import { REDIS, uniqueName } from './servers.ts'
import {
  BODY,
  DONE,
  json,
  KEY,
  leaveUnread,
  NOTHING,
  passTime,
  response,
  rowOf,
  setUp,
  spent,
  typed
} from './stored.ts'

/** What responses made in the background take of limits, of backends, of the gateway's own file, and of its end. */

/** A backend that makes a new response for each request; `shown` says how each one is shown. */
async function severalResponses(t: TestContext, rate_limit: object, more: object = {}) {
  const shown: Record<string, object | undefined> = {}
  let count = 0
  const backend = await fakeBackend(t, (request, reply) => {
    const isMade = request.method === 'POST' && !request.url.includes('/cancel')
    const id = isMade ? `resp_${++count}` : request.url.split('/')[3]!
    if (request.method === 'DELETE') shown[id] = undefined
    else if (isMade) shown[id] = response('queued', { id })
    const body = shown[id] ?? { error: { message: 'unknown' } }
    const status = shown[id] === undefined && request.method !== 'DELETE' ? 404 : 200
    reply.writeHead(status, { 'content-type': 'application/json' }).end(json(body))
  })
  const gateway = await startGateway(
    t,
    {
      backends: [{ name: 'gpu', url: backend.url, models: [{ public: 'm' }] }],
      auth: { enabled: true, keys: [{ key: 'sk-1', name: 'ann' }], skip_paths: ['/metrics'] },
      rate_limit: { enabled: true, ...rate_limit },
      ...more
    },
    {},
    folder(t)
  )
  const url = `${gateway.url}/v1/responses`
  /** The status of a request; all that it counts is counted then. */
  const ended = async (sent: Promise<Response>) => {
    const { status, headers } = await sent
    await gateway.logged({ msg: 'exchange', requestId: headers.get('x-llmproxy-request-id') })
    return status
  }
  return {
    backend,
    gateway,
    make: (more: object = {}) =>
      ended(post(url, { ...BODY, max_output_tokens: 1000, ...more }, KEY)),
    read: (id: string) => ended(fetch(`${url}/${id}`, { headers: KEY })),
    cancel: (id: string) => ended(post(`${url}/${id}/cancel`, {}, KEY)),
    remove: (id: string) => ended(fetch(`${url}/${id}`, { method: 'DELETE', headers: KEY })),
    finish(id: string, output_tokens: number, status = 'completed') {
      const usage = { input_tokens: 10, output_tokens, total_tokens: 10 + output_tokens }
      shown[id] = response(status, { id, usage })
    }
  }
}

for (const storage of ['memory', 'redis']) {
  const skip = storage === 'redis' && REDIS.skip
  const where = () =>
    storage === 'memory'
      ? [{}, {}]
      : [
          { storage, redis_prefix: uniqueName('background') },
          {
            storage: {
              caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
            }
          }
        ]

  test(`${storage}: a response in the background keeps its reservation until it is billed`, {
    skip
  }, async t => {
    const [limits, more] = where()
    const per_key = { total_quota: 5000 }
    const { make, read, finish } = await severalResponses(t, { per_key, ...limits }, more)
    const statuses: number[] = []
    for (let at = 0; at < 6; at++) statuses.push(await make())
    assert.deepEqual(statuses, [200, 200, 200, 200, 429, 429])
    for (let at = 1; at <= 4; at++) {
      finish(`resp_${at}`, 10)
      assert.equal(await read(`resp_${at}`), 200)
    }
    // 80 tokens are spent, so four more have room.
    const later: number[] = []
    for (let at = 0; at < 5; at++) later.push(await make())
    assert.deepEqual(later, [200, 200, 200, 200, 429])
  })

  test(`${storage}: a response in the background keeps its slot until it is over, and can be read and stopped`, {
    skip
  }, async t => {
    const [limits, more] = where()
    const per_key = { max_concurrent: 2 }
    const set = await severalResponses(t, { per_key, ...limits }, more)
    const { make, read, cancel, remove, finish, gateway } = set
    assert.deepEqual([await make(), await make(), await make()], [200, 200, 429])
    assert.equal(await read('resp_1'), 200)
    assert.equal(await make(), 429)
    finish('resp_1', 10, 'cancelled')
    assert.equal(await cancel('resp_1'), 200)
    assert.deepEqual([await make(), await make()], [200, 429])
    // The backend does not have it any more: the gateway notices soon.
    assert.equal(await remove('resp_2'), 200)
    await gateway.logged({ msg: 'exchange', exactness: 'at_least' })
    await eventually(async () => (await make()) === 200)
    assert.equal(await make(), 429)
  })
}

test('a caller whose quota is used up can read what is billed, and stop what still costs', async t => {
  const per_key = { total_quota: 3000 }
  const { make, read, cancel, remove, finish } = await severalResponses(t, { per_key })
  assert.deepEqual([await make(), await make()], [200, 200])
  finish('resp_1', 5000)
  assert.equal(await read('resp_1'), 200)
  assert.equal(await make(), 429)
  assert.equal(await read('resp_1'), 200)
  assert.equal(await read('resp_2'), 200)
  assert.equal(await cancel('resp_2'), 200)
  assert.equal(await remove('resp_2'), 200)
  assert.equal(await remove('resp_unknown'), 404)
})

test('reads of a response count as requests, and stopping it is never rejected', async t => {
  const per_key = { requests_per_minute: 3 }
  const { make, read, cancel, remove } = await severalResponses(t, { per_key })
  assert.deepEqual([await make(), await read('resp_1')], [200, 200])
  assert.deepEqual([await read('resp_1'), await read('resp_1')], [200, 429])
  assert.deepEqual([await cancel('resp_1'), await remove('resp_1')], [200, 200])
})

test('a settlement counts tokens, and takes no request and no slot of its caller', async t => {
  const per_key = { requests_per_minute: 3, max_concurrent: 1, total_quota: 100_000 }
  const rate_limit = { enabled: true, per_key }
  const { state, record, dataDir, again, backend } = await leaveUnread(t, { rate_limit })
  const hung = Promise.withResolvers<void>()
  state.wait = () => hung.promise
  passTime(dataDir)
  const { url } = await again()
  await backend.request(1)
  const chat = async () =>
    (await post(`${url}/v1/embeddings`, { model: 'public', input: 'x' }, KEY)).status
  state.wait = undefined
  assert.equal(await chat(), 200)
  await record()
  state.shown = DONE
  hung.resolve()
  assert.deepEqual(spent(await record()), [30, 1000, 'exact'])
  state.shown = {}
  assert.deepEqual([await chat(), await chat(), await chat()], [200, 200, 429])
  const db = new DatabaseSync(join(dataDir, 'limits.db'))
  const tokens = Number(db.prepare('SELECT tokens FROM quotas').get()!.tokens)
  assert.ok(tokens >= 1030 && tokens < 1050, String(tokens))
  db.close()
})

test('a poll that hangs is ended as soon as the gateway is told to stop', async t => {
  const { state, dataDir, again, backend } = await leaveUnread(t)
  state.wait = () => new Promise(() => {})
  passTime(dataDir)
  const { fastify } = await again()
  const poll = await backend.request(1)
  const began = performance.now()
  await fastify.close()
  await poll.closed
  assert.ok(performance.now() - began < 5_000, 'the drain timeout is 30 s')
  assert.equal(rowOf(dataDir).billed, null)
})

const OWNER = { caller: undefined, address: undefined }
const UNREAD = { backend: 'b', model: 'm', caller: 'a', unbilled: 5 }
const QUIET = { warn() {}, error() {} }

test('settlements have a pace, and end when they are stopped', async t => {
  const responses = new StoredResponses(join(folder(t), 'r.db'), QUIET)
  t.after(() => responses.close())
  for (let at = 0; at < 20; at++) responses.add({ ...UNREAD, id: `resp_${at}` }, OWNER)
  await responses.hasten('none')
  for (let at = 0; at < 20; at++) await responses.hasten(`resp_${at}`)
  const times: number[] = []
  const all = Promise.withResolvers<void>()
  const pace = 30
  const settle = async () => {
    if (times.push(performance.now()) === 20) all.resolve()
  }
  const unread = new UnreadResponses(responses, settle, { pace, processes: 2 })
  const begun = performance.now()
  unread.wakeAt(0)
  await all.promise
  // A timer may be a millisecond early. Late ones are no fault: each is counted from the beginning.
  assert.ok(times[8]! - begun > 2 * pace - 5, String(times))
  assert.ok(times[16]! - begun > 4 * pace - 10, String(times))
  unread.stop()

  for (let at = 0; at < 20; at++) await responses.hasten(`resp_${at}`)
  const stopped = new UnreadResponses(responses, () => assert.fail('is stopped'))
  stopped.wakeAt(0)
  const { claim } = responses
  const claimed = Promise.withResolvers<void>()
  responses.claim = async count => {
    stopped.stop()
    const result = await claim.call(responses, count)
    setImmediate(claimed.resolve)
    return result
  }
  await claimed.promise
})

test('a locked file stops no read of it, and few writes wait for it', async t => {
  const file = join(folder(t), 'r.db')
  const warnings: object[] = []
  const responses = new StoredResponses(file, {
    ...QUIET,
    warn: (each: object) => warnings.push(each)
  })
  t.after(() => responses.close())
  responses.add({ ...UNREAD, id: 'resp_1' }, OWNER)
  await responses.claim(0)
  const other = new DatabaseSync(file)
  other.exec('BEGIN EXCLUSIVE')
  for (let at = 0; at < 1_005; at++) responses.add({ ...UNREAD, id: `resp_x${at}` })
  const fresh = new StoredResponses(file, QUIET)
  t.after(() => fresh.close())
  assert.equal((await fresh.find('resp_1'))?.backend, 'b')
  assert.equal(await responses.find('resp_unknown'), undefined)
  assert.equal(warnings.length, 5)
  other.exec('ROLLBACK')
  other.close()
})

test('a file that does not respond rejects all that waits for it after one timeout', async t => {
  const file = join(folder(t), 'r.db')
  const responses = new StoredResponses(file, QUIET)
  responses.add({ ...UNREAD, id: 'resp_1' }, OWNER)
  await responses.claim(0)
  await responses.close()
  const other = new DatabaseSync(file)
  other.exec('PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE')
  const timeout = 400
  const locked = new StoredResponses(file, QUIET, { timeout })
  const began = performance.now()
  const found = await Promise.allSettled(['a', 'b', 'c', 'd'].map(id => locked.find(id)))
  assert.deepEqual(
    found.map(each => each.status === 'rejected' && each.reason.name),
    Array(4).fill('DatabaseError')
  )
  assert.ok(performance.now() - began < 3 * timeout)
  other.close()
  await locked.close()
})

test('parts of a stream that are read one after the other are billed, each once', async t => {
  const { state, config, record } = await setUp(t)
  const gateway = await startGateway(t, config)
  const url = `${gateway.url}/v1/responses`
  await (await post(url, BODY, KEY)).text()
  await record()
  const words = Array.from({ length: 90 }, (_, at) => ` word${at}`)
  state.hasEnd = false
  const read = async (from: number, to: number) => {
    state.events = words
      .slice(from, to)
      .map(delta => typed({ type: 'response.output_text.delta', delta }))
    const abort = new AbortController()
    const path = `${url}/resp_1?stream=true&starting_after=${from}`
    const { body } = await fetch(path, { headers: KEY, signal: abort.signal })
    let seen = ''
    for await (const piece of body!.pipeThrough(new TextDecoderStream())) {
      seen += piece
      if (seen.includes(`word${to - 1}"`)) break
    }
    abort.abort()
    return (await record()).output_tokens
  }
  const parts = [await read(60, 90), await read(0, 30), await read(30, 60)]
  for (const part of parts) assert.ok(part >= 30, String(parts))
  assert.equal(await read(0, 90), 0)
  const all = parts.reduce((sum, part) => sum + part, 0)
  assert.ok(all <= 2 * 90 * 3, String(all))

  state.shown = DONE
  await (await fetch(`${url}/resp_1`, { headers: KEY })).text()
  assert.equal((await record()).output_tokens, 1000 - all)
})

test('the end of a stream is not taken for the whole response', async t => {
  const { state, config, record } = await setUp(t)
  const gateway = await startGateway(t, config)
  const url = `${gateway.url}/v1/responses`
  await (await post(url, BODY, KEY)).text()
  await record()
  state.events = [
    typed({ type: 'response.output_text.delta', delta: ' three' }),
    typed({ type: 'response.completed', response: response('completed') })
  ]
  await (await fetch(`${url}/resp_1?stream=true&starting_after=80`, { headers: KEY })).text()
  const part = (await record()).output_tokens
  assert.ok(part > 0 && part < 5, String(part))
  state.shown = DONE
  await (await fetch(`${url}/resp_1`, { headers: KEY })).text()
  assert.equal((await record()).output_tokens, 1000 - part)
})

test('a part is billed by how much of it is new, and 64 parts are remembered', () => {
  const usage = (completionTokens: number) => ({
    promptTokens: 5,
    completionTokens,
    totalTokens: 5 + completionTokens,
    exactness: 'counted' as const
  })
  const first = charge(usage(20), [0, 10])
  const second = charge(usage(20), [5, 15], first.bill)
  assert.deepEqual([first.due?.totalTokens, second.due?.totalTokens], [25, 10])
  assert.deepEqual(second.bill.parts, [[0, 15]])
  const whole = charge(usage(100), undefined, second.bill)
  assert.deepEqual([whole.due?.completionTokens, whole.bill.completionTokens], [70, 100])
  let { bill } = first
  for (let at = 1; at < 200; at++) ({ bill } = charge(usage(1), [at * 20, at * 20 + 1], bill))
  assert.equal(bill.parts?.length, 64)
})

test('a backend that uses an id again begins a new bill', async t => {
  const { state, config, record } = await setUp(t)
  const gateway = await startGateway(t, config)
  const url = `${gateway.url}/v1/responses`
  for (let round = 0; round < 3; round++) {
    state.shown = response('queued')
    await (await post(url, BODY, KEY)).text()
    assert.deepEqual(spent(await record()), NOTHING)
    state.shown = DONE
    await (await fetch(`${url}/resp_1`, { headers: KEY })).text()
    assert.deepEqual(spent(await record()), [30, 1000, 'exact'])
  }
})

for (const isEmbedded of [false, true]) {
  const where = isEmbedded ? 'an embedding server' : 'the gateway'
  test(`a slash at the end of a path does not hide a response from its bill in ${where}`, async t => {
    const { state, config, record } = await setUp(t)
    let origin: string
    if (isEmbedded) {
      const fastify = Fastify()
      t.after(() => fastify.close())
      await fastify.register(gateway, config as never)
      origin = await fastify.listen({ host: '127.0.0.1', port: 0 })
    } else origin = (await startGateway(t, config)).url
    const url = `${origin}/v1/responses`
    await (await post(url, BODY, KEY)).text()
    await record()
    state.shown = DONE
    const status = isEmbedded ? 404 : 200
    const read = await fetch(`${url}/resp_1/`, { headers: KEY })
    assert.equal(read.status, status)
    await read.text()
    assert.equal((await post(`${url}/resp_1/cancel/`, {}, KEY)).status, status)
    if (isEmbedded) await (await fetch(`${url}/resp_1`, { headers: KEY })).text()
    assert.deepEqual(spent(await record()), [30, 1000, 'exact'])
    if (!isEmbedded) assert.deepEqual(spent(await record()), NOTHING)
  })
}

test('a client cannot pretend to be the gateway, also while a settlement is under way', async t => {
  const { state, dataDir, again, backend } = await leaveUnread(t)
  state.wait = () => new Promise(() => {})
  passTime(dataDir)
  const { url } = await again()
  const { headers } = await backend.request(1)
  assert.equal(headers['x-llmproxy-settlement'], undefined)
  for (const token of ['undefined', 'true', '', randomUUID(), headers['x-request-id']]) {
    const sent = { 'x-llmproxy-settlement': String(token) }
    assert.equal((await fetch(`${url}/v1/responses/resp_1`, { headers: sent })).status, 401)
  }
})
