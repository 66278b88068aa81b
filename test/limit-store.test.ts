import assert from 'node:assert/strict'
import { hash } from 'node:crypto'
import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
import { DatabaseSync } from 'node:sqlite'
import { type TestContext, test } from 'node:test'
import { createClient } from '@redis/client'
import fc from 'fast-check'
import { pino } from 'pino'
import { MemoryStore } from '../src/limits/memory.ts'
import { DamagedKeyError, Orders, toOrder } from '../src/limits/orders.ts'
import { Periods } from '../src/limits/period.ts'
import { Quotas } from '../src/limits/quotas.ts'
import { RemoteLeases, RemoteStore } from '../src/limits/remote.ts'
import {
  type Account,
  type Amount,
  type Call,
  type Hold,
  isRefusal,
  type Lease,
  type LimitStore,
  NOTHING
} from '../src/limits/store.ts'
import { Uploads } from '../src/limits/uploads.ts'
import { checkOptions } from '../src/options.ts'
import { Redis } from '../src/store/redis.ts'
import { StorageOptions } from '../src/store/storage.ts'
import { eventually } from './helper.ts'
import {
  account,
  clock,
  joinRedis,
  type Opened,
  openMemory,
  openRedis,
  openRemote,
  type Several,
  severalReplicas,
  severalWorkers
} from './limit-stores.ts'
import { folder } from './process.ts'
import { door, REDIS, uniqueName } from './servers.ts'

/** One contract, and everything that holds limits: in memory, in another process, and in a real Redis. */

const STORES: [name: string, skip: string | false, open: (t: TestContext) => Promise<Opened>][] = [
  ['memory', false, openMemory],
  ['remote', false, openRemote],
  ['redis', REDIS.skip, openRedis]
]

type Process = Awaited<ReturnType<Several['join']>>

const tokens = (count: number): Amount => ({ tokens: count, cost: 0 })
const call = (accounts: Account[], hold: Hold = NOTHING, least = hold): Call => ({
  accounts,
  hold,
  least
})

async function granted(store: LimitStore, wanted: Call): Promise<Lease> {
  const lease = await store.reserve(wanted)
  assert.ok(!isRefusal(lease), JSON.stringify(lease))
  return lease
}

async function refused(store: LimitStore, wanted: Call) {
  const refusal = await store.reserve(wanted)
  assert.ok(isRefusal(refusal), 'let through')
  return refusal
}

/** No uploads. */
const NONE: readonly number[] = []

/** What was sent before this has arrived. */
const settled = (store: LimitStore) => store.reserve(call([account({}, 'nobody')]))

