/** After this many examples weights are known well. */
const MANY = 200
/** Afterwards, one of this many examples is learned. */
const SEVERAL = 8
/** Mean error (relative) of estimates above which all examples are learned. */
const OFF = 0.1
/** How much one example changes that mean. */
const RATE = 1 / 16

/**
 * Decides which examples of one caller are learned: all of the first ones, all while estimates are off, and few of
 * the others, because learning costs as much as reading the request. They are chosen at random, so that a caller
 * cannot choose what teaches.
 *
 * @example
 * const lessons = new Lessons()
 * lessons.isDue(98, 100) // true
 */
export class Lessons {
  #count = 0
  #error = 0

  /** Whether to learn that something estimated to have `estimate` tokens has `tokens` (1 or more). */
  isDue(estimate: number, tokens: number): boolean {
    const error = Math.min(1, Math.abs(estimate - tokens) / tokens)
    this.#error += (error - this.#error) * RATE
    this.#count++
    return this.#count <= MANY || this.#error > OFF || Math.random() < 1 / SEVERAL
  }
}
