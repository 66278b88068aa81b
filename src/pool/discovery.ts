import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyBaseLogger } from 'fastify'
import { reasonOf } from '../errors.ts'
import { VERSION } from '../version.ts'
import type { Backend, Live } from './backend.ts'
import { type ModelCard, toCard } from './models.ts'

/** How backends are asked for their models. Times in milliseconds. */
export interface ModelDiscovery {
  enabled: boolean
  interval: number
  timeout: number
}

/** A list is no longer than this: a server that sends more is no inference server. */
const MAX_BYTES = 4 * 1024 * 1024
const MAX_MODELS = 10_000
/** How often (ms) a model that nobody lists may make all backends be asked. */
const MISS_MS = 5_000
/** How long (ms) a call for such a model waits for what they say. */
const PATIENCE_MS = 1_000
/** How soon (ms) a backend that gave no list is asked again. */
const UNKNOWN_MS = 5_000

/**
 * Asks every backend for its models, at once and then every `interval`: `GET /v1/models`, and Ollama's
 * `GET /api/tags` where that is not there. A backend that gives no list keeps the last one it gave.
 */
export class Discovery {
  readonly #log: FastifyBaseLogger
  #backends: Backend[] = []
  #settings: ModelDiscovery = { enabled: false, interval: 0, timeout: 0 }
  #stop = new AbortController()
  #asking: Promise<void>[] | undefined
  #askedAt = Number.NEGATIVE_INFINITY
  /** Why a backend gives no list, as it was logged. */
  readonly #complaints = new WeakMap<Live, string>()

  constructor(log: FastifyBaseLogger) {
    this.#log = log
  }

  /** Begins anew with these backends. */
  watch(backends: Backend[], settings: ModelDiscovery): void {
    this.stop()
    this.#stop = new AbortController()
    this.#settings = settings
    this.#backends = settings.enabled ? backends.filter(({ config }) => config.listsModels) : []
    for (const backend of backends)
      if (!this.#backends.includes(backend)) backend.live.models = undefined
    if (this.#backends.length > 0) void this.#watch(this.#stop.signal)
  }

  stop(): void {
    this.#stop.abort()
    this.#asking = undefined
  }

  /**
   * Asks again, because a model is wanted that nobody lists: it may have come since. Resolves as soon as
   * one `isFound`, and when nobody has it or takes too long to say so.
   */
  async find(isFound: () => boolean): Promise<void> {
    const { signal } = this.#stop
    if (this.#asking === undefined && performance.now() - this.#askedAt < MISS_MS) return
    void this.#ask(signal)
    const found = this.#asking!.map(async asked => {
      await asked
      if (!isFound()) throw new Error('not yet')
    })
    await Promise.any([...found, sleep(PATIENCE_MS, undefined, { ref: false })]).catch(() => {})
    // Others were configured meanwhile.
    if (signal.aborted && !this.#stop.signal.aborted && !isFound()) await this.find(isFound)
  }

  async #watch(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      await this.#ask(signal)
      // One that gave no list may only not be up yet.
      const isPartial = this.#backends.some(({ live }) => live.models === undefined)
      const { interval } = this.#settings
      await sleep(isPartial ? Math.min(interval, UNKNOWN_MS) : interval, undefined, {
        signal,
        ref: false
      }).catch(() => {})
    }
  }

  /** All of them at once; who comes while they are being asked waits for the same answers. */
  async #ask(signal: AbortSignal): Promise<void> {
    this.#asking ??= this.#backends.map(each => this.#learn(each, signal))
    const asking = this.#asking
    await Promise.all(asking)
    if (this.#asking !== asking) return
    this.#asking = undefined
    this.#askedAt = performance.now()
  }

  async #learn(backend: Backend, signal: AbortSignal): Promise<void> {
    const patience = AbortSignal.any([signal, AbortSignal.timeout(this.#settings.timeout)])
    try {
      const models = await listModels(backend, patience)
      if (signal.aborted) return
      const before = backend.live.models
      backend.live.models = models
      this.#complaints.delete(backend.live)
      const isNews = before === undefined || [...models.keys()].join() !== [...before.keys()].join()
      if (isNews)
        this.#log.info({ backend: backend.name, models: models.size }, 'backend lists models')
    } catch (error) {
      if (!signal.aborted) this.#complain(backend, error as Error)
    }
  }

  /** Says once why a backend gives no list; that it takes no calls without a key somebody has to know. */
  #complain({ name, live }: Backend, error: Error): void {
    const reason = reasonOf(error)
    if (this.#complaints.get(live) === reason) return
    this.#complaints.set(live, reason)
    const level = /^status 40[13]/.test(reason) ? 'warn' : 'info'
    this.#log[level]({ backend: name, reason }, 'backend lists no models')
  }
}

async function listModels(
  backend: Backend,
  signal: AbortSignal
): Promise<ReadonlyMap<string, ModelCard>> {
  const { data } = ((await getJson(backend, '/v1/models', signal)) ?? {}) as { data?: unknown }
  if (Array.isArray(data)) return toCards(data)
  const { models } = ((await getJson(backend, '/api/tags', signal)) ?? {}) as { models?: unknown }
  if (Array.isArray(models)) return toCards(models.map(each => ({ id: each?.name })))
  throw new Error('neither /v1/models nor /api/tags has a list')
}

function toCards(listed: unknown[]): Map<string, ModelCard> {
  const cards = new Map<string, ModelCard>()
  for (const card of listed.slice(0, MAX_MODELS) as (Partial<ModelCard> | null)[]) {
    if (typeof card?.id !== 'string') throw new Error('a model without an id')
    cards.set(card.id, { ...toCard(card.id), ...card })
  }
  return cards
}

/** The JSON at a path; undefined when there is none (404). */
async function getJson(
  { live, config }: Backend,
  path: string,
  signal: AbortSignal
): Promise<unknown> {
  const { statusCode, body } = await live.ask(path, {
    method: 'GET',
    headers: { accept: 'application/json', 'user-agent': `llmproxy/${VERSION}`, ...config.headers },
    signal
  })
  if (statusCode !== 200) {
    await body.dump()
    if (statusCode === 404) return undefined
    throw new Error(`status ${statusCode} of ${path}`)
  }
  let size = 0
  const chunks: Buffer[] = []
  for await (const chunk of body as AsyncIterable<Buffer>) {
    size += chunk.length
    if (size > MAX_BYTES) throw new Error(`more than ${MAX_BYTES} bytes at ${path}`)
    chunks.push(chunk)
  }
  return JSON.parse(Buffer.concat(chunks).toString())
}
