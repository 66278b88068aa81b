import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { isRefusal, NOTHING } from '../src/limits/store.ts'
import { account, type Opened, openMemory, openRedis } from './limit-stores.ts'
import { REDIS } from './servers.ts'

/**
 * How many calls limits let through, beside how many a log of all of them would. LONG=1: for as long as docs/limits.md
 * says.
 */

const MINUTE = 60_000
const LASTS = (process.env.LONG ? 5 : 2) * MINUTE

/** When calls come (ms). */
function every(gap: number, count = 1, offset = 0): number[] {
  const times: number[] = []
  for (let at = offset; at < LASTS; at += gap) for (let n = 0; n < count; n++) times.push(at)
  return times
}

const border = (count: number) =>
  [...every(MINUTE, count, MINUTE - 500), ...every(MINUTE, count, MINUTE + 500)].sort(
    (a, b) => a - b
  )

const TRAFFIC: [name: string, limit: number, times: number[]][] = [
  ['steady: a call every 500 ms', 60, every(500)],
  ['bursty: 50 calls every 20 s', 60, every(20_000, 50)],
  ['60 calls 0.5 s before and after each full minute', 60, border(60)],
  ['steady: a call every 30 ms', 1000, every(30)],
  ['bursty: 800 calls every 20 s', 1000, every(20_000, 800)],
  ['1,000 calls 0.5 s before and after each full minute', 1000, border(1000)]
]

type Limiter = (time: number) => boolean | Promise<boolean>

/** A log of every call that was let through: nobody can do better. */
function ideal(limit: number): Limiter {
  const taken: number[] = []
  return time => {
    while (taken.length > 0 && taken[0]! <= time - MINUTE) taken.shift()
    return taken.length < limit && taken.push(time) > 0
  }
}

/** What counts anew from each full minute on. */
function fixedWindow(limit: number): Limiter {
  const counts = new Map<number, number>()
  return time => {
    const minute = Math.floor(time / MINUTE)
    const count = counts.get(minute) ?? 0
    counts.set(minute, count + 1)
    return count < limit
  }
}

async function ours(open: (t: TestContext) => Promise<Opened>, t: TestContext, limit: number) {
  const { store, later } = await open(t)
  const call = {
    accounts: [account({ requests_per_minute: limit })],
    hold: NOTHING,
    least: NOTHING
  }
  let now = 0
  return async (time: number) => {
    if (time > now) await later(time - now)
    now = time
    const lease = await store.reserve(call)
    if (isRefusal(lease)) return false
    store.settle(lease, NOTHING)
    return true
  }
}

/** How many were let through, and how many at most in any 60 s. */
async function run(times: number[], limiter: Limiter): Promise<{ all: number; most: number }> {
  const taken: number[] = []
  for (const time of times) if (await limiter(time)) taken.push(time)
  let most = 0
  for (let first = 0, last = 0; last < taken.length; last++) {
    while (taken[first]! <= taken[last]! - MINUTE) first++
    most = Math.max(most, last - first + 1)
  }
  return { all: taken.length, most }
}

for (const [name, limit, times] of TRAFFIC) {
  test(`${name}, at a limit of ${limit} a minute`, { skip: REDIS.skip }, async t => {
    const best = await run(times, ideal(limit))
    const memory = await run(times, await ours(openMemory, t, limit))
    const redis = await run(times, await ours(openRedis, t, limit))
    const fixed = await run(times, fixedWindow(limit))
    const cells = [best, memory, redis, fixed].map(({ all, most }) => `${all} / ${most}`)
    t.diagnostic(`| ${name} | ${limit} | ${times.length} | ${cells.join(' | ')} |`)
    for (const { all, most } of [memory, redis]) {
      assert.ok(most <= limit)
      assert.ok(all <= best.all && all >= best.all * 0.98)
    }
    if (limit <= 512) assert.equal(memory.all, best.all)
  })
}
