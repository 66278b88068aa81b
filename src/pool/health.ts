import { setTimeout as sleep } from 'node:timers/promises'
import { isDeepStrictEqual } from 'node:util'
import { reasonOf } from '../errors.ts'
import type { Say } from '../logs/shared-lines.ts'
import type { Backend } from './backend.ts'
import { isLocal } from './failures.ts'

/** Active health checks. Times in milliseconds. */
export interface HealthCheck {
  enabled: boolean
  interval: number
  timeout: number
  method: 'GET' | 'HEAD' | 'POST'
  path: string
  expectedStatus: number
  unhealthyThreshold: number
  healthyThreshold: number
}

/**
 * Probes every backend at once and then every `interval`. A backend goes away after
 * `unhealthyThreshold` failures in a row and comes back after `healthyThreshold` successes; the very
 * first probe decides alone, so that a gateway does not begin by sending calls to a dead backend.
 */
export class HealthChecker {
  readonly #say: Say
  readonly #watched = new Map<Backend, AbortController>()
  #check: HealthCheck | undefined

  constructor(say: Say) {
    this.#say = say
  }

  /**
   * Checks these backends from now on. One that is checked in this way already goes on, with what has been
   * counted; ones that are not checked any more count as healthy.
   */
  watch(backends: Backend[], check: HealthCheck): void {
    const isSame = isDeepStrictEqual(check, this.#check)
    this.#check = check
    for (const backend of this.#watched.keys()) {
      if (!isSame || !backends.includes(backend)) this.#leave(backend)
    }
    for (const backend of backends) {
      if (!check.enabled) {
        if (!backend.live.healthy) backend.live.turn(true)
      } else if (!this.#watched.has(backend)) {
        const stop = new AbortController()
        this.#watched.set(backend, stop)
        void this.#watch(backend, check, stop.signal)
      }
    }
  }

  stop(): void {
    for (const backend of this.#watched.keys()) this.#leave(backend)
  }

  #leave(backend: Backend): void {
    this.#watched.get(backend)?.abort()
    this.#watched.delete(backend)
  }

  async #watch(backend: Backend, check: HealthCheck, signal: AbortSignal): Promise<void> {
    const { live } = backend
    let successes = 0
    let failures = 0
    const judge = (failure: string | undefined) => {
      successes = failure === undefined ? successes + 1 : 0
      failures = failure === undefined ? 0 : failures + 1
      if (failure !== undefined) live.fail(failure)
      if (
        live.healthy &&
        (failures >= check.unhealthyThreshold || (!live.isProbed && failures > 0))
      ) {
        live.turn(false)
        // A backend that cannot be reached has its warning.
        const level = live.reach.failure === undefined ? 'warn' : 'info'
        this.#say(level, { backend: backend.name, reason: failure }, 'backend is unhealthy')
      } else if (
        !live.healthy &&
        (successes >= check.healthyThreshold || (!live.isProbed && successes > 0))
      ) {
        live.turn(true)
        this.#say('info', { backend: backend.name }, 'backend is healthy')
      }
      live.isProbed = true
    }
    while (!signal.aborted) {
      const result = await probe(backend, check, signal)
      if (signal.aborted) return
      if (result !== 'not_probed') judge(result)
      await sleep(check.interval, undefined, { signal, ref: false }).catch(() => {})
    }
  }
}

/** Returns what went wrong, if anything; `not_probed` if the gateway itself could not open a connection. */
async function probe(
  backend: Backend,
  check: HealthCheck,
  signal: AbortSignal
): Promise<string | undefined> {
  try {
    const { statusCode, body } = await backend.live.ask(check.path, {
      method: check.method,
      headers: backend.config.headers,
      signal: AbortSignal.any([signal, AbortSignal.timeout(check.timeout)])
    })
    await body.dump()
    return statusCode === check.expectedStatus ? undefined : `status ${statusCode}`
  } catch (error) {
    return isLocal(error as Error) ? 'not_probed' : reasonOf(error as Error)
  }
}
