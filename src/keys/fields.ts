import { type Static, type TInteger, Type } from 'typebox'
import { limitFields, type OwnLimits } from '../limits/limits.ts'
import { PRIORITIES } from '../pool/queue.ts'
import { isNetwork, type KeyRecord, parseStatus, parseTime, toNetworks } from './key.ts'

/** What may stand with a key, the same in the configuration, in a file and in the builtin store. */

export const MAX_TAG = 200
/** What was spent before belongs to the period of the start, unless it is said when that began. */
const STARTED_AT = Date.now()

const Networks = (description: string) =>
  Type.Array(
    Type.String({ check: isNetwork, expects: 'an address or network such as 10.0.0.0/8' }),
    { description }
  )

export const Time = (description: string) =>
  Type.Unsafe<string | number>({
    type: ['string', 'number'],
    check: (value: unknown) => !Number.isNaN(parseTime(value)),
    description,
    expects: 'a time such as 2026-12-31T00:00:00Z, or Unix seconds or milliseconds'
  })

/** The description alone: what a key does not limit is limited as for every key. */
const own = ({ description = '' }: TInteger & { description?: string }) =>
  Type.Optional(Type.Integer({ minimum: 0, description }))

const OwnLimitFields = Type.Object(
  {
    requests_per_second: own(limitFields.requests_per_second),
    requests_per_minute: own(limitFields.requests_per_minute),
    burst_size: own(limitFields.burst_size),
    tokens_per_minute: own(limitFields.tokens_per_minute),
    max_concurrent: own(limitFields.max_concurrent),
    reserve: Type.Optional(
      Type.Enum(['max', 'typical'], {
        description: 'What a request reserves of total_quota; else as for every key'
      })
    )
  },
  {
    additionalProperties: false,
    description: 'Limits of its own; what is left out is as for every key'
  }
)

export const keyFields = {
  name: Type.Optional(
    Type.String({ minLength: 1, maxLength: 255, description: 'Name in logs and bills' })
  ),
  user_id: Type.Optional(Type.String({ minLength: 1, maxLength: 255, description: 'Who pays' })),
  status: Type.Optional(
    Type.Unsafe<string | number>({
      type: ['string', 'number'],
      check: (value: unknown) => parseStatus(value) !== undefined,
      description: 'active, disabled, expired or quota_exceeded',
      expects: 'one of active, disabled, expired, quota_exceeded'
    })
  ),
  starts_at: Type.Optional(Time('Not valid before; UTC where no zone is named')),
  expires_at: Type.Optional(Time('Not valid from then on; UTC where no zone is named')),
  allowed_ips: Type.Optional(Networks('Addresses it may be used from; none: all')),
  denied_ips: Type.Optional(Networks('Addresses it may not be used from')),
  models: Type.Optional(
    Type.Array(Type.String({ minLength: 1 }), {
      description: 'Models it may use, * as a wildcard; none: all'
    })
  ),
  limits: Type.Optional(OwnLimitFields),
  total_quota: Type.Optional(
    Type.Number({ minimum: 0, description: 'What it may spend in a period; 0: no limit' })
  ),
  quota_unit: Type.Optional(
    Type.Enum(['tokens', 'cost'], { description: 'What total_quota counts; else tokens' })
  ),
  quota_reset_period: Type.Optional(
    Type.Enum(['never', 'daily', 'weekly', 'monthly'], {
      description: 'When what was spent is forgotten; else never'
    })
  ),
  used_quota: Type.Optional(
    Type.Number({ minimum: 0, description: 'What was spent before the gateway began to count' })
  ),
  last_reset_at: Type.Optional(
    Time('Beginning of the period in which used_quota was spent; else that of the start')
  ),
  priority: Type.Optional(
    Type.Enum([...PRIORITIES], {
      description: 'batch: where calls must wait, its calls wait behind those of others'
    })
  ),
  trace: Type.Optional(
    Type.Boolean({
      description: 'May ask how the backend of a call was chosen (x-llmproxy-trace)'
    })
  ),
  tags: Type.Optional(
    Type.Record(Type.String(), Type.String(), {
      check: areTags,
      expects:
        'a mapping of names (letters, digits, "_", "." and "-") to texts of up to 200 characters',
      description: 'Tags of its usage records; a client cannot change them'
    })
  )
}

export function isTagName(name: string): boolean {
  return /^[\w.-]{1,64}$/.test(name)
}

function areTags(tags: unknown): boolean {
  return Object.entries(tags ?? {}).every(
    ([name, tag]) => isTagName(name) && String(tag).length <= MAX_TAG
  )
}

const KeyFields = Type.Object(keyFields)
export type KeyFields = Static<typeof KeyFields>

/** What a source that has checked the fields says about a key. */
export async function toKeyRecord(id: string, fields: KeyFields): Promise<KeyRecord> {
  const { name, user_id, status, starts_at, expires_at, models, priority, trace, tags } = fields
  return {
    id,
    name,
    userId: user_id,
    status: parseStatus(status ?? 'active')!,
    startsAt: optionalTime(starts_at),
    expiresAt: optionalTime(expires_at),
    allowedIps: await toNetworks(fields.allowed_ips),
    deniedIps: await toNetworks(fields.denied_ips),
    models: models?.length === 0 ? undefined : models,
    limits: ownLimits(fields),
    spent: toSpent(fields),
    priority,
    trace,
    tags
  }
}

/** The limits that stand with a key; undefined where none does. */
function ownLimits(
  fields: Pick<KeyFields, 'limits' | 'total_quota' | 'quota_unit' | 'quota_reset_period'>
): OwnLimits | undefined {
  const { total_quota, quota_unit, quota_reset_period } = fields
  const all = { ...fields.limits, total_quota, quota_unit, quota_reset_period }
  const said = Object.entries(all).filter(([, value]) => value !== undefined)
  return said.length === 0 ? undefined : (Object.fromEntries(said) as OwnLimits)
}

function toSpent({ used_quota, last_reset_at }: KeyFields): KeyRecord['spent'] {
  return used_quota === undefined
    ? undefined
    : { amount: used_quota, at: optionalTime(last_reset_at) ?? STARTED_AT }
}

function optionalTime(time: string | number | undefined): number | undefined {
  return time === undefined ? undefined : parseTime(time)
}
