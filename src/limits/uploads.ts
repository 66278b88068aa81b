import { type Account, idOf, type Refusal } from './store.ts'

/** When a slot may be free again (ms). */
const RETRY = 1_000

/**
 * Requests whose bodies are being read, by account: each has a slot of `max_concurrent` from its first byte on, so that
 * a caller cannot fill the memory with more uploads than it may have requests.
 *
 * @example
 * const uploads = new Uploads()
 * const limits = { ...noLimits, max_concurrent: 1 }
 * const upload = uploads.begin([{ scope: 'per_key', id: 'alice', limits }])
 * uploads.refusal(upload).limit // 'max_concurrent'
 * uploads.end(upload)
 */
export class Uploads {
  readonly #counts = new Map<string, number>()

  /** Returns how many uploads of an account are under way. */
  of(account: Account): number {
    return this.#counts.get(idOf(account)) ?? 0
  }

  /**
   * Returns why an upload gets no slot; only uploads of this process are counted.
   *
   * @param processes that share the limits
   */
  refusal(accounts: readonly Account[], processes = 1): Refusal | undefined {
    for (const account of accounts) {
      const max = account.limits.max_concurrent
      if (max > 0 && this.of(account) >= Math.ceil(max / processes)) {
        return { scope: account.scope, limit: 'max_concurrent', max, retryAfterMs: RETRY }
      }
    }
    return undefined
  }

  /** Returns the accounts in which the upload has a slot, until they are given to {@link end}. */
  begin(accounts: readonly Account[]): Account[] {
    const limited = accounts.filter(({ limits }) => limits.max_concurrent > 0)
    for (const account of limited) this.#counts.set(idOf(account), this.of(account) + 1)
    return limited
  }

  end(accounts: readonly Account[]): void {
    for (const account of accounts) {
      const others = this.of(account) - 1
      if (others > 0) this.#counts.set(idOf(account), others)
      else this.#counts.delete(idOf(account))
    }
  }
}
