import '../check-node.ts'
import client, { Counter, Gauge, Histogram, Registry } from '@prometheus-io/client'
import type { FastifyPluginAsync } from 'fastify'
import fastifyMetricsModule from 'fastify-metrics'
import { type Static, Type } from 'typebox'
import { type Exchange, type Exchanges, withExchanges } from '../exchange.ts'
import { forgetDeparted } from '../metrics/departed.ts'
import { discoveryMetrics } from '../metrics/discovery.ts'
import { AtStart, checkOptions, type Given, NotBuilt, Section } from '../options.ts'
import { part, share, toPart } from '../parts.ts'
import { PRIORITIES } from '../pool/queue.ts'

/**
 * Prometheus metrics of the process, the routes and the gateway, in a registry of their own:
 * `fastify.metricsRegistry`. Labels are route patterns and configured names, never what a client
 * sends, so that their number is bounded.
 *
 * @example
 * await fastify.register(metrics)
 * fastify.get('/metrics', () => fastify.metricsRegistry.metrics())
 */

/** Where the gateway's other routes are. */
const TAKEN = /^\/(v1|api|health|models|chat|completions|embeddings|tokenize|detokenize)(\/|$)/

const ODD = /\/\.{1,2}(\/|$)|\/\//

const isAscending = (bounds: unknown) =>
  Array.isArray(bounds) && bounds.every((bound, at) => at === 0 || bound > bounds[at - 1])

export const MetricsOptions = AtStart(
  Section(
    {
      enabled: Type.Boolean({ default: true, description: 'Serves metrics' }),
      path: Type.String({
        pattern: '^/[\\w./-]+$',
        check: (path: unknown) => !TAKEN.test(String(path)) && !ODD.test(String(path)),
        default: '/metrics',
        expects: 'a path such as /metrics that no other route has',
        description: 'Where'
      }),
      latency_buckets: Type.Array(Type.Number({ exclusiveMinimum: 0 }), {
        minItems: 1,
        check: isAscending,
        expects: 'a list of growing numbers',
        default: [0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600],
        description: 'Upper bounds of the latency histogram, in seconds'
      }),
      custom_labels: NotBuilt('More labels')
    },
    'Prometheus metrics'
  )
)
export type MetricsOptions = Static<typeof MetricsOptions>

// A CommonJS module whose types say `export default`: the plugin is its `default`.
const fastifyMetrics = fastifyMetricsModule.default

/** GenAI conventions of OpenTelemetry, and on to what local models take. */
const TTFT_BUCKETS = [
  0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 15, 20, 30, 45, 60, 120
]
const TPOT_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]

/** As `llmproxy_backend_circuit_state` counts them. */
const CIRCUIT_STATES = ['closed', 'half_open', 'open'] as const

