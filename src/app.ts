import './check-node.ts'
import { setTimeout as sleep } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import type { Registry } from '@prometheus-io/client'
import type {
  FastifyInstance,
  FastifyPluginAsync,
  FastifyReply,
  FastifyRequest,
  RegisterOptions
} from 'fastify'
import { type Static, Type } from 'typebox'
import { allOrNothing, takeOver } from './changes.ts'
import { DataDirWatch } from './data-dir-watch.ts'
import { anthropic } from './dialects/anthropic.ts'
import type { Dialect } from './dialects/dialect.ts'
import { ollama } from './dialects/ollama.ts'
import { openai } from './dialects/openai.ts'
import { DiscoveryOptions, discoveryIssues } from './discovery/sources.ts'
import { GatewayError, toGatewayError } from './errors.ts'
import { type Exchanges, withExchanges } from './exchange.ts'
import type { Issue } from './issues.ts'
import { keyFile } from './keys/key-store.ts'
import { keyQuotaIssues, looksIntoStore, sourceIssues } from './keys/sources.ts'
import { LimitsOptions, limitIssues } from './limits/policy.ts'
import { closeInStages } from './lingering.ts'
import { maskedJson } from './masked.ts'
import { checkOptions, Duration, type Given, OptionsError } from './options.ts'
import { share } from './parts.ts'
import type { Peers } from './peers.ts'
import admin, { AdminOptions } from './plugins/admin.ts'
import auth, { AuthOptions, type GivenAuthOptions } from './plugins/auth.ts'
import backends from './plugins/backends.ts'
import discovery from './plugins/discovery.ts'
import limits from './plugins/limits.ts'
import log from './plugins/log.ts'
import logging, { LoggingOptions, requestLogIssues } from './plugins/logging.ts'
import metering from './plugins/metering.ts'
import metrics, { MetricsOptions } from './plugins/metrics.ts'
import overload, { OverloadOptions } from './plugins/overload.ts'
import payload from './plugins/payload.ts'
import proxy, { ProxyOptions } from './plugins/proxy.ts'
import usage, { UsageOptions } from './plugins/usage.ts'
import { BackendsOptions, fallbackIssues } from './pool/policy.ts'
import type { OnDelivery } from './reporters/courier.ts'
import { reporterIssues } from './reporters/reporters.ts'
import anthropicRoutes from './routes/anthropic.ts'
import healthRoutes from './routes/health.ts'
import metricsRoutes from './routes/metrics.ts'
import modelRoutes from './routes/models.ts'
import ollamaRoutes from './routes/ollama.ts'
import openaiRoutes from './routes/openai.ts'
import { StorageOptions } from './store/storage.ts'

export type { Caller, Endpoint, Exchange, Exchanges, Usage } from './exchange.ts'
export type { Payload } from './payload.ts'

/** What the gateway can be told, in a file and in code alike. */
export const GatewayOptions = Type.Object(
  {
    ...BackendsOptions.properties,
    discovery: DiscoveryOptions,
    auth: AuthOptions,
    rate_limit: LimitsOptions,
    usage: UsageOptions,
    storage: StorageOptions,
    logging: LoggingOptions,
    metrics: MetricsOptions,
    admin: AdminOptions,
    proxy: Type.Optional(ProxyOptions),
    overload: Type.Optional(OverloadOptions),
    drain_delay: Type.Optional(
      Duration(undefined, 'How long calls are still taken when the server closes', 0)
    ),
    drain_timeout: Type.Optional(
      Duration(undefined, 'How long running answers may take when the server closes', 0)
    )
  },
  { additionalProperties: false }
)
export type GatewayOptions = Static<typeof GatewayOptions>

/** What can be done to a running gateway. */
export interface Gateway {
  /**
   * Takes over other options, but for what needs a restart; running exchanges keep the ones they began with. What
   * fails changes nothing.
   */
  reload(options: GatewayOptions): Promise<void>
  /** Base URL of the demo backend, when it is in use. */
  readonly demoUrl: string | undefined
  readonly exchanges: Exchanges
  readonly metricsRegistry: Registry
  /** Counts records that another process has delivered. */
  countDelivery: OnDelivery
}

/** The gateway's options as they may be given in code. */
export type GivenOptions = Given<Omit<GatewayOptions, 'auth'>> & {
  auth?: GivenAuthOptions
  onGateway?: (gateway: Gateway) => void
  /** Answer every unknown path of the server, not only those under the prefix. */
  ownsNotFound?: boolean
  /** Where several processes serve together. */
  peers?: Peers
  /** What the admin API shows in front of the gateway's own options, and the schema of both together. */
  settings?: () => { schema: object; value: object }
  /** Reads the configuration again for the admin API, if there is something to read; returns the changes as JSON. */
  reload?: () => Promise<string> | undefined
  /** Where usage records are kept until they are delivered; without it, in memory. */
  dataDir?: string
}

