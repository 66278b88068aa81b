import { type Static, Type } from 'typebox'
import type { Distinct } from '../issues.ts'
import { Duration, HeadersToSend, isHttpUrl, NotBuilt, Section } from '../options.ts'
import type { HealthCheck } from './health.ts'
import type { PoolConfig } from './pool.ts'
import { strategies } from './strategies.ts'

/** Which backends there are, how one is chosen, and when it is tried again, checked and kept from work. */

/** The built-in demo backend, instead of a URL. */
export const DEMO = 'demo://'
/** It answers to any name. */
const DEMO_MODELS = ['demo', '*']

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
    weight: Type.Integer({ minimum: 1, default: 1, description: 'Share of the calls' }),
    models: Type.Optional(
      Type.Array(Type.String({ minLength: 1 }), {
        minItems: 1,
        expects: 'a list of at least one model',
        description: 'The models it serves, * as a wildcard; those it lists itself if left out'
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
    timeout: Duration('10m', 'Time to the first byte of the answer, for one attempt', 0),
    connect_timeout: Duration('5s', 'Time to a connection'),
    idle_timeout: Duration('5m', 'Time between two chunks of an answer; 0: for ever', 0),
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
    fallback: NotBuilt('Other backends for some models'),
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

/** The pool as it is configured; `demoUrl` is where the demo backend listens. */
export function toPool(
  { backends, routing }: BackendsOptions,
  demoUrl: string | undefined
): PoolConfig {
  const { retry, circuit_breaker: breaker } = routing
  return {
    backends: backends.map(backend => ({
      name: nameOf(backend)!,
      url: backend.url === DEMO ? demoUrl! : backend.url,
      weight: backend.weight,
      models: backend.models ?? (backend.url === DEMO ? DEMO_MODELS : undefined),
      headers: {
        ...(backend.api_key === undefined ? {} : { authorization: `Bearer ${backend.api_key}` }),
        ...lowerCased(backend.headers)
      },
      timeout: backend.timeout ?? routing.timeout,
      connectTimeout: backend.connect_timeout ?? routing.connect_timeout,
      idleTimeout: backend.idle_timeout ?? routing.idle_timeout
    })),
    loadBalance: routing.load_balance,
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
      retryOn: retry.retry_on
    }
  }
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

function lowerCased(headers: Record<string, string>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(headers).map(([name, text]) => [name.toLowerCase(), text])
  )
}
