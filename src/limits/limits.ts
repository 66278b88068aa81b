import { type Static, Type } from 'typebox'

/** What may be limited, the same for everybody together, for a key, a user and a model. */

const count = (description: string) => Type.Integer({ minimum: 0, default: 0, description })

/** The members that each set of limits has, as options. */
export const limitFields = {
  requests_per_second: count('Average rate; 0: no limit'),
  requests_per_minute: count('At most so many in any 60 s; 0: no limit'),
  burst_size: count('Requests at once; 0: twice requests_per_second'),
  tokens_per_minute: count('Tokens, of prompts and answers, in any 60 s; 0: no limit'),
  max_concurrent: count('Requests in flight, until the last byte of the answer; 0: no limit'),
  total_quota: Type.Number({
    minimum: 0,
    default: 0,
    description: 'What may be spent in a period; 0: no limit'
  }),
  reserve: Type.Enum(['max', 'typical'], {
    default: 'max',
    description:
      'What a request reserves of total_quota before it runs. max: its prompt and all output it may get (max_tokens, else rate_limit.assumed_max_tokens); typical: what responses usually need, so that a burst may overrun the quota'
  }),
  quota_unit: Type.Enum(['tokens', 'cost'], {
    default: 'tokens',
    description: 'What total_quota counts: tokens, or money in the currency of usage.prices'
  }),
  quota_reset_period: Type.Enum(['never', 'daily', 'weekly', 'monthly'], {
    default: 'never',
    description: 'When what was spent is forgotten, in the time zone of rate_limit.time_zone'
  })
}

export const LimitSet = Type.Object(limitFields, { additionalProperties: false })

/** Limits of one subject; 0: no such limit. */
export type Limits = Static<typeof LimitSet>

/** The limits that stand with a key replace, each for itself, those that every key has. */
export type OwnLimits = Partial<Limits>

/** The bucket that requests a second and a burst come to; 0 a second: there is none. */
export function bucketOf(limits: Limits): { perSecond: number; burst: number } {
  const { burst_size, requests_per_minute, requests_per_second } = limits
  const perSecond = requests_per_second || (burst_size > 0 ? requests_per_minute / 60 : 0)
  return { perSecond, burst: burst_size || perSecond * 2 }
}