export interface Lifecycle {
  /** The server is about to close: nobody should send it anything more. */
  isLeaving: boolean
  /** New calls are refused. */
  isDraining: boolean
  /** Called as soon as the server is about to close. */
  readonly onLeaving: (() => void)[]
}

const DRAIN_TIMEOUT = 30_000
const FLUSH_TIMEOUT = 5_000
const MAX_SWALLOWED = 256 * 1024
const NO_WEBSOCKET = 'WebSockets are not supported here. Send a POST.'
/** Paths that clients open with a WebSocket first. Codex uses POST after a 426, and retries for seconds after a 404. */
const WEBSOCKETS = /\/responses\/?(\?|$)/

/**
 * The whole gateway as one plugin. It keeps its hooks, decorators, errors and routes in its own
 * scope, under the prefix it is registered with.
 *
 * @example
 * import Fastify from 'fastify'
 * import gateway from 'llmproxy'
 *
 * const fastify = Fastify()
 * await fastify.register(gateway, { prefix: '/llm', backends: [{ url: 'http://127.0.0.1:8001' }] })
 */
const gateway: FastifyPluginAsync<GivenOptions> = async function gateway(fastify, given) {
  const {
    onGateway,
    ownsNotFound,
    peers,
    settings = () => ({ schema: GatewayOptions, value: {} }),
    reload = () => undefined,
    dataDir,
    prefix,
    logLevel,
    logSerializers,
    ...sections
  } = given as GivenOptions & RegisterOptions
  let options = checkOptions(GatewayOptions, sections, 'llmproxy')
  const issues = [...optionIssues(options), ...backendIssues(options)]
  if (issues.length > 0) throw new OptionsError(issues, 'llmproxy')
  if (/[:*]/.test(fastify.prefix)) {
    throw new OptionsError(
      [{ path: ['prefix'], message: 'must be a path without parameters' }],
      'llmproxy'
    )
  }
  const lifecycle: Lifecycle = { isLeaving: false, isDraining: false, onLeaving: [] }
  share(fastify, 'lifecycle', lifecycle)
  if (peers !== undefined) share(fastify, 'peers', peers)
  if (dataDir !== undefined) {
    const keys = looksIntoStore(options.auth) ? keyFile(dataDir, options.auth.db_path) : undefined
    const watch = new DataDirWatch(dataDir, fastify.log, keys)
    share(fastify, 'dataDirWatch', watch)
    fastify.addHook('onClose', async () => watch.close())
  }

  // A request passes the plugins from top to bottom. First it becomes an exchange, so that whatever
  // happens to it is counted and logged; then what no route should see is turned away.
  const exchanges = withExchanges(fastify)
  fastify.setErrorHandler(answerError)
  if (ownsNotFound || (prefix ?? '') !== '') fastify.setNotFoundHandler(answerNotFound)
  fastify.addHook('onRequest', (request, reply, done) => {
    refuseOddPath(request.raw.url ?? '')
    // Node would answer in its own way; a server that leaves it to us gets ours (RFC 9112, section 3.2).
    if (request.headers.host === undefined && request.raw.httpVersion === '1.1') {
      throw new GatewayError('invalid_request', 'The Host header is missing.')
    }
    if (hasTwoHosts(request.raw.rawHeaders)) {
      throw new GatewayError('invalid_request', 'There must not be more than one Host header.')
    }
    if (lifecycle.isDraining && request.exchange.endpoint !== undefined) {
      reply.header('connection', 'close')
      throw new GatewayError('shutting_down', 'This server is shutting down.')
    }
    done()
  })

  // Can it be served at all? Before anything is spent on it.
  await fastify.register(overload, options.overload ?? {})
  // Who is it? Before the body is read: a stranger costs nothing.
  await fastify.register(auth, { ...options.auth, storage: options.storage, dataDir })
  // Is there such a route? Before a body is read that nobody wants.
  fastify.addHook('onRequest', (request, reply, done) => {
    if (request.is404) answerNotFound(request, reply)
    else done()
  })
  // What is asked? The body stays the bytes that came.
  await fastify.register(payload)
  // Does anybody have that model?
  let pool = poolOf(options)
  await fastify.register(backends, pool)
  await fastify.register(discovery, { ...options.discovery, storage: options.storage, dataDir })
  // May it be asked now? The last question, so that a refused call has cost nothing.
  await fastify.register(limits, {
    ...options.rate_limit,
    caches: options.storage.caches,
    dataDir,
    // Whoever shares the limits may have changed keys; from the first call on that counts here too.
    onKeyNews: news => fastify.keys.hear(news)
  })
  const shared = tellKeyChanges(fastify)
  // How does the answer come back?
  await fastify.register(proxy, options.proxy ?? {})
  // What did it cost? Read from the answer as it passes, and reported when it is over.
  await fastify.register(metering)
  await fastify.register(usage, { ...options.usage, storage: options.storage, dataDir })
  // What happened? Counted and logged after everything else.
  await fastify.register(metrics, options.metrics)
  await fastify.register(log)
  await fastify.register(logging, { ...options.logging, storage: options.storage, dataDir })

  await fastify.register(openaiRoutes, { dataDir })
  await fastify.register(anthropicRoutes)
  await fastify.register(ollamaRoutes)
  await fastify.register(modelRoutes)
  await fastify.register(healthRoutes)
  if (options.metrics.enabled) await fastify.register(metricsRoutes, { path: options.metrics.path })

  // Who may look at it, and change its keys?
  if (options.admin.enabled && !looksIntoStore(options.auth)) {
    fastify.log.warn('keys of the admin API admit nobody: auth does not look into the store')
  }
  await fastify.register(admin, {
    ...options.admin,
    async routes(scope) {
      // Only who serves them has them in memory.
      const { default: adminRoutes } = await import('./routes/admin.ts')
      const administered = {
        keys: () => fastify.keys.store(),
        shared,
        backends: fastify.backends,
        usage: fastify.usage,
        reload,
        config() {
          const { proxy, overload, drain_delay, drain_timeout, ...sections } = options
          const { schema, value } = settings()
          return maskedJson(schema, { ...value, ...sections })
        }
      }
      await scope.register(adminRoutes(administered))
    }
  })

  // Closing: not ready any more, then no new calls; running answers may finish, what remains is ended honestly.
  const closeIdle = () => {
    // Node treats a connection as idle although a slow client has not read all of its response.
    const isSending = exchanges.open.some(({ reply }) => reply.raw.writableEnded)
    if (!isSending) fastify.server.closeIdleConnections?.()
  }
  fastify.addHook('preClose', async () => {
    lifecycle.isLeaving = true
    for (const listener of lifecycle.onLeaving) listener()
    if (options.drain_delay) await sleep(options.drain_delay)
    lifecycle.isDraining = true
    const sweep = setInterval(closeIdle, 250).unref()
    closeIdle()
    await within(options.drain_timeout ?? DRAIN_TIMEOUT, exchanges.drained())
    for (const exchange of [...exchanges.open]) {
      exchange.interrupt(new GatewayError('shutting_down', 'This server is shutting down.'))
    }
    await within(FLUSH_TIMEOUT, exchanges.drained())
    await fastify.usage.flush(AbortSignal.timeout(FLUSH_TIMEOUT))
    clearInterval(sweep)
  })

  onGateway?.({
    exchanges,
    metricsRegistry: fastify.metricsRegistry,
    countDelivery(result, records) {
      for (const listener of fastify.usage.onDelivery) listener(result, records)
    },
    get demoUrl() {
      return fastify.backends.demoUrl
    },
    async reload(wanted) {
      const changed = takeOver(GatewayOptions, options, wanted)
      await allOrNothing(take, options, changed)
      options = changed
    }
  })

  async function take(changed: GatewayOptions): Promise<void> {
    await fastify.keys.update(changed.auth, changed.storage)
    await fastify.logging.update(changed.logging, changed.storage)
    const found = await fastify.discovery.update(changed.discovery, changed.storage)
    // Health checks begin anew only where something is another way.
    if (isDeepStrictEqual(poolOf(changed), pool)) fastify.backends.find(found)
    else await fastify.backends.update(poolOf(changed), found)
    pool = poolOf(changed)
    await fastify.limits.update(changed.rate_limit, changed.storage.caches)
    await fastify.usage.update(changed.usage, changed.storage)
    fastify.proxy.update(changed.proxy ?? {})
    fastify.overload.update(changed.overload ?? {})
    fastify.admin.update(changed.admin)
  }
}

