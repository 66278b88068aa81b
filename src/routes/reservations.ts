/** Reservation of one response. */
interface Reservation {
  release: () => void
  /** When it began (ms). */
  at: number
}

const MAX_HELD = 10_000
/** Age (ms) at which a reservation ends in any case; responses are settled before. */
const MAX_AGE = 25 * 3_600_000

/**
 * What requests have reserved for responses that are made in the background. The oldest reservations are given back when
 * there are too many.
 *
 * @example
 * const reservations = new Reservations()
 * let free = 0
 * reservations.hold('resp_1', () => free++)
 * reservations.release('resp_1')
 * free // 1
 */
export class Reservations {
  readonly #held = new Map<string, Reservation>()

  hold(id: string, release: () => void): void {
    this.release(id)
    this.#held.set(id, { release, at: performance.now() })
    for (const [oldest, { at }] of this.#held) {
      if (this.#held.size <= MAX_HELD && performance.now() - at < MAX_AGE) return
      this.release(oldest)
    }
  }

  release(id: string): void {
    const held = this.#held.get(id)
    this.#held.delete(id)
    held?.release()
  }
}