for (const [name, skip, open] of STORES) {
  test(`${name}: requests a minute, exactly, and no burst at a border`, { skip }, async t => {
    const { store, later } = await open(t)
    const wanted = call([account({ requests_per_minute: 3 })])
    const first = await granted(store, wanted)
    assert.deepEqual([first.requests?.limit, first.requests?.remaining], [3, 2])
    await later(50_000)
    await granted(store, wanted)
    await granted(store, wanted)
    const { retryAfterMs, ...refusal } = await refused(store, wanted)
    assert.deepEqual(refusal, { scope: 'per_key', limit: 'requests_per_minute', max: 3 })
    assert.ok(retryAfterMs > 8_900 && retryAfterMs <= 11_000, String(retryAfterMs))
    await later(11_000)
    await granted(store, wanted)
    await refused(store, wanted)
  })

  test(`${name}: requests a second, with a burst`, { skip }, async t => {
    const { store, later } = await open(t)
    const wanted = call([account({ requests_per_second: 0.5, burst_size: 2 })])
    await granted(store, wanted)
    await granted(store, wanted)
    const { limit, max, retryAfterMs } = await refused(store, wanted)
    assert.deepEqual([limit, max], ['requests_per_second', 0.5])
    assert.ok(retryAfterMs > 1_000 && retryAfterMs <= 2_000)
    await later(2_000)
    await granted(store, wanted)
    await refused(store, wanted)
  })

  test(`${name}: a burst alone limits how many of a minute come at once`, { skip }, async t => {
    const { store } = await open(t)
    const wanted = call([account({ requests_per_minute: 2, burst_size: 1 })])
    await granted(store, wanted)
    assert.equal((await refused(store, wanted)).limit, 'requests_per_second')
  })

  test(`${name}: slots come back when a call is settled, once`, { skip }, async t => {
    const { store } = await open(t)
    const wanted = call([account({ max_concurrent: 2 })])
    const first = await granted(store, wanted)
    await granted(store, wanted)
    const refusal = await refused(store, wanted)
    assert.deepEqual(refusal, {
      scope: 'per_key',
      limit: 'max_concurrent',
      max: 2,
      retryAfterMs: 1000
    })
    store.settle(first, NOTHING)
    store.settle(first, NOTHING)
    await settled(store)
    await granted(store, wanted)
    await refused(store, wanted)
  })

  test(`${name}: every account has room, or nothing is taken`, { skip }, async t => {
    const { store } = await open(t)
    const everybody = account({ requests_per_minute: 3 }, '', 'global')
    const alice = account({ max_concurrent: 1 })
    const bob = account({ max_concurrent: 5 }, 'bob')
    await granted(store, call([everybody, alice]))
    for (let at = 0; at < 5; at++) await refused(store, call([everybody, alice]))
    await granted(store, call([everybody, bob]))
    await granted(store, call([everybody, bob]))
    assert.equal((await refused(store, call([everybody, bob]))).scope, 'global')
  })

  test(`${name}: tokens a minute are reserved, and what is left over comes back`, {
    skip
  }, async t => {
    const { store, later } = await open(t)
    const accounts = [account({ tokens_per_minute: 1000 })]
    const first = await granted(store, call(accounts, tokens(600)))
    assert.deepEqual([first.tokens?.limit, first.tokens?.remaining], [1000, 400])
    const { limit, max } = await refused(store, call(accounts, tokens(401)))
    assert.deepEqual([limit, max], ['tokens_per_minute', 1000])
    store.settle(first, tokens(100))
    const second = await granted(store, call(accounts, tokens(900)))
    store.settle(second, tokens(900))
    await settled(store)
    const { retryAfterMs } = await refused(store, call(accounts, tokens(1)))
    assert.ok(retryAfterMs > 50_000 && retryAfterMs <= 61_000, String(retryAfterMs))
    await later(61_000)
    await granted(store, call(accounts, tokens(1000)))
  })

  test(`${name}: a call that is larger than a minute runs alone; with such a prompt, never`, {
    skip
  }, async t => {
    const { store } = await open(t)
    const accounts = [account({ tokens_per_minute: 1000 })]
    const refusal = await refused(store, call(accounts, tokens(5000), tokens(1001)))
    assert.equal(refusal.retryAfterMs, Number.POSITIVE_INFINITY)
    await granted(store, call(accounts, tokens(5000), tokens(900)))
    await refused(store, call(accounts, tokens(1)))
  })

  test(`${name}: a running call reserves more in steps, as long as there is room`, {
    skip
  }, async t => {
    const { store } = await open(t)
    const accounts = [
      account({ total_quota: 1000 }),
      account({ tokens_per_minute: 5000 }, '', 'global')
    ]
    const lease = await granted(store, call(accounts, tokens(400)))
    assert.equal(await store.extend(lease, tokens(350), tokens(256), false), true)
    assert.equal(await store.extend(lease, tokens(600), tokens(256), false), true)
    assert.equal(await store.extend(lease, tokens(850), tokens(256), false), false)
    assert.equal(await store.extend(lease, tokens(900), tokens(256), true), true)
    store.settle(lease, tokens(990))
    await settled(store)
    await granted(store, call([accounts[0]!], tokens(10)))
    const { limit } = await refused(store, call([accounts[0]!], tokens(1)))
    assert.equal(limit, 'reserved_quota')
  })

  test(`${name}: each quota reserves for itself: all that a call can need, or what is typical`, {
    skip
  }, async t => {
    const { store } = await open(t)
    const shared = account({ total_quota: 5000, reserve: 'max' }, '', 'global')
    const own = account({ total_quota: 100, reserve: 'typical', tokens_per_minute: 5000 })
    const wanted = call([shared, own], { ...tokens(3000), typical: tokens(40) })
    const lease = await granted(store, wanted)
    const { scope, limit, needed } = await refused(store, wanted)
    assert.deepEqual([scope, limit, needed], ['global', 'reserved_quota', 3000])
    const isFull = async (each: Account, amount: number) => {
      const rest = await granted(store, call([each], tokens(amount)))
      await refused(store, call([each], tokens(1)))
      store.settle(rest, NOTHING)
      await settled(store)
    }
    await isFull(shared, 2000)
    await isFull(own, 60)
    // The running call grows beyond what is typical: 10 of 40 are left, and 16 come to them.
    const more = { ...NOTHING, typical: tokens(16) }
    assert.equal(await store.extend(lease, tokens(30), more, false), true)
    await isFull(shared, 2000)
    await isFull(own, 44)
    const tooMuch = { ...NOTHING, typical: tokens(45) }
    assert.equal(await store.extend(lease, tokens(30), tooMuch, false), false)
    store.settle(lease, tokens(50))
    await settled(store)
    await isFull(shared, 4950)
    await isFull(own, 50)
  })

  test(`${name}: an estimate alone is rejected by no quota that is untouched`, {
    skip
  }, async t => {
    const { store } = await open(t)
    for (const quota_unit of ['tokens', 'cost'] as const) {
      const amount = (count: number) => ({ ...NOTHING, [quota_unit]: count })
      const accounts = [account({ total_quota: 60, quota_unit }, quota_unit)]
      const { limit, retryAfterMs } = await refused(store, call(accounts, amount(92), amount(61)))
      assert.deepEqual([limit, retryAfterMs], ['total_quota', Number.POSITIVE_INFINITY])
      const other = await granted(store, call(accounts, amount(1)))
      // It waits until nothing else is reserved.
      const waits = await refused(store, call(accounts, amount(92), amount(5)))
      assert.equal(waits.limit, 'reserved_quota')
      store.settle(other, NOTHING)
      const first = await granted(store, call(accounts, amount(92), amount(5)))
      assert.equal((await refused(store, call(accounts, amount(1)))).limit, 'reserved_quota')
      store.settle(first, amount(10))
      await settled(store)
      const { limit: spent } = await refused(store, call(accounts, amount(92), amount(5)))
      assert.equal(spent, 'total_quota')
      await granted(store, call(accounts, amount(50)))
    }
    const typical = [account({ total_quota: 60, reserve: 'typical' }, 'typical')]
    const hold = { ...tokens(2000), typical: tokens(92) }
    await granted(store, call(typical, hold, { ...tokens(1900), typical: tokens(4) }))
  })

  test(`${name}: a quota is renewed with its period`, { skip }, async t => {
    const { store, later } = await open(t)
    const accounts = [account({ total_quota: 100, quota_reset_period: 'daily' })]
    store.settle(await granted(store, call(accounts, tokens(100))), tokens(100))
    await settled(store)
    const { retryAfterMs } = await refused(store, call(accounts, tokens(1)))
    assert.ok(retryAfterMs > 0 && retryAfterMs <= 24 * 60 * 60 * 1000)
    await later(retryAfterMs + 1)
    await granted(store, call(accounts, tokens(100)))
    const never = await refused(store, call([account({ total_quota: 1 }, 'x')], tokens(2)))
    assert.equal(never.retryAfterMs, Number.POSITIVE_INFINITY)
  })

  test(`${name}: a quota of money, and one of which a part is spent already`, { skip }, async t => {
    const { store } = await open(t)
    const money = [account({ total_quota: 1.5, quota_unit: 'cost' })]
    store.settle(await granted(store, call(money, { tokens: 1, cost: 0.5 })), {
      tokens: 1,
      cost: 1.25
    })
    await settled(store)
    await refused(store, call(money, { tokens: 1, cost: 0.5 }))
    await granted(store, call(money, { tokens: 1, cost: 0.25 }))

    const begun = {
      ...account({ total_quota: 100 }, 'begun'),
      spent: { amount: 90, at: undefined }
    }
    await refused(store, call([begun], tokens(11)))
    await granted(store, call([begun], tokens(10)))
    const old = {
      ...account({ total_quota: 100, quota_reset_period: 'monthly' as const }, 'old'),
      spent: { amount: 90, at: Date.parse('2020-01-01') }
    }
    await granted(store, call([old], tokens(100)))
  })

  test(`${name}: what is forced is counted`, { skip }, async t => {
    const { store } = await open(t)
    const accounts = [account({ requests_per_minute: 1, max_concurrent: 1, total_quota: 10 })]
    await granted(store, call(accounts, tokens(10)))
    await granted(store, { ...call(accounts, tokens(10)), force: true })
    await refused(store, call(accounts))
  })

  test(`${name}: a read is rejected by rates alone, and a booking is no request`, {
    skip
  }, async t => {
    const { store } = await open(t)
    const limits = { requests_per_minute: 3, requests_per_second: 1, burst_size: 3 }
    const accounts = [
      account({ ...limits, max_concurrent: 1, tokens_per_minute: 10, total_quota: 10 })
    ]
    await granted(store, call(accounts, tokens(10)))
    await refused(store, call(accounts))
    for (let count = 0; count < 4; count++) {
      const booking = { ...call(accounts), force: true, isBooking: true }
      const lease = await granted(store, booking)
      await store.book(lease, tokens(5))
      store.settle(lease, tokens(5))
    }
    const read = { ...call(accounts), onlyRates: true }
    for (let count = 0; count < 2; count++) store.settle(await granted(store, read), tokens(0))
    await refused(store, read)
  })

  test(`${name}: in any order of calls, aborts and ends nothing goes beyond a limit, and all comes back`, {
    skip,
    timeout: 60_000
  }, async t => {
    const { store } = await open(t)
    let run = 0
    const step = fc.record({
      key: fc.constantFrom('a', 'b'),
      action: fc.constantFrom('begin', 'begin', 'grow', 'end', 'abort'),
      amount: fc.integer({ min: 1, max: 300 })
    })
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 20, maxLength: 80 }), async steps => {
        run++
        const quota = 1000
        const accountsOf = (key: string) => [
          account({ max_concurrent: 3 }, `${key}-${run}`),
          account({ total_quota: quota, max_concurrent: 4 }, `all-${run}`, 'global')
        ]
        let spent = 0
        const open: { key: string; lease: Lease; used: number }[] = []
        const held = () => open.reduce((sum, each) => sum + each.lease.held.tokens, 0)
        const booked = () => open.reduce((sum, each) => sum + each.lease.spent.tokens, 0)
        for (const { key, action, amount } of steps) {
          const running = open.find(each => each.key === key)
          if (action === 'begin') {
            const lease = await store.reserve(call(accountsOf(key), tokens(amount)))
            if (!isRefusal(lease)) open.push({ key, lease, used: 0 })
          } else if (running !== undefined && action === 'grow') {
            // It uses what it holds, and asks for more.
            running.used = running.lease.spent.tokens + running.lease.held.tokens
            await store.extend(running.lease, tokens(running.used), tokens(amount), false)
          } else if (running !== undefined) {
            const whole = running.lease.spent.tokens + running.lease.held.tokens
            const used = action === 'end' ? whole : running.used
            store.settle(running.lease, tokens(used))
            spent += used
            open.splice(open.indexOf(running), 1)
          }
          assert.ok(spent + booked() + held() <= quota, 'beyond the quota')
          assert.ok(open.length <= 4 && open.filter(each => each.key === key).length <= 3)
        }
        for (const { lease, used } of open) {
          store.settle(lease, tokens(used))
          spent += used
        }
        await settled(store)
        const left = quota - spent
        if (left > 0) {
          const lease = await granted(store, call(accountsOf('a'), tokens(left)))
          await refused(store, call(accountsOf('b'), tokens(1)))
          store.settle(lease, NOTHING)
          await settled(store)
        }
        const slots = []
        for (let slot = 0; left > 0 && slot < 3; slot++) {
          slots.push(await granted(store, call(accountsOf('a'), NOTHING)))
        }
        if (left > 0) await refused(store, call([accountsOf('a')[0]!], NOTHING))
      }),
      { numRuns: 25 }
    )
  })
}

