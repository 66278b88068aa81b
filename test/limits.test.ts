import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import fc from 'fast-check'
import { goDuration } from '../src/limits/headers.ts'
import { LimitSet, type OwnLimits } from '../src/limits/limits.ts'
import { MemoryStore } from '../src/limits/memory.ts'
import { Periods } from '../src/limits/period.ts'
import { SlidingWindow, TokenBucket } from '../src/limits/rates.ts'
import { isRefusal, type Lease, NOTHING, toAccount } from '../src/limits/store.ts'
import { checkOptions } from '../src/options.ts'
import {
  CHAT,
  chunk,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  type TestGateway
} from './helper.ts'

const NONE = checkOptions(LimitSet, {})

test('a window lets through exactly its limit in any minute, for limits of any size', () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 3000 }),
      fc.array(fc.integer({ min: 0, max: 400 }), { minLength: 1, maxLength: 3000 }),
      (limit, gaps) => {
        const window = new SlidingWindow(limit)
        const taken: number[] = []
        let now = 0
        for (const gap of gaps) {
          now += gap
          if (window.wait(now) === 0) {
            window.take(now)
            taken.push(now)
          }
          const inWindow = taken.filter(time => time > now - 60_000).length
          assert.ok(inWindow <= limit)
        }
      }
    ),
    { numRuns: 30 }
  )
})

test('a window holds its limit and its count while reloads change the limit', () => {
  const limit = fc.oneof(fc.integer({ min: 1, max: 512 }), fc.integer({ min: 513, max: 5000 }))
  fc.assert(
    fc.property(
      limit,
      fc.array(
        fc.record({
          limit,
          calls: fc.integer({ min: 1, max: 1500 }),
          gap: fc.double({ min: 0, max: 20, noNaN: true })
        }),
        { minLength: 2, maxLength: 8 }
      ),
      (first, steps) => {
        const window = new SlidingWindow(first)
        const taken: number[] = []
        let now = 0
        for (const { limit, calls, gap } of steps) {
          window.limit = limit
          for (let call = 0; call < calls; call++) {
            now += gap
            if (window.wait(now) > 0) continue
            window.take(now)
            taken.push(now)
            const inWindow = taken.filter(time => time > now - 60_000).length
            assert.ok(inWindow <= limit)
          }
          const within = (ms: number) => taken.filter(time => time > now - ms).length
          // A place may come back a grain late.
          assert.ok(window.remaining(now) <= Math.max(0, limit - within(60_000)))
          assert.ok(window.remaining(now) >= Math.max(0, limit - within(60_000 + 60_000 / 512)))
        }
      }
    ),
    { numRuns: 60 }
  )
})

test('a window that was full when its limit was raised counts on', () => {
  const window = new SlidingWindow(500)
  for (let at = 0; at < 500; at++) window.take(at)
  window.limit = 5000
  for (let at = 0; at < 4500; at++) window.take(1000 + at * 10)
  assert.equal(window.remaining(46_000), 0)
  assert.ok(window.wait(46_000) > 0)
  assert.equal(window.remaining(200_000), 5000)
})

test('a window of up to 512 is exact to the millisecond, a larger one at most 1/512 late', () => {
  const small = new SlidingWindow(60)
  for (let at = 0; at < 60; at++) small.take(at * 10)
  assert.equal(small.wait(1000), 59_000)
  assert.equal(small.wait(60_000), 0)

  const large = new SlidingWindow(1_000_000)
  for (let count = 0; count < 1_000_000; count++) large.take(count * 0.05)
  const wait = large.wait(50_000)
  assert.ok(wait >= 10_000 && wait <= 10_000 + 60_000 / 512 + 1, String(wait))
})

test('the window’s memory does not grow with its limit', () => {
  const window = new SlidingWindow(5_000_000)
  for (let count = 0; count < 2_000_000; count++) window.take(count * 0.03)
  const before = process.memoryUsage().arrayBuffers
  for (let count = 0; count < 1_000_000; count++) window.take(60_000 + count * 0.03)
  assert.ok(process.memoryUsage().arrayBuffers - before < 100_000)
})

test('a bucket gives a burst and then its rate', () => {
  const bucket = new TokenBucket(10, 20)
  let taken = 0
  while (bucket.wait(0) === 0) {
    bucket.take(0)
    taken++
  }
  assert.equal(taken, 20)
  assert.equal(bucket.wait(0), 100)
  assert.equal(bucket.wait(100), 0)
})

