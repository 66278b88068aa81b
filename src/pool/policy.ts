import { type Static, Type } from 'typebox'
import type { Distinct, Issue } from '../issues.ts'
import { untagged } from '../keys/key.ts'
import { Duration, HeadersToSend, isHttpUrl, NotBuilt, Section, Size } from '../options.ts'
import type { TimeLimits } from './backend.ts'
import { CONTINUATION_WAYS } from './continuation.ts'
import type { HealthCheck } from './health.ts'
import { isPattern, type ModelEntry } from './models.ts'
import type { PoolConfig } from './pool.ts'
import { strategies } from './strategies.ts'

/** Which backends there are, how one is chosen, and when it is tried again, checked and kept from work. */

/** The built-in demo backend, instead of a URL. */
export const DEMO = 'demo://'
/** It answers to any name. */
const DEMO_MODELS = ['demo', '*']

export const MAX_PRIORITY = 100
/** Weights are added up: with larger ones nothing would be left of small ones. */
const MAX_WEIGHT = 1_000_000

const ModelName = Type.String({ minLength: 1 })
const ModelTimeouts = Type.Object(
  {
    connect_timeout: Type.Optional(Duration(undefined, 'Time to a connection')),
    timeout: Type.Optional(Duration(undefined, 'Time to the first byte of the answer', 0)),
    idle_timeout: Type.Optional(Duration(undefined, 'Time between two chunks', 0)),
    total_timeout: Type.Optional(Duration(undefined, 'Time to the end of the answer', 0))
  },
  { additionalProperties: false }
)

export const BackendOptions = Type.Object(
  {
    name: Type.Optional(
      Type.String({
        minLength: 1,
        description: 'Name in metrics and logs; host and port if left out'
      })
    ),
    url: Type.String({
      pattern: '^(https?|demo)://',
      check: (url: unknown) =>
        url === DEMO || (isHttpUrl(url) && new URL(String(url)).search === ''),
      expects: 'a URL such as http://host:8000',
      description: 'Base URL, with or without /v1; demo:// is a backend that is built in'
    }),
    weight: Type.Integer({
      minimum: 1,
      maximum: MAX_WEIGHT,
      default: 1,
      description: 'Share of the calls'
    }),
    priority: Type.Integer({
      minimum: 0,
      maximum: MAX_PRIORITY,
      default: 0,
      description: 'Gets calls only while no backend with a lower one can take them'
    }),
    models: Type.Optional(
      Type.Array(
        Type.Union([ModelName, Type.Record(ModelName, ModelName, { minProperties: 1 })], {
          expects: 'a model, or a mapping of public names to names at the backend'
        }),
        {
          minItems: 1,
          expects: 'a list of at least one model',
          description:
            'The models it serves: name, * as a wildcard, or {public name: name at the backend}; those it lists itself if left out'
        }
      )
    ),
    max_concurrent: Type.Integer({
      minimum: 0,
      default: 0,
      description: 'Most calls at once, shared out to the workers; 0: no limit'
    }),
    continuation: Type.Optional(
      Type.Enum([...CONTINUATION_WAYS], {
        description: 'How it goes on with a text that another one has begun; left out: it does not'
      })
    ),
    cache_salt: Type.Optional(
      Type.Enum(['per_key'], {
        description:
          'per_key: sends a cache_salt for each API key (vLLM, SGLang), so that a caller cannot measure which prompts of others are in the prefix cache; left out: the cache is shared'
      })
    ),
    continuous_usage: Type.Optional(
      Type.Boolean({
        description:
          'Asks for the tokens so far in every event of a stream, and takes them out again: hidden reasoning is counted also if the client leaves early; left out: where the models are owned by vllm or sglang'
      })
    ),
    api_key: Type.Optional(
      Type.String({
        pattern: '^[\\x21-\\x7e]+$',
        expects: 'text without spaces and line ends',
        secret: true,
        description: 'Sent as Authorization: Bearer'
      })
    ),
    headers: HeadersToSend,
    timeout: Type.Optional(Duration(undefined, 'routing.timeout for this backend', 0)),
    connect_timeout: Type.Optional(Duration(undefined, 'routing.connect_timeout for this backend')),
    idle_timeout: Type.Optional(Duration(undefined, 'routing.idle_timeout for this backend', 0)),
    total_timeout: Type.Optional(Duration(undefined, 'routing.total_timeout for this backend', 0)),
    max_idle_conns: Type.Optional(
      Type.Integer({ minimum: 0, description: 'No effect; idle connections are closed after 4 s' })
    )
  },
  { additionalProperties: false, description: 'One inference server' }
)

