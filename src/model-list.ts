import { matchesModel, untagged } from './keys/key.ts'
import { Lru } from './keys/lru.ts'
import { inSlices } from './slices.ts'

/** Maximum number of names whose entry is remembered. */
const MAX_FOUND = 1_000

type Item<Value> = readonly [pattern: string, value: Value]

interface Entry<Value> {
  pattern: string
  value: Value
  /** Place in the list. */
  at: number
}

/**
 * A list of values for models and patterns of them, of which the first that fits counts. A long one costs no more to look
 * up than a short one, unless its patterns begin alike.
 *
 * @example
 * const prices = new ModelList([['llama3', 1], ['llama*', 2], ['*', 3]])
 * prices.find('llama3:latest') // 1
 * prices.find('llama4') // 2
 * prices.find('mistral', 'llama4') // 2
 */
export class ModelList<Value> {
  /** The first entry of each name without a wildcard. */
  readonly #names = new Map<string, Entry<Value>>()
  /** The patterns, by the text before their first wildcard. */
  readonly #patterns = new Map<string, Entry<Value>[]>()
  /** Lengths of those texts. */
  readonly #lengths = new Set<number>()
  readonly #found = new Lru<string, Entry<Value> | null>(MAX_FOUND)

  #count = 0

  /** Makes a list without blocking the event loop. */
  static async of<Value>(list: Iterable<Item<Value>>): Promise<ModelList<Value>> {
    const models = new ModelList<Value>()
    await inSlices(list, item => models.#add(item))
    return models
  }

  constructor(list: Iterable<Item<Value>> = []) {
    for (const item of list) this.#add(item)
  }

  #add([pattern, value]: Item<Value>): void {
    const wildcard = pattern.indexOf('*')
    const entry = { pattern, value, at: this.#count++ }
    if (wildcard === -1) {
      const name = untagged(pattern)
      if (!this.#names.has(name)) this.#names.set(name, entry)
      return
    }
    const begin = pattern.slice(0, wildcard)
    const alike = this.#patterns.get(begin) ?? []
    alike.push(entry)
    this.#patterns.set(begin, alike)
    this.#lengths.add(begin.length)
  }

  /** Returns the value of the first entry that fits one of the names of a model. */
  find(...models: string[]): Value | undefined {
    return this.entry(...models)?.value
  }

  /** As `find`, with the name or pattern. */
  entry(...models: string[]): Readonly<Entry<Value>> | undefined {
    let first: Entry<Value> | undefined
    for (const model of models) first = earlier(first, this.#first(model))
    return first
  }

  #first(model: string): Entry<Value> | undefined {
    const known = this.#found.get(model)
    if (known !== undefined) return known ?? undefined
    let first = this.#names.get(untagged(model))
    for (const length of this.#lengths) {
      if (length > model.length) continue
      const alike = this.#patterns.get(model.slice(0, length))
      first = earlier(
        first,
        alike?.find(({ pattern }) => matchesModel([pattern], model))
      )
    }
    this.#found.set(model, first ?? null)
    return first
  }
}

function earlier<Value>(one: Entry<Value> | undefined, other: Entry<Value> | undefined) {
  return one === undefined || (other !== undefined && other.at < one.at) ? other : one
}
