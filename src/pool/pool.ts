import { Backend, type BackendConfig } from './backend.ts'
import { type StrategyName, strategies } from './strategies.ts'

/** When and how often another attempt is made. Times in milliseconds. */
export interface RetryPolicy {
  enabled: boolean
  maxRetries: number
  initialWait: number
  maxWait: number
  multiplier: number
  retryOn: readonly FailureKind[]
}

/** How an attempt fails before the client has had a byte of an answer. */
export type FailureKind = 'connect_failure' | 'timeout' | '5xx' | '429'

export interface PoolConfig {
  backends: BackendConfig[]
  loadBalance: StrategyName
  retry: RetryPolicy
}

/** All backends, and how one is chosen. */
export class Pool {
  backends: Backend[] = []
  retry!: RetryPolicy
  #strategy = strategies.round_robin
  readonly #leaving = new Set<Backend>()

  constructor(config: PoolConfig) {
    this.update(config)
  }

  /**
   * Takes over another configuration. A backend that stays (same name and URL) keeps its
   * connections, its counts and what was learned; one that goes finishes its answers first.
   */
  update({ backends, loadBalance, retry }: PoolConfig): void {
    const before = this.backends
    this.backends = backends.map(config => {
      const same = before.find(backend => backend.name === config.name && isSame(backend, config))
      if (same === undefined) return new Backend(config)
      same.config = config
      return same
    })
    for (const backend of before) if (!this.backends.includes(backend)) void this.#retire(backend)
    this.#strategy = strategies[loadBalance]
    this.retry = retry
  }

  /**
   * The backends that may be given work. `pinned` (a name) is the only one that can serve a call
   * about what it holds; if it has left the pool any other may say so.
   */
  candidates(pinned?: string): Backend[] {
    const holder = pinned && this.backends.find(each => each.name === pinned)
    return (holder ? [holder] : this.backends).filter(each => each.available)
  }

  /** The backend for the next attempt, or undefined when none that may be used is available. */
  pick(exclude: ReadonlySet<Backend>, pinned?: string): Backend | undefined {
    const candidates = this.candidates(pinned).filter(each => !exclude.has(each))
    return candidates.length < 2 ? candidates[0] : this.#strategy(candidates, performance.now())
  }

  /** All that are in use, those included that finish their answers before they go. */
  get all(): Backend[] {
    return [...this.backends, ...this.#leaving]
  }

  get available(): boolean {
    return this.backends.some(backend => backend.available)
  }

  async destroy(): Promise<void> {
    await Promise.all(this.all.map(backend => backend.destroy()))
  }

  async #retire(backend: Backend): Promise<void> {
    this.#leaving.add(backend)
    await backend.close()
    this.#leaving.delete(backend)
  }
}

/** Connections can be kept: what they were opened with has not changed. */
function isSame(backend: Backend, config: BackendConfig): boolean {
  return (
    backend.config.url === config.url && backend.config.connectTimeout === config.connectTimeout
  )
}
