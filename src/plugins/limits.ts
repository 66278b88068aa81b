import { resolve } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import rateLimit, { normalizeIP } from '@fastify/rate-limit'
import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import { GatewayError } from '../errors.ts'
import { type Exchange, withExchanges } from '../exchange.ts'
import type { KeyNews } from '../keys/key.ts'
import { limitHeaders } from '../limits/headers.ts'
import { openMemoryStore } from '../limits/memory.ts'
import { Periods } from '../limits/period.ts'
import {
  type Asker,
  accountsOf,
  cacheOf,
  hasBudget,
  LimitsOptions,
  onErrorOf,
  redisIssues
} from '../limits/policy.ts'
import { RedisStore } from '../limits/redis.ts'
import { tooMany, usedUp } from '../limits/refusal.ts'
import {
  type Account,
  ADDRESS,
  type Amount,
  type Hold,
  isRefusal,
  type Lease,
  type LimitStore,
  NOTHING,
  type Refusal,
  StoreError
} from '../limits/store.ts'
import { Typical } from '../limits/typical.ts'
import { Uploads } from '../limits/uploads.ts'
import { Complaint } from '../logs/complaint.ts'
import { checkOptions, type Given, OptionsError } from '../options.ts'
import { partsOf } from '../reporters/record.ts'
import { StorageOptions } from '../store/storage.ts'

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

/** The options of the plugin; `caches` has the Redis that they name. */
export type GivenLimitsOptions = Given<LimitsOptions> &
  Pick<Given<StorageOptions>, 'caches'> & {
    /** Takes over what processes that share the limits say of keys. */
    onKeyNews?: (news: KeyNews[]) => Promise<void>
  }

declare module 'fastify' {
  interface FastifyInstance {
    limits: {
      update(options: LimitsOptions, caches: Caches): Promise<void>
      observers: LimitObserver[]
      /**
       * Tells all processes that share these limits of keys (their SHA-256) that were changed; with `validFor`:
       * that die in so many ms.
       */
      tellKeys(hashes: readonly string[], validFor?: number): Promise<void>
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
}

type Caches = StorageOptions['caches']

/** How often (ms) running streams are looked at. */
const LOOK_INTERVAL = 250
/** By how many tokens a reserve grows; by fewer where that is all there is. */
const STEPS = [256, 64, 16]
/** Output tokens of a request that sets no maximum, for a model whose context is not known. */
const UNKNOWN_OUTPUT = 4096
/** Up to this size (bytes) a body is read before limits are checked, where that takes a round trip. */
const SMALL_BODY = 64 * 1024
/** More is reserved before the last tokens are spent. */
const AHEAD = 128

const limitsPlugin: FastifyPluginAsync<GivenLimitsOptions> = async function limits(fastify, given) {
  const { caches: givenCaches, onKeyNews, ...givenOptions } = given
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
  const unpriced = new Complaint((calls, reason) =>
    fastify.log.warn({ calls, reason }, 'a quota of money does not count these calls')
  )

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
    async tellKeys(hashes, validFor) {
      if (store instanceof RedisStore) await store.tell(hashes, validFor)
    }
  })

  const uploads = new Uploads()
  exchanges.onEnd('slot', endUpload)

  // Before the body is read, so that what cannot be served costs no upload.
  fastify.addHook('onRequest', (request, _reply, done) => {
    if (request.routeOptions.config.rateLimit === false || options.mode === 'shadow') return done()
    const accounts = accountsOf(askerOf(request), options)
    const { exchange } = request
    const length = lengthOf(request)
    const settle = (refusal: Refusal | undefined) => {
      if (refusal !== undefined) throw refuse(refusal, exchange)
      done()
    }
    const others = accounts.map(account => uploads.of(account))
    const count = (account: Account) => others[accounts.indexOf(account)]!
    // Taken before the store is asked: of a burst all would be told that there is room.
    if (length > 0) {
      const refusal = uploads.refusal(accounts, fastify.peers?.count)
      if (refusal !== undefined) return settle(refusal)
      exchange.uploading = uploads.begin(accounts)
    }
    // A round trip costs more than reading a small body.
    if (!store.isLocal && length <= SMALL_BODY) return settle(undefined)
    const refusal = store.look(accounts, count)
    if (!(refusal instanceof Promise)) return settle(refusal)
    refusal.then(settle).catch(done)
  })