/** Replicas take a hundred times as long as workers. LONG=1: more of both. */
const [WORKER_RUNS, REPLICA_RUNS] = process.env.LONG ? [2_000, 50] : [50, 3]

for (const [name, skip, several, numRuns] of [
  ['workers', false, severalWorkers, WORKER_RUNS],
  ['replicas', REDIS.skip, severalReplicas, REPLICA_RUNS]
] as const) {
  test(`${name}: in any order of calls and crashes nothing goes beyond a limit, and all comes back`, {
    skip,
    timeout: 60_000
  }, async t => {
    const { join, noticed } = await several(t)
    let run = 0
    const step = fc.record({
      at: fc.constantFrom(0, 1),
      action: fc.constantFrom('begin', 'begin', 'grow', 'end', 'crash'),
      amount: fc.integer({ min: 1, max: 200 })
    })
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 10, maxLength: 40 }), async steps => {
        run++
        const processes = [await join(), await join()]
        const accounts = [account({ total_quota: 1000, max_concurrent: 4 }, `all-${run}`)]
        /** What was said to be spent; a crashed call's later tokens nobody knows. */
        let spent = 0
        let open: { at: number; lease: Lease }[] = []
        for (const { at, action, amount } of steps) {
          const { store, kill } = processes[at]!
          const running = open.find(each => each.at === at)
          if (action === 'begin') {
            const lease = await store.reserve(call(accounts, tokens(amount)))
            if (!isRefusal(lease)) open.push({ at, lease })
          } else if (action === 'crash') {
            kill()
            for (const { lease } of open.filter(each => each.at === at)) spent += lease.spent.tokens
            open = open.filter(each => each.at !== at)
            await noticed()
            processes[at] = await join()
          } else if (running !== undefined) {
            const { lease } = running
            const used = tokens(lease.spent.tokens + lease.held.tokens)
            if (action === 'grow') await store.extend(lease, used, tokens(amount), false)
            else {
              store.settle(lease, used)
              await settled(store)
              spent += used.tokens
              open.splice(open.indexOf(running), 1)
            }
          }
          const taken = open.reduce(
            (sum, { lease }) => sum + lease.spent.tokens + lease.held.tokens,
            0
          )
          assert.ok(spent + taken <= 1000, 'beyond the quota')
          assert.ok(open.length <= 4, 'beyond the slots')
        }
        for (const { at, lease } of open) {
          processes[at]!.store.settle(lease, lease.spent)
          spent += lease.spent.tokens
        }
        for (const { store } of processes) await settled(store)
        const [{ store, kill }, other] = processes as [Process, Process]
        if (spent < 1000) {
          await granted(store, call(accounts, tokens(1000 - spent)))
          for (let slot = 0; slot < 3; slot++) {
            await refused(other.store, call(accounts, tokens(1)))
            await granted(store, call([account({ max_concurrent: 4 }, `all-${run}`)]))
          }
          await refused(other.store, call([account({ max_concurrent: 4 }, `all-${run}`)]))
        }
        kill()
        other.kill()
      }),
      { numRuns, endOnFailure: true }
    )
  })
}

