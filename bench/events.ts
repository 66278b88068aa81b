/** What happens next: a binary heap by time, then by the order in which it was added. */
export class Events {
  readonly #heap: { at: number; order: number; happen: () => void }[] = []
  #added = 0

  add(at: number, happen: () => void): void {
    const event = { at, order: this.#added++, happen }
    let place = this.#heap.push(event) - 1
    while (place > 0) {
      const parent = (place - 1) >> 1
      if (!this.#isEarlier(event, this.#heap[parent]!)) break
      this.#heap[place] = this.#heap[parent]!
      place = parent
    }
    this.#heap[place] = event
  }

  run(): void {
    for (let next = this.#take(); next !== undefined; next = this.#take()) next()
  }

  #take(): (() => void) | undefined {
    const first = this.#heap[0]
    const last = this.#heap.pop()
    if (first === undefined || last === undefined) return undefined
    if (first !== last) this.#sink(last)
    return first.happen
  }

  #sink(event: { at: number; order: number; happen: () => void }): void {
    const heap = this.#heap
    let place = 0
    for (;;) {
      let child = 2 * place + 1
      if (child >= heap.length) break
      if (child + 1 < heap.length && this.#isEarlier(heap[child + 1]!, heap[child]!)) child++
      if (!this.#isEarlier(heap[child]!, event)) break
      heap[place] = heap[child]!
      place = child
    }
    heap[place] = event
  }

  #isEarlier(a: { at: number; order: number }, b: { at: number; order: number }): boolean {
    return a.at < b.at || (a.at === b.at && a.order < b.order)
  }
}