function poolOf({ backends, routing, health_check }: GatewayOptions): BackendsOptions {
  return { backends, routing, health_check }
}

/**
 * Whoever shares the limits hears of a key that was changed here.
 *
 * @returns waits for what is being told, and says whether all of it was heard
 */
function tellKeyChanges({ keys, limits, log }: FastifyInstance): () => Promise<boolean> {
  const telling = new Set<Promise<boolean>>()
  const tell = async (hashes: readonly string[], validFor?: number) => {
    try {
      await limits.tellKeys(hashes, validFor)
      return true
    } catch (error) {
      const reason = (error as Error).message
      log.warn({ reason }, 'other gateways could not be told of a changed key')
      return false
    }
  }
  keys.onChange.push((hashes, validFor) => {
    if (hashes === undefined) return
    const told = tell(hashes, validFor)
    telling.add(told)
    void told.then(() => telling.delete(told))
  })
  return async () => (await Promise.all(telling)).every(Boolean)
}

/** What sections ask of one another, or of themselves, that is not there. */
export function optionIssues(options: GatewayOptions): Issue[] {
  const { auth, discovery, usage, logging, rate_limit, storage } = options
  const within = (section: string, issues: Issue[]) =>
    issues.map(({ path, message }) => ({
      path: path[0] === 'storage' ? path : [section, ...path],
      message
    }))
  return [
    // Backends that are found are not known yet.
    ...(discovery.enabled ? [] : fallbackIssues(options)),
    ...within('discovery', discoveryIssues(discovery, storage)),
    ...within('auth', sourceIssues(auth, storage)),
    ...within('auth', keyQuotaIssues(auth, usage.prices.length > 0)),
    ...within('rate_limit', limitIssues(rate_limit, usage, storage)),
    ...within('usage', reporterIssues(usage, storage)),
    ...within('logging', requestLogIssues(logging, storage))
  ]
}