const metricsPlugin: FastifyPluginAsync<Given<MetricsOptions>> = async function metrics(
  fastify,
  given
) {
  const options = checkOptions(MetricsOptions, given)
  const registry = new Registry()
  const registers: [Registry] = [registry]
  share(fastify, 'metricsRegistry', registry)
  if (!options.enabled) return

  await fastify.register(fastifyMetrics, {
    name: 'routeMetrics',
    endpoint: null,
    promClient: client,
    defaultMetrics: { enabled: true, register: registry },
    routeMetrics: {
      enabled: { histogram: true, summary: false },
      overrides: {
        histogram: { registers, buckets: options.latency_buckets },
        summary: { registers }
      }
    }
  } as never)

  const requests = new Counter({
    name: 'llmproxy_requests_total',
    help: 'Requests, by the status the client got (499: it left before)',
    labelNames: ['path', 'stream', 'backend', 'status'],
    registers
  })
  const latency = new Histogram({
    name: 'llmproxy_latency_ms',
    help: 'Time from the beginning of a request to the end of its answer, in milliseconds',
    labelNames: ['path', 'stream', 'backend'],
    buckets: options.latency_buckets.map(seconds => seconds * 1000),
    registers
  })
  const tokens = new Counter({
    name: 'llmproxy_usage_tokens_total',
    help: 'Tokens that were metered; cached and cache_write are parts of prompt',
    labelNames: ['type'],
    registers
  })
  const ttft = new Histogram({
    name: 'llmproxy_time_to_first_token_seconds',
    help: 'Time from the beginning of a streaming request to its first token',
    labelNames: ['path', 'backend'],
    buckets: TTFT_BUCKETS,
    registers
  })
  const tpot = new Histogram({
    name: 'llmproxy_time_per_output_token_seconds',
    help: 'Time per output token after the first, of answers that came to their end',
    labelNames: ['path', 'backend'],
    buckets: TPOT_BUCKETS,
    registers
  })
  const outcomes = new Counter({
    name: 'llmproxy_exchanges_total',
    help: 'Exchanges, by how they ended',
    labelNames: ['outcome'],
    registers
  })
  const heartbeats = new Counter({
    name: 'llmproxy_heartbeat_streams_total',
    help: 'Streams whose client got its 200 and comments before a backend had answered',
    labelNames: ['path'],
    registers
  })
  const affinity = new Counter({
    name: 'llmproxy_prefix_affinity_total',
    help: 'Calls with a prompt: hit went where its beginning is in the cache, left went elsewhere because of the wait there, miss found it nowhere',
    labelNames: ['result'],
    registers
  })
  const exchanges = withExchanges(fastify)
  new Gauge({
    name: 'llmproxy_requests_in_flight',
    help: 'Requests whose answer has not ended',
    registers,
    collect() {
      this.set(exchanges.open.filter(isCounted).length)
    }
  })

  new Gauge({
    name: 'llmproxy_request_body_bytes',
    help: 'Request bodies in memory: they are kept until a backend responds',
    registers,
    collect() {
      this.set(exchanges.bodies.held)
    }
  })

  exchanges.onEnd('metrics', exchange => {
    if (!isCounted(exchange)) return
    const path = exchange.endpoint?.url ?? 'other'
    const stream = String(exchange.request.payload?.stream ?? false)
    const backend = exchange.backend ?? 'none'
    requests.inc({ path, stream, backend, status: exchange.statusCode })
    latency.observe({ path, stream, backend }, exchange.durationMs)
    outcomes.inc({ outcome: exchange.outcome })
    if (exchange.hadHeartbeat) heartbeats.inc({ path })
    if (exchange.affinity !== undefined) affinity.inc({ result: exchange.affinity })
    const { usage, ttftMs } = exchange
    if (usage !== undefined) {
      tokens.inc({ type: 'prompt' }, usage.promptTokens)
      tokens.inc({ type: 'completion' }, usage.completionTokens)
      const { cachedTokens = 0, cacheWriteTokens = 0 } = usage
      if (cachedTokens > 0) tokens.inc({ type: 'cached' }, cachedTokens)
      if (cacheWriteTokens > 0) tokens.inc({ type: 'cache_write' }, cacheWriteTokens)
    }
    if (ttftMs === undefined) return
    ttft.observe({ path, backend }, ttftMs / 1000)
    const after = (usage?.completionTokens ?? 0) - 1
    if (exchange.outcome === 'ok' && after > 0) {
      tpot.observe({ path, backend }, (exchange.lastTokenAt - exchange.firstTokenAt) / 1000 / after)
    }
  })

  exchanges.onStillborn.push(({ statusCode }) => {
    requests.inc({ path: 'other', stream: 'false', backend: 'none', status: statusCode })
    outcomes.inc({ outcome: 'rejected' })
  })

  connectionMetrics(part(fastify, 'connections'), exchanges, registers)
  // Whichever parts are registered, and in any order.
  fastify.addHook('onReady', async () => {
    const backends = part(fastify, 'backends')
    if (backends !== undefined) backendMetrics(backends, registers)
    const discovery = part(fastify, 'discovery')
    if (discovery !== undefined) discoveryMetrics(discovery, registers)
    const limits = part(fastify, 'limits')
    if (limits !== undefined) {
      const refusals = new Counter({
        name: 'llmproxy_limit_refusals_total',
        help: 'Requests refused by a limit, or in shadow mode those that would have been',
        labelNames: ['scope', 'limit', 'mode'],
        registers
      })
      const stopped = new Counter({
        name: 'llmproxy_limit_stopped_total',
        help: 'Answers ended before their time because a budget was used up',
        registers
      })
      const troubles = new Counter({
        name: 'llmproxy_limit_store_errors_total',
        help: 'Steps that the store of the limits could not take',
        registers
      })
      limits.observers.push({
        refused: ({ scope, limit }, mode) => refusals.inc({ scope, limit, mode }),
        stopped: () => stopped.inc(),
        trouble: () => troubles.inc()
      })
    }
    const dataDirWatch = part(fastify, 'dataDirWatch')
    if (dataDirWatch !== undefined) {
      new Gauge({
        name: 'llmproxy_data_dir_not_safe',
        help: '1: the data directory was deleted or replaced, or is not writable',
        aggregator: 'max',
        registers,
        collect() {
          this.set(Number(dataDirWatch.trouble !== undefined))
        }
      })
    }
    const usage = part(fastify, 'usage')
    if (usage !== undefined) usageMetrics(usage, registers)
  })
}

