import type { Left } from './store.ts'

/**
 * What is left of the limits, as OpenAI's (`x-ratelimit-remaining-tokens`) or Anthropic's
 * (`anthropic-ratelimit-tokens-remaining`) clients read it: https://platform.openai.com/docs/guides/rate-limits,
 * https://docs.anthropic.com/en/api/rate-limits.
 *
 * @param time now (Unix ms)
 * @example
 * limitHeaders('openai', { tokens: { limit: 60, remaining: 59, resetMs: 1000 } }, 0)['x-ratelimit-reset-tokens'] // '1s'
 */
export function limitHeaders(
  dialect: string,
  left: { requests?: Left | undefined; tokens?: Left | undefined },
  time: number
): Record<string, string> {
  const headers: Record<string, string> = {}
  for (const unit of ['requests', 'tokens'] as const) {
    const state = left[unit]
    if (state === undefined) continue
    const limit = String(state.limit)
    const remaining = String(Math.max(0, Math.floor(state.remaining)))
    if (dialect === 'anthropic') {
      headers[`anthropic-ratelimit-${unit}-limit`] = limit
      headers[`anthropic-ratelimit-${unit}-remaining`] = remaining
      headers[`anthropic-ratelimit-${unit}-reset`] = toSeconds(time + state.resetMs)
    } else {
      headers[`x-ratelimit-limit-${unit}`] = limit
      headers[`x-ratelimit-remaining-${unit}`] = remaining
      headers[`x-ratelimit-reset-${unit}`] = goDuration(state.resetMs)
    }
  }
  return headers
}

/** RFC 3339 in whole seconds. */
function toSeconds(time: number): string {
  return `${new Date(Math.ceil(time / 1000) * 1000).toISOString().slice(0, 19)}Z`
}

/** A time as OpenAI writes it in its headers: `12ms`, `1.5s`, `6m0s`. */
export function goDuration(ms: number): string {
  if (ms < 1000) return `${Math.ceil(ms)}ms`
  const seconds = Math.ceil(ms / 100) / 10
  if (seconds < 60) return `${seconds}s`
  const whole = Math.ceil(seconds)
  return `${Math.floor(whole / 60)}m${whole % 60}s`
}
