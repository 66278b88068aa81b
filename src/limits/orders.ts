import crypto from 'node:crypto'
import type { KeyNews } from '../keys/key.ts'
import type { Redis } from '../store/redis.ts'
import { type Period, spentBefore } from './counter.ts'
import { bucketOf } from './limits.ts'
import { SCRIPT } from './script.ts'
import { type Account, isAddress, type Left, type Refusal } from './store.ts'

/** How {@link SCRIPT} is asked, and what it answers. */

const SHA = crypto.hash('sha1', SCRIPT)

/**
 * Error replies that come from what the keys of one order hold. All others come from the state of the server (LOADING,
 * READONLY, MASTERDOWN, NOAUTH, CLUSTERDOWN, OOM, MISCONF ...); Redis 6 puts those behind a dash.
 */
const OF_KEYS = /^(?:WRONGTYPE|ERR user_script|ERR Error running script)(?!.*: -[A-Z])/

/** An account of the order has a damaged key in Redis; nothing was done. Other orders are not affected. */
export class DamagedKeyError extends Error {
  override name = 'DamagedKeyError'
}

/** A rejection as the script returns it; -1: waiting does not help. */
export type Refused = Omit<Refusal, 'retryAfterMs'> & { wait: number }

/** The answer of each operation of the script. */
export interface Answers {
  reserve: { refused: Refused } | { accounts: AccountState[] }
  look: { refused?: Refused }
  extend: { held: boolean }
  settle: object
  /** News and their times (Unix ms) in turn. */
  /** `heard`: the news up to this time are in it; before `now`: there are more. */
  beat: { replicas: number; now: number; heard: number; news: string[] | object }
  /** `last`: number of the last order that was heard; 0: none is known. */
  join: { epoch: string; now: number; last: number }
  seed: object
  leave: object
  tell: object
}

interface AccountState {
  spent_tokens: number
  spent_cost: number
  requests?: LeftState
  tokens?: LeftState
}
type LeftState = [limit: number, remaining: number, resetMs: number]

/** The operations of the script, in one Redis. */
export class Orders {
  readonly #redis: Redis
  readonly #prefix: string
  readonly #replica: string
  readonly #time: (() => number) | undefined

  /**
   * @param prefix begins all names
   * @param time in place of Redis' clock (Unix ms), for tests
   */
  constructor(redis: Redis, prefix: string, replica: string, time?: () => number) {
    this.#redis = redis
    this.#prefix = prefix
    this.#replica = replica
    this.#time = time
  }

  /** @throws {DamagedKeyError} or, where Redis is not there, another error */
  async ask<Op extends keyof Answers>(
    op: Op,
    accounts: readonly Account[],
    order: object
  ): Promise<Answers[Op] | { lost: true }> {
    const tag = `${this.#prefix}:{limits}`
    const names = accounts.map(each => `${tag}:${crypto.hash('sha256', each.name).slice(0, 32)}`)
    const keys = ['replicas', 'epoch', 'news', 'orders'].map(each => `${tag}:${each}`)
    const json = JSON.stringify({ op, replica: this.#replica, time: this.#time?.(), ...order })
    const rest = [String(keys.length + names.length), ...keys, ...names, json]
    const reply = await this.#redis.run(client =>
      client
        .sendCommand(['EVALSHA', SHA, ...rest])
        .catch((error: Error) => {
          if (!error.message.startsWith('NOSCRIPT')) throw error
          return client.sendCommand(['EVAL', SCRIPT, ...rest])
        })
        .catch((error: Error) => {
          if (!OF_KEYS.test(error.message)) throw error
          // Returned, since an error would end the connection of all orders.
          return new DamagedKeyError(error.message)
        })
    )
    if (reply instanceof DamagedKeyError) throw reply
    return JSON.parse(String(reply))
  }
}

/** An account as the script reads it. */
export function toOrder(account: Account, period: Period): object {
  const { scope, limits } = account
  const { requests_per_minute, tokens_per_minute, max_concurrent } = limits
  const { total_quota, quota_unit, reserve } = limits
  const { perSecond: rate, burst } = bucketOf(limits)
  return {
    scope,
    rate,
    burst,
    requests_per_minute,
    tokens_per_minute,
    max_concurrent,
    total_quota,
    quota_unit,
    reserve,
    start: period.start,
    finish: Number.isFinite(period.end) ? period.end : 0,
    before: spentBefore(account, period),
    is_address: isAddress(account.name)
  }
}

export function toLeft(state: LeftState | undefined): Left | undefined {
  if (state === undefined) return undefined
  const [limit, remaining, resetMs] = state
  return { limit, remaining, resetMs }
}

const REVOKED = 'revoked:'
const CHANGED = 'changed:'

/** The order that tells of keys; it needs no replica to tell it. */
export function toTold(hashes: readonly string[], validFor: number | undefined) {
  const kind = validFor === undefined ? CHANGED : REVOKED
  return { news: hashes.map(hash => kind + hash), delay: Math.round(validFor ?? 0) }
}

/** @param ahead how much (ms) Redis' clock is */
export function toNews(told: string[], ahead: number): KeyNews[] {
  return told.flatMap((each, at) => {
    if (at % 2 === 1) return []
    const hash = each.slice(each.indexOf(':') + 1)
    return each.startsWith(REVOKED) ? { hash, revokedAt: Number(told[at + 1]) - ahead } : { hash }
  })
}
