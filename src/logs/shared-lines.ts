import { Lru } from '../keys/lru.ts'

/** A line that every worker writes about what they have in common, such as a backend that cannot be reached. */
export interface SharedLine {
  level: 'info' | 'warn'
  fields: { backend?: string; [name: string]: unknown }
  msg: string
}

/** Writes such a line; of several workers the primary writes it, once. */
export type Say = (...line: [SharedLine['level'], SharedLine['fields'], SharedLine['msg']]) => void

/** Time (ms) in which all workers notice the same event: each tries a lost backend at least every 10 s. */
const SAME_EVENT_MS = 60_000
const MAX_LINES = 1_000

/**
 * Tells whether a line is about an event that another worker has reported.
 *
 * @example
 * const lines = new SharedLines()
 * const down = { level: 'warn', fields: { backend: 'gpu-1' }, msg: 'backend cannot be reached' }
 * lines.isNew('worker 1', down) // true
 * lines.isNew('worker 2', down) // false
 * // It was reachable in between.
 * lines.isNew('worker 1', down) // true
 */
export class SharedLines {
  readonly #latest = new Lru<string, { at: number; workers: Set<unknown> }>(MAX_LINES)

  isNew(worker: unknown, { fields: { backend }, msg }: SharedLine): boolean {
    const key = JSON.stringify([backend, msg])
    const event = this.#latest.get(key)
    const now = performance.now()
    // A worker reports an event once, so its second line is about another one.
    if (event && !event.workers.has(worker) && now - event.at < SAME_EVENT_MS) {
      event.workers.add(worker)
      return false
    }
    this.#latest.set(key, { at: now, workers: new Set([worker]) })
    return true
  }
}
