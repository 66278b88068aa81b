/**
 * An inference server in virtual time, as vLLM schedules: continuous batching in steps, prompts in chunks
 * beside the answers that are being written, first come first served, and a cache of prompt prefixes in
 * blocks of which the least recently used make room.
 *
 * The figures are those of Qwen3-32B in BF16 on two H100:
 * - 15,926 prompt tokens a second, measured (https://github.com/llm-d/llm-d/pull/2071);
 * - 14 ms for a step: 65.5 GB of weights at 70 % of 2 x 3.35 TB/s (NVIDIA's data sheet);
 * - 280,000 tokens of cache: what weights and activations leave of 90 % of 160 GB, at 256 KB a token
 *   (64 layers, 8 KV heads of 128, keys and values, 2 bytes), which takes 0.000056 ms to read in a step;
 * - 256 answers at once and 8,192 tokens a step, vLLM's settings for such a machine.
 * Blocks are of 512 tokens, as in Mooncake's traces; vLLM's of 16 would make no difference here.
 */

export const BLOCK = 512

export interface EngineRates {
  /** Prompt tokens per ms. */
  prefill: number
  /** A step (ms), and each token of context in it. */
  step: number
  context: number
  /** Blocks of the cache. */
  blocks: number
  maxRunning: number
  maxTokens: number
}

export const H100: EngineRates = {
  prefill: 15.926,
  step: 14,
  context: 0.000_056,
  blocks: Math.floor(280_000 / BLOCK),
  maxRunning: 256,
  maxTokens: 8192
}

/** A call as the server sees it. */
export interface Work {
  /** What the whole blocks of its prompt and of its answer are known by in the cache. */
  blocks: number[]
  promptTokens: number
  outputTokens: number
  /** The first token is there, and the last; virtual time in ms. */
  onFirst(now: number): void
  onEnd(now: number): void
}

interface Running {
  work: Work
  /** Blocks of the prompt that were in the cache. */
  hits: number
  /** Tokens of the prompt that are still to be read, and of the answer to be written. */
  unread: number
  unwritten: number
  context: number
  /** Blocks that are its own so far, of those it will need. */
  reserved: number
}

export class Engine {
  readonly rates: EngineRates
  /** Prompt tokens that were asked for, and that were in the cache. */
  promptTokens = 0
  cachedTokens = 0
  #waiting: Work[] = []
  #running: Running[] = []
  /** Blocks in use, by how many; blocks that may be let go of, those that were used longest ago first. */
  readonly #used = new Map<number, number>()
  readonly #idle = new Set<number>()
  #reserved = 0

  constructor(rates: EngineRates) {
    this.rates = rates
  }

  get isIdle(): boolean {
    return this.#running.length === 0 && this.#waiting.length === 0
  }

  add(work: Work): void {
    this.#waiting.push(work)
  }

  /** Does one step that begins now; returns when it ends. */
  step(now: number): number {
    const { rates } = this
    let budget = rates.maxTokens
    let context = 0
    for (const each of this.#running) {
      if (each.unread > 0) continue
      budget--
      context += each.context
    }
    const written = rates.maxTokens - budget
    const chunks: [Running, number][] = []
    const read = (each: Running) => {
      const chunk = Math.min(each.unread, budget)
      budget -= chunk
      chunks.push([each, chunk])
    }
    for (const each of this.#running) if (each.unread > 0 && budget > 0) read(each)
    while (budget > 0 && this.#running.length < rates.maxRunning) {
      const admitted = this.#admit()
      if (admitted === undefined) break
      read(admitted)
    }
    const tokens = rates.maxTokens - budget
    const end = now + Math.max(rates.step + context * rates.context, tokens / rates.prefill)
    if (written > 0) this.#write(end)
    for (const [each, chunk] of chunks) {
      each.unread -= chunk
      if (each.unread === 0) this.#begin(each, end)
    }
    this.#running = this.#running.filter(each => each.unread > 0 || each.unwritten > 0)
    return end
  }

  /** The next one that waits, if there is room for it in the cache. */
  #admit(): Running | undefined {
    const work = this.#waiting[0]
    if (work === undefined) return undefined
    const { blocks, promptTokens, outputTokens } = work
    const needed = Math.ceil((promptTokens + outputTokens) / BLOCK)
    const whole = Math.floor(promptTokens / BLOCK)
    let hits = 0
    while (hits < whole && (this.#used.has(blocks[hits]!) || this.#idle.has(blocks[hits]!))) hits++
    for (let at = 0; at < hits; at++) this.#hold(blocks[at]!)
    const reserved = needed - hits
    if (!this.#makeRoom(reserved)) {
      for (let at = hits - 1; at >= 0; at--) this.#release(blocks[at]!)
      return undefined
    }
    this.#waiting.shift()
    this.#reserved += reserved
    // The last token is always read: it makes the first of the answer.
    const cachedTokens = Math.min(hits * BLOCK, promptTokens - 1)
    this.promptTokens += promptTokens
    this.cachedTokens += cachedTokens
    const running = {
      work,
      hits,
      unread: promptTokens - cachedTokens,
      unwritten: outputTokens,
      context: promptTokens,
      reserved
    }
    this.#running.push(running)
    return running
  }

  #makeRoom(blocks: number): boolean {
    const least = this.rates.blocks - blocks - this.#reserved - this.#used.size
    // Alone it gets in, however long it is.
    if (least < 0) return this.#running.length === 0
    for (const id of this.#idle) {
      if (this.#idle.size <= least) break
      this.#idle.delete(id)
    }
    return true
  }

  #begin(each: Running, now: number): void {
    const { blocks, promptTokens } = each.work
    this.#keep(each, each.hits, Math.floor(promptTokens / BLOCK), blocks)
    each.work.onFirst(now)
    this.#advance(each, now)
  }

  #write(now: number): void {
    for (const each of this.#running) if (each.unread === 0) this.#advance(each, now)
  }

  #advance(each: Running, now: number): void {
    each.unwritten--
    each.context++
    if (each.unwritten > 0) return
    const { blocks, promptTokens, outputTokens } = each.work
    const whole = Math.floor((promptTokens + outputTokens) / BLOCK)
    this.#keep(each, Math.floor(promptTokens / BLOCK), whole, blocks)
    // The end of a prompt is let go of before its beginning.
    for (let at = whole - 1; at >= 0; at--) this.#release(blocks[at]!)
    this.#reserved -= each.reserved
    each.work.onEnd(now)
  }

  /** Blocks that have been filled can be shared from now on. */
  #keep(each: Running, from: number, to: number, blocks: number[]): void {
    for (let at = from; at < to; at++) this.#hold(blocks[at]!)
    const kept = Math.min(each.reserved, to - from)
    each.reserved -= kept
    this.#reserved -= kept
  }

  #hold(id: number): void {
    this.#idle.delete(id)
    this.#used.set(id, (this.#used.get(id) ?? 0) + 1)
  }

  #release(id: number): void {
    const users = (this.#used.get(id) ?? 1) - 1
    if (users > 0) return void this.#used.set(id, users)
    this.#used.delete(id)
    this.#idle.add(id)
  }
}