/** A store whose time stands still until it is set. */
function storeAt() {
  const clock = { at: 0, now: () => clock.at, time: () => clock.at }
  return { clock, store: new MemoryStore(new Periods('UTC'), undefined, clock) }
}

const callOf = (own: OwnLimits, id = 'k') => ({
  accounts: [toAccount('per_key', id, { ...NONE, ...own })],
  hold: NOTHING,
  least: NOTHING
})

test('a burst does not widen the minute', () => {
  const { clock, store } = storeAt()
  const call = callOf({ requests_per_minute: 60, burst_size: 10 })
  let allowed = 0
  for (clock.at = 0; clock.at < 60_000; clock.at += 10) {
    if (!isRefusal(store.reserve(call))) allowed++
  }
  assert.equal(allowed, 60)
  const fresh = storeAt().store
  let atOnce = 0
  while (!isRefusal(fresh.reserve(call))) atOnce++
  assert.equal(atOnce, 10)
})

test('forgotten keys do not pile up', () => {
  const { clock, store } = storeAt()
  for (let key = 0; key < 50_000; key++) {
    clock.at = key * 100
    const lease = store.reserve(callOf({ requests_per_minute: 1 }, String(key)))
    assert.ok(!isRefusal(lease))
    store.settle(lease, NOTHING)
  }
  assert.ok(store.size < 50_000 / 10, String(store.size))
})

async function start(t: TestContext, rate_limit: object, more: object = {}) {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, ...rate_limit },
    ...more
  })
  const call = (key?: string, path = '/v1/embeddings') =>
    post(gateway.url + path, CHAT, key === undefined ? {} : { authorization: `Bearer ${key}` })
  return { backend, gateway, call }
}

const AUTH = { auth: { enabled: true, keys: ['a', 'b'], skip_paths: ['/health', '/metrics'] } }

test('what is forgotten is never what a call is just taking', async () => {
  const store = new MemoryStore(new Periods('UTC'))
  const one = (id: string) => ({
    accounts: [
      toAccount('global', '', { ...NONE, max_concurrent: 1 }),
      toAccount('per_key', id, { ...NONE, requests_per_minute: 5 })
    ],
    hold: NOTHING,
    least: NOTHING
  })
  for (let at = 0; at < 3000; at++) {
    const lease = await store.reserve(one(`key-${at}`))
    assert.ok(!isRefusal(lease))
    assert.ok(isRefusal(await store.reserve(one('other'))), `after ${at}`)
    store.settle(lease, NOTHING)
  }
})

test('whoever asks for many models makes nobody’s quota forgotten', async () => {
  const store = new MemoryStore(new Periods('UTC'))
  const quota = { ...NONE, total_quota: 100 }
  const one = (key: string, model: string) => ({
    accounts: [toAccount('per_key', key, quota), toAccount('per_model', model, quota)],
    hold: NOTHING,
    least: NOTHING
  })
  store.settle((await store.reserve(one('alice', 'llama'))) as Lease, { tokens: 100, cost: 0 })
  for (let at = 0; at < 110_000; at++) {
    store.settle((await store.reserve(one('eve', `model-${at}`))) as Lease, NOTHING)
  }
  assert.ok(isRefusal(await store.reserve(one('alice', 'other'))))
  assert.ok(store.size < 5_000, String(store.size))
})

test('requests a minute, for each key, over all routes, with OpenAI’s headers and body', async t => {
  const { call, gateway, backend } = await start(t, { per_key: { requests_per_minute: 3 } }, AUTH)
  const first = await call('a')
  assert.equal(first.headers.get('x-ratelimit-limit-requests'), '3')
  assert.equal(first.headers.get('x-ratelimit-remaining-requests'), '2')
  assert.match(first.headers.get('x-ratelimit-reset-requests')!, /^(1m0s|[\d.]+s)$/)
  await call('a', '/v1/chat/completions')
  await call('a', '/tokenize')
  const refused = await call('a')
  assert.equal(refused.status, 429)
  const seconds = Number(refused.headers.get('retry-after'))
  assert.ok(seconds > 50 && seconds <= 60)
  assert.ok(Number(refused.headers.get('retry-after-ms')) > 50_000)
  assert.equal(refused.headers.get('x-ratelimit-remaining-requests'), '0')
  const { error } = await refused.json()
  assert.equal(error.type, 'rate_limit_error')
  assert.equal(error.code, 'rate_limit_exceeded')
  assert.match(error.message, /limited to 3 requests a minute/)
  assert.equal((await call('b')).status, 200, 'the other key has its own')
  const anthropic = await call('a', '/v1/messages')
  assert.equal((await anthropic.json()).error.type, 'rate_limit_error')
  assert.equal(backend.requests.length, 4)
  assert.equal(
    await gateway.metric('llmproxy_limit_refusals_total', { limit: 'requests_per_minute' }),
    2
  )
  assert.equal((await fetch(`${gateway.url}/health`)).status, 200, 'health has no limit')
})