const RoutingOptions = Section(
  {
    enabled: Type.Boolean({ default: true, description: 'false switches retries off' }),
    load_balance: Type.Enum(Object.keys(strategies) as (keyof typeof strategies)[], {
      default: 'round_robin',
      description: 'How a backend is chosen; round_robin honours weights'
    }),
    prefix_affinity: Type.Boolean({
      default: true,
      description: 'least_wait counts which backend has the beginning of a prompt in its cache'
    }),
    timeout: Duration('10m', 'Time to the first byte of the answer, for one attempt', 0),
    connect_timeout: Duration('5s', 'Time to a connection'),
    hold_first_event: Duration(
      '1s',
      'How long the head of a stream is held back until its first event, which may be an error that another backend can make good; at most half of the time that the client waits',
      0
    ),
    idle_timeout: Duration('5m', 'Time between two chunks of an answer; 0: for ever', 0),
    total_timeout: Duration('0', 'Time to the end of an answer, for one attempt; 0: for ever', 0),
    default_model: Type.Optional(
      Type.String({ minLength: 1, description: 'Model of requests that name none' })
    ),
    model_timeouts: Type.Record(ModelName, ModelTimeouts, {
      default: {},
      expects: 'a mapping of models to time limits',
      description: 'Time limits of some models, * as a wildcard, over those of backends'
    }),
    retry: Section(
      {
        enabled: Type.Boolean({
          default: false,
          description: 'Tries again on what retry_on names'
        }),
        max_retries: Type.Integer({
          minimum: 0,
          default: 3,
          description: 'Attempts after the first'
        }),
        initial_wait: Duration('1s', 'Wait before a backend is tried again', 0),
        max_wait: Duration('10s', 'Longest wait, also for Retry-After', 0),
        multiplier: Type.Number({ minimum: 1, default: 2, description: 'Growth of the wait' }),
        retry_on: Type.Array(Type.Enum(['connect_failure', 'timeout', '5xx', '429']), {
          default: ['connect_failure', '5xx', '429'],
          description: 'Failures that are tried again'
        })
      },
      'More attempts, as long as the client has not had a byte'
    ),
    hedge: Section(
      {
        enabled: Type.Boolean({
          default: false,
          description:
            'Asks another backend, too, when the first byte comes later than 95 % do; 2 % of the calls at most'
        })
      },
      'A second attempt beside one that is late'
    ),
    model_discovery: Section(
      {
        enabled: Type.Boolean({
          default: true,
          description: 'false: without models of its own a backend takes every call'
        }),
        interval: Duration('60s', 'Time between two questions'),
        timeout: Duration('5s', 'How long an answer may take')
      },
      'Backends are asked which models they have'
    ),
    circuit_breaker: Section(
      {
        enabled: Type.Boolean({
          default: true,
          description: 'Keeps calls from backends that fail, from half of the pool at most'
        }),
        consecutive_failures: Type.Integer({
          minimum: 1,
          default: 5,
          description: 'Failures in a row that are too many'
        }),
        error_ratio: Type.Number({
          exclusiveMinimum: 0,
          maximum: 1,
          default: 0.5,
          description: 'Share of failures that is too large, among ten calls or more within 30 s'
        }),
        open_time: Duration('5s', 'Time without calls; doubled up to 1m while probes fail')
      },
      'Backends that fail get no calls for a while'
    ),
    queue: Section(
      {
        max_size: Type.Integer({ minimum: 0, default: 1000, description: 'Calls that may wait' }),
        max_bytes: Size('256MB', 'Bytes of the bodies that may wait'),
        timeout: Duration('60s', 'How long a call may wait')
      },
      'Where calls wait while all backends that could take them have max_concurrent'
    ),
    fallback: Type.Array(
      Type.Object(
        {
          models: Type.Array(ModelName, {
            default: [],
            description: 'The models it is for, * as a wildcard; all if left out'
          }),
          primary: Type.String({ minLength: 1, description: 'Gets the calls; name or URL' }),
          fallback: Type.Array(Type.String({ minLength: 1 }), {
            default: [],
            description: 'Get them in this order when it fails; names or URLs'
          })
        },
        { additionalProperties: false }
      ),
      { default: [], description: 'Which backends some models go to; the first entry that fits' }
    ),
    model_fallbacks: Type.Record(ModelName, Type.Array(ModelName, { minItems: 1 }), {
      default: {},
      expects: 'a mapping of models to lists of models',
      description: 'Models that take the place of one that no backend can serve, in this order'
    }),
    script: NotBuilt('Script that chooses')
  },
  'How calls find a backend'
)

const HealthCheckOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Asks every backend how it is' }),
    interval: Duration('30s', 'Time between two checks'),
    timeout: Duration('5s', 'How long an answer may take'),
    method: Type.Enum(['GET', 'HEAD', 'POST'], { default: 'GET', description: 'Method' }),
    path: Type.String({
      pattern: '^/',
      default: '/health',
      expects: 'a path such as /health',
      description: 'Path; /api/version for Ollama'
    }),
    expected_status: Type.Integer({
      minimum: 200,
      maximum: 599,
      default: 200,
      description: 'Status of a healthy backend'
    }),
    unhealthy_threshold: Type.Integer({ minimum: 1, default: 3, description: 'Failures in a row' }),
    healthy_threshold: Type.Integer({ minimum: 1, default: 2, description: 'Successes in a row' }),
    panic: Type.Boolean({
      default: true,
      description: 'Tries requests nevertheless when checks alone say that every backend is down'
    }),
    script: NotBuilt('Script that checks')
  },
  'Active health checks'
)

export const BackendsOptions = Section(
  {
    backends: Type.Array(BackendOptions, {
      default: [],
      expects: 'a list of backends',
      distinct: [
        { by: backend => nameOf(backend as Partial<BackendOptions>), what: 'name' }
      ] satisfies Distinct[],
      description: 'The inference servers'
    }),
    routing: RoutingOptions,
    health_check: HealthCheckOptions
  },
  'The pool of inference servers'
)
export type BackendsOptions = Static<typeof BackendsOptions>
export type BackendOptions = Static<typeof BackendOptions>

/**
 * The pool as it is configured.
 *
 * @param demoUrl where the demo backend listens
 * @param workers how many processes share what the backends can take
 */
export function toPool(
  { backends, routing, health_check: check }: BackendsOptions,
  demoUrl: string | undefined,
  workers = 1
): PoolConfig {
  const { retry, circuit_breaker: breaker } = routing
  const toName = (nameOrUrl: string) => findBackend(backends, nameOrUrl)
  return {
    backends: backends.map(backend => ({
      name: nameOf(backend)!,
      url: backend.url === DEMO ? demoUrl! : backend.url,
      weight: backend.weight,
      priority: backend.priority,
      models: modelsOf(backend)?.flatMap(toEntries),
      maxConcurrent: share(backend.max_concurrent, workers),
      continuation: routing.enabled ? backend.continuation : undefined,
      saltsCache: backend.cache_salt === 'per_key',
      continuousUsage: backend.continuous_usage,
      listsModels: modelsOf(backend)?.some(isOpen) ?? true,
      headers: {
        ...(backend.api_key === undefined ? {} : { authorization: `Bearer ${backend.api_key}` }),
        ...lowerCased(backend.headers)
      },
      timeout: backend.timeout ?? routing.timeout,
      connectTimeout: backend.connect_timeout ?? routing.connect_timeout,
      longestConnect: Math.max(
        backend.connect_timeout ?? routing.connect_timeout,
        ...Object.values(routing.model_timeouts).map(each => each.connect_timeout ?? 0)
      ),
      holdFirstEvent: routing.hold_first_event,
      idleTimeout: backend.idle_timeout ?? routing.idle_timeout,
      totalTimeout: backend.total_timeout ?? routing.total_timeout
    })),
    loadBalance: routing.load_balance,
    defaultModel: routing.default_model,
    prefixAffinity: routing.prefix_affinity,
    fallback: routing.fallback.map(({ models, primary, fallback }) => ({
      models,
      order: [primary, ...fallback].map(toName).filter(name => name !== undefined)
    })),
    queue: {
      maxSize: share(routing.queue.max_size, workers),
      maxBytes: routing.queue.max_bytes / workers,
      timeout: routing.queue.timeout
    },
    modelTimeouts: Object.entries(routing.model_timeouts).map(([pattern, limits]) => [
      pattern,
      toTimeLimits(limits)
    ]),
    modelFallbacks: new Map(
      Object.entries(routing.model_fallbacks).map(([model, others]) => [untagged(model), others])
    ),
    panics: check.panic,
    hedges: routing.enabled && routing.hedge.enabled,
    breaker: breaker.enabled
      ? {
          consecutiveFailures: breaker.consecutive_failures,
          errorRatio: breaker.error_ratio,
          openTime: breaker.open_time
        }
      : undefined,
    retry: {
      enabled: routing.enabled && retry.enabled,
      maxRetries: retry.max_retries,
      initialWait: retry.initial_wait,
      maxWait: retry.max_wait,
      multiplier: retry.multiplier,
      retryOn: retry.retry_on,
      fallsBack: routing.enabled
    }
  }
}

