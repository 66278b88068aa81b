import type { FastifyBaseLogger } from 'fastify'
import { GatewayError } from '../errors.ts'
import type { Caller } from '../exchange.ts'
import {
  checkKey,
  hashKey,
  type KeyRecord,
  type KeySource,
  matchesModel,
  reasonFor,
  type StatusCodes,
  statusRefusal,
  toCaller
} from './key.ts'

export interface KeyringOptions {
  /** `first_match`: the first source that knows the key decides; `all`: every source must admit. */
  mode: 'first_match' | 'all'
  codes: StatusCodes
  sources: KeySource[]
}

/**
 * Turns a presented key into its caller.
 *
 * @example
 * const keyring = new Keyring({ mode: 'first_match', codes, sources }, log)
 * await keyring.caller('sk-alice', '10.0.0.1') // { id: 'alice', ... }
 */
export class Keyring {
  readonly #options: KeyringOptions
  readonly #log: FastifyBaseLogger
  #running = 0
  #onIdle: (() => void) | undefined

  constructor(options: KeyringOptions, log: FastifyBaseLogger) {
    this.#options = options
    this.#log = log
  }

  /** @throws {GatewayError} 401 unknown, 403 refused, 429 quota, 503 when a source can't tell */
  async caller(key: string, ip: string): Promise<Caller> {
    const hash = hashKey(key)
    this.#running++
    try {
      const { mode } = this.#options
      return await (mode === 'all' ? this.#all(key, hash, ip) : this.#first(key, hash, ip))
    } finally {
      if (--this.#running === 0) this.#onIdle?.()
    }
  }

  /** Drops what sources remember of the key with this hash, or of all. */
  forget(hash?: string): void {
    for (const source of this.#options.sources) source.forget?.(hash)
  }

  /** Resolves when nobody waits for a source any more. */
  async idle(): Promise<void> {
    if (this.#running === 0) return
    await new Promise<void>(resolve => {
      this.#onIdle = resolve
    })
  }

  async #first(key: string, hash: string, ip: string): Promise<Caller> {
    let unsure = false
    for (const source of this.#options.sources) {
      const record = await this.#lookup(source, key, hash)
      if (record === 'down') unsure = true
      else if (record !== undefined) return this.#admit(record, ip)
    }
    throw unsure ? unavailable() : this.#unknown()
  }

  async #all(key: string, hash: string, ip: string): Promise<Caller> {
    if (this.#options.sources.length === 0) throw this.#unknown()
    const callers: Caller[] = []
    for (const source of this.#options.sources) {
      const record = await this.#lookup(source, key, hash)
      if (record === 'down') throw unavailable()
      if (record === undefined) throw this.#unknown()
      callers.push(this.#admit(record, ip))
    }
    return callers.reduce(merge)
  }

  async #lookup(source: KeySource, key: string, hash: string) {
    try {
      return await source.lookup(key, hash)
    } catch (error) {
      const reason = reasonFor(error, key)
      this.#log.error({ source: source.name, reason }, 'a key source is down')
      return 'down' as const
    }
  }

  #admit(record: KeyRecord | GatewayError, ip: string): Caller {
    if (record instanceof GatewayError) throw record
    const refusal = checkKey(record, { ip, now: Date.now(), codes: this.#options.codes })
    if (refusal !== undefined) throw refusal
    return toCaller(record)
  }

  #unknown(): GatewayError {
    return (
      statusRefusal('not_found', this.#options.codes) ??
      new GatewayError('invalid_api_key', 'This API key is not valid.')
    )
  }
}

function unavailable(): GatewayError {
  return new GatewayError('auth_unavailable', 'API keys cannot be checked at the moment.', {
    headers: { 'retry-after': '1' }
  })
}

/** The first source names the caller, the others may add what it didn't know and narrow models. */
function merge(first: Caller, next: Caller): Caller {
  const models =
    first.models === undefined || next.models === undefined
      ? (first.models ?? next.models)
      : [
          ...first.models.filter(model => matchesModel(next.models!, model)),
          ...next.models.filter(model => matchesModel(first.models!, model))
        ]
  const { id, name = next.name, userId = next.userId } = first
  const { limits = next.limits, spent = next.spent, priority = next.priority } = first
  const { trace = next.trace } = first
  return {
    id,
    name,
    userId,
    models,
    limits,
    spent,
    priority,
    trace,
    tags: { ...next.tags, ...first.tags }
  }
}