  function endUpload(exchange: Exchange): void {
    if (exchange.uploading !== undefined) uploads.end(exchange.uploading)
    exchange.uploading = undefined
  }

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
    endUpload(exchange)
    const accounts = accountsOf(askerOf(exchange.request), options)
    if (accounts.length > 0) {
      refuseUnpriced(exchange, accounts)
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

  /** Without a price a budget of money would not notice the request. */
  function refuseUnpriced(exchange: Exchange, accounts: Account[]): void {
    if (options.mode === 'shadow' || fastify.usage?.refusesUnpriced !== true) return
    if (exchange.endpoint?.spends === undefined || !accounts.some(isOfMoney)) return
    const nothing = { input: 0, output: 0, cached: 0, cacheWrite: 0 }
    if (fastify.usage.cost(exchange, nothing) !== undefined) return
    throw new GatewayError(
      'model_not_priced',
      'This model has no price, and a budget of money applies to the request. Use another model.'
    )
  }

  /** What a request reserves, and what it will spend at least. */
  function expectation(exchange: Exchange, accounts: Account[]): { hold: Hold; least: number } {
    if (!hasBudget(accounts) || exchange.endpoint?.spends === undefined) {
      return { hold: NOTHING, least: 0 }
    }
    const input = fastify.tokens?.input(exchange) ?? 0
    const least = fastify.tokens?.least(exchange) ?? 0
    if (exchange.endpoint.spends === 'input') {
      return { hold: amount(exchange, input, 0), least }
    }
    const most = mostOutput(exchange, input)
    const usual = typical.expect(subject(exchange.request), exchange.model ?? '', most)
    const isMax = accounts.some(({ limits }) => limits.total_quota > 0 && limits.reserve === 'max')
    const hold = amount(exchange, input, isMax ? most : usual)
    return { hold: { ...hold, window: input + usual }, least }
  }

  /** Output tokens that a request can get: what it allows, and what the context of its model leaves. */
  function mostOutput(exchange: Exchange, input: number): number {
    const { payload } = exchange.request
    const { maxTokens, sequences = 1 } = payload ?? {}
    const context = fastify.backends?.pool.contextLength(exchange)
    const room = context === undefined ? undefined : Math.max(1, context - input) * sequences
    if (maxTokens !== undefined) return Math.min(maxTokens, room ?? maxTokens)
    const { assumed_max_tokens: assumed } = options
    return assumed === undefined ? (room ?? UNKNOWN_OUTPUT * sequences) : assumed * sequences
  }

  function amount(exchange: Exchange, input: number, output: number): Amount {
    const tokens = { input, output, cached: 0, cacheWrite: 0 }
    const cost = fastify.usage?.cost(exchange, tokens) ?? 0
    return { tokens: input + output, cost }
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
    // What it has spent is booked already, and more exactly.
    if (exchange.concluded) return
    const output = fastify.tokens?.output(exchange) ?? 0
    if (output === 0) return
    const input = fastify.tokens.input(exchange)
    const spent = amount(exchange, input, output)
    const { tokens, window = tokens } = lease.held
    const isSpent = spent.tokens - lease.spent.tokens
    const left = Math.min(tokens, window) - isSpent
    if (left > AHEAD) return
    const isReserved = tokens - isSpent > AHEAD
    watched.delete(exchange)
    const isStopping = options.on_exhausted === 'stop' && options.mode === 'enforce'
    let hasRoom = false
    for (const output of STEPS) {
      const quota = isReserved ? NOTHING : amount(exchange, 0, output)
      const more = { ...quota, window: output }
      hasRoom = await from.extend(lease, spent, more, !isStopping)
      if (exchange.closed) return
      if (hasRoom) break
    }
    if (hasRoom || left > 0) return watch(exchange)
    for (const observer of observers) observer.stopped?.()
    exchange.interrupt(usedUp(lease.accounts.some(hasQuota)), 'rejected')
  }

  // Usage records must not say more than quotas do, whatever happens to this process.
  exchanges.onEnd('budget', exchange => {
    const { reservation, usage } = exchange
    if (usage === undefined || !reservation?.lease.accounts.some(hasQuota)) return
    const { store, lease } = reservation
    exchange.booked = store.book(lease, { tokens: usage.totalTokens, cost: costOf(exchange) ?? 0 })
    exchange.recorded = exchange.booked
  })

  exchanges.onEnd('settle', exchange => {
    const { reservation, usage, request } = exchange
    if (reservation === undefined) return
    watched.delete(exchange)
    if (watched.size === 0) {
      clearInterval(looking)
      looking = undefined
    }
    const { store, lease } = reservation
    if (usage === undefined) return store.settle(lease, NOTHING)
    const cost = costOf(exchange)
    if (cost === undefined && lease.accounts.some(isOfMoney)) {
      unpriced.add(1, `no price of ${exchange.model ?? 'a call without a model'}`)
    }
    store.settle(lease, { tokens: usage.totalTokens, cost: cost ?? 0 })
    if (exchange.outcome === 'ok') {
      typical.learn(subject(request), exchange.model ?? '', usage.completionTokens)
    }
  })

  function costOf(exchange: Exchange): number | undefined {
    const { usage } = exchange
    return usage && fastify.usage?.cost(exchange, partsOf(usage))
  }

  fastify.addHook('onClose', async () => {
    clearInterval(looking)
    unpriced.end()
    await store.close()
  })

  function refuse(refusal: Refusal, exchange: Exchange): GatewayError {
    for (const observer of observers) observer.refused?.(refusal, options.mode)
    const { scope, limit } = refusal
    if (options.mode === 'shadow') {
      const { id: requestId } = exchange
      fastify.log.info({ requestId, scope, limit }, 'a limit would have refused this')
    }
    const quotaStatus = fastify.keys?.quotaStatus()
    return tooMany(refusal, exchange.dialect.name, Date.now(), quotaStatus)
  }

  async function openStore(options: LimitsOptions, caches: Caches): Promise<LimitStore> {
    const { log, dataDir, peers } = fastify
    const cache = cacheOf(options, caches)
    if (cache === undefined)
      return peers?.limits ?? openMemoryStore(options.time_zone, dataDir, log)
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
      ...(onKeyNews === undefined ? {} : { onKeyNews })
    })
    await redis.start()
    return redis
  }
}

