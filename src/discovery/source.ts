import { isDeepStrictEqual } from 'node:util'
import type { FastifyBaseLogger } from 'fastify'
import { type BackendOptions, nameOf } from '../pool/policy.ts'
import { reasonOf } from '../store/reason.ts'
import { pause } from './ask.ts'
import { type DefaultsOptions, type Entry, toBackends } from './entry.ts'

/**
 * Follows something that knows backends: says all of them each time there is news, until the signal comes.
 * It rejects when it can't go on, and is begun anew then.
 */
export type Watch = (say: (entries: readonly Entry[]) => void, signal: AbortSignal) => Promise<void>

/** Waits (ms) after failures in a row; one after answers for longer than the wait is the first of its row. */
const FIRST_WAIT = 500
const MAX_WAIT = 30_000
const MAX_NAMES = 20

/** Where backends are found, and what it said last: an answer that is not given any more still holds. */
export class Source {
  readonly name: string
  /** The last good answer; undefined before the first. */
  backends: BackendOptions[] | undefined
  #entries: readonly Entry[] | undefined
  /** The last question was answered. */
  isUp = false
  errors = 0
  /** When the answer has last changed (Unix ms). */
  changedAt = 0
  /** Resolves when it has answered or failed for the first time. */
  readonly tried: Promise<void>
  readonly #defaults: DefaultsOptions
  readonly #onChange: () => void
  readonly #log: FastifyBaseLogger
  readonly #stop = new AbortController()
  #bad = new Set<string>()

  /** @param before the source whose place it takes: what that one said holds until this one answers */
  constructor(
    name: string,
    defaults: DefaultsOptions,
    watch: Watch,
    onChange: () => void,
    log: FastifyBaseLogger,
    before?: Source
  ) {
    this.name = name
    this.#defaults = defaults
    this.#onChange = onChange
    this.#log = log
    if (before !== undefined) {
      this.#entries = before.#entries
      this.backends = this.#entries && toBackends(this.#entries, defaults, () => {})
      this.changedAt = before.changedAt
    }
    const tried = Promise.withResolvers<void>()
    this.tried = tried.promise
    void this.#follow(watch, tried.resolve)
  }

  close(): void {
    this.#stop.abort()
  }

  async #follow(watch: Watch, tried: () => void): Promise<void> {
    const { signal } = this.#stop
    let wait = FIRST_WAIT
    while (!signal.aborted) {
      const began = performance.now()
      const run = new AbortController()
      let hasAnswered = false
      try {
        await watch(
          entries => {
            if (!signal.aborted) this.#take(entries)
            hasAnswered = true
            tried()
          },
          AbortSignal.any([signal, run.signal])
        )
      } catch (error) {
        if (signal.aborted) return
        if (hasAnswered && performance.now() - began > wait) wait = FIRST_WAIT
        this.#fail(error, wait)
      } finally {
        run.abort()
      }
      tried()
      // Many gateways have the same trouble at the same time.
      await pause(wait * (0.5 + Math.random() / 2), signal)
      wait = Math.min(wait * 2, MAX_WAIT)
    }
  }

  #fail(error: unknown, wait: number): void {
    const isNews = this.isUp || this.errors === 0
    this.errors++
    this.isUp = false
    const kept = this.backends?.length ?? 0
    const line = { source: this.name, reason: reasonOf(error), wait, backends: kept }
    this.#log[isNews ? 'warn' : 'debug'](line, 'discovery source fails; its last answer holds')
  }

  #take(entries: readonly Entry[]): void {
    const before = this.backends
    const bad = new Set<string>()
    this.#entries = entries
    const backends = toBackends(entries, this.#defaults, (entry, reason) => {
      bad.add(`${entry} ${reason}`)
      if (this.#bad.has(`${entry} ${reason}`)) return
      this.#log.warn({ source: this.name, entry, reason }, 'a found backend cannot be used')
    })
    this.#bad = bad
    if (!this.isUp && this.errors > 0) {
      this.#log.info({ source: this.name }, 'discovery source answers again')
    }
    this.isUp = true
    if (before !== undefined && isDeepStrictEqual(inOrder(before), inOrder(backends))) return
    this.backends = backends
    this.changedAt = Date.now()
    const [names, old] = [backends, before ?? []].map(each => each.map(nameOf)) as [
      string[],
      string[]
    ]
    const added = names.filter(each => !old.includes(each)).slice(0, MAX_NAMES)
    const removed = old.filter(each => !names.includes(each)).slice(0, MAX_NAMES)
    const line = { source: this.name, backends: names.length, added, removed }
    this.#log.info(line, 'backends found')
    this.#onChange()
  }
}

/** A table has no order, nor has a registry that keeps its servers in a hash: another one is no change. */
function inOrder(backends: readonly BackendOptions[]): string[] {
  return backends.map(each => JSON.stringify(each)).sort()
}