/** Without backends there must be a way to find some. */
export function backendIssues({ backends, discovery }: GatewayOptions): Issue[] {
  if (backends.length > 0 || discovery.enabled) return []
  const message = 'must be a list of at least one backend, unless discovery is enabled'
  return [{ path: ['backends'], message }]
}

/** Answers an error in the dialect of its route. */
export function answerError(error: unknown, request: FastifyRequest, reply: FastifyReply): void {
  const gatewayError = toGatewayError(error)
  const { exchange } = request
  exchange?.answeredWith(gatewayError)
  if (gatewayError.code === 'internal_error') {
    request.log.error({ err: error, requestId: exchange?.id }, 'unexpected error')
  }
  const dialect = exchange?.endpoint?.dialect ?? dialectOf(request.url)
  const id = exchange?.id ?? ''
  if (!request.raw.complete) refuseRest(request, reply)
  reply
    .code(gatewayError.statusCode)
    .headers({ 'x-request-id': id, [dialect.idHeader]: id, ...gatewayError.headers })
    .type('application/json; charset=utf-8')
    .send(JSON.stringify(dialect.error(gatewayError, id)))
}

/** The connection of a rejected request is closed, unless the rest of its body is small. */
function refuseRest(request: FastifyRequest, reply: FastifyReply): void {
  const length = Number(request.headers['content-length'] ?? Number.POSITIVE_INFINITY)
  if (length <= MAX_SWALLOWED) return
  reply.header('connection', 'close')
  closeInStages(reply.raw)
}

/** Responds to a request for an unknown route. The path stays out of the response and of the log. */
function answerNotFound(request: FastifyRequest, reply: FastifyReply): void {
  const { upgrade } = request.headers
  const error =
    upgrade?.toLowerCase() === 'websocket' && WEBSOCKETS.test(request.url)
      ? new GatewayError('upgrade_not_supported', NO_WEBSOCKET, {
          headers: { upgrade: 'HTTP/1.1', connection: 'upgrade' }
        })
      : new GatewayError('not_found', 'There is no such route.')
  answerError(error, request, reply)
}

function dialectOf(url: string): Dialect {
  if (url.includes('/v1/messages')) return anthropic
  return url.includes('/api/') ? ollama : openai
}

/** @param headers names and values by turns */
function hasTwoHosts(headers: readonly string[]): boolean {
  let hosts = 0
  for (let at = 0; at < headers.length; at += 2) {
    const name = headers[at]!
    if (name.length === HOST.length && name.toLowerCase() === HOST) hosts++
  }
  return hosts > 1
}

const HOST = 'host'
const ODD = /^[^/]|\/\/|\\|%(?:2e|5c|25|00)|(?:\/|%2f)\.{1,2}(?:\/|%2f|$)/i

/** Paths that two servers could read differently reach no backend. */
function refuseOddPath(url: string): void {
  if (ODD.test(url.split('?', 1)[0]!)) {
    throw new GatewayError('invalid_path', 'The path of this request is not plain.')
  }
}

async function within(ms: number, promise: Promise<unknown>): Promise<void> {
  let timer: NodeJS.Timeout | undefined
  const timeout = new Promise(resolve => {
    timer = setTimeout(resolve, ms)
  })
  await Promise.race([promise, timeout])
  clearTimeout(timer)
}

export default gateway
