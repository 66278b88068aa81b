import { GatewayError } from '../errors.ts'
import { Attained } from './attained.ts'
import { tooLate } from './patience.ts'

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
  /** Those of the same lane wait for the same backends. */
  readonly lane: string
  /** Bytes that are kept while it waits. */
  readonly bytes: number
  /**
   * When it began to wait, as if all its waiting had been at a stretch, and when its client will have waited
   * for long enough (monotonic, ms).
   */
  readonly since: number
  readonly deadline: number
  /** Is there room for it, or nothing left to wait for? */
  isReady(): boolean
  /** Goes on. */
  proceed(): void
  /** It has not been served, and will not be. */
  turnAway(error: GatewayError): void
}

/** The calls of one caller and priority that wait for the same backends, in the order in which they came. */
interface Line {
  readonly caller: string
  readonly priority: Priority
  readonly waiters: Waiter[]
  /** When one of them was served last. */
  servedAt: number
}

/** All that wait for the same backends; it is there as long as somebody does. */
interface Lane {
  readonly lines: Map<string, Line>
  /** Mean time (ms) between two that are served while others wait. */
  pace: number | undefined
  servedAt: number | undefined
}

/** A line of which nobody was served for so long (ms) comes before all others: none starves. */
const STARVING_MS = 30_000
/** Places become free without anybody's saying so (a circuit's time is over): they are looked for. */
const LOOK_MS = 250
/** How much the latest call counts for how fast places become free. */
const ALPHA = 0.2

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
  policy: QueuePolicy
  readonly #lanes = new Map<string, Lane>()
  readonly #timers = new Map<Waiter, NodeJS.Timeout>()
  #bytes = 0
  #looking: NodeJS.Timeout | undefined
  #isServing = false

  constructor(policy: QueuePolicy) {
    this.policy = policy
  }

  get size(): number {
    return this.#timers.size
  }

  /** How many of a priority wait. */
  count(priority: Priority): number {
    let count = 0
    for (const { lines } of this.#lanes.values())
      for (const line of lines.values())
        if (line.priority === priority) count += line.waiters.length
    return count
  }

  has(waiter: Waiter): boolean {
    return this.#timers.has(waiter)
  }

  /** How many are likely to be served before this one, which waits or is about to. */
  position({ caller, priority, lane, since }: Waiter, now: number): number {
    const lines = this.#lanes.get(lane)?.lines
    if (lines === undefined) return 0
    const own = lines.get(lineKey(caller, priority))?.waiters ?? []
    const before = own.filter(each => each.since < since).length
    const had = this.#had(caller, now)
    let ahead = before
    for (const line of lines.values()) {
      if (line.caller === caller && line.priority === priority) continue
      // Callers take turns: of a long line only as many go before as there are turns until this one's.
      const turns = before + (this.#had(line.caller, now) <= had ? 1 : 0)
      if (line.priority === priority) ahead += Math.min(line.waiters.length, turns)
      else if (line.priority === 'interactive') ahead += line.waiters.length
    }
    return ahead
  }

  /**
   * Lets a call wait. If there is no room, the latest call of the longest line makes some, unless this one
   * belongs there itself.
   *
   * @returns why it can't
   */
  join(waiter: Waiter, now: number): GatewayError | undefined {
    const until = Math.min(waiter.since + this.policy.timeout, waiter.deadline)
    const ahead = this.position(waiter, now)
    const wait = (this.#lanes.get(waiter.lane)?.pace ?? 0) * (ahead + 1)
    if (ahead > 0 && now + wait > until) {
      this.turnedAway.deadline++
      return overloaded('All backends are busy, and this call would wait for too long.', wait)
    }
    if (!this.#makeRoom(waiter, now)) {
      this.turnedAway.full++
      return overloaded('All backends are busy, and the queue is full.', wait)
    }
    this.#insert(waiter, until - now)
    this.#looking ??= setInterval(() => this.serve(performance.now()), LOOK_MS).unref()
    return undefined
  }

  /** It does not want to wait any more; false: it did not wait. */
  leave(waiter: Waiter): boolean {
    const timer = this.#timers.get(waiter)
    if (timer === undefined) return false
    clearTimeout(timer)
    this.#timers.delete(waiter)
    this.#bytes -= waiter.bytes
    const lane = this.#lanes.get(waiter.lane)!
    const key = lineKey(waiter.caller, waiter.priority)
    const { waiters } = lane.lines.get(key)!
    waiters.splice(waiters.indexOf(waiter), 1)
    if (waiters.length === 0) lane.lines.delete(key)
    if (lane.lines.size === 0) this.#lanes.delete(waiter.lane)
    if (this.size === 0) {
      clearInterval(this.#looking)
      this.#looking = undefined
    }
    return true
  }

  /** There may be room: whoever's turn it is goes on. */
  serve(now: number): void {
    // One that goes on and fails at once makes room again.
    if (this.#isServing) return
    this.#isServing = true
    // One that must wait again, since what its lane has waited for was not for it, is not asked twice.
    const served = new Set<Waiter>()
    for (;;) {
      const line = this.#next(now, served)
      if (line === undefined) break
      served.add(line.waiters[0]!)
      this.#proceed(line, now)
    }
    this.#isServing = false
  }

  /** The line whose turn it is, of those that there is room for. */
  #next(now: number, served: ReadonlySet<Waiter>): Line | undefined {
    let next: Line | undefined
    for (const { lines } of this.#lanes.values()) {
      const [some] = lines.values()
      if (!some!.waiters[0]!.isReady()) continue
      for (const line of lines.values()) {
        if (served.has(line.waiters[0]!)) continue
        if (next === undefined || this.#isBefore(line, next, now)) next = line
      }
    }
    return next
  }

  #isBefore(line: Line, other: Line, now: number): boolean {
    const [since, otherSince] = [waitsSince(line), waitsSince(other)]
    const isStarving = now - since > STARVING_MS
    if (isStarving || now - otherSince > STARVING_MS) return since < otherSince
    if (line.priority !== other.priority) return line.priority === 'interactive'
    const difference = this.#had(line.caller, now) - this.#had(other.caller, now)
    return difference === 0 ? line.waiters[0]!.since < other.waiters[0]!.since : difference < 0
  }

  #proceed(line: Line, now: number): void {
    const waiter = line.waiters[0]!
    const lane = this.#lanes.get(waiter.lane)!
    line.servedAt = now
    if (lane.servedAt !== undefined) {
      const gap = now - lane.servedAt
      lane.pace = lane.pace === undefined ? gap : lane.pace + (gap - lane.pace) * ALPHA
    }
    lane.servedAt = now
    this.leave(waiter)
    this.onServed?.(waiter.priority, now - waiter.since)
    try {
      waiter.proceed()
    } catch (cause) {
      const message = 'The gateway failed to handle this request.'
      waiter.turnAway(new GatewayError('internal_error', message, { cause }))
    }
  }

  /** A token more or less is none. */
  #had(caller: string, now: number): number {
    return Math.round(this.attained.of(caller, now))
  }

  #insert(waiter: Waiter, patience: number): void {
    const lane = this.#lanes.get(waiter.lane) ?? {
      lines: new Map<string, Line>(),
      pace: undefined,
      servedAt: undefined
    }
    this.#lanes.set(waiter.lane, lane)
    const { caller, priority } = waiter
    const key = lineKey(caller, priority)
    const line = lane.lines.get(key) ?? { caller, priority, waiters: [], servedAt: 0 }
    lane.lines.set(key, line)
    line.waiters.push(waiter)
    this.#bytes += waiter.bytes
    this.#timers.set(waiter, setTimeout(() => this.#expire(waiter), patience).unref())
  }

  #expire(waiter: Waiter): void {
    const now = performance.now()
    const wait = (this.#lanes.get(waiter.lane)?.pace ?? 0) * (this.position(waiter, now) + 1)
    if (!this.leave(waiter)) return
    this.turnedAway.timeout++
    const isClients = waiter.deadline <= waiter.since + this.policy.timeout
    waiter.turnAway(
      isClients ? tooLate() : overloaded('All backends were busy for too long.', wait)
    )
  }

  #makeRoom(waiter: Waiter, now: number): boolean {
    const { maxSize, maxBytes } = this.policy
    if (waiter.bytes > maxBytes) return false
    while (this.size >= maxSize || this.#bytes + waiter.bytes > maxBytes) {
      const longest = this.#longest()
      if (longest === undefined) return false
      const own = this.#lanes.get(waiter.lane)?.lines.get(lineKey(waiter.caller, waiter.priority))
      const length = (own?.waiters.length ?? 0) + 1
      const isWorse = longest.priority === 'batch' && waiter.priority === 'interactive'
      const isBetter = longest.priority === 'interactive' && waiter.priority === 'batch'
      if (isBetter || (!isWorse && longest.waiters.length <= length)) return false
      const last = longest.waiters.at(-1)!
      const wait = (this.#lanes.get(last.lane)!.pace ?? 0) * this.position(last, now)
      this.leave(last)
      this.turnedAway.full++
      last.turnAway(overloaded('All backends are busy, and the queue is full.', wait))
    }
    return true
  }

  /** Of batches, if there are any. */
  #longest(): Line | undefined {
    let longest: Line | undefined
    for (const { lines } of this.#lanes.values()) {
      for (const line of lines.values()) {
        const isBatch = line.priority === 'batch'
        const wasBatch = longest?.priority === 'batch'
        const isLonger = line.waiters.length > (longest?.waiters.length ?? 0)
        if (isBatch === wasBatch ? isLonger : isBatch || longest === undefined) longest = line
      }
    }
    return longest
  }
}

function lineKey(caller: string, priority: Priority): string {
  return `${priority} ${caller}`
}

/** Since when nobody of it was served. */
function waitsSince({ waiters, servedAt }: Line): number {
  return Math.max(waiters[0]!.since, servedAt)
}

function overloaded(message: string, wait: number): GatewayError {
  const seconds = Math.max(1, Math.ceil(wait / 1000))
  return new GatewayError('overloaded', message, { headers: { 'retry-after': String(seconds) } })
}
