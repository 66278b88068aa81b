/** How many answers of a kind are remembered. */
const REMEMBERED = 20
/** A kind nobody has asked for yet. */
const UNKNOWN = 256
const MAX_KINDS = 10_000

/**
 * How long answers usually get: nine of ten of the last twenty of a key and a model were not longer.
 *
 * @example
 * const typical = new Typical()
 * typical.learn('alice', 'llama', 40)
 * typical.expect('alice', 'llama', 1000) // 40
 */
export class Typical {
  /** The one that was used last stands last. */
  readonly #kinds = new Map<string, { tokens: Uint32Array; count: number }>()

  /** Tokens that the next answer will likely not go beyond, which never are more than `most`. */
  expect(caller: string, model: string, most = Number.POSITIVE_INFINITY): number {
    const kind = this.#kinds.get(nameOf(caller, model))
    if (kind === undefined) return Math.min(most, UNKNOWN)
    const sorted = kind.tokens.slice(0, Math.min(kind.count, REMEMBERED)).sort()
    return Math.min(most, sorted[Math.ceil(sorted.length * 0.9) - 1]!)
  }

  learn(caller: string, model: string, tokens: number): void {
    const name = nameOf(caller, model)
    const kind = this.#kinds.get(name) ?? { tokens: new Uint32Array(REMEMBERED), count: 0 }
    kind.tokens[kind.count++ % REMEMBERED] = tokens
    this.#kinds.delete(name)
    this.#kinds.set(name, kind)
    if (this.#kinds.size > MAX_KINDS) this.#kinds.delete(this.#kinds.keys().next().value!)
  }
}

function nameOf(caller: string, model: string): string {
  return `${caller}\n${model.slice(0, 200)}`
}
