import { resolve } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import rateLimit, { normalizeIP } from '@fastify/rate-limit'
import type { FastifyBaseLogger, FastifyPluginAsync, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import { type Static, Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { type Exchange, withExchanges } from '../exchange.ts'
import type { Issue } from '../issues.ts'
import { matchesModel } from '../keys/key.ts'
import { limitHeaders } from '../limits/headers.ts'
import { LimitSet, type Limits, limitFields } from '../limits/limits.ts'
import { MemoryStore } from '../limits/memory.ts'
import { isTimeZone, Periods } from '../limits/period.ts'
import { Quotas } from '../limits/quotas.ts'
import { RedisStore } from '../limits/redis.ts'
import { tooMany, usedUp } from '../limits/refusal.ts'
import {
  type Account,
  type Amount,
  isRefusal,
  type Lease,
  type LimitStore,
  NOTHING,
  type Refusal,
  type Scope,
  StoreError
} from '../limits/store.ts'
import { Typical } from '../limits/typical.ts'
import { checkOptions, type Given, NotBuilt, OptionsError, Section } from '../options.ts'
import { StorageOptions, storageIssues } from '../store/storage.ts'
import type { UsageOptions } from './usage.ts'

/**
 * Limits: how many requests and tokens, how many calls at the same time, and how much in a day or a month;
 * for everybody together, for each API key (each client address where no key is known), each user and each
 * model. A call takes its place in all of them in one step, or in none. What it will spend is reserved as it
 * begins, and settled when the exchange closes.
 *
 * @example
 * await fastify.register(limits, { per_key: { requests_per_minute: 60, max_concurrent: 3 } })
 * fastify.get('/hello', async () => 'hello')
 */

const part = (description: string) =>
  Section(
    { enabled: Type.Boolean({ default: true, description: 'Switches these on' }), ...limitFields },
    description
  )
const named = (description: string) =>
  Type.Record(Type.String({ minLength: 1 }), LimitSet, { default: {}, description })

export const LimitsOptions = Section(
  {
    enabled: Type.Boolean({
      default: false,
      description: 'Switches these limits on; those that stand with a key always hold'
    }),
    mode: Type.Enum(['enforce', 'shadow'], {
      default: 'enforce',
      description: 'shadow: refuses nothing, but counts and logs what would have been refused'
    }),
    storage: Type.Enum(['memory', 'redis'], {
      default: 'memory',
      description: 'memory: counted in this process; redis: for all processes that share it'
    }),
    redis: Type.String({
      default: 'default',
      description: 'For storage: redis, its name in storage.caches'
    }),
    redis_prefix: Type.String({
      minLength: 1,
      default: 'llmproxy',
      description: 'Begins all names in Redis; gateways with the same one share their limits'
    }),
    on_store_error: Type.Enum(['local', 'allow', 'deny'], {
      default: 'local',
      description:
        'While Redis is away: local: each process lets its share through; allow: everything; deny: 503'
    }),
    on_exhausted: Type.Enum(['finish', 'stop'], {
      default: 'finish',
      description:
        'A stream that would go beyond a budget of tokens or money: is finished, or ended with an error'
    }),
    time_zone: Type.String({
      default: 'UTC',
      check: isTimeZone,
      expects: 'a time zone such as Europe/Berlin',
      description: 'By whose midnight quotas are renewed'
    }),
    script: NotBuilt('Script that decides'),
    global: part('For everybody together'),
    per_key: part('For each API key'),
    per_user: part('For each user_id'),
    per_model: part('For each model'),
    users: named('Users who have other limits than per_user'),
    models: named(
      'Models, * as a wildcard, that have others than per_model; the first that fits counts'
    )
  },
  'How much may be asked'
)
export type LimitsOptions = Static<typeof LimitsOptions>

/** The options of the plugin; `caches` has the Redis that they name. */
export type GivenLimitsOptions = Given<LimitsOptions> & Pick<Given<StorageOptions>, 'caches'>

declare module 'fastify' {
  interface FastifyInstance {
    limits: {
      update(options: LimitsOptions, caches: Caches): Promise<void>
      observers: LimitObserver[]
      /** Tells all processes that share these limits that a key (its SHA-256) has been revoked. */
      revoke(hash: string): Promise<void>
    }
  }
}

/** Wants to know what happens. */
export interface LimitObserver {
  refused?(refusal: Refusal, mode: LimitsOptions['mode']): void
  /** An answer was ended because a budget was used up. */
  stopped?(): void
  /** The store could not be asked. */
  trouble?(): void
  /** A process that shares the limits says that a key (its SHA-256) has been revoked. */
  revoked?(hash: string): void
}

type Caches = StorageOptions['caches']

/** How often (ms) running streams are looked at. */
const LOOK_INTERVAL = 250
/** By how many tokens a reserve grows; by fewer where that is all there is. */
const STEPS = [256, 64, 16]
/** More is reserved before the last tokens are spent. */
const AHEAD = 128

const limitsPlugin: FastifyPluginAsync<GivenLimitsOptions> = async function limits(fastify, given) {
  const { caches: givenCaches, ...givenOptions } = given
  const { caches } = checkOptions(StorageOptions, { caches: givenCaches ?? [] })
  let options = checkOptions(LimitsOptions, { enabled: true, ...givenOptions })
  const issues = redisIssues(options, caches)
  if (issues.length > 0) throw new OptionsError(issues)
  const observers: LimitObserver[] = []
  let cache = cacheOf(options, caches)
  let store = await openStore(options, caches)
  const exchanges = withExchanges(fastify)
  const typical = new Typical()
  /** Streams whose reserve may have to grow. */
  const watched = new Set<Exchange>()
  let looking: NodeJS.Timeout | undefined

  fastify.decorate('limits', {
    async update(changed, caches) {
      const before = store
      const other = cacheOf(changed, caches)
      const isRenamed = other !== undefined && changed.redis_prefix !== options.redis_prefix
      const isOther = isRenamed || !isDeepStrictEqual(other, cache)
      if (isOther) store = await openStore(changed, caches)
      else store.update({ periods: new Periods(changed.time_zone), onError: onErrorOf(changed) })
      options = changed
      cache = other
      if (isOther) await before.close()
    },
    observers,
    async revoke(hash) {
      if (store instanceof RedisStore) await store.revoke(hash)
    }
  })

  // A look before the body is read, so that a caller who is over costs no upload.
  fastify.addHook('onRequest', (request, _reply, done) => {
    if (request.routeOptions.config.rateLimit === false || options.mode === 'shadow') return done()
    const refusal = store.look(accountsOf(request, options))
    if (refusal !== undefined) throw refuse(refusal, request.exchange)
    done()
  })

  // @fastify/rate-limit runs the step on every route of this scope and honours its per-route
  // `config.rateLimit`; the key it hands to its store is the exchange, the count comes from here.
  class Store {
    incr(
      exchange: Exchange,
      done: (error: Error | null, result?: { current: number; ttl: number }) => void
    ) {
      reserve(exchange).then(() => done(null, { current: 1, ttl: 0 }), done)
    }

    child() {
      return this
    }
  }
  await fastify.register(rateLimit, {
    hook: 'preHandler',
    max: 1,
    store: Store as never,
    keyGenerator: request => request.exchange as never,
    addHeadersOnExceeding: {
      'x-ratelimit-limit': false,
      'x-ratelimit-remaining': false,
      'x-ratelimit-reset': false
    }
  })

  async function reserve(exchange: Exchange): Promise<void> {
    const accounts = accountsOf(exchange.request, options)
    if (accounts.length > 0) {
      const call = { accounts, ...expectation(exchange, accounts) }
      const from = store
      let lease = await from.reserve(call).catch(toUnavailable)
      if (isRefusal(lease)) {
        const error = refuse(lease, exchange)
        if (options.mode === 'enforce') throw error
        lease = (await from.reserve({ ...call, force: true })) as Lease
      }
      exchange.reservation = { store: from, lease }
      if (exchange.closed) from.settle(lease, NOTHING)
      else {
        exchange.reply.headers(limitHeaders(exchange.dialect.name, lease, Date.now()))
        if (exchange.request.payload?.stream && hasBudget(accounts)) watch(exchange)
      }
    }
    if (exchange.closed) throw new GatewayError('client_gone', 'The client has left.')
  }

  /** What a call will likely spend, and what at least. */
  function expectation(exchange: Exchange, accounts: Account[]): { hold: Amount; least: number } {
    if (!hasBudget(accounts) || exchange.endpoint?.spends === undefined) {
      return { hold: NOTHING, least: 0 }
    }
    const { payload } = exchange.request
    const model = payload?.model ?? ''
    const input = fastify.tokens?.input(exchange) ?? 0
    const output =
      exchange.endpoint.spends === 'input'
        ? 0
        : typical.expect(subject(exchange.request), model, payload?.maxTokens)
    return { hold: amount(model, { input, output, cached: 0 }), least: input }
  }

  function amount(
    model: string,
    tokens: { input: number; output: number; cached: number }
  ): Amount {
    return { tokens: tokens.input + tokens.output, cost: fastify.usage?.cost(model, tokens) ?? 0 }
  }

  function watch(exchange: Exchange): void {
    watched.add(exchange)
    looking ??= setInterval(() => {
      for (const each of watched) {
        lookAt(each).catch(error => {
          fastify.log.warn({ reason: error.message }, 'no more could be reserved for a stream')
        })
      }
    }, LOOK_INTERVAL).unref()
  }

  /** Books what a stream has spent so far, and reserves more for it before that is needed. */
  async function lookAt(exchange: Exchange): Promise<void> {
    const { store: from, lease } = exchange.reservation!
    const model = exchange.request.payload?.model ?? ''
    const output = fastify.tokens?.output(exchange) ?? 0
    if (output === 0) return
    const input = fastify.tokens.input(exchange)
    const spent = amount(model, { input, output, cached: 0 })
    const left = lease.held.tokens - (spent.tokens - lease.spent.tokens)
    if (left > AHEAD) return
    watched.delete(exchange)
    const isStopping = options.on_exhausted === 'stop' && options.mode === 'enforce'
    let hasRoom = false
    for (const output of STEPS) {
      const more = amount(model, { input: 0, output, cached: 0 })
      hasRoom = await from.extend(lease, spent, more, !isStopping)
      if (exchange.closed) return
      if (hasRoom) break
    }
    if (hasRoom || left > 0) return watch(exchange)
    for (const observer of observers) observer.stopped?.()
    exchange.interrupt(usedUp(lease.accounts.some(each => each.limits.total_quota > 0)), 'rejected')
  }

  exchanges.onEnd('settle', exchange => {
    const { reservation, usage, request } = exchange
    if (reservation === undefined) return
    watched.delete(exchange)
    if (watched.size === 0) {
      clearInterval(looking)
      looking = undefined
    }
    const model = request.payload?.model ?? ''
    if (usage === undefined) return reservation.store.settle(reservation.lease, NOTHING)
    const { promptTokens: input, completionTokens: output, cachedTokens: cached = 0 } = usage
    const spent = amount(model, { input, output, cached })
    reservation.store.settle(reservation.lease, { ...spent, tokens: usage.totalTokens })
    if (exchange.outcome === 'ok') typical.learn(subject(request), model, output)
  })

  fastify.addHook('onClose', async () => {
    clearInterval(looking)
    await store.close()
  })

  function refuse(refusal: Refusal, exchange: Exchange): GatewayError {
    for (const observer of observers) observer.refused?.(refusal, options.mode)
    const { scope, limit } = refusal
    if (options.mode === 'shadow') {
      const { id: requestId } = exchange
      fastify.log.info({ requestId, scope, limit }, 'a limit would have refused this')
    }
    return tooMany(refusal, exchange.dialect.name, Date.now())
  }

  async function openStore(options: LimitsOptions, caches: Caches): Promise<LimitStore> {
    const { log, dataDir, peers } = fastify
    const cache = cacheOf(options, caches)
    if (cache === undefined) return peers?.limits ?? openMemoryStore(options, dataDir, log)
    const redis = new RedisStore({
      cache,
      prefix: options.redis_prefix,
      periods: new Periods(options.time_zone),
      onError: onErrorOf(options),
      log,
      ...(dataDir === undefined ? {} : { file: resolve(dataDir, 'replicas') }),
      onTrouble: () => {
        for (const observer of observers) observer.trouble?.()
      },
      onRevoked: hash => {
        for (const observer of observers) observer.revoked?.(hash)
      }
    })
    await redis.start()
    return redis
  }
}

/** Counts in this process; what was spent of quotas outlives a restart in a file, where there is a directory. */
export async function openMemoryStore(
  { time_zone }: LimitsOptions,
  dataDir: string | undefined,
  log: FastifyBaseLogger
): Promise<MemoryStore> {
  const periods = new Periods(time_zone)
  if (dataDir === undefined) return new MemoryStore(periods)
  return new MemoryStore(periods, await Quotas.open(resolve(dataDir, 'limits.db'), log))
}

/** Why these limits cannot be held. */
export function limitIssues(
  options: LimitsOptions,
  { prices }: UsageOptions,
  { caches }: StorageOptions
): Issue[] {
  const issues = redisIssues(options, caches)
  for (const [path, limits] of limitSets(options)) {
    const { burst_size, requests_per_second, requests_per_minute } = limits
    if (burst_size && !requests_per_second && !requests_per_minute) {
      const message = 'needs requests_per_second or requests_per_minute beside it'
      issues.push({ path: [...path, 'burst_size'], message })
    }
    if (limits.quota_unit === 'cost' && limits.total_quota > 0 && prices.length === 0) {
      issues.push({ path: [...path, 'quota_unit'], message: 'needs usage.prices to count by' })
    }
  }
  return issues
}

function redisIssues(options: LimitsOptions, caches: Caches): Issue[] {
  if (options.storage === 'memory' || !options.enabled) return []
  return storageIssues({ caches, databases: [] }, 'caches', options.redis, ['redis'])
}

/** The Redis that counts; undefined: this process does. */
function cacheOf({ storage, redis }: LimitsOptions, caches: Caches) {
  return storage === 'redis' ? caches.find(({ name }) => name === redis) : undefined
}

/** What only counts must not stand in the way. */
function onErrorOf({ mode, on_store_error }: LimitsOptions): LimitsOptions['on_store_error'] {
  return mode === 'shadow' ? 'allow' : on_store_error
}

function limitSets(options: LimitsOptions): [Issue['path'], Limits][] {
  const parts = ['global', 'per_key', 'per_user', 'per_model'] as const
  const named = (['users', 'models'] as const).flatMap(list =>
    Object.entries(options[list]).map(([name, limits]): [Issue['path'], Limits] => [
      [list, name],
      limits
    ])
  )
  return [...parts.map((name): [Issue['path'], Limits] => [[name], options[name]]), ...named]
}

const NONE = checkOptions(LimitSet, {})

/** Whose limits a request is held to, and which. */
function accountsOf(request: FastifyRequest, options: LimitsOptions): Account[] {
  const { caller, payload } = request
  const accounts: Account[] = []
  const add = (scope: Scope, id: string, limits: Limits, spent?: Account['spent']) => {
    if (isAny(limits)) accounts.push({ scope, id, limits, spent })
  }
  const of = (name: 'global' | 'per_key' | 'per_user' | 'per_model') =>
    options.enabled && options[name].enabled ? options[name] : NONE
  add('global', '', of('global'))
  const perKey = of('per_key')
  const own = caller?.limits === undefined ? perKey : { ...perKey, ...caller.limits }
  add('per_key', subject(request), own, caller?.spent)
  const user = caller?.userId
  if (user !== undefined) {
    const isNamed = options.enabled && Object.hasOwn(options.users, user)
    add('per_user', user, isNamed ? options.users[user]! : of('per_user'))
  }
  const model = payload?.model
  if (model !== undefined) {
    const named = options.enabled
      ? Object.entries(options.models).find(([pattern]) => matchesModel([pattern], model))
      : undefined
    add('per_model', model, named?.[1] ?? of('per_model'))
  }
  return accounts
}

function isAny(limits: Limits): boolean {
  const { requests_per_second, requests_per_minute, tokens_per_minute } = limits
  const rates = requests_per_second + requests_per_minute + tokens_per_minute
  return rates + limits.max_concurrent + limits.total_quota > 0
}

function hasBudget(accounts: readonly Account[]): boolean {
  return accounts.some(({ limits }) => limits.tokens_per_minute + limits.total_quota > 0)
}

/** Whose limits count: the caller's, or the address's (an IPv6 network's) where nobody is known. */
function subject(request: FastifyRequest): string {
  // No key's id begins like this.
  return request.caller?.id ?? `\n${normalizeIP(request.ip)}`
}

function toUnavailable(error: unknown): never {
  if (!(error instanceof StoreError)) throw error
  throw new GatewayError('limits_unavailable', 'Limits cannot be checked at the moment.', {
    headers: { 'retry-after': '1' }
  })
}

export default fp(limitsPlugin, { name: 'limits', fastify: '5.x' })