function connectionMetrics(
  connections: import('../connections.ts').Connections | undefined,
  { turns }: Exchanges,
  registers: [Registry]
): void {
  new Counter({
    name: 'llmproxy_connections_refused_total',
    help: 'Client connections closed by the gateway, by the bound that was reached; accept: could not be accepted',
    labelNames: ['reason'],
    registers,
    collect() {
      this.reset()
      if (turns.closed > 0) this.inc({ reason: 'pipelining' }, turns.closed)
      for (const [reason, count] of connections?.refused ?? []) this.inc({ reason }, count)
    }
  })
  if (connections === undefined) return
  new Gauge({
    name: 'llmproxy_connections_open',
    help: 'Open client connections',
    registers,
    collect() {
      this.set(connections.open)
    }
  })
}

function backendMetrics(
  { pool, onAttempt, onCircuit, onChange }: import('./backends.ts').Backends,
  registers: [Registry]
): void {
  const sweep = forgetDeparted(registers[0], () => pool.all.map(({ name }) => name))
  sweep()
  onChange.push(sweep)
  new Gauge({
    name: 'llmproxy_backend_up',
    help: '1: the backend can be called: no health check, connection, circuit or refusal says otherwise',
    labelNames: ['backend'],
    // Of several workers: down as soon as one of them finds it so.
    aggregator: 'min',
    registers,
    collect() {
      sweep()
      this.reset()
      for (const { name, live } of pool.backends)
        this.set({ backend: name }, Number(live.trouble === undefined))
    }
  })
  new Gauge({
    name: 'llmproxy_health_check_panic',
    help: '1: requests are tried although health checks say that every backend is down',
    aggregator: 'max',
    registers,
    collect() {
      this.set(Number(pool.isPanicking))
    }
  })
  new Gauge({
    name: 'llmproxy_backend_drained',
    help: '1: the backend gets no calls because somebody wants it so',
    labelNames: ['backend'],
    // Of several workers: drained as soon as one of them holds to it.
    aggregator: 'max',
    registers,
    collect() {
      this.reset()
      for (const { name, live } of pool.backends)
        this.set({ backend: name }, Number(live.isDrained))
    }
  })
  new Gauge({
    name: 'llmproxy_backend_in_flight',
    help: 'Attempts at this backend whose answer has not ended',
    labelNames: ['backend'],
    registers,
    collect() {
      this.reset()
      for (const { name, live } of pool.all) this.inc({ backend: name }, live.inFlight)
    }
  })
  new Gauge({
    name: 'llmproxy_queue_waiting',
    help: 'Calls that wait because all backends that could take them are full',
    labelNames: ['priority'],
    registers,
    collect() {
      for (const priority of PRIORITIES) this.set({ priority }, pool.queue.count(priority))
    }
  })
  const waits = new Histogram({
    name: 'llmproxy_queue_wait_seconds',
    help: 'How long calls have waited in the queue, of those that had to',
    labelNames: ['priority'],
    buckets: TTFT_BUCKETS,
    registers
  })
  pool.queue.onServed = (priority, ms) => waits.observe({ priority }, ms / 1000)
  new Counter({
    name: 'llmproxy_queue_turned_away_total',
    help: 'Calls that were refused instead of waiting: the queue was full, they would have waited for too long, or had',
    labelNames: ['reason'],
    registers,
    collect() {
      this.reset()
      for (const [reason, count] of Object.entries(pool.queue.turnedAway))
        this.inc({ reason }, count)
    }
  })
  const attempts = new Counter({
    name: 'llmproxy_attempts_total',
    help: 'Attempts at a backend, by what came of them',
    labelNames: ['backend', 'result'],
    registers
  })
  onAttempt.push((backend, result) => attempts.inc({ backend, result }))
  new Gauge({
    name: 'llmproxy_backend_circuit_state',
    help: '0: closed, the backend gets calls; 1: half open, it gets a single one; 2: open, it has failed or asked for a rest',
    labelNames: ['backend'],
    aggregator: 'max',
    registers,
    collect() {
      this.reset()
      const now = performance.now()
      for (const { name, live } of pool.backends)
        this.set({ backend: name }, CIRCUIT_STATES.indexOf(live.breaker.state(now)))
    }
  })
  const ejections = new Counter({
    name: 'llmproxy_backend_ejections_total',
    help: 'How often the circuit of a backend has opened, and why',
    labelNames: ['backend', 'reason'],
    registers
  })
  onCircuit.push((backend, turn) => {
    if (turn.state === 'open') ejections.inc({ backend, reason: turn.reason })
  })
  new Counter({
    name: 'llmproxy_hedges_total',
    help: 'Second attempts beside one that was late, by whether they gave the answer',
    labelNames: ['result'],
    registers,
    collect() {
      this.reset()
      for (const [result, count] of Object.entries(pool.hedges.results)) this.inc({ result }, count)
    }
  })
  new Counter({
    name: 'llmproxy_continuations_total',
    help: 'Streams that broke off, by whether another backend went on with them',
    labelNames: ['result'],
    registers,
    collect() {
      this.reset()
      for (const [result, count] of Object.entries(pool.continuations)) this.inc({ result }, count)
    }
  })
  new Counter({
    name: 'llmproxy_retry_budget_exhausted_total',
    help: 'Retries that were not made because there had been too many',
    registers,
    collect() {
      this.reset()
      this.inc(pool.retryBudget.exhausted)
    }
  })
}

