/** How many answers of a kind are remembered. */
const REMEMBERED = 20
/** A model that has not answered yet. */
const UNKNOWN = 32
const MAX_KINDS = 10_000

/**
 * How long answers usually get: nine of ten of the last twenty of a key and a model were not longer; of a key
 * that has had none, of the model.
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
    const kind = this.#kinds.get(nameOf(caller, model)) ?? this.#kinds.get(nameOf('', model))
    if (kind === undefined) return Math.min(most, UNKNOWN)
    const sorted = kind.tokens.slice(0, Math.min(kind.count, REMEMBERED)).sort()
    return Math.min(most, sorted[Math.ceil(sorted.length * 0.9) - 1]!)
  }

  learn(caller: string, model: string, tokens: number): void {
    this.#learn(nameOf(caller, model), tokens)
    this.#learn(nameOf('', model), tokens)
  }

  #learn(name: string, tokens: number): void {
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
