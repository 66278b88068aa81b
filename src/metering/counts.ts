import type { Usage } from '../exchange.ts'

/** The counts of all APIs, by the names of the wire; the last one above 0 stays. */
export type Counts = Record<string, number>

/** Adds what a usage object (JSON) says. */
export function addCounts(counts: Counts, json: string): void {
  let usage: Record<string, unknown>
  try {
    usage = JSON.parse(json)
  } catch {
    return
  }
  for (const name in usage) {
    const value = usage[name]
    if (isCount(name, value)) counts[name] = value
    else if (typeof value === 'object' && value !== null) {
      const details = value as Record<string, unknown>
      for (const detail in details) {
        if (isCount(detail, details[detail])) counts[detail] = details[detail]
      }
    }
  }
}

function isCount(name: string, value: unknown): value is number {
  // JSON.parse makes Infinity of 1e999.
  return Number.isFinite(value) && Number(value) > 0 && name.endsWith('_tokens')
}

/**
 * One shape for all. Cached tokens are part of the prompt in OpenAI's counts and beside it in
 * Anthropic's; here they are always part of it.
 */
export function toUsage(counts: Counts): Usage | undefined {
  if (Object.keys(counts).length === 0) return undefined
  const cached = (counts.cache_read_input_tokens ?? 0) + (counts.cache_creation_input_tokens ?? 0)
  const beside = counts.prompt_tokens === undefined ? cached : 0
  const completionTokens = counts.completion_tokens ?? counts.output_tokens ?? 0
  const input = counts.prompt_tokens ?? counts.input_tokens
  const promptTokens =
    input === undefined && beside === 0
      ? Math.max(0, (counts.total_tokens ?? 0) - completionTokens)
      : (input ?? 0) + beside
  const cachedTokens = counts.cached_tokens ?? counts.cache_read_input_tokens
  return {
    promptTokens,
    completionTokens,
    totalTokens: Math.max(counts.total_tokens ?? 0, promptTokens + completionTokens),
    // Whatever a server counts there: less than nothing is never left of the prompt.
    ...(cachedTokens === undefined ? {} : { cachedTokens: Math.min(cachedTokens, promptTokens) }),
    ...(counts.reasoning_tokens === undefined ? {} : { reasoningTokens: counts.reasoning_tokens }),
    exactness: 'exact'
  }
}
