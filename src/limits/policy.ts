import { type Static, Type } from 'typebox'
import type { Caller } from '../exchange.ts'
import { membersOf } from '../fragments.ts'
import type { Issue } from '../issues.ts'
import { ModelList } from '../model-list.ts'
import { checkOptions, NotBuilt, Section } from '../options.ts'
import { type StorageOptions, storageIssues } from '../store/storage.ts'
import { LimitSet, type Limits, limitFields } from './limits.ts'
import { isTimeZone } from './period.ts'
import { type Account, type Scope, toAccount } from './store.ts'

/** Which limits there are as options, and which of them a call is held to. */

const part = (description: string) =>
  Section(
    { enabled: Type.Boolean({ default: true, description: 'Switches these on' }), ...limitFields },
    description
  )
const named = (description: string) =>
  Type.Record(Type.String({ minLength: 1 }), LimitSet, { default: {}, description })

export const LimitsOptions = Section(
  {
    enabled: Type.Boolean({
      default: false,
      description:
        'Enforces these limits; if left out, true where limits are listed. Limits set on a key always apply'
    }),
    mode: Type.Enum(['enforce', 'shadow'], {
      default: 'enforce',
      description: 'shadow: refuses nothing, but counts and logs what would have been refused'
    }),
    storage: Type.Enum(['memory', 'redis'], {
      default: 'memory',
      description: 'memory: counted in this process; redis: for all processes that share it'
    }),
    redis: Type.String({
      default: 'default',
      description: 'For storage: redis, its name in storage.caches'
    }),
    redis_prefix: Type.String({
      minLength: 1,
      default: 'llmproxy',
      description: 'Begins all names in Redis; gateways with the same one share their limits'
    }),
    on_store_error: Type.Enum(['local', 'allow', 'deny'], {
      default: 'local',
      description:
        'While Redis is away: local: each process lets its share through; allow: everything; deny: 503'
    }),
    on_exhausted: Type.Enum(['finish', 'stop'], {
      default: 'finish',
      description:
        'A stream that would go beyond a budget of tokens or money: is finished, or ended with an error'
    }),
    assumed_max_tokens: Type.Optional(
      Type.Integer({
        minimum: 1,
        description:
          'Output tokens that a request without max_tokens reserves of a quota; if left out, what the context of its model leaves, or 4096 where that is not known. A request whose tokens cannot be estimated (a form, an image) reserves as many, or 4096'
      })
    ),
    time_zone: Type.String({
      default: 'UTC',
      check: isTimeZone,
      expects: 'a time zone such as Europe/Berlin',
      description: 'By whose midnight quotas are renewed'
    }),
    script: NotBuilt('Script that decides'),
    global: part('For everybody together'),
    per_key: part('For each API key'),
    per_user: part('For each user_id'),
    per_model: part('For each model'),
    users: named('Users who have other limits than per_user'),
    models: named(
      'Models, * as a wildcard, that have others than per_model; the first that fits counts'
    )
  },
  'How much may be asked',
  ['global', 'per_key', 'per_user', 'per_model', 'users', 'models']
)
export type LimitsOptions = Static<typeof LimitsOptions>

/** Why these limits cannot be held. */
export function limitIssues(
  options: LimitsOptions,
  { prices }: { prices: readonly unknown[] },
  { caches }: StorageOptions
): Issue[] {
  const issues = redisIssues(options, caches)
  for (const [path, limits] of limitSets(options)) {
    const { burst_size, requests_per_second, requests_per_minute } = limits
    if (burst_size && !requests_per_second && !requests_per_minute) {
      const message = 'needs requests_per_second or requests_per_minute beside it'
      issues.push({ path: [...path, 'burst_size'], message })
    }
    if (limits.quota_unit === 'cost' && limits.total_quota > 0 && prices.length === 0) {
      issues.push({ path: [...path, 'quota_unit'], message: 'needs usage.prices to count by' })
    }
  }
  return issues
}

export function redisIssues(options: LimitsOptions, caches: StorageOptions['caches']): Issue[] {
  if (options.storage === 'memory' || !options.enabled) return []
  return storageIssues({ caches, databases: [] }, 'caches', options.redis, ['redis'])
}

/** The Redis that counts; undefined: this process does. */
export function cacheOf({ storage, redis }: LimitsOptions, caches: StorageOptions['caches']) {
  return storage === 'redis' ? caches.find(({ name }) => name === redis) : undefined
}

/** What only counts must not stand in the way. */
export function onErrorOf({
  mode,
  on_store_error
}: LimitsOptions): LimitsOptions['on_store_error'] {
  return mode === 'shadow' ? 'allow' : on_store_error
}

function limitSets(options: LimitsOptions): [Issue['path'], Limits][] {
  const parts = ['global', 'per_key', 'per_user', 'per_model'] as const
  const named = (['users', 'models'] as const).flatMap(list =>
    Object.entries(options[list]).map(([name, limits]): [Issue['path'], Limits] => [
      [list, name],
      limits
    ])
  )
  return [...parts.map((name): [Issue['path'], Limits] => [[name], options[name]]), ...named]
}

const NONE = checkOptions(LimitSet, {})

/** Limits of `rate_limit.models`. */
export function limitsOfModels({ enabled, models }: LimitsOptions): Promise<ModelList<Limits>> {
  return ModelList.of(enabled ? membersOf(models) : [])
}

/**
 * Returns the accounts whose limits apply to all requests of a caller.
 *
 * @param subject id of the caller, or the address that counts as one
 */
export function accountsOf(
  caller: Caller | undefined,
  subject: string,
  options: LimitsOptions
): Account[] {
  const perKey = limitsOf(options, 'per_key')
  const own = caller?.limits === undefined ? perKey : { ...perKey, ...caller.limits }
  const accounts = [
    toAccount('global', '', limitsOf(options, 'global')),
    toAccount('per_key', subject, own, caller?.spent)
  ]
  const user = caller?.userId
  if (user !== undefined) {
    const isNamed = options.enabled && Object.hasOwn(options.users, user)
    const limits = isNamed ? options.users[user]! : limitsOf(options, 'per_user')
    accounts.push(toAccount('per_user', user, limits))
  }
  return accounts.filter(isLimited)
}

/**
 * Returns the account of a model, if it has limits.
 *
 * @param models limits of `rate_limit.models`
 * @param isListed whether a backend or the configuration has a model of this name
 */
export function modelAccount(
  model: string,
  options: LimitsOptions,
  models: ModelList<Limits>,
  isListed: boolean
): Account | undefined {
  const named = models.entry(model)
  // Names that callers invent share one count: there may be any number of them.
  const name = isListed ? model : (named?.pattern ?? '*')
  const account = toAccount('per_model', name, named?.value ?? limitsOf(options, 'per_model'))
  return isLimited(account) ? account : undefined
}

function limitsOf(options: LimitsOptions, part: Scope): Limits {
  return options.enabled && options[part].enabled ? options[part] : NONE
}

function isLimited({ limits }: Account): boolean {
  const { requests_per_second, requests_per_minute, tokens_per_minute } = limits
  const rates = requests_per_second + requests_per_minute + tokens_per_minute
  return rates + limits.max_concurrent + limits.total_quota > 0
}

export function hasBudget(accounts: readonly Account[]): boolean {
  return accounts.some(({ limits }) => limits.tokens_per_minute + limits.total_quota > 0)
}