test('redis: what a crashed process had taken comes back within 10 s', {
  skip: REDIS.skip
}, async t => {
  const { later, time } = clock()
  const prefix = uniqueName('crash')
  const way = await door(t, REDIS)
  const itsRedis = { host: '127.0.0.1', port: way.port }
  const crashed = await joinRedis(t, itsRedis, prefix, { time })
  const other = await joinRedis(t, REDIS, prefix, { time })
  const accounts = [account({ max_concurrent: 2, total_quota: 1000, tokens_per_minute: 1000 })]
  await granted(crashed, call(accounts, tokens(500)))
  const lease = await granted(crashed, call(accounts, tokens(500)))
  // What it has said that it has spent stays spent.
  await crashed.extend(lease, tokens(100), tokens(100), true)
  await refused(other, call(accounts, tokens(1)))
  way.set('shut')
  await later(7_000)
  await other.beat()
  await refused(other, call(accounts, tokens(1)))
  await later(3_000)
  await other.beat()
  await granted(other, call(accounts, tokens(900)))
  await granted(
    other,
    call(accounts, NOTHING).accounts === accounts
      ? call([account({ max_concurrent: 2 })])
      : call([])
  )
})

test('redis: a process that was not heard of for too long gets back what it has', {
  skip: REDIS.skip
}, async t => {
  const { later, time } = clock()
  const prefix = uniqueName('late')
  const late = await joinRedis(t, REDIS, prefix, { time })
  const other = await joinRedis(t, REDIS, prefix, { time })
  const accounts = [account({ max_concurrent: 2 })]
  const first = await granted(late, call(accounts))
  await granted(late, call(accounts))
  await later(20_000)
  await other.beat()
  const third = await granted(other, call(accounts))
  other.settle(third, NOTHING)
  await late.beat()
  await refused(other, call(accounts))
  late.settle(first, NOTHING)
  await settled(late)
  await granted(other, call(accounts))
  await refused(other, call(accounts))
})

test('redis: one that has lost everything is told by those who know', {
  skip: REDIS.skip
}, async t => {
  const prefix = uniqueName('lost')
  const [one, two] = [await joinRedis(t, REDIS, prefix), await joinRedis(t, REDIS, prefix)]
  const accounts = [account({ requests_per_minute: 10, max_concurrent: 5, total_quota: 1000 })]
  const lease = await granted(one, call(accounts, tokens(10)))
  for (const store of [one, two, two]) {
    store.settle(await granted(store, call(accounts, tokens(100))), tokens(100))
    await settled(store)
  }
  const client = createClient({ url: REDIS.url })
  await client.connect()
  t.after(() => client.destroy())
  await client.del(await client.keys(`${prefix}:*`))
  for (const store of [one, two]) {
    while (!(await store.reserve(call([account({}, 'nobody')])).catch(() => false)))
      await store.beat()
    await store.beat()
    assert.ok(store.isJoined)
  }
  const next = await granted(two, call(accounts, tokens(690)))
  assert.deepEqual([next.requests?.remaining], [5])
  await refused(two, call(accounts, tokens(1)))
  one.settle(lease, tokens(10))
})

