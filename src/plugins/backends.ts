import '../check-node.ts'
import { setTimeout as sleep } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import type { FastifyPluginAsync } from 'fastify'
import { type DemoBackend, startDemo } from '../demo.ts'
import { modelMissing, modelNotFound } from '../errors.ts'
import { type Explain, explainer } from '../explain.ts'
import type { Say } from '../logs/shared-lines.ts'
import { checkOptions, type Given } from '../options.ts'
import { part, share, toPart } from '../parts.ts'
import type { AttemptResult } from '../pool/attempt.ts'
import { Discovery } from '../pool/discovery.ts'
import { type Found, joined } from '../pool/found.ts'
import { HealthChecker } from '../pool/health.ts'
import { listModels, type ModelCard } from '../pool/models.ts'
import { BackendsOptions, DEMO, toHealthCheck, toPool } from '../pool/policy.ts'
import { type OnCircuit, Pool } from '../pool/pool.ts'

/**
 * The pool of inference servers: which ones there are, whether they are healthy, and which one is
 * next. The proxy plugin sends through it.
 *
 * @example
 * await fastify.register(backends, { backends: [{ url: 'http://127.0.0.1:8001', weight: 2 }] })
 * fastify.backends.pool.available // true
 */

/** The pool, how it is changed, and who wants to know of attempts and circuits. */
export interface Backends {
  readonly pool: Pool
  readonly onAttempt: ((backend: string, result: AttemptResult) => void)[]
  /** All models that are known, as their backends show them; undefined when no backend's are. */
  models(): ModelCard[] | undefined
  readonly onCircuit: OnCircuit[]
  /** Why a request went where it did, whichever worker has served it; undefined: that is not known (any more). */
  readonly explain: Explain
  /** Called when the backends may have changed. */
  readonly onChange: (() => void)[]
  /**
   * Gives a backend no more calls, or gives it some again, in all workers. What it has begun it ends.
   *
   * @returns false: there is none of that name
   */
  drain(name: string, drained: boolean): boolean
  /** Takes over other options, and what is found if that is told, too. */
  update(options: BackendsOptions, found?: readonly Found[]): Promise<void>
  /** Takes over what is found beside the options: all of it. */
  find(found: readonly Found[]): void
  /** Which source has found the backend of this name; undefined: it is configured. */
  sourceOf(name: string): string | undefined
  /** Base URL of the demo backend, when it is in use. */
  readonly demoUrl: string | undefined
}

/** How long (ms) a start waits for the first connection to each backend. */
const FIRST_CONNECTION_MS = 250

const PANIC =
  'health checks say that every backend is down: requests are tried nevertheless (health_check.panic)'

