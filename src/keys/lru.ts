/**
 * A map that forgets what was not asked for longest.
 *
 * @example
 * const lru = new Lru(2)
 * lru.set('a', 1)
 * lru.set('b', 2)
 * lru.get('a') // 1
 * lru.set('c', 3)
 * lru.get('b') // undefined
 */
export class Lru<K, V> {
  readonly #entries = new Map<K, V>()
  readonly #most: number
  /** The last one that was asked for or set: it need not be moved to the end. */
  #latest: K | undefined

  constructor(most: number) {
    this.#most = most
  }

  get(key: K): V | undefined {
    const value = this.#entries.get(key)
    if (value === undefined || key === this.#latest) return value
    this.#entries.delete(key)
    this.#entries.set(key, value)
    this.#latest = key
    return value
  }

  set(key: K, value: V): void {
    if (key !== this.#latest) this.delete(key)
    this.#entries.set(key, value)
    this.#latest = key
    if (this.#entries.size > this.#most) this.#entries.delete(this.#entries.keys().next().value!)
  }

  delete(key: K): void {
    this.#entries.delete(key)
    if (key === this.#latest) this.#latest = undefined
  }

  clear(): void {
    this.#entries.clear()
    this.#latest = undefined
  }

  /** Those that were not asked for longest come first. */
  entries(): IterableIterator<[K, V]> {
    return this.#entries.entries()
  }

  get size(): number {
    return this.#entries.size
  }
}
