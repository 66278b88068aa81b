import type { Usage } from '../exchange.ts'

/**
 * A stored response whose usage was not known when its request ended: one that is made in the background, or
 * whose stream was cut. Whoever reads it later shows what it has cost.
 */
export interface UnbilledResponse {
  /** Tokens of its prompt, estimated. */
  readonly promptTokens: number
  /**
   * Takes what an exchange has seen of its usage; undefined: nothing. `isComplete`: there will be no more.
   *
   * @returns what of it has not been billed before; undefined: nothing
   */
  bill(
    usage: Usage | undefined,
    isComplete: boolean
  ): Usage | Promise<Usage | undefined> | undefined
}

/** Maximum number of responses of which it is remembered what was billed. */
export const MAX_BILLED = 10_000

/**
 * What was billed of stored responses, so that each token is billed once: a response can be read several
 * times, in part, and by several processes at a time.
 *
 * @example
 * const billed = new Billed()
 * const usage = { promptTokens: 5, completionTokens: 2, totalTokens: 7, exactness: 'exact' }
 * billed.raise('resp_1', usage).totalTokens // 7
 * billed.raise('resp_1', usage) // undefined
 */
export class Billed {
  readonly #usage = new Map<string, Usage>()

  get size(): number {
    return this.#usage.size
  }

  /** Returns by how much this usage is more than what was billed before; undefined: it is not. */
  raise(response: string, usage: Usage): Usage | undefined {
    const before = this.#usage.get(response)
    if (before === undefined) {
      if (this.#usage.size >= MAX_BILLED) this.#usage.delete(this.#usage.keys().next().value!)
      this.#usage.set(response, usage)
      return usage
    }
    this.#usage.set(response, most(usage, before))
    const due = difference(usage, before)
    return due.totalTokens > 0 ? due : undefined
  }
}

const PARTS = ['cachedTokens', 'cacheWriteTokens', 'reasoningTokens'] as const

function most(one: Usage, other: Usage): Usage {
  return merge(one, other, Math.max)
}

function difference(usage: Usage, before: Usage): Usage {
  const due = merge(usage, before, (now, then) => Math.max(0, now - then))
  return { ...due, totalTokens: due.promptTokens + due.completionTokens }
}

function merge(one: Usage, other: Usage, by: (one: number, other: number) => number): Usage {
  const merged: Usage = {
    promptTokens: by(one.promptTokens, other.promptTokens),
    completionTokens: by(one.completionTokens, other.completionTokens),
    totalTokens: by(one.totalTokens, other.totalTokens),
    exactness: one.exactness
  }
  for (const part of PARTS) {
    if (one[part] !== undefined) merged[part] = by(one[part], other[part] ?? 0)
  }
  return merged
}