/** Whose limits count: the caller's, or the address's (an IPv6 network's) where nobody is known. */
function subject(request: FastifyRequest): string {
  return request.caller?.id ?? ADDRESS + normalizeIP(request.ip)
}

function hasQuota({ limits }: Account): boolean {
  return limits.total_quota > 0
}

/** Bytes that a request announces; Infinity where it does not say. */
function lengthOf({ headers }: FastifyRequest): number {
  if (headers['transfer-encoding'] !== undefined) return Number.POSITIVE_INFINITY
  return Number(headers['content-length'] ?? 0)
}

function isOfMoney({ limits }: Account): boolean {
  return limits.total_quota > 0 && limits.quota_unit === 'cost'
}

function askerOf(request: FastifyRequest): Asker {
  const { caller, exchange, payload, server } = request
  const lists = (model: string) => server.backends?.pool.lists(model) ?? true
  const { stored, heldModel } = exchange
  return {
    caller,
    subject: subject(request),
    model: payload && exchange.model,
    heldModel: stored && heldModel,
    lists
  }
}

function toUnavailable(error: unknown): never {
  if (!(error instanceof StoreError)) throw error
  throw new GatewayError('limits_unavailable', 'Limits cannot be checked at the moment.', {
    headers: { 'retry-after': '1' }
  })
}

export default fp(limitsPlugin, { name: 'limits', fastify: '5.x' })
