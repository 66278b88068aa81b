import type { Usage } from '../exchange.ts'

/** No backend counts more tokens than this for one request: a higher count is a defect. */
const MAX_TOKENS = 100_000_000
/** An output of more tokens than this is only possible if as much text has passed. */
export const LONG_OUTPUT = 1_000_000
/** No character of text is more tokens than this. */
export const TOKENS_PER_CHARACTER = 3

/** The counts that `Usage` cannot do without. */
const MAIN = /^(prompt|completion|input|output|total)_tokens$/

/**
 * The counts of all APIs, by the names of the wire; the last one above 0 stays.
 *
 * @example
 * const counts = new Counts()
 * counts.add('{"prompt_tokens":2,"completion_tokens":1}')
 * counts.toUsage() // { promptTokens: 2, completionTokens: 1, totalTokens: 3, exactness: 'exact' }
 */
export class Counts {
  /** The backend reported something that is no count of tokens where it had to report one. */
  isWrong = false
  readonly #counts: Record<string, number> = {}

  /** Adds what a usage object (JSON) says. What is right in a later one stands for what was wrong before. */
  add(json: string): void {
    let usage: Record<string, unknown>
    try {
      usage = JSON.parse(json)
    } catch {
      this.isWrong = true
      return
    }
    this.isWrong = false
    for (const name in usage) {
      const value = usage[name]
      if (typeof value !== 'object' || value === null) this.set(name, value)
      else for (const [detail, count] of Object.entries(value)) this.#setDetail(detail, count)
    }
  }

  /** Sets one count. */
  set(name: string, value: unknown): void {
    if (!name.endsWith('_tokens') || value === null || value === 0) return
    if (isCount(value)) this.#counts[name] = value
    else if (MAIN.test(name)) this.isWrong = true
  }

  /** Tokens of the output so far. */
  get output(): number {
    return this.#counts.completion_tokens ?? this.#counts.output_tokens ?? 0
  }

  /**
   * One shape for all. Cached tokens are part of the prompt in OpenAI's counts and beside it in
   * Anthropic's; here they are always part of it. The total is the sum of both parts, which are checked, whatever
   * the backend reports as total.
   */
  toUsage(): Usage | undefined {
    const counts = this.#counts
    if (Object.keys(counts).length === 0) return undefined
    const read = counts.cache_read_input_tokens ?? 0
    const beside =
      counts.prompt_tokens === undefined ? read + (counts.cache_creation_input_tokens ?? 0) : 0
    const completionTokens = this.output
    const input = counts.prompt_tokens ?? counts.input_tokens
    const promptTokens =
      input === undefined && beside === 0
        ? Math.max(0, (counts.total_tokens ?? 0) - completionTokens)
        : (input ?? 0) + beside
    return {
      promptTokens,
      completionTokens,
      totalTokens: promptTokens + completionTokens,
      ...this.#parts(promptTokens, completionTokens),
      exactness: 'exact'
    }
  }

  /** Whatever a server counts there: less than nothing is never left of the prompt, or of the output. */
  #parts(prompt: number, completion: number): Partial<Usage> {
    const counts = this.#counts
    const cached = counts.cached_tokens ?? counts.cache_read_input_tokens
    const written = counts.cache_write_tokens ?? counts.cache_creation_input_tokens
    const reasoning = counts.reasoning_tokens
    const parts: Partial<Usage> = {}
    if (cached !== undefined) parts.cachedTokens = Math.min(cached, prompt)
    if (written !== undefined) {
      parts.cacheWriteTokens = Math.min(written, prompt - (parts.cachedTokens ?? 0))
    }
    if (reasoning !== undefined) parts.reasoningTokens = Math.min(reasoning, completion)
    return parts
  }

  #setDetail(name: string, value: unknown): void {
    if (name.endsWith('_tokens') && isCount(value)) this.#counts[name] = value
  }
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && Number(value) > 0 && Number(value) <= MAX_TOKENS
}

/**
 * Whether a response in which this many characters have passed can have this many tokens.
 *
 * @param most tokens that it can have without as much text: those of reasoning that is not shown, for one
 */
export function isOutput(tokens: number, passed: number, most = LONG_OUTPUT): boolean {
  return tokens <= Math.max(most, TOKENS_PER_CHARACTER * passed)
}