test('redis: news of a key are heard everywhere, in their time, and again where that failed', {
  skip: REDIS.skip
}, async t => {
  const prefix = uniqueName('news')
  const { time, later } = clock()
  const heard = new Set<string>()
  let isBroken = true
  const one = await joinRedis(t, REDIS, prefix, { time })
  await one.tell(['gone'], 0)
  const two = await joinRedis(t, REDIS, prefix, {
    time,
    async onKeyNews(news) {
      if (isBroken) throw new Error('the disk is full')
      for (const { hash, revokedAt } of news) heard.add(`${hash} ${revokedAt !== undefined}`)
    }
  })
  await one.tell(['changed', 'too'])
  await one.tell(['rotated'], 5_000)
  await two.beat()
  assert.ok(two.isJoined)
  isBroken = false
  const hears = async (...wanted: string[]) => {
    await two.beat()
    heard.clear()
    // What came in this millisecond is told once more.
    await two.beat()
    assert.deepEqual([...heard].sort(), wanted)
  }
  await hears('changed false', 'gone true', 'too false')
  await later(4_999)
  await hears()
  await later(1)
  await hears('rotated true')
})

test('redis: what was spent while it was away is counted once', { skip: REDIS.skip }, async t => {
  const way = await door(t, REDIS)
  const near = { host: '127.0.0.1', port: way.port }
  const store = await joinRedis(t, near, uniqueName('away'), { onError: 'local' })
  const wanted = call([account({ total_quota: 1000 })], tokens(100))
  const before = await granted(store, wanted)
  way.set('shut')
  store.settle(before, tokens(100))
  store.settle(await granted(store, wanted), tokens(200))
  way.set('open')
  await store.beat()
  await store.beat()
  assert.ok(store.isJoined)
  await granted(store, { ...wanted, hold: tokens(700) })
  assert.equal((await refused(store, { ...wanted, hold: tokens(1) })).limit, 'reserved_quota')
})

test('redis: what it has heard without being heard is counted once', {
  skip: REDIS.skip
}, async t => {
  const way = await door(t, REDIS)
  const near = { host: '127.0.0.1', port: way.port }
  const prefix = uniqueName('once')
  const store = await joinRedis(t, near, prefix, { onError: 'local' })
  const other = await joinRedis(t, REDIS, prefix)
  const limited = account({ total_quota: 1000, requests_per_minute: 6 })
  const wanted = call([limited], tokens(100))
  const rejoin = async () => {
    way.set('open')
    while (!store.isJoined) await store.beat()
  }
  const left = async (quota: number) => {
    const { requests } = await granted(other, call([limited], tokens(quota)))
    return requests!.remaining
  }

  const [first, second] = [await granted(store, wanted), await granted(store, wanted)]
  way.set('unheard')
  // Redis books the one, and does not hear of the other any more.
  const extending = store.extend(first, tokens(50), tokens(100), false)
  store.settle(second, tokens(200))
  await extending
  await rejoin()
  store.settle(first, tokens(150))
  way.set('unheard')
  // This one counts as a request in Redis already, and is granted here once more.
  const third = await granted(store, wanted)
  await rejoin()
  store.settle(third, tokens(100))
  await store.beat()
  assert.equal(await left(550), 2)
  assert.equal((await refused(other, call([limited], tokens(1)))).limit, 'reserved_quota')
})

test('redis: a process joins again while its calls go on', { skip: REDIS.skip }, async t => {
  const way = await door(t, REDIS)
  const near = { host: '127.0.0.1', port: way.port }
  const store = await joinRedis(t, near, uniqueName('busy'), { onError: 'local' })
  const wanted = call([account({ total_quota: 1e9 })], tokens(1))
  let isOver = false
  let calls = 0
  const callers = Array.from({ length: 8 }, async () => {
    while (!isOver) {
      store.settle(await granted(store, wanted), tokens(1))
      calls++
      await new Promise(setImmediate)
    }
  })
  way.set('shut')
  await eventually(() => !store.isJoined)
  way.set('open')
  while (!store.isJoined) await store.beat()
  const before = calls
  await eventually(() => calls >= before + 100)
  assert.ok(store.isJoined)
  isOver = true
  await Promise.all(callers)
})

test('redis: what it has lost, and was given back unheard, is counted once', {
  skip: REDIS.skip
}, async t => {
  const way = await door(t, REDIS)
  const near = { host: '127.0.0.1', port: way.port }
  const prefix = uniqueName('given-back')
  const store = await joinRedis(t, near, prefix, { onError: 'local' })
  const wanted = call([account({ requests_per_minute: 20 })])
  for (let made = 0; made < 5; made++) await granted(store, wanted)
  const client = await createClient({ url: REDIS.url }).connect()
  t.after(() => client.close())
  await client.del(await client.keys(`${prefix}:*`))
  const { ask } = Orders.prototype
  t.mock.method(Orders.prototype, 'ask', function (this: Orders, ...args: Parameters<typeof ask>) {
    if (args[0] === 'seed') {
      t.mock.restoreAll()
      way.set('unheard')
    }
    return ask.apply(this, args)
  })
  await store.beat()
  assert.ok(!store.isJoined)
  way.set('open')
  while (!store.isJoined) await store.beat()
  assert.equal((await granted(store, wanted)).requests!.remaining, 14)
  await store.close()
  assert.equal(await client.hLen(`${prefix}:{limits}:orders`), 0)
})

test('redis: an order that comes after its process has joined anew does nothing', {
  skip: REDIS.skip
}, async t => {
  const { caches } = checkOptions(StorageOptions, {
    caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
  })
  const redis = new Redis(caches[0]!)
  t.after(() => redis.close())
  const orders = new Orders(redis, uniqueName('late'), 'me')
  const order = (number: number) => ({ number, accounts: [], spent: tokens(1), less: tokens(0) })
  assert.equal(
    ((await orders.ask('join', [], { number: 1, fresh: 'x' })) as { last: number }).last,
    0
  )
  assert.ok('settled' in (await orders.ask('settle', [], order(3))))
  assert.ok('lost' in (await orders.ask('settle', [], order(2))))
  const again = (await orders.ask('join', [], { number: 5, fresh: 'x' })) as { last: number }
  assert.equal(again.last, 3)
  assert.ok('lost' in (await orders.ask('settle', [], order(4))))
  assert.ok('settled' in (await orders.ask('settle', [], order(6))))
})

