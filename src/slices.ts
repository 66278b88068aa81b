import { setImmediate } from 'node:timers/promises'

/** Longest time (ms) that work on a list takes before other work has its turn. */
const SLICE = 8

/**
 * Calls `work` for each item, and lets the event loop go on every few milliseconds.
 *
 * @example
 * let sum = 0
 * await inSlices([1, 2, 3], item => { sum += item })
 * sum // 6
 */
export async function inSlices<T>(items: Iterable<T>, work: (item: T) => unknown): Promise<void> {
  let until = performance.now() + SLICE
  for (const item of items) {
    work(item)
    if (performance.now() < until) continue
    await setImmediate()
    until = performance.now() + SLICE
  }
}