/** What one of the workers may take; 0 stays no limit. */
function share(most: number, workers: number): number {
  return most === 0 ? 0 : Math.max(1, Math.floor(most / workers))
}

/** What `routing.fallback` says of backends that there are not. */
export function fallbackIssues({ backends, routing }: BackendsOptions): Issue[] {
  return routing.fallback.flatMap(({ primary, fallback }, at) =>
    [primary, ...fallback].flatMap((each, place) => {
      if (findBackend(backends, each) !== undefined) return []
      const member = place === 0 ? ['primary'] : ['fallback', place - 1]
      const path = ['routing', 'fallback', at, ...member]
      return [{ path, message: 'must be the name or the URL of one of the backends' }]
    })
  )
}

export function toHealthCheck(check: BackendsOptions['health_check']): HealthCheck {
  return {
    enabled: check.enabled,
    interval: check.interval,
    timeout: check.timeout,
    method: check.method,
    path: check.path,
    expectedStatus: check.expected_status,
    unhealthyThreshold: check.unhealthy_threshold,
    healthyThreshold: check.healthy_threshold
  }
}

/** A backend without a name goes by the host, port and path of its URL. */
export function nameOf({ name, url }: Partial<BackendOptions>): string | undefined {
  if (name !== undefined || url === undefined) return name
  if (url === DEMO) return 'demo'
  return isHttpUrl(url)
    ? url.replace(/^https?:\/\/([^/]*@)?/, '').replace(/\/+(v1\/*)?$/, '')
    : undefined
}

/** The name of the backend that is meant. */
function findBackend(backends: BackendOptions[], nameOrUrl: string): string | undefined {
  const bare = (url: string) => url.replace(/\/+(v1\/*)?$/, '')
  const found =
    backends.find(each => nameOf(each) === nameOrUrl) ??
    backends.find(each => bare(each.url) === bare(nameOrUrl))
  return found && nameOf(found)
}

function toTimeLimits(limits: Static<typeof ModelTimeouts>): Partial<TimeLimits> {
  const given = {
    connectTimeout: limits.connect_timeout,
    timeout: limits.timeout,
    idleTimeout: limits.idle_timeout,
    totalTimeout: limits.total_timeout
  }
  return Object.fromEntries(Object.entries(given).filter(([, ms]) => ms !== undefined))
}

type ConfiguredModel = NonNullable<BackendOptions['models']>[number]

function toEntries(model: ConfiguredModel): ModelEntry[] {
  return typeof model === 'string'
    ? [{ name: model, upstream: undefined }]
    : Object.entries(model).map(([name, upstream]) => ({ name, upstream }))
}

/** What it lists shows what is meant. */
function isOpen(model: ConfiguredModel): boolean {
  return typeof model === 'string' && isPattern(model)
}

function modelsOf({ models, url }: BackendOptions): ConfiguredModel[] | undefined {
  return models ?? (url === DEMO ? DEMO_MODELS : undefined)
}

function lowerCased(headers: Record<string, string>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(headers).map(([name, text]) => [name.toLowerCase(), text])
  )
}
