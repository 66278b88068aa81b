import type { Prefixes } from './prefixes.ts'

/** A shorter beginning (bytes) is not worth going anywhere for. */
const LEAST_SHARED = 1024

/** So many beginnings are remembered for a backend: 512 KB, for some 32 MB of prompts. */
const SETS = 4096
const WAYS = 8

/** How old a beginning is, as a power of two of tokens: more than any cache has. */
const AGES = 32
/** What is believed of an age before anything is known of it, and how much of what was known is forgotten. */
const BELIEF = 2
const FORGET = 0.05

/** What a backend should have of a prompt, in bytes of it. */
export interface Shared {
  /** What it was sent before, whether or not it still has it. */
  sent: number
  /** What it likely still has. */
  kept: number
  /** Tokens that it has worked on since it was sent the oldest of it. */
  age: number
}

const NOTHING: Shared = { sent: 0, kept: 0, age: 0 }

/**
 * The beginnings of prompts that a backend was sent, and how likely it still has them, which depends on
 * how much has gone through its cache since: that is learned from its answers. Of a set of eight that share
 * their low bits the one that was used longest ago makes room, as in a processor's cache: the memory is
 * one fixed piece, and nothing is left to the garbage collector.
 */
export class PrefixIndex {
  #high = new Uint32Array(0)
  #low = new Uint32Array(0)
  /** By the clock, which counts tokens; an entry of 0 is free. */
  #usedAt = new Float64Array(0)
  #clock = 1
  #size = 0
  /** By age: what the backend still had, and what not. */
  readonly #kept = new Float64Array(AGES)
  readonly #lost = new Float64Array(AGES)

  /** How many there are. */
  get size(): number {
    return this.#size
  }

  /** What its backend should have of this prompt. */
  shared(prefixes: Prefixes): Shared {
    if (this.#size === 0) return NOTHING
    let [sent, kept, age, likely] = [0, 0, 0, 1]
    for (let at = 0; at < prefixes.ends.length; at++) {
      const found = this.#find(prefixes.high[at]!, prefixes.low[at]!)
      if (found === -1) break
      const its = this.#clock - this.#usedAt[found]!
      if (its > age) {
        age = its
        likely = Math.min(likely, this.#likely(age))
      }
      kept += likely * (prefixes.ends[at]! - sent)
      sent = prefixes.ends[at]!
    }
    return sent > LEAST_SHARED ? { sent, kept, age } : NOTHING
  }

  /** Its backend reads this prompt, so many tokens of which it has not read before. */
  add(prefixes: Prefixes, tokens: number): void {
    if (this.#high.length === 0) this.#allocate()
    this.#clock += tokens
    for (let at = 0; at < prefixes.ends.length; at++) {
      this.#use(prefixes.high[at]!, prefixes.low[at]!)
    }
  }

  /** Its backend has written so many tokens, which are in its cache too. */
  wrote(tokens: number): void {
    this.#clock += tokens
  }

  /** It still had what was so old, or not. */
  learn(age: number, hadIt: boolean): void {
    const power = powerOf(age)
    this.#kept[power]! *= 1 - FORGET
    this.#lost[power]! *= 1 - FORGET
    if (hadIt) this.#kept[power]!++
    else this.#lost[power]!++
  }

  /** Its cache is gone. */
  clear(): void {
    this.#usedAt.fill(0)
    this.#size = 0
  }

  #likely(age: number): number {
    const power = powerOf(age)
    const kept = this.#kept[power]! + BELIEF
    return kept / (kept + this.#lost[power]!)
  }

  #allocate(): void {
    this.#high = new Uint32Array(SETS * WAYS)
    this.#low = new Uint32Array(SETS * WAYS)
    this.#usedAt = new Float64Array(SETS * WAYS)
  }

  #find(high: number, low: number): number {
    const first = (low % SETS) * WAYS
    for (let at = first; at < first + WAYS; at++) {
      if (this.#low[at] === low && this.#high[at] === high && this.#usedAt[at] !== 0) return at
    }
    return -1
  }

  #use(high: number, low: number): void {
    const found = this.#find(high, low)
    if (found !== -1) {
      this.#usedAt[found] = this.#clock
      return
    }
    const first = (low % SETS) * WAYS
    let oldest = first
    for (let at = first + 1; at < first + WAYS; at++) {
      if (this.#usedAt[at]! < this.#usedAt[oldest]!) oldest = at
    }
    if (this.#usedAt[oldest] === 0) this.#size++
    this.#high[oldest] = high
    this.#low[oldest] = low
    this.#usedAt[oldest] = this.#clock
  }
}

function powerOf(age: number): number {
  return Math.min(AGES - 1, Math.floor(Math.log2(age + 1)))
}