test('redis: a slot whose granting was not heard of comes back', { skip: REDIS.skip }, async t => {
  const way = await door(t, REDIS)
  const near = { host: '127.0.0.1', port: way.port }
  const store = await joinRedis(t, near, uniqueName('unheard'))
  const wanted = call([account({ max_concurrent: 1 })])
  way.set('unheard')
  await assert.rejects(store.reserve(wanted))
  way.set('open')
  await store.beat()
  await store.beat()
  assert.ok(store.isJoined)
  await granted(store, wanted)
})

test('remote: what is granted after nobody waits for it comes back', async () => {
  const { later: _, ...time } = clock()
  const counting = new MemoryStore(new Periods('UTC'), undefined, time)
  const leases = new RemoteLeases(counting, answer => setImmediate(() => store.hear(answer)))
  const store: RemoteStore = new RemoteStore(question => void leases.hear(question))
  const wanted = call([account({ max_concurrent: 1 })])
  const waiting = assert.rejects(store.reserve(wanted))
  await store.close()
  await waiting
  await new Promise(setImmediate)
  await granted(counting, wanted)
})

test('remote: uploads of several processes are counted together, until they end or their process is gone', async () => {
  const counting = new MemoryStore(new Periods('UTC'))
  const uploads = new Uploads()
  const open = () => {
    const leases = new RemoteLeases(counting, answer => store.hear(answer), uploads)
    const store: RemoteStore = new RemoteStore(question => void leases.hear(question))
    return { store, leases }
  }
  const [one, two] = [open(), open()]
  const accounts = [account({ max_concurrent: 3 })]
  const look = async ({ store }: ReturnType<typeof open>) => {
    const own = new Uploads()
    const upload = own.begin(accounts)
    const refusal = await store.look(accounts, NONE, upload)
    return { refusal, end: () => own.end(upload) }
  }
  const lease = await granted(one.store, call(accounts))
  const [first, second] = await Promise.all([look(one), look(two)])
  assert.deepEqual([first.refusal, second.refusal], [undefined, undefined])
  const third = await look(one)
  assert.equal(third.refusal?.limit, 'max_concurrent')
  third.end()
  assert.equal((await one.store.look(accounts, NONE))?.limit, 'max_concurrent')
  first.end()
  assert.equal(await one.store.look(accounts, NONE), undefined)
  assert.equal((await look(two)).refusal, undefined)
  assert.equal((await look(one)).refusal?.limit, 'max_concurrent')
  two.leases.close()
  one.store.settle(lease, NOTHING)
  assert.deepEqual(uploads.of(accounts.slice(0, 1)), [0])
  assert.equal((await look(one)).refusal, undefined)
})

test('redis: what goes far beyond a limit, as in shadow mode, stays small', {
  skip: REDIS.skip
}, async t => {
  const { later, time } = clock()
  const prefix = uniqueName('shadow')
  const store = await joinRedis(t, REDIS, prefix, { time })
  const wanted = { ...call([account({ requests_per_minute: 60 })]), force: true }
  for (let at = 0; at < 3_000; at++) {
    await later(2)
    store.settle(await granted(store, wanted), NOTHING)
  }
  await settled(store)
  const client = createClient({ url: REDIS.url })
  await client.connect()
  t.after(() => client.destroy())
  for (const key of await client.keys(`${prefix}:*`)) {
    if ((await client.type(key)) === 'string') assert.ok((await client.strLen(key)) < 16_000)
  }
})

test('redis: a quota of which nothing was spent is not kept', { skip: REDIS.skip }, async t => {
  const prefix = uniqueName('unspent')
  const store = await joinRedis(t, REDIS, prefix)
  for (const [id, spent] of [
    ['asked', 0],
    ['spent', 1]
  ] as const) {
    const accounts = [account({ total_quota: 100 }, id, 'per_model')]
    store.settle(await granted(store, call(accounts)), tokens(spent))
    await settled(store)
  }
  const client = createClient({ url: REDIS.url })
  await client.connect()
  t.after(() => client.destroy())
  const kept = []
  for (const key of await client.keys(`${prefix}:*`)) {
    if ((await client.type(key)) === 'string' && !key.endsWith(':epoch')) {
      kept.push((await client.ttl(key)) === -1)
    }
  }
  assert.deepEqual(kept.sort(), [false, false, true])
})

for (const [name, skip, open] of STORES) {
  test(`${name}: what running calls have reserved of a quota comes back, and so is worth waiting for`, {
    skip
  }, async t => {
    const { store } = await open(t)
    const accounts = [account({ total_quota: 100 })]
    const lease = await granted(store, call(accounts, tokens(80)))
    const { limit, retryAfterMs } = await refused(store, call(accounts, tokens(30)))
    assert.deepEqual([limit, retryAfterMs], ['reserved_quota', 1000])
    store.settle(lease, tokens(80))
    await settled(store)
    assert.equal((await refused(store, call(accounts, tokens(30)))).limit, 'total_quota')
  })
}

const DAY = 24 * 60 * 60 * 1000
const YEAR = 400 * DAY

async function spend(store: LimitStore, accounts: Account[], amount: number): Promise<void> {
  store.settle(await granted(store, call(accounts)), tokens(amount))
  await settled(store)
}

