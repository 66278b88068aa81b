import type { TestContext } from 'node:test'
import { pino } from 'pino'
import { LimitSet, type OwnLimits } from '../src/limits/limits.ts'
import { MemoryStore } from '../src/limits/memory.ts'
import { Periods } from '../src/limits/period.ts'
import { RedisStore } from '../src/limits/redis.ts'
import { RemoteLeases, RemoteStore } from '../src/limits/remote.ts'
import { type Account, type LimitStore, type Scope, toAccount } from '../src/limits/store.ts'
import { checkOptions } from '../src/options.ts'
import { StorageOptions } from '../src/store/storage.ts'
import { door, REDIS, uniqueName } from './servers.ts'

/** Everything that holds limits, with a time of its own. */

export interface Opened {
  store: LimitStore
  /** Time goes on (ms). */
  later(ms: number): Promise<void>
}

const UTC = new Periods('UTC')
/** A Thursday. */
const START = Date.parse('2026-01-15T12:00:00Z')

/** A time that stands still until it is told to go on. */
export function clock() {
  let now = 0
  return {
    now: () => now,
    time: () => START + now,
    async later(ms: number) {
      now += ms
    }
  }
}

export async function openMemory(): Promise<Opened> {
  const { later, ...time } = clock()
  return { store: new MemoryStore(UTC, undefined, time), later }
}

export async function openRemote(): Promise<Opened> {
  const { later, ...time } = clock()
  const leases = new RemoteLeases(new MemoryStore(UTC, undefined, time), answer =>
    setImmediate(() => store.hear(JSON.parse(JSON.stringify(answer))))
  )
  const store: RemoteStore = new RemoteStore(question => {
    setImmediate(() => void leases.hear(JSON.parse(JSON.stringify(question))))
  })
  return { store, later }
}

/** Processes that share limits, and can be killed. */
export interface Several {
  join(): Promise<{ store: LimitStore; kill(): void }>
  /** Resolves when the others know that the killed ones are dead. */
  noticed(): Promise<void>
}

export async function severalWorkers(): Promise<Several> {
  const counting = new MemoryStore(UTC)
  return {
    async join() {
      let isDead = false
      const leases = new RemoteLeases(counting, answer => {
        if (!isDead) setImmediate(() => store.hear(answer))
      })
      const store: RemoteStore = new RemoteStore(question => {
        if (!isDead) setImmediate(() => void leases.hear(question))
      })
      return {
        store,
        kill() {
          isDead = true
          leases.close()
        }
      }
    },
    async noticed() {
      await new Promise(setImmediate)
    }
  }
}

export async function severalReplicas(t: TestContext): Promise<Several> {
  const { later, time } = clock()
  const prefix = uniqueName('several')
  const alive = new Set<RedisStore>()
  return {
    async join() {
      const way = await door(t, REDIS)
      const itsRedis = { host: '127.0.0.1', port: way.port }
      const store = await joinRedis(t, itsRedis, prefix, { time })
      alive.add(store)
      return {
        store,
        kill() {
          alive.delete(store)
          way.set('shut')
          // Nothing of it comes through.
          void store.close()
        }
      }
    },
    async noticed() {
      for (let passed = 0; passed < 9_000; passed += 3_000) {
        await later(3_000)
        for (const store of alive) await joined(store)
      }
    }
  }
}

export async function openRedis(t: TestContext): Promise<Opened & { store: RedisStore }> {
  const { later, time } = clock()
  const store = await joinRedis(t, REDIS, uniqueName('limits'), { time })
  return {
    store,
    async later(ms) {
      await later(ms)
      // One may be under way that was sent before that.
      await store.beat()
      await joined(store)
    }
  }
}

/** Resolves after a beat that Redis has answered: on a busy machine one may time out. */
async function joined(store: RedisStore): Promise<void> {
  do await store.beat()
  while (!store.isJoined)
}

/** One more process that shares the limits in a Redis. */
export async function joinRedis(
  t: TestContext,
  { host, port }: { host: string; port: number },
  prefix: string,
  more: Partial<ConstructorParameters<typeof RedisStore>[0]> = {}
): Promise<RedisStore> {
  const { caches } = checkOptions(StorageOptions, {
    caches: [{ name: 'default', driver: 'redis', addr: `${host}:${port}` }]
  })
  const store = new RedisStore({
    cache: caches[0]!,
    prefix,
    periods: UTC,
    onError: 'deny',
    log: pino({ level: 'silent' }),
    ...more
  })
  t.after(() => store.close())
  await joined(store)
  return store
}

export function account(own: OwnLimits, id = 'alice', scope: Scope = 'per_key'): Account {
  return toAccount(scope, id, { ...checkOptions(LimitSet, {}), ...own })
}
