import type { Live } from './backend.ts'

/** First bytes that take longer than this share of all are late. */
const QUANTILE = 0.95
/** Of fewer it is not known what is late. */
const MIN_SAMPLES = 20
/** From so many on, all that were there count half. */
const MAX_SAMPLES = 512
/** Each bucket is so many times as wide as the one before; the last ends at ten minutes. */
const GROWTH = 1.1
const BUCKETS = 140
/** Models of one backend whose times are remembered. */
const MAX_MODELS = 100
/** So many calls allow one hedge: 2 % of the load. */
const CALLS_PER_HEDGE = 50
/** Calls that are remembered. */
const MOST_CALLS = 500

/**
 * How long first bytes take, within a tenth; older ones count less.
 *
 * @example
 * const times = new FirstBytes()
 * for (let ms = 1; ms <= 100; ms++) times.observe(ms)
 * Math.round(times.late!) // 96
 */
export class FirstBytes {
  readonly #counts = new Uint16Array(BUCKETS + 1)
  #samples = 0

  observe(ms: number): void {
    const bucket = Math.ceil(Math.log(Math.max(ms, 1)) / Math.log(GROWTH))
    this.#counts[Math.min(bucket, BUCKETS)]!++
    this.#samples++
    if (this.#samples === MAX_SAMPLES) this.#forget()
  }

  /** After how long (ms) one is late; undefined as long as too few have been seen. */
  get late(): number | undefined {
    if (this.#samples < MIN_SAMPLES) return undefined
    let later = this.#samples * (1 - QUANTILE)
    for (let bucket = BUCKETS; bucket > 0; bucket--) {
      later -= this.#counts[bucket]!
      if (later < 0) return GROWTH ** bucket
    }
    return 1
  }

  #forget(): void {
    this.#samples = 0
    for (let bucket = 0; bucket <= BUCKETS; bucket++) {
      this.#counts[bucket]! >>= 1
      this.#samples += this.#counts[bucket]!
    }
  }
}

/**
 * Second attempts at calls whose first byte is late (Dean and Barroso, The Tail at Scale, 2013): when they may
 * be made, and what came of them.
 */
export class Hedges {
  /** How often the second attempt gave the answer, and how often it did not. */
  readonly results = { won: 0, lost: 0 }
  readonly #times = new WeakMap<Live, Map<string, FirstBytes>>()
  #calls = 0

  /** A call is made that could be hedged. */
  earn(): void {
    if (this.#calls < MOST_CALLS) this.#calls++
  }

  /** May one be? */
  spend(): boolean {
    if (this.#calls < CALLS_PER_HEDGE) return false
    this.#calls -= CALLS_PER_HEDGE
    return true
  }

  /** A backend has begun to answer after so long (ms), or has not for so long. */
  observe(live: Live, model: string | undefined, ms: number): void {
    const ofModels = this.#times.get(live) ?? new Map<string, FirstBytes>()
    this.#times.set(live, ofModels)
    let times = ofModels.get(model ?? '')
    if (times === undefined) {
      if (ofModels.size === MAX_MODELS) ofModels.delete(ofModels.keys().next().value!)
      times = new FirstBytes()
      ofModels.set(model ?? '', times)
    }
    times.observe(ms)
  }

  /** After how long (ms) this backend's first byte is late; undefined: nobody knows. */
  lateAfter(live: Live, model: string | undefined): number | undefined {
    return this.#times.get(live)?.get(model ?? '')?.late
  }
}