for (const [name, skip, open] of STORES) {
  test(`${name}: a clock that is ahead for a moment neither locks a quota nor gives it back`, {
    skip
  }, async t => {
    const { store, later } = await open(t)
    const daily = [account({ total_quota: 100, quota_reset_period: 'daily' })]
    await spend(store, daily, 60)
    await later(YEAR)
    await spend(store, daily, 30)
    await later(-YEAR)
    // 90 of today's are spent, whatever the clock said meanwhile.
    await refused(store, call(daily, tokens(11)))
    await spend(store, daily, 5)
    await refused(store, call(daily, tokens(6)))
    await granted(store, call(daily, tokens(5)))
    await later(DAY)
    await granted(store, call(daily, tokens(90)))
  })

  test(`${name}: a clock that is a little behind does not begin a period anew`, {
    skip
  }, async t => {
    const { store, later } = await open(t)
    const daily = [account({ total_quota: 100, quota_reset_period: 'daily' })]
    await later(DAY / 2 + 1_000)
    await spend(store, daily, 60)
    await later(-2_000)
    await refused(store, call(daily, tokens(41)))
    await spend(store, daily, 10)
    await later(2_000)
    await refused(store, call(daily, tokens(31)))
  })
}

test('redis: rates and slots follow a clock that is set back', { skip: REDIS.skip }, async t => {
  const { later, time } = clock()
  const prefix = uniqueName('back')
  const way = await door(t, REDIS)
  const store = await joinRedis(t, REDIS, prefix, { time })
  const doomed = await joinRedis(t, { host: '127.0.0.1', port: way.port }, prefix, { time })
  const beat = async () => {
    await store.beat()
    await store.beat()
  }
  await later(YEAR)
  await beat()
  await doomed.beat()
  const minute = call([account({ requests_per_minute: 1 }, 'minute')])
  const second = call([account({ requests_per_second: 1, burst_size: 1 }, 'second')])
  const slot = call([account({ max_concurrent: 1 }, 'slot')])
  for (const each of [minute, second]) store.settle(await granted(store, each), NOTHING)
  await granted(doomed, slot)
  way.set('shut')
  await settled(store)
  await later(-YEAR)
  await beat()
  for (const each of [minute, second, slot]) await refused(store, each)
  await later(2_000)
  await granted(store, second)
  for (let passed = 0; passed < 60_000; passed += 6_000) {
    await later(6_000)
    await beat()
  }
  await granted(store, minute)
  await granted(store, slot)
})

test('redis: a gateway whose own clock is ahead counts in the period of Redis', {
  skip: REDIS.skip
}, async t => {
  const { time } = clock()
  const prefix = uniqueName('ahead')
  const right = await joinRedis(t, REDIS, prefix, { time })
  const daily = account({ total_quota: 100, quota_reset_period: 'daily' })
  await spend(right, [daily], 60)
  const { caches } = checkOptions(StorageOptions, {
    caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
  })
  const redis = new Redis(caches[0]!)
  t.after(() => redis.close())
  const wrong = new Orders(redis, prefix, 'wrong', time)
  await wrong.ask('join', [], { number: 1, fresh: 'x' })
  const start = time() + YEAR
  const accounts = [toOrder(daily, { start, end: start + DAY })]
  const order = {
    number: 2,
    accounts,
    hold: NOTHING,
    least: NOTHING,
    spent: tokens(30),
    less: NOTHING
  }
  assert.ok('accounts' in (await wrong.ask('reserve', [daily], order)))
  assert.ok('settled' in (await wrong.ask('settle', [daily], { ...order, number: 3 })))
  await refused(right, call([daily], tokens(11)))
  await granted(right, call([daily], tokens(10)))
})

test('redis: news of a key are heard after the clock was ahead', { skip: REDIS.skip }, async t => {
  const { later, time } = clock()
  const prefix = uniqueName('news-back')
  const heard: string[] = []
  const store = await joinRedis(t, REDIS, prefix, {
    time,
    onKeyNews: async news => void heard.push(...news.map(each => each.hash))
  })
  await later(YEAR)
  await store.beat()
  await store.beat()
  await later(-YEAR)
  await store.tell(['revoked'], 0)
  await later(1_000)
  await store.beat()
  await store.beat()
  assert.ok(heard.includes('revoked'))
})

test('file: what was spent survives a restart while the clock is ahead', async t => {
  const file = `${folder(t)}/limits.db`
  const { later, ...time } = clock()
  const log = pino({ level: 'silent' })
  const reopen = async () =>
    new MemoryStore(new Periods('UTC'), await Quotas.open(file, log, time.time()), time)
  const daily = [account({ total_quota: 100, quota_reset_period: 'daily' })]
  const other = [account({ total_quota: 100, quota_reset_period: 'daily' }, 'bob')]
  let store = await reopen()
  await spend(store, daily, 60)
  await spend(store, other, 60)
  await store.close()
  await later(YEAR)
  store = await reopen()
  await spend(store, daily, 30)
  await store.close()
  await later(-YEAR)
  store = await reopen()
  t.after(() => store.close())
  await refused(store, call(daily, tokens(11)))
  await granted(store, call(daily, tokens(10)))
  await refused(store, call(other, tokens(41)))
})

test('file: quotas of a file of the first version are read', async t => {
  const file = `${folder(t)}/limits.db`
  const db = new DatabaseSync(file)
  db.exec(`CREATE TABLE quotas (account TEXT NOT NULL PRIMARY KEY, period_start INTEGER NOT NULL,
    period_end INTEGER, tokens REAL NOT NULL, cost REAL NOT NULL) WITHOUT ROWID;
    INSERT INTO quotas VALUES ('per_key:alice', 0, NULL, 60, 0)`)
  db.close()
  const quotas = await Quotas.open(file, pino({ level: 'silent' }))
  const store = new MemoryStore(new Periods('UTC'), quotas)
  t.after(() => store.close())
  await refused(store, call([account({ total_quota: 100 })], tokens(41)))
})

