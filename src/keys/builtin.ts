import { GatewayError } from '../errors.ts'
import { toKeyRecord } from './fields.ts'
import type { KeyRecord, KeySource } from './key.ts'
import type { FoundKey, KeyStore } from './key-store.ts'
import { Lru } from './lru.ts'

/** How long (ms) what was found in the file is good, before it is asked whether somebody has changed it. */
const GOOD_FOR = 250
/** Keys that are remembered. */
const MOST = 10_000

interface Remembered extends Pick<FoundKey, 'isRevoked' | 'until'> {
  record: KeyRecord
}

/**
 * Keys of a {@link KeyStore}. Those that were found are remembered: what this process changes is dropped
 * at once ({@link BuiltinKeys.forget}), and what another one changes is noticed by the first lookup
 * 250 ms later.
 */
export class BuiltinKeys implements KeySource {
  readonly name: string
  readonly #store: KeyStore
  readonly #found = new Lru<string, Remembered>(MOST)
  #version: string | undefined
  #looking: Promise<void> | undefined
  #lookedAt = Number.NEGATIVE_INFINITY
  /** What was asked for before something was dropped may be old. */
  #drops = 0

  constructor(name: string, store: KeyStore) {
    this.name = name
    this.#store = store
  }

  async lookup(_key: string, hash: string): Promise<KeyRecord | GatewayError | undefined> {
    if (performance.now() - this.#lookedAt > GOOD_FOR) {
      this.#looking ??= this.#look()
      await this.#looking
    }
    const found = this.#found.get(hash) ?? (await this.#find(hash))
    if (found === undefined) return undefined
    if (found.until !== undefined && Date.now() >= found.until) return undefined
    return found.isRevoked
      ? new GatewayError('key_disabled', 'This API key has been revoked.')
      : found.record
  }

  forget(hash?: string): void {
    this.#drops++
    if (hash === undefined) this.#found.clear()
    else this.#found.delete(hash)
  }

  async #look(): Promise<void> {
    try {
      const askedAt = performance.now()
      const version = await this.#store.version()
      if (version !== this.#version) this.forget()
      this.#version = version
      this.#lookedAt = askedAt
    } finally {
      this.#looking = undefined
    }
  }

  async #find(hash: string): Promise<Remembered | undefined> {
    const drops = this.#drops
    const found = await this.#store.find(hash)
    if (found === undefined) return undefined
    const { id, fields, isRevoked, until } = found
    const remembered = { record: await toKeyRecord(id, fields), isRevoked, until }
    if (drops === this.#drops) this.#found.set(hash, remembered)
    return remembered
  }
}
