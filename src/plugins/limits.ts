import '../check-node.ts'
import { resolve } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import rateLimit, { normalizeIP } from '@fastify/rate-limit'
import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import { GatewayError } from '../errors.ts'
import { type Endpoint, type Exchange, withExchanges } from '../exchange.ts'
import type { KeyNews } from '../keys/key.ts'
import { limitHeaders } from '../limits/headers.ts'
import { openMemoryStore } from '../limits/memory.ts'
import { Periods } from '../limits/period.ts'
import {
  accountsOf,
  cacheOf,
  hasBudget,
  LimitsOptions,
  limitsOfModels,
  modelAccount,
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
import { part, share, toPart } from '../parts.ts'
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
    /** Directory of what is kept over restarts; without it, nothing is. */
    dataDir?: string | undefined
    /** Takes over what processes that share the limits say of keys. */
    onKeyNews?: (news: KeyNews[]) => Promise<void>
  }

export interface Limits {
  update(options: LimitsOptions, caches: Caches): Promise<void>
  observers: LimitObserver[]
  /**
   * Tells all processes that share these limits of keys (their SHA-256) that were changed; with `validFor`:
   * that die in so many ms.
   */
  tellKeys(hashes: readonly string[], validFor?: number): Promise<void>
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
/**
 * Tokens of an output that has no maximum, and of a prompt that its text does not bound, for a model of unknown context;
 * tokens of a request that cannot be estimated: a form, an image.
 */
const UNKNOWN_TOKENS = 4096
/** Up to this size (bytes) a body is read before limits are checked, where that takes a round trip. */
const SMALL_BODY = 64 * 1024
/** More is reserved before the last tokens are spent. */
const AHEAD = 128

const NO_PRICE =
  'This model has no price, and a budget of money applies to the request. Use another model.'
const NO_MODEL =
  'The gateway does not read the model of this request, so it has no price, and a budget of money applies to it.'

const limitsPlugin: FastifyPluginAsync<GivenLimitsOptions> = async function limits(fastify, given) {
  const { caches: givenCaches, dataDir, onKeyNews, ...givenOptions } = given
  const { caches } = checkOptions(StorageOptions, { caches: givenCaches ?? [] })
  let options = checkOptions(LimitsOptions, { enabled: true, ...givenOptions })
  let models = await limitsOfModels(options)
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

  share(fastify, 'limits', {
    async update(changed, caches) {
      const before = store
      const changedModels = await limitsOfModels(changed)
      const other = cacheOf(changed, caches)
      const isRenamed = other !== undefined && changed.redis_prefix !== options.redis_prefix
      const isOther = isRenamed || !isDeepStrictEqual(other, cache)
      if (isOther) store = await openStore(changed, caches)
      else store.update({ periods: new Periods(changed.time_zone), onError: onErrorOf(changed) })
      options = changed
      models = changedModels
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

  // Before the body is read, so that what cannot be served costs no upload; after the caller is known.
  fastify.addHook('preParsing', (request, _reply, _body, done) => {
    const { exchange } = request
    const isFree = request.routeOptions.config.rateLimit === false || options.mode === 'shadow'
    if (isFree || exchange.endpoint?.rejectedBy !== undefined) return done()
    const accounts = callerAccounts(request)
    const length = lengthOf(request)
    const settle = (refusal: Refusal | undefined) => {
      if (refusal !== undefined) throw refuse(refusal, exchange)
      done()
    }
    const others = uploads.of(accounts)
    // Taken before the store is asked: of a burst all would be told that there is room.
    if (length > 0) {
      const refusal = uploads.refusal(accounts, others)
      if (refusal !== undefined) return settle(refusal)
      exchange.upload = uploads.begin(accounts)
    }
    // A round trip costs more than reading a small body.
    if (!store.isLocal && length <= SMALL_BODY) return settle(undefined)
    const refusal = store.look(accounts, others, exchange.upload)
    if (!(refusal instanceof Promise)) return settle(refusal)
    refusal.then(settle).catch(done)
  })

  function endUpload(exchange: Exchange): void {
    if (exchange.upload !== undefined) uploads.end(exchange.upload)
    exchange.upload = undefined
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

  /** Returns the accounts of a request's caller. A hook of the host may set the caller at any time before the handler. */
  function callerAccounts(request: FastifyRequest): readonly Account[] {
    const { caller, exchange } = request
    const { limited } = exchange
    if (limited !== undefined && limited.caller === caller) return limited.accounts
    const accounts = accountsOf(caller, subject(request), options)
    exchange.limited = { caller, accounts }
    return accounts
  }

  function accountsFor({ request }: Exchange, model: string | undefined): readonly Account[] {
    const accounts = callerAccounts(request)
    if (model === undefined) return accounts
    const isListed = model !== '' && (request.server.backends?.pool.lists(model) ?? true)
    const ofModel = modelAccount(model, options, models, isListed)
    return ofModel === undefined ? accounts : [...accounts, ofModel]
  }

  async function reserve(exchange: Exchange): Promise<void> {
    endUpload(exchange)
    // It counts when it is known what has been spent.
    if (exchange.settlement !== undefined) return
    const accounts = accountsFor(exchange, limitedModel(exchange))
    if (accounts.length > 0) {
      refuseUnpriced(exchange, accounts)
      const { rejectedBy } = exchange.endpoint ?? {}
      const call = {
        accounts,
        ...expectation(exchange, accounts),
        force: rejectedBy === 'nothing',
        onlyRates: rejectedBy === 'rates'
      }
      const from = store
      const reserved = from.reserve(call)
      let lease = reserved instanceof Promise ? await reserved.catch(toUnavailable) : reserved
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
  function refuseUnpriced(exchange: Exchange, accounts: readonly Account[]): void {
    if (options.mode === 'shadow' || part(fastify, 'usage')?.refusesUnpriced !== true) return
    if (!maySpend(exchange.endpoint) || !accounts.some(isOfMoney)) return
    if (part(fastify, 'usage')?.isPriced(exchange)) return
    throw new GatewayError('model_not_priced', exchange.model === undefined ? NO_MODEL : NO_PRICE)
  }

  /** What a request reserves, and what it needs at least: an output that it asks for is no estimate. */
  function expectation(
    exchange: Exchange,
    accounts: readonly Account[]
  ): { hold: Hold; least: Hold } {
    const { endpoint } = exchange
    if (endpoint === undefined || !hasBudget(accounts) || !maySpend(endpoint)) {
      return { hold: NOTHING, least: NOTHING }
    }
    if (endpoint.spends === undefined) {
      const unknown = options.assumed_max_tokens ?? UNKNOWN_TOKENS
      return { hold: amount(exchange, 0, unknown), least: NOTHING }
    }
    const tokens = part(fastify, 'tokens')
    const input = tokens?.input(exchange) ?? 0
    const least = amount(exchange, tokens?.least(exchange) ?? 0, 0)
    const isOpen = tokens?.isOpen(exchange) === true
    if (endpoint.spends === 'input') {
      const hold = amount(exchange, isOpen ? mostInput(exchange, input, 0) : input, 0)
      return { hold: { ...hold, typical: amount(exchange, input, 0) }, least }
    }
    const most = mostOutput(exchange, input)
    const usual = typical.expect(subject(exchange.request), exchange.model ?? '', most)
    const hold = amount(exchange, isOpen ? mostInput(exchange, input, most) : input, most)
    const asked = exchange.request.payload?.maxTokens ?? Number.POSITIVE_INFINITY
    const output = Math.min(asked, mostOutput(exchange, least.tokens))
    const leastOfAll = amount(exchange, least.tokens, output)
    return {
      hold: { ...hold, typical: amount(exchange, input, usual) },
      least: { ...leastOfAll, typical: least }
    }
  }

  /** Tokens that a prompt can have whose text does not bound them: all that its model has room for. */
  function mostInput(exchange: Exchange, input: number, output: number): number {
    const { sequences = 1 } = exchange.request.payload ?? {}
    const context = part(fastify, 'backends')?.pool.contextLength(exchange)
    const most = context === undefined ? UNKNOWN_TOKENS : context - Math.ceil(output / sequences)
    return Math.max(input, most)
  }

  /** Output tokens that a request can get: what it allows, and what the context of its model leaves. */
  function mostOutput(exchange: Exchange, input: number): number {
    const { payload } = exchange.request
    const { maxTokens, isLimitSure, sequences = 1 } = payload ?? {}
    const pool = part(fastify, 'backends')?.pool
    const context = pool?.contextLength(exchange)
    const room = context === undefined ? undefined : Math.max(1, context - input) * sequences
    if (maxTokens !== undefined && (isLimitSure || pool?.readsCompletionLimit(exchange))) {
      return Math.min(maxTokens, room ?? maxTokens)
    }
    const { assumed_max_tokens: assumed } = options
    return assumed === undefined ? (room ?? UNKNOWN_TOKENS * sequences) : assumed * sequences
  }

  function amount(exchange: Exchange, input: number, output: number): Amount {
    const tokens = { input, output, cached: 0, cacheWrite: 0 }
    const cost = part(fastify, 'usage')?.cost(exchange, tokens) ?? 0
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
    const counted = part(fastify, 'tokens')
    const output = counted?.output(exchange) ?? 0
    if (counted === undefined || output === 0) return
    const input = counted.input(exchange)
    const spent = amount(exchange, input, output)
    const { tokens, typical: usual = lease.held } = lease.held
    const isSpent = spent.tokens - lease.spent.tokens
    const left = Math.min(tokens, usual.tokens) - isSpent
    if (left > AHEAD) return
    const isReserved = tokens - isSpent > AHEAD
    watched.delete(exchange)
    const isStopping = options.on_exhausted === 'stop' && options.mode === 'enforce'
    let hasRoom = false
    for (const output of STEPS) {
      const step = amount(exchange, 0, output)
      const more = { ...(isReserved ? NOTHING : step), typical: step }
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
    const { reservation, usage, endpoint } = exchange
    if (usage === undefined) return
    if (endpoint?.showsResponse) exchange.booked = bookShown(exchange)
    else if (reservation?.lease.accounts.some(hasQuota)) {
      exchange.booked = reservation.store.book(reservation.lease, spentBy(exchange))
    }
    exchange.recorded = exchange.booked
  })

  /** Books what a stored response has spent: that is no request, and no limit can reject it. */
  async function bookShown(exchange: Exchange): Promise<void> {
    const accounts = accountsFor(exchange, exchange.model)
    learn(exchange, accounts)
    const spent = spentBy(exchange)
    const from = store
    try {
      const booking = { accounts, hold: NOTHING, least: NOTHING, force: true, isBooking: true }
      const lease = (await from.reserve(booking)) as Lease
      await from.book(lease, spent)
      from.settle(lease, spent)
    } catch (error) {
      const { message: reason } = error as Error
      fastify.log.warn({ reason }, 'limits do not count a stored response')
    }
  }

  exchanges.onEnd('settle', exchange => {
    const { reservation, stored } = exchange
    const { release } = stored ?? {}
    if (release !== undefined) void (exchange.booked ?? Promise.resolve()).then(release)
    if (reservation === undefined) return
    watched.delete(exchange)
    if (watched.size === 0) {
      clearInterval(looking)
      looking = undefined
    }
    const { store, lease } = reservation
    if (exchange.endpoint?.showsResponse) return store.settle(lease, NOTHING)
    learn(exchange, lease.accounts)
    const spent = spentBy(exchange)
    if (stored?.hold === undefined) return store.settle(lease, spent)
    void store.extend(lease, spent, NOTHING, true).catch(() => {})
    stored.hold(() => store.settle(lease, spent))
  })

  /** What a finished exchange says about models: that one has no price, or how long its responses are. */
  function learn(exchange: Exchange, accounts: readonly Account[]): void {
    const { usage, request, outcome, model } = exchange
    if (usage === undefined) return
    if (costOf(exchange) === undefined && accounts.some(isOfMoney)) {
      unpriced.add(1, `no price of ${model ?? 'a call without a model'}`)
    }
    if (outcome === 'ok') typical.learn(subject(request), model ?? '', usage.completionTokens)
  }

  function spentBy(exchange: Exchange): Amount {
    const { usage } = exchange
    if (usage === undefined) return NOTHING
    return { tokens: usage.totalTokens, cost: costOf(exchange) ?? 0 }
  }

  function costOf(exchange: Exchange): number | undefined {
    const { usage } = exchange
    return usage && part(fastify, 'usage')?.cost(exchange, partsOf(usage))
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
    const quotaStatus = part(fastify, 'keys')?.quotaStatus()
    const hasKey = exchange.request.caller !== undefined
    return tooMany(refusal, exchange.dialect.name, Date.now(), { quotaStatus, hasKey })
  }

  async function openStore(options: LimitsOptions, caches: Caches): Promise<LimitStore> {
    const { log } = fastify
    const cache = cacheOf(options, caches)
    if (cache === undefined)
      return part(fastify, 'peers')?.limits ?? openMemoryStore(options.time_zone, dataDir, log)
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

/** The model whose limits apply; empty: one that is not read, such as that of a form. */
function limitedModel({ endpoint, model }: Exchange): string | undefined {
  return endpoint === undefined || endpoint.body === 'none' ? undefined : (model ?? '')
}

/** Whether a backend may report usage for its requests. */
function maySpend(endpoint: Endpoint | undefined): boolean {
  return endpoint !== undefined && endpoint.body !== 'none' && !endpoint.isFree
}

/** Whose limits count: the caller's, or the address's (an IPv6 network's) where nobody is known. */
function subject(request: FastifyRequest): string {
  return request.caller?.id ?? ADDRESS + normalizeIP(request.exchange.clientIp)
}

function hasQuota({ limits }: Account): boolean {
  return limits.total_quota > 0
}

/** Bytes that a request announces; Infinity where it does not say. */
function lengthOf({ headers }: FastifyRequest): number {
  const isCoded = headers['content-encoding'] !== undefined
  if (isCoded || headers['transfer-encoding'] !== undefined) return Number.POSITIVE_INFINITY
  return Number(headers['content-length'] ?? 0)
}

function isOfMoney({ limits }: Account): boolean {
  return limits.total_quota > 0 && limits.quota_unit === 'cost'
}

function toUnavailable(error: unknown): never {
  if (!(error instanceof StoreError)) throw error
  throw new GatewayError('limits_unavailable', 'Limits cannot be checked at the moment.', {
    headers: { 'retry-after': '1' }
  })
}

export default toPart(limitsPlugin, {
  name: 'limits',
  decorates: ['limits', 'rateLimit', 'createRateLimit']
})