const backendsPlugin: FastifyPluginAsync<Given<BackendsOptions>> = async function backends(
  fastify,
  given
) {
  let options = checkOptions(BackendsOptions, given)
  let found: readonly Found[] = []
  let sources: ReadonlyMap<string, string> = new Map()
  const peers = part(fastify, 'peers')
  const say: Say = peers?.say ?? ((level, fields, msg) => fastify.log[level](fields, msg))
  const checker = new HealthChecker(say)
  const discovery = new Discovery(say)
  let demo: DemoBackend | undefined
  const prepare = async (changed: BackendsOptions) => {
    // The original's reference file has it, so it must not stop a start.
    if (changed.backends.some(backend => backend.max_idle_conns !== undefined)) {
      fastify.log.warn('backends[].max_idle_conns has no effect: idle connections close after 4 s')
    }
    if (changed.backends.some(({ url }) => url === DEMO)) demo ??= await startDemo()
  }
  const onChange: (() => void)[] = []
  const onCircuit: OnCircuit[] = [
    (backend, { state, ...why }) => {
      if (state === 'closed') fastify.log.info({ backend }, 'circuit closed')
      else fastify.log.warn({ backend, ...why }, 'circuit opened')
    }
  ]
  await prepare(options)
  const workers = peers?.count
  const pool = new Pool(toPool(options, demo?.url, workers), {
    circuit(backend, turn) {
      for (const listener of onCircuit) listener(backend, turn)
    },
    reach(backend, { origin, basePath, reach: { failure: reason } }) {
      if (reason === undefined) return say('info', { backend }, 'backend can be reached')
      say('warn', { backend, url: origin + basePath, reason }, 'backend cannot be reached')
    },
    panic(isPanicking) {
      if (isPanicking) say('warn', {}, PANIC)
      else say('info', {}, 'health checks decide again which backends get requests')
    }
  })
  const watch = () => {
    checker.watch(pool.backends, toHealthCheck(options.health_check))
    discovery.watch(pool.backends, options.routing.model_discovery)
    return Promise.all(pool.backends.map(({ live }) => live.reach.begin()))
  }
  const reached = watch()
  let isClosed = false
  const apply = () => {
    // A reload that waits for its sources may outlast the gateway.
    if (isClosed) return
    const all = joined(options.backends, found)
    sources = all.sources
    pool.update(toPool({ ...options, backends: all.backends }, demo?.url, workers))
    void watch()
    for (const listener of onChange) listener()
  }

  const setDrained = (name: string, drained: boolean) => {
    const backend = pool.backends.find(each => each.name === name)
    if (backend !== undefined) backend.live.isDrained = drained
    return backend !== undefined
  }
  peers?.onNews(news => {
    if (news.kind === 'backend') setDrained(news.backend, news.drained)
  })

  share(fastify, 'backends', {
    pool,
    onAttempt: [],
    models: () => listModels(pool.backends),
    drain(backend, drained) {
      if (!setDrained(backend, drained)) return false
      peers?.tell({ kind: 'backend', backend, drained })
      return true
    },
    onCircuit,
    explain: explainer(pool.decisions, peers),
    onChange,
    get demoUrl() {
      return demo?.url
    },
    async update(changed, foundThen = found) {
      await prepare(changed)
      options = changed
      found = foundThen
      apply()
    },
    find(foundNow) {
      if (isDeepStrictEqual(foundNow, found)) return
      found = foundNow
      apply()
    },
    sourceOf: name => sources.get(name)
  } satisfies Backends)

  // Before keys, limits and prices are looked up: all of them depend on the model.
  fastify.addHook('preValidation', (request, _reply, done) => {
    const { payload, exchange } = request
    if (payload === undefined || payload.model !== undefined) return done()
    if (payload.previousResponseId !== undefined || pool.backends.length === 0) return done()
    const { spends, isFree } = exchange.endpoint ?? {}
    const isOptional = spends === undefined && !pool.hasSeveralModels
    // What spends nothing may lack a model where all backends have the same.
    if (isFree && isOptional) return done()
    const imply = () => {
      payload.model = pool.impliedModel
      payload.isModelImplied = payload.model !== undefined
      return payload.isModelImplied
    }
    if (imply() || isOptional) return done()
    discovery.find(imply).then(() => done(imply() ? undefined : modelMissing()), done)
  })

  // Before a limit is asked: a model that nobody has costs nothing.
  fastify.addHook('preHandler', (request, _reply, done) => {
    // A caller learns of no model that it may not use, whichever part is registered first.
    part(fastify, 'keys')?.checkModel(request)
    const model = request.exchange?.model
    // Who holds the response that is gone on with says itself what it has.
    const isHeld =
      request.payload?.previousResponseId !== undefined || request.exchange.pinned !== undefined
    // Where there are no backends at all that is what the caller is told.
    if (
      model === undefined ||
      isHeld ||
      pool.backends.length === 0 ||
      pool.serves(model, request.exchange)
    ) {
      return done()
    }
    const isFound = () => pool.serves(model, request.exchange)
    discovery.find(isFound).then(() => done(isFound() ? undefined : modelNotFound(model)), done)
  })

  // So that /health/ready is right from the first time.
  fastify.addHook('onReady', async () => {
    await Promise.race([reached, sleep(FIRST_CONNECTION_MS, undefined, { ref: false })])
  })

  fastify.addHook('onClose', async () => {
    isClosed = true
    checker.stop()
    discovery.stop()
    await pool.destroy()
    await demo?.close()
  })
}

export default toPart(backendsPlugin, {
  name: 'backends',
  decorates: ['backends']
})
