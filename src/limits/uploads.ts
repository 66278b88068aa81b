import type { Account, Refusal } from './store.ts'

/** When a slot may be free again (ms). */
const RETRY = 1_000

/** One request whose body is being read. */
export interface Upload {
  /** Names of the accounts in which it has a slot. */
  readonly names: readonly string[]
  /** Is called when it ends. */
  onEnd?: () => void
}

/**
 * Requests whose bodies are being read, by account: each has a slot of `max_concurrent` from its first byte on, so that
 * a caller cannot fill the memory with more uploads than it may have requests.
 *
 * @example
 * const uploads = new Uploads()
 * const limits = { ...noLimits, max_concurrent: 1 }
 * const accounts = [toAccount('per_key', 'alice', limits)]
 * const upload = uploads.begin(accounts)
 * uploads.refusal(accounts, uploads.of(accounts)).limit // 'max_concurrent'
 * uploads.end(upload)
 */
export class Uploads {
  readonly #counts = new Map<string, number>()

  /** Returns how many uploads of each account are under way. */
  of(accounts: readonly Account[]): number[] {
    return accounts.map(account => this.#counts.get(account.name) ?? 0)
  }

  /**
   * Returns why one more upload gets no slot.
   *
   * @param others uploads of each account that are under way
   */
  refusal(accounts: readonly Account[], others: readonly number[]): Refusal | undefined {
    for (const [at, { scope, limits }] of accounts.entries()) {
      const max = limits.max_concurrent
      if (max > 0 && others[at]! >= max) {
        return { scope, limit: 'max_concurrent', max, retryAfterMs: RETRY }
      }
    }
    return undefined
  }

  /** Returns an upload that has its slots until it is given to {@link end}. */
  begin(accounts: readonly Account[]): Upload {
    const names = accounts.filter(({ limits }) => limits.max_concurrent > 0).map(({ name }) => name)
    for (const name of names) this.#counts.set(name, (this.#counts.get(name) ?? 0) + 1)
    return { names }
  }

  end({ names, onEnd }: Upload): void {
    for (const name of names) {
      const others = this.#counts.get(name)! - 1
      if (others > 0) this.#counts.set(name, others)
      else this.#counts.delete(name)
    }
    onEnd?.()
  }
}
