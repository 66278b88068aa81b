import { GatewayError } from '../errors.ts'
import { limitHeaders } from './headers.ts'
import type { LimitName, Refusal, Scope } from './store.ts'

const WHOSE: Record<Scope, string> = {
  global: 'This server',
  per_key: 'This API key',
  per_user: 'This user',
  per_model: 'This model'
}
const UNITS: Record<LimitName, [noun: string, per: string]> = {
  requests_per_second: ['request', 'a second'],
  requests_per_minute: ['request', 'a minute'],
  tokens_per_minute: ['token', 'a minute'],
  max_concurrent: ['request', 'at the same time'],
  total_quota: ['', ''],
  reserved_quota: ['', '']
}

/**
 * The answer to a call that a limit refuses: 429, `rate_limit_exceeded` where waiting helps and
 * `insufficient_quota` where it doesn't.
 *
 * @param time now (Unix ms)
 * @param options.quotaStatus status of a response to a caller whose quota is used up
 * @param options.hasKey whether the request had a key; else limits of a key apply to its address
 */
export function tooMany(
  refusal: Refusal,
  dialect: string,
  time: number,
  { quotaStatus, hasKey }: { quotaStatus?: number | undefined; hasKey: boolean }
): GatewayError {
  const { limit, max, retryAfterMs } = refusal
  const whose =
    refusal.scope === 'per_key' && !hasKey ? 'This client address' : WHOSE[refusal.scope]
  if (limit === 'total_quota') return quotaUsedUp(refusal, whose, time, quotaStatus)
  const held =
    limit === 'reserved_quota'
      ? `Running requests have reserved what is left of the quota of ${whose.replace('T', 't')}.${advice(refusal)}`
      : `${whose} is limited to ${amountOf(max, limit)}.`
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

function amountOf(max: number, limit: LimitName): string {
  const number = Number(max.toFixed(2))
  const [noun, per] = UNITS[limit]
  return `${number} ${noun}${number === 1 ? '' : 's'} ${per}`
}

function quotaUsedUp(
  refusal: Refusal,
  whose: string,
  time: number,
  statusCode = 429
): GatewayError {
  const { retryAfterMs, left = 0 } = refusal
  const what =
    left > 0
      ? `${whose} has too little left of its quota.${advice(refusal)}`
      : `${whose} has used up its quota.`
  const renewed = Number.isFinite(retryAfterMs)
    ? ` It is renewed at ${new Date(time + retryAfterMs).toISOString().slice(0, 19)}Z.`
    : ''
  return new GatewayError('insufficient_quota', what + renewed, {
    statusCode,
    headers: { 'x-should-retry': 'false' }
  })
}

/** Returns how much is left, how much the request would need, and how it can need less. */
function advice({ left, needed }: Refusal): string {
  if (left === undefined || !needed) return ''
  const amount = (value: number) => String(Number(Math.max(0, value).toPrecision(6)))
  return ` ${amount(left)} are left, and this request may need ${amount(needed)}: set a lower max_tokens, or send a shorter prompt.`
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
