import { GatewayError } from '../errors.ts'
import { limitHeaders } from './headers.ts'
import type { LimitName, Refusal, Scope } from './store.ts'

const WHOSE: Record<Scope, string> = {
  global: 'This server',
  per_key: 'This API key',
  per_user: 'This user',
  per_model: 'This model'
}
const UNITS: Record<LimitName, string> = {
  requests_per_second: 'requests a second',
  requests_per_minute: 'requests a minute',
  tokens_per_minute: 'tokens a minute',
  max_concurrent: 'requests at the same time',
  total_quota: '',
  reserved_quota: ''
}

/**
 * The answer to a call that a limit refuses: 429, `rate_limit_exceeded` where waiting helps and
 * `insufficient_quota` where it doesn't.
 *
 * @param time now (Unix ms)
 */
export function tooMany(refusal: Refusal, dialect: string, time: number): GatewayError {
  const { scope, limit, max, retryAfterMs } = refusal
  if (limit === 'total_quota') return quotaUsedUp(refusal, time)
  const held =
    limit === 'reserved_quota'
      ? `What is left of the quota of ${WHOSE[scope].replace('T', 't')} is reserved by running calls.`
      : `${WHOSE[scope]} is limited to ${Number(max.toFixed(2))} ${UNITS[limit]}.`
  if (!Number.isFinite(retryAfterMs)) {
    return new GatewayError('rate_limit_exceeded', `${held} This request alone is larger.`, {
      headers: { 'x-should-retry': 'false' }
    })
  }
  const seconds = Math.ceil(retryAfterMs / 1000)
  const state = { limit: max, remaining: 0, resetMs: retryAfterMs }
  const left =
    limit === 'max_concurrent' || limit === 'reserved_quota'
      ? {}
      : { [limit === 'tokens_per_minute' ? 'tokens' : 'requests']: state }
  return new GatewayError('rate_limit_exceeded', `${held} Please try again in ${seconds}s.`, {
    headers: {
      'retry-after': String(seconds),
      'retry-after-ms': String(Math.ceil(retryAfterMs)),
      ...limitHeaders(dialect, left, time)
    }
  })
}

function quotaUsedUp({ scope, retryAfterMs }: Refusal, time: number): GatewayError {
  const renewed = Number.isFinite(retryAfterMs)
    ? ` It is renewed at ${new Date(time + retryAfterMs).toISOString().slice(0, 19)}Z.`
    : ''
  return new GatewayError(
    'insufficient_quota',
    `${WHOSE[scope]} has used up its quota.${renewed}`,
    { headers: { 'x-should-retry': 'false' } }
  )
}

/** How an answer ends that would go beyond a budget. */
export function usedUp(hasQuota: boolean): GatewayError {
  return hasQuota
    ? new GatewayError('insufficient_quota', 'The quota was used up before the answer was whole.', {
        headers: { 'x-should-retry': 'false' }
      })
    : new GatewayError(
        'rate_limit_exceeded',
        'The tokens of a minute were used up before the answer was whole.'
      )
}
