import { GatewayError } from '../errors.ts'
import { Attained } from './attained.ts'

/** What may wait while every backend that could take it is full. Times in milliseconds. */
export interface QueuePolicy {
  maxSize: number
  /** Bytes of the bodies that wait. */
  maxBytes: number
  timeout: number
}

/** Interactive calls go before those of batches. */
export const PRIORITIES = ['interactive', 'batch'] as const
export type Priority = (typeof PRIORITIES)[number]

/** A call that waits. */
export interface Waiter {
  /** Whose turn it is is settled between callers. */
  readonly caller: string
  readonly priority: Priority
  /** Bytes that are kept while it waits. */
  readonly bytes: number
  /** When it has waited for long enough (monotonic, ms). */
  readonly deadline: number
  /** Is there room for it, or nothing left to wait for? */
  isReady(): boolean
  /** Goes on after having waited for `waited` ms. */
  proceed(waited: number): void
  /** It has not been served, and will not be. */
  turnAway(error: GatewayError): void
}

interface Place {
  waiter: Waiter
  since: number
  timer: NodeJS.Timeout
}

/** A batch call that has waited this long (ms) is as good as an interactive one: none starves. */
const PROMOTED_MS = 30_000
/** Places become free without anybody's saying so (a circuit's time is over): they are looked for. */
const LOOK_MS = 250
/** How much the latest call counts for how fast places become free. */
const ALPHA = 0.1

/**
 * One queue before all backends. Who waits is served by priority, within a priority the caller who has
 * been served least comes first, and a caller's own calls keep their order.
 */
export class Queue {
  /** Hears how long (ms) those have waited that go on. */
  onServed: ((priority: Priority, waited: number) => void) | undefined
  /** How many could not wait, or have waited in vain. */
  readonly turnedAway = { full: 0, deadline: 0, timeout: 0 }
  readonly attained = new Attained()
  #policy: QueuePolicy
  /** In the order in which they came; they leave from anywhere. */
  readonly #places = new Map<Waiter, Place>()
  #bytes = 0
  #looking: NodeJS.Timeout | undefined
  #isServing = false
  /** Mean time (ms) between two that were served while others waited. */
  #pace: number | undefined
  #servedAt: number | undefined

  constructor(policy: QueuePolicy) {
    this.#policy = policy
  }

  set policy(policy: QueuePolicy) {
    this.#policy = policy
  }

  get size(): number {
    return this.#places.size
  }

  /** How many of a priority wait. */
  count(priority: Priority): number {
    let count = 0
    for (const { priority: its } of this.#places.keys()) if (its === priority) count++
    return count
  }

  /** How many are served before this one, as things stand. */
  position(waiter: Waiter, now: number): number {
    return this.#order(now).indexOf(waiter)
  }

  /**
   * Lets a call wait.
   *
   * @returns why it can't
   */
  join(waiter: Waiter, now: number): GatewayError | undefined {
    const { maxSize, maxBytes, timeout } = this.#policy
    const wait = this.#expectedWait(waiter, now)
    const patience = Math.min(timeout, waiter.deadline - now)
    const isFull = this.size >= maxSize || this.#bytes + waiter.bytes > maxBytes
    if (isFull) this.turnedAway.full++
    else if (wait > patience) this.turnedAway.deadline++
    if (isFull) return overloaded('All backends are busy, and the queue is full.', wait)
    if (wait > patience) {
      return overloaded('All backends are busy, and this call would wait for too long.', wait)
    }
    const timer = setTimeout(() => {
      if (!this.leave(waiter)) return
      this.turnedAway.timeout++
      waiter.turnAway(overloaded('All backends were busy for too long.', this.#pace ?? 0))
    }, patience).unref()
    this.#places.set(waiter, { waiter, since: now, timer })
    this.#bytes += waiter.bytes
    this.#looking ??= setInterval(() => this.serve(performance.now()), LOOK_MS).unref()
    return undefined
  }

  /** It does not want to wait any more; false: it did not wait. */
  leave(waiter: Waiter): boolean {
    const place = this.#places.get(waiter)
    if (place === undefined) return false
    clearTimeout(place.timer)
    this.#places.delete(waiter)
    this.#bytes -= waiter.bytes
    if (this.size > 0) return true
    clearInterval(this.#looking)
    this.#looking = undefined
    this.#servedAt = undefined
    return true
  }

  /** There may be room: whoever's turn it is goes on. */
  serve(now: number): void {
    // One that goes on and fails at once makes room again.
    if (this.#isServing || this.size === 0) return
    this.#isServing = true
    try {
      let next: Waiter | undefined
      do {
        next = this.#order(now).find(waiter => waiter.isReady())
        if (next !== undefined) this.#proceed(next, now)
      } while (next !== undefined && this.size > 0)
    } finally {
      this.#isServing = false
    }
  }

  #proceed(waiter: Waiter, now: number): void {
    const waited = now - this.#places.get(waiter)!.since
    this.leave(waiter)
    this.#keepPace(now)
    this.onServed?.(waiter.priority, waited)
    waiter.proceed(waited)
  }

  /** First the first calls of all callers, then their second ones, and so on. A token more or less is none. */
  #order(now: number): Waiter[] {
    const rounds = new Map<string, number>()
    return [...this.#places.values()]
      .map(({ waiter, since }) => {
        const isBatch = waiter.priority === 'batch' && now - since < PROMOTED_MS
        const whose = `${isBatch}${waiter.caller}`
        const round = rounds.get(whose) ?? 0
        rounds.set(whose, round + 1)
        return { waiter, isBatch, round, had: Math.round(this.attained.of(waiter.caller, now)) }
      })
      .sort((a, b) => Number(a.isBatch) - Number(b.isBatch) || a.round - b.round || a.had - b.had)
      .map(({ waiter }) => waiter)
  }

  /** Time (ms) until a call that comes now would be served, by how fast others are. */
  #expectedWait(waiter: Waiter, now: number): number {
    if (this.#pace === undefined || this.#servedAt === undefined) return 0
    let ahead = 0
    const own = this.attained.of(waiter.caller, now)
    for (const other of this.#places.keys()) {
      const isBefore = other.caller === waiter.caller || this.attained.of(other.caller, now) <= own
      if (other.priority === waiter.priority ? isBefore : other.priority === 'interactive') ahead++
    }
    return (ahead + 1) * this.#pace
  }

  #keepPace(now: number): void {
    if (this.#servedAt !== undefined) {
      const gap = now - this.#servedAt
      this.#pace = this.#pace === undefined ? gap : this.#pace + (gap - this.#pace) * ALPHA
    }
    this.#servedAt = now
  }
}

function overloaded(message: string, wait: number): GatewayError {
  const seconds = Math.max(1, Math.ceil(wait / 1000))
  return new GatewayError('overloaded', message, { headers: { 'retry-after': String(seconds) } })
}