test('redis: news of many keys are heard, however many at the same time', {
  skip: REDIS.skip
}, async t => {
  const { later, time } = clock()
  const heard = new Set<string>()
  const largest: number[] = []
  const store = await joinRedis(t, REDIS, uniqueName('much-news'), {
    time,
    async onKeyNews(news) {
      largest.push(news.length)
      for (const each of news) heard.add(each.hash)
    }
  })
  const hashes = (name: string, count: number) =>
    Array.from({ length: count }, (_, at) => `${name}-${at}`)
  await store.tell(hashes('a', 7_000), 0)
  await later(1)
  await store.tell(hashes('b', 7_000), 0)
  await later(1)
  await store.beat()
  await store.beat()
  assert.equal(heard.size, 14_000)
  assert.ok(Math.max(...largest) <= 10_000)
  await store.tell(hashes('c', 12_000), 0)
  await later(1)
  await store.beat()
  await store.beat()
  assert.equal(heard.size, 26_000)
})

test('redis: a damaged key concerns its account alone', { skip: REDIS.skip }, async t => {
  const prefix = uniqueName('damaged')
  const client = await createClient({ url: REDIS.url }).connect()
  t.after(() => client.close())
  const name = `${prefix}:{limits}:${hash('sha256', 'per_key:alice').slice(0, 32)}`
  const damages = {
    'of another type': () => client.lPush(name, 'x'),
    'of other content': () => client.set(name, 'x')
  }
  const shared = account({ max_concurrent: 3, total_quota: 1000 }, '', 'global')
  const alice = call([shared, account({ requests_per_minute: 3 })], tokens(100))
  const bob = call([shared, account({}, 'bob')], tokens(100))
  const way = await door(t, REDIS)
  const near = { host: '127.0.0.1', port: way.port }
  const local = await joinRedis(t, near, prefix, { onError: 'local' })
  const deny = await joinRedis(t, REDIS, prefix)
  let spent = 0
  const settle = async (store: LimitStore, lease: Lease, amount: number) => {
    spent += amount
    store.settle(lease, tokens(amount))
    await settled(store)
  }
  for (const [damage, make] of Object.entries(damages)) {
    await client.del(name)
    const before = await granted(deny, alice)
    await client.del(name)
    await make()
    await assert.rejects(deny.reserve(alice), { name: 'StoreError' })
    await deny.extend(before, tokens(60), tokens(10), true)
    // The other process counts what its limits leave, and the accounts that are not damaged in Redis.
    const beside = await granted(local, alice)
    assert.equal(await local.extend(beside, tokens(100), tokens(16), false), true)
    const third = await granted(local, bob)
    assert.equal((await refused(deny, bob)).limit, 'max_concurrent', damage)
    await settle(deny, before, 70)
    await settle(deny, await granted(deny, bob), 10)
    await settle(local, beside, 110)
    await settle(local, third, 20)
    assert.ok(deny.isJoined && local.isJoined)
    const left = await granted(deny, call([shared], tokens(1000 - spent)))
    assert.equal((await refused(local, call([shared], tokens(1)))).limit, 'reserved_quota')
    deny.settle(left, NOTHING)
    await settled(deny)
  }
  // Three in a minute are for two processes one for each.
  await granted(local, { ...alice, force: true })
  assert.equal((await refused(local, alice)).limit, 'requests_per_minute')

  way.set('shut')
  while (local.isJoined) await local.beat()
  await granted(local, { ...call([shared, account({}, 'alice')]), force: true })
  way.set('open')
  while (!local.isJoined) await local.beat()
  assert.equal(await client.get(name), 'x')
  await granted(deny, bob)
  assert.equal((await refused(deny, bob)).limit, 'max_concurrent')
})

test('redis: an error of the server, or of what all requests need, means that it is away', {
  skip: REDIS.skip
}, async t => {
  const prefix = uniqueName('server')
  const client = await createClient({ url: REDIS.url }).connect()
  t.after(() => client.close())
  const store = await joinRedis(t, REDIS, prefix, { onError: 'local' })
  await client.del(`${prefix}:{limits}:replicas`)
  await client.set(`${prefix}:{limits}:replicas`, 'x')
  await store.beat()
  assert.ok(!store.isJoined)

  const replies: [reply: string, isOfKeys: boolean][] = [
    ['WRONGTYPE Operation against a key holding the wrong kind of value script: ab', true],
    ['ERR user_script:12: attempt to index a nil value script: ab', true],
    ['ERR Error running script (call to f_ab): @user_script:1: WRONGTYPE Operation', true],
    ['ERR Error running script (call to f_ab): @user_script: 1: -OOM command not allowed', false],
    ['OOM command not allowed when used memory > maxmemory', false],
    ['READONLY You can not write against a read only replica.', false],
    ['LOADING Redis is loading the dataset in memory', false],
    ['NOAUTH Authentication required.', false],
    ['CLUSTERDOWN Hash slot not served', false]
  ]
  for (const [reply, isOfKeys] of replies) {
    const server = createServer(socket => {
      socket.on('error', () => {})
      socket.on('data', data => {
        // The handshake is accepted.
        for (const [command] of data.toString().matchAll(/\r\n(HELLO|CLIENT|EVALSHA)\r\n/gi)) {
          const isOrder = command.trim().toUpperCase() === 'EVALSHA'
          socket.write(isOrder ? `-${reply}\r\n` : '+OK\r\n')
        }
      })
    }).listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    const { caches } = checkOptions(StorageOptions, {
      caches: [{ name: 'default', driver: 'redis', addr: `127.0.0.1:${port}` }]
    })
    const redis = new Redis(caches[0]!)
    const error = await new Orders(redis, prefix, 'me').ask('look', [], {}).catch(each => each)
    assert.equal(error instanceof DamagedKeyError, isOfKeys, `${reply}: ${error}`)
    await redis.close()
    server.close()
  }
})