function usageMetrics(usage: import('./usage.ts').UsageReports, registers: Registry[]): void {
  const successes = new Counter({
    name: 'llmproxy_webhook_success_total',
    help: 'Usage events delivered',
    registers
  })
  const failures = new Counter({
    name: 'llmproxy_webhook_failure_total',
    help: 'Usage events given up',
    registers
  })
  usage.onDelivery.push((result, records) => {
    if (result === 'delivered') successes.inc(records)
    else failures.inc(records)
  })
  new Gauge({
    name: 'llmproxy_webhook_queue',
    help: 'Usage events not delivered yet, without those that only the disk has',
    registers,
    collect() {
      this.set(usage.pending)
    }
  })
  new Gauge({
    name: 'llmproxy_usage_not_safe',
    help: '1: usage records cannot be written to the disk, and are kept in memory',
    aggregator: 'max',
    registers,
    collect() {
      this.set(Number(usage.trouble !== undefined))
    }
  })
}

/** Forwarded routes, and whatever was refused; not the health checks and scrapes of operators. */
function isCounted(exchange: Exchange): boolean {
  return exchange.endpoint !== undefined || exchange.outcome === 'rejected'
}

export default toPart(metricsPlugin, {
  name: 'metrics',
  decorates: ['metricsRegistry', 'routeMetrics']
})
