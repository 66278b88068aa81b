import { getHeapStatistics } from 'node:v8'
import type { Limits } from './limits.ts'
import type { Periods } from './period.ts'
import type { Upload } from './uploads.ts'

/** Where limits are counted: in this process, or for several processes together. */

export type Scope = 'global' | 'per_key' | 'per_user' | 'per_model'

/** One subject and what it may do. */
export interface Account {
  scope: Scope
  /** A key's id, a user, a model, an address; '' for everybody together. */
  id: string
  /** Name among all subjects: it is looked up many times for one request. */
  name: string
  limits: Limits
  /** What of its quota was spent before it was first counted here. */
  spent?: { amount: number; at: number | undefined } | undefined
}

/** Tokens, and what they cost. */
export interface Amount {
  tokens: number
  cost: number
}

/** Reservation of a request: all that it can need. */
export interface Hold extends Amount {
  /** Usual need of such requests, where that differs: for tokens_per_minute, and for quotas with `reserve: typical`. */
  typical?: Amount | undefined
}

export const NOTHING: Amount = { tokens: 0, cost: 0 }

/** What one call wants. */
export interface Call {
  accounts: readonly Account[]
  /** Amount to reserve. */
  hold: Hold
  /**
   * Amount that it needs however wrong the estimates are. With more than a minute's tokens it could never be let through; a
   * quota of which nothing is spent or reserved lets it through if this fits.
   */
  least: Hold
  /** Takes even where there is no room. */
  force?: boolean
  /** Only rates may reject it: it reads what another request has reserved tokens for. */
  onlyRates?: boolean
  /** It books what is spent already: it is no request, and rates do not count it. Used with `force`. */
  isBooking?: boolean
}

export type LimitName =
  | 'requests_per_second'
  | 'requests_per_minute'
  | 'tokens_per_minute'
  | 'max_concurrent'
  | 'total_quota'
  /** What is left of the quota is reserved by running calls. */
  | 'reserved_quota'

export interface Refusal {
  scope: Scope
  limit: LimitName
  /** The number that was reached. */
  max: number
  /** When it is worth trying again; Infinity: never, as it stands. */
  retryAfterMs: number
  /** Amounts of a quota in its unit: left, and needed by the request. */
  left?: number
  needed?: number
}

/** What is left of the tightest limit of its kind, for response headers. */
export interface Left {
  limit: number
  remaining: number
  resetMs: number
}

/** What a call holds until it is settled. */
export interface Lease {
  readonly accounts: readonly Account[]
  /** Reserved, and not spent yet. */
  held: Hold
  /** Spent so far. */
  spent: Amount
  isOpen: boolean
  readonly requests?: Left | undefined
  readonly tokens?: Left | undefined
}

export interface StoreSettings {
  periods: Periods
  /** What happens to calls while the store cannot be asked. */
  onError: 'allow' | 'deny' | 'local'
}

export interface LimitStore {
  /**
   * One step over all accounts: each has room and all are taken, or nothing is. A promise where that takes a round trip.
   *
   * @throws {StoreError} when it can't be said
   */
  reserve(call: Call): Lease | Refusal | Promise<Lease | Refusal>
  /** Whether {@link look} needs no round trip. */
  readonly isLocal: boolean
  /**
   * Whether a request would be rejected now; takes nothing. Where the store is not there it is not.
   *
   * @param uploading other requests of each account whose bodies are being read in this process
   * @param upload the request itself, which a store that counts uploads of several processes counts until it ends
   */
  look(
    accounts: readonly Account[],
    uploading: readonly number[],
    upload?: Upload
  ): Refusal | undefined | Promise<Refusal | undefined>
  /**
   * Books what has been spent since the last time, and reserves `more` where every account has room for
   * it (with `force`: in any case).
   *
   * @param spent in all so far
   * @returns whether it was reserved
   */
  extend(lease: Lease, spent: Amount, more: Hold, force: boolean): Promise<boolean>
  /**
   * Books what was spent in all, and holds the rest until {@link settle}. Resolves when a crash of this process
   * cannot lose it, or when that cannot be achieved now; never rejects.
   */
  book(lease: Lease, spent: Amount): Promise<void>
  /** Books what was spent in all and gives the rest back, with the slot; does nothing a second time. */
  settle(lease: Lease, spent: Amount): void
  /** What was counted stays counted. */
  update(settings: StoreSettings): void
  /** Resolves when all is written down that has to be. */
  close(): Promise<void>
}

/** Nobody can say whether there is room. */
export class StoreError extends Error {
  override name = 'StoreError'
}

export function isRefusal(result: Lease | Refusal): result is Refusal {
  return 'scope' in result
}

/** Begins the id of a client address, which stands in for a key where no key is known. No key's id begins like this. */
export const ADDRESS = '\n'

/** Heap (bytes) for each address. An address takes about 2 KB, so all together take at most an eighth of the heap. */
const HEAP_PER_ADDRESS = 16 * 1024
/**
 * Client addresses whose limits are counted: 100,000, or fewer where the heap is small. Of more, those that are looked
 * at next are forgotten.
 */
export const MAX_ADDRESSES = Math.min(
  100_000,
  Math.floor(getHeapStatistics().heap_size_limit / HEAP_PER_ADDRESS)
)

/** Whether this is the name of a client address: there may be any number of them. */
export function isAddress(name: string): boolean {
  return name.startsWith(`per_key:${ADDRESS}`)
}

export function toAccount(
  scope: Scope,
  id: string,
  limits: Limits,
  spent?: Account['spent']
): Account {
  return { scope, id, name: `${scope}:${id}`, limits, spent }
}