test('requests a second, global', async t => {
  const { call } = await start(t, { global: { requests_per_second: 1, burst_size: 2 } })
  assert.equal((await call()).status, 200)
  assert.equal((await call('x')).status, 200)
  const refused = await call('y')
  assert.equal(refused.status, 429)
  assert.equal(refused.headers.get('retry-after'), '1')
  assert.match((await refused.json()).error.message, /This server/)
})

test('max_concurrent counts until the last byte', async t => {
  const held: import('node:http').ServerResponse[] = []
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    held.push(response)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, per_key: { max_concurrent: 2 } }
  })
  const text = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }))
  const [first] = await Promise.all(
    [1, 2].map(async () => {
      const client = await rawClient(t, gateway.port, text)
      await client.until(/Hi/)
      return client
    })
  )
  const refused = await post(`${gateway.url}/v1/chat/completions`, CHAT)
  assert.equal(refused.status, 429)
  assert.equal(refused.headers.get('retry-after'), '1')
  assert.match((await refused.json()).error.message, /2 requests at the same time/)
  held[0]!.end('data: [DONE]\n\n')
  await gateway.logged({ msg: 'exchange', outcome: 'ok' })
  const next = await rawClient(t, gateway.port, text)
  await next.until(/ 200 OK/)
  first!.socket.destroy()
})

test('without auth each client address has its own count, whatever key it shows', async t => {
  const { call } = await start(t, { per_key: { requests_per_minute: 1 } })
  assert.equal((await call('x')).status, 200)
  assert.equal((await call('y')).status, 429)
})

test('a refused upload is refused before it is sent', async t => {
  const { call, gateway } = await start(t, { per_key: { requests_per_minute: 1 } })
  await call()
  const client = await rawClient(t, gateway.port)
  client.socket.write('POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ncontent-length: 60000000\r\n\r\n')
  assert.match(await client.until(/\}\}/), / 429 /)
})

test('an answer of the backend costs its slot and no more, even when it fails', async t => {
  const backend = await fakeBackend(t, (_request, _response, raw) => raw.socket.destroy())
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, per_key: { max_concurrent: 1 } }
  })
  for (let call = 0; call < 5; call++) {
    assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 502)
  }
})

test('durations in headers are written as OpenAI writes them', () => {
  assert.equal(goDuration(12), '12ms')
  assert.equal(goDuration(1000), '1s')
  assert.equal(goDuration(1500), '1.5s')
  assert.equal(goDuration(60_000), '1m0s')
  assert.equal(goDuration(360_000), '6m0s')
  assert.equal(goDuration(59_990), '1m0s')
  assert.equal(goDuration(119_850), '2m0s')
})

test('an IPv6 network counts as one address', async t => {
  const { gateway } = await start(
    t,
    { per_key: { requests_per_minute: 1 } },
    { server: { trust_proxy: true } }
  )
  const status = async (address: string) =>
    (await post(`${gateway.url}/v1/embeddings`, CHAT, { 'x-forwarded-for': address })).status
  assert.equal(await status('2001:db8::1'), 200)
  assert.equal(await status('2001:db8::2'), 429)
  assert.equal(await status('2001:db8:0:1::1'), 200)
})

test('without burst_size twice the rate may come at once', () => {
  const { store } = storeAt()
  let atOnce = 0
  while (!isRefusal(store.reserve(callOf({ requests_per_second: 5 })))) atOnce++
  assert.equal(atOnce, 10)
})

test('a limit of 1 is one request, and of an address where there is no key', async t => {
  const limits = { per_key: { requests_per_minute: 1 } }
  const message = async (gateway: TestGateway, headers = {}) => {
    await post(`${gateway.url}/v1/embeddings`, CHAT, headers)
    const refused = await post(`${gateway.url}/v1/embeddings`, CHAT, headers)
    return (await refused.json()).error.message
  }
  const open = await start(t, limits)
  assert.match(
    await message(open.gateway),
    /^This client address is limited to 1 request a minute\./
  )
  const closed = await start(t, limits, { auth: { enabled: true, keys: ['k'] } })
  assert.match(
    await message(closed.gateway, { authorization: 'Bearer k' }),
    /^This API key is limited to 1 request a minute\./
  )
})
