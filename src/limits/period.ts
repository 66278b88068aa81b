import { createRequire } from 'node:module'
import type * as Luxon from 'luxon'
import type { Period } from './counter.ts'
import type { Limits } from './limits.ts'

const UNITS = { daily: 'day', weekly: 'week', monthly: 'month' } as const
const FOR_EVER: Period = { start: 0, end: Number.POSITIVE_INFINITY }

/**
 * The periods that quotas are counted by, in a time zone (a name of the IANA's database); weeks begin
 * on Monday (ISO 8601), and a day may have 23 hours.
 *
 * @example
 * new Periods('Europe/Berlin').at('daily', Date.parse('2026-03-29T12:00:00Z')) // { start: 1774738800000, end: 1774821600000 }
 */
export class Periods {
  readonly #zone: string
  readonly #known = new Map<keyof typeof UNITS, Period>()

  constructor(zone: string) {
    this.#zone = zone
  }

  /** @param time Unix ms */
  at(period: Limits['quota_reset_period'], time: number): Period {
    if (period === 'never') return FOR_EVER
    const known = this.#known.get(period)
    if (known !== undefined && time >= known.start && time < known.end) return known
    // It takes 2 MB, which who has no such quotas does not need.
    const { DateTime }: typeof Luxon = createRequire(import.meta.url)('luxon')
    const start = DateTime.fromMillis(time, { zone: this.#zone }).startOf(UNITS[period])
    const end = start.plus({ [UNITS[period]]: 1 }).startOf(UNITS[period])
    const found = { start: start.toMillis(), end: end.toMillis() }
    this.#known.set(period, found)
    return found
  }
}

export function isTimeZone(name: unknown): boolean {
  if (name === 'UTC') return true
  try {
    return Intl.DateTimeFormat('en', { timeZone: String(name) }) !== undefined
  } catch {
    return false
  }
}
