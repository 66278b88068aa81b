import { setTimeout as sleep } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import { reasonOf } from '../errors.ts'
import type { Say } from '../logs/shared-lines.ts'
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

/** Statuses that say that a backend would refuse requests, too; 501 and 405 are about this route alone. */
const REFUSAL = /^status (40[13]|50(?!1)\d|5[1-9]\d) /

/** How a backend is asked. */
interface Watched {
  backend: Backend
  stop: AbortController
  /** It is being asked. */
  asking: Promise<void> | undefined
  /** When it has answered or failed last (monotonic, ms). */
  askedAt: number
}

/**
 * Asks every backend for its models, at once and then every `interval`: `GET /v1/models`, and Ollama's
 * `GET /api/tags` where that is not there. A backend that gives no list keeps the last one it gave.
 */
export class Discovery {
  readonly #say: Say
  readonly #watched = new Map<Backend, Watched>()
  #settings: ModelDiscovery = { enabled: false, interval: 0, timeout: 0 }
  /** Why a backend gives no list, as it was logged. */
  readonly #complaints = new WeakMap<Live, string>()

  constructor(say: Say) {
    this.#say = say
  }

  /** Asks these backends from now on. One that is asked in this way already goes on as it is. */
  watch(backends: Backend[], settings: ModelDiscovery): void {
    const isSame = isDeepStrictEqual(settings, this.#settings)
    this.#settings = settings
    for (const backend of this.#watched.keys()) {
      if (!isSame || !backends.includes(backend)) this.#leave(backend)
    }
    for (const backend of backends) {
      if (!settings.enabled || !backend.config.listsModels) backend.live.models = undefined
      else if (!this.#watched.has(backend)) void this.#watch(backend)
    }
  }

  stop(): void {
    for (const backend of this.#watched.keys()) this.#leave(backend)
  }

  /**
   * Asks again, because a model is wanted that nobody lists: it may have come since. Resolves as soon as
   * one `isFound`, and when nobody has it or takes too long to say so.
   */
  async find(isFound: () => boolean): Promise<void> {
    const now = performance.now()
    const asked = [...this.#watched.values()].filter(
      ({ asking, askedAt }) => asking !== undefined || now - askedAt >= MISS_MS
    )
    if (asked.length === 0) return
    const found = asked.map(async each => {
      await this.#ask(each)
      if (!isFound()) throw new Error('not yet')
    })
    await Promise.any([...found, sleep(PATIENCE_MS, undefined, { ref: false })]).catch(() => {})
    // Others were configured meanwhile.
    if (asked.some(({ stop }) => stop.signal.aborted) && !isFound()) await this.find(isFound)
  }

  #leave(backend: Backend): void {
    this.#watched.get(backend)?.stop.abort()
    this.#watched.delete(backend)
  }

  async #watch(backend: Backend): Promise<void> {
    const stop = new AbortController()
    const watched = { backend, stop, asking: undefined, askedAt: Number.NEGATIVE_INFINITY }
    this.#watched.set(backend, watched)
    const { interval } = this.#settings
    while (!stop.signal.aborted) {
      await this.#ask(watched)
      // One that gave no list may only not be up yet.
      const wait = backend.live.models === undefined ? Math.min(interval, UNKNOWN_MS) : interval
      await sleep(wait, undefined, { signal: stop.signal, ref: false }).catch(() => {})
    }
  }

  /** Who comes while it is being asked waits for the same answer. */
  #ask(watched: Watched): Promise<void> {
    watched.asking ??= this.#learn(watched.backend, watched.stop.signal).finally(() => {
      watched.asking = undefined
      watched.askedAt = performance.now()
    })
    return watched.asking
  }

  async #learn(backend: Backend, signal: AbortSignal): Promise<void> {
    const patience = AbortSignal.any([signal, AbortSignal.timeout(this.#settings.timeout)])
    try {
      const models = await listModels(backend, patience)
      if (signal.aborted) return
      const before = backend.live.models
      backend.live.models = models
      backend.live.refusal = undefined
      this.#complaints.delete(backend.live)
      const isNews = before === undefined || [...models.keys()].join() !== [...before.keys()].join()
      const { name } = backend
      if (isNews) this.#say('info', { backend: name, models: models.size }, 'backend lists models')
    } catch (error) {
      if (!signal.aborted) this.#complain(backend, error as Error)
    }
  }

  /**
   * Logs once why a backend gives no list. Without a key (401, 403) or with an error of its own (5xx) it will not take
   * requests either. The same reason given again refuses nothing: a request may have succeeded since.
   */
  #complain({ name, live }: Backend, error: Error): void {
    const reason = reasonOf(error)
    if (this.#complaints.get(live) === reason) return
    this.#complaints.set(live, reason)
    const isRefused = REFUSAL.test(reason)
    live.refusal = isRefused ? reason : undefined
    this.#say(isRefused ? 'warn' : 'info', { backend: name, reason }, 'backend lists no models')
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
  // Further names of a model (llama.cpp's --alias).
  for (const card of [...cards.values()]) {
    const { aliases } = card
    for (const alias of Array.isArray(aliases) ? aliases : []) {
      const isNew = typeof alias === 'string' && alias !== '' && !cards.has(alias)
      if (isNew && cards.size < MAX_MODELS)
        cards.set(alias, { ...card, id: alias, alias_of: card.id })
    }
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
