/** How far an example scatters around the right weights (relative, squared), before that is known: 5 %. */
const NOISE = 0.05 ** 2
const LEAST_NOISE = 0.003 ** 2
/** How much one example changes that, and what it counts for at most: 50 %. */
const NOISE_RATE = 1 / 50
const MOST_SCATTER = 0.5 ** 2
/** Examples that scatter more for some time say that the model or its server has changed: 15 %. */
const MISFIT = 0.15 ** 2
/** A count of so few tokens is no better known than to one or two. */
const FEW = 20
/** What each example adds to the variance of a weight: it may have changed. */
const DRIFT = 1e-6

/**
 * Weights that are learned from examples, one by one: the sum of features by weights is the number of
 * tokens. They are estimated as a Kalman filter does, https://en.wikipedia.org/wiki/Kalman_filter: each
 * weight is known with some variance, and slowly becomes less known, so that new examples count for
 * more than old ones. The variance never grows beyond that of the beginning: a model that writes no
 * Chinese for a year has not unlearned anything. How far examples scatter is learned beside the
 * weights: where deltas say exactly how many tokens there are, a few examples are enough.
 *
 * @example
 * const fit = new Fit([1], [1])
 * for (let tokens = 10; tokens < 100; tokens++) fit.learn([tokens / 3], tokens)
 * Math.round(fit.of([100])) // 300
 */
export class Fit {
  readonly #weights: Float64Array
  readonly #variances: readonly number[]
  /** The covariance of the weights, row by row. */
  readonly #covariance: Float64Array
  #noise = NOISE

  /**
   * @param weights at the beginning
   * @param variances of these weights
   */
  constructor(weights: readonly number[], variances: readonly number[]) {
    this.#weights = Float64Array.from(weights)
    this.#variances = variances
    this.#covariance = new Float64Array(weights.length ** 2)
    this.#doubt()
  }

  /** Returns another fit that begins with these weights, and is as unsure of them as this one was at the beginning. */
  heir(): Fit {
    return new Fit([...this.#weights], this.#variances)
  }

  /** The tokens of something with these features. Features left out at the end count as 0. */
  of(features: readonly number[]): number {
    let sum = 0
    const size = Math.min(features.length, this.#weights.length)
    for (let at = 0; at < size; at++) sum += features[at]! * this.#weights[at]!
    return sum
  }

  /** Something with these features has so many tokens (1 or more). */
  learn(features: readonly number[], tokens: number): void {
    const size = this.#weights.length
    const covariance = this.#covariance
    const change = new Float64Array(size)
    // Long answers are not further off than short ones, relatively.
    const square = tokens * (tokens + FEW)
    let variance = this.#noise * square
    for (let row = 0; row < size; row++) {
      let sum = 0
      for (let at = 0; at < size; at++) sum += covariance[row * size + at]! * features[at]!
      change[row] = sum
      variance += sum * features[row]!
    }
    const error = tokens - this.of(features)
    const scatter = Math.min(error ** 2 / square, MOST_SCATTER)
    this.#noise += (scatter - this.#noise) * NOISE_RATE
    this.#noise = Math.max(this.#noise, LEAST_NOISE)
    for (let row = 0; row < size; row++) {
      const gain = change[row]! / variance
      this.#weights[row]! += gain * error
      for (let at = 0; at < size; at++) covariance[row * size + at]! -= gain * change[at]!
      const most = this.#variances[row]!
      const here = row * size + row
      covariance[here] = Math.min(Math.max(covariance[here]!, 0) + DRIFT, most)
    }
    if (this.#noise > MISFIT) this.#doubt()
  }

  /** Takes nothing for known. */
  #doubt(): void {
    const size = this.#weights.length
    this.#noise = NOISE
    this.#covariance.fill(0)
    for (let at = 0; at < size; at++) this.#covariance[at * size + at] = this.#variances[at]!
  }
}
