import { isDeepStrictEqual } from 'node:util'
import type { FastifyBaseLogger } from 'fastify'
import type { Found } from '../pool/found.ts'
import type { StorageOptions } from '../store/storage.ts'
import { pause } from './ask.ts'
import { Source } from './source.ts'
import { type DiscoveryOptions, nameOfSource, toWatch } from './sources.ts'

/** What sources are followed with, and who hears of changes. */
export interface Surroundings {
  dataDir: string | undefined
  log: FastifyBaseLogger
  onChange(found: readonly Found[]): void
}

/** Changes that come within this time (ms) after one are told together. */
const GATHER_MS = 250

/** All sources, and what they have found together. */
export class Finder {
  readonly #around: Surroundings
  readonly #patience: number
  #mode: DiscoveryOptions['mode'] = 'merge'
  /** By all that was said of them. */
  #sources = new Map<string, Source>()
  #found: readonly Found[] = []
  #telling: NodeJS.Timeout | undefined
  #toldAt = Number.NEGATIVE_INFINITY
  #updating: Promise<unknown> = Promise.resolve()
  #isClosed = false

  /** @param patience how long (ms) sources that have just begun may take for their first answer */
  constructor(around: Surroundings, patience: number) {
    this.#around = around
    this.#patience = patience
  }

  get sources(): Source[] {
    return [...this.#sources.values()]
  }

  /**
   * Follows these sources from now on. Those for which nothing has changed go on as they are.
   *
   * @returns what they have found, when each has answered or failed, or the patience is at its end
   */
  update(options: DiscoveryOptions, storage: StorageOptions): Promise<readonly Found[]> {
    const updated = this.#updating.then(() => this.#update(options, storage))
    this.#updating = updated
    return updated
  }

  close(): void {
    this.#isClosed = true
    clearTimeout(this.#telling)
    for (const source of this.sources) source.close()
  }

  async #update(options: DiscoveryOptions, storage: StorageOptions): Promise<readonly Found[]> {
    const before = this.#sources
    const sources = new Map<string, Source>()
    for (const each of options.enabled ? options.sources : []) {
      if (!each.enabled) continue
      const used = each.type === 'database' ? storage.databases : []
      const all = JSON.stringify([each, options.interval, used])
      sources.set(all, before.get(all) ?? this.#begin(each, options, storage))
    }
    const stop = new AbortController()
    const tried = Promise.all([...sources.values()].map(each => each.tried))
    await Promise.race([tried, pause(this.#patience, stop.signal)])
    stop.abort()
    this.#sources = sources
    this.#mode = options.mode
    this.#found = this.#merged()
    for (const [all, source] of before) if (!sources.has(all)) source.close()
    if (this.#isClosed) this.close()
    return this.#found
  }

  #begin(
    each: DiscoveryOptions['sources'][number],
    options: DiscoveryOptions,
    storage: StorageOptions
  ): Source {
    const { log, dataDir } = this.#around
    const watch = toWatch(each, options.interval, storage, dataDir)
    const name = nameOfSource(each)
    const before = this.sources.find(source => source.name === name)
    return new Source(name, each.backend ?? {}, watch, () => this.#changed(), log, before)
  }

  /** The first change is told at once; a rollout is many. */
  #changed(): void {
    if (this.#telling !== undefined) return
    const wait = this.#toldAt + GATHER_MS - performance.now()
    this.#telling = setTimeout(() => this.#tell(), Math.max(0, wait)).unref()
  }

  #tell(): void {
    this.#telling = undefined
    this.#toldAt = performance.now()
    const found = this.#merged()
    if (isDeepStrictEqual(found, this.#found)) return
    this.#found = found
    this.#around.onChange(found)
  }

  #merged(): Found[] {
    const all = this.sources.map(({ name, backends = [] }) =>
      backends.map(backend => ({ source: name, backend }))
    )
    return this.#mode === 'first' ? (all.find(each => each.length > 0) ?? []) : all.flat()
  }
}
