import type { FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import { type Static, Type } from 'typebox'
import { type Exchange, withExchanges } from '../exchange.ts'
import { checkOptions, type Given, NotBuilt, Section } from '../options.ts'
import type { Reporter, UsageEvent } from '../reporters/reporter.ts'
import { type Delivery, Webhook, WebhookOptions } from '../reporters/webhook.ts'

/**
 * Reports what every exchange that reached a backend has spent, after it has ended.
 *
 * @example
 * await fastify.register(usage, {
 *   reporters: [{ name: 'billing', type: 'webhook', webhook: { url: 'http://127.0.0.1:9000/usage' } }]
 * })
 */

const ReporterOptions = Type.Object(
  {
    name: Type.Optional(Type.String({ description: 'Name in logs and metrics' })),
    type: Type.Enum(['webhook'], {
      description: 'webhook',
      expects: 'webhook (other types are not supported by this version yet)'
    }),
    enabled: Type.Boolean({ default: true, description: 'Switches it on' }),
    webhook: Type.Optional(WebhookOptions),
    database: NotBuilt('A database that receives usage records'),
    builtin: NotBuilt('The embedded store'),
    script: NotBuilt('Script that reports')
  },
  {
    additionalProperties: false,
    check: (reporter: Record<string, unknown>) =>
      typeof reporter[String(reporter.type)] === 'object',
    expects: 'a mapping with the part that its type names, such as webhook: {url: ...}'
  }
)

export const UsageOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Reports usage' }),
    reporters: Type.Array(ReporterOptions, { default: [], description: 'Who is told' })
  },
  'Where the usage of every call goes'
)
export type UsageOptions = Static<typeof UsageOptions>

declare module 'fastify' {
  interface FastifyInstance {
    usage: UsageReports
  }
}

export interface UsageReports {
  readonly reporters: readonly Reporter[]
  readonly onDelivery: ((result: Delivery) => void)[]
  update(options: UsageOptions): void
  /** Delivers what is pending until the signal fires. */
  flush(signal: AbortSignal): Promise<void>
}

/** How long a reporter that was taken out of the configuration may still deliver. */
const LEAVE_TIMEOUT = 60_000

const usagePlugin: FastifyPluginAsync<Given<UsageOptions>> = async function usage(fastify, given) {
  const { log } = fastify
  const onDelivery: UsageReports['onDelivery'] = []
  const delivered = (result: Delivery) => {
    for (const listener of onDelivery) listener(result)
  }
  const create = (options: UsageOptions): Reporter[] =>
    options.reporters
      .filter(({ enabled }) => options.enabled && enabled)
      .map(({ name, webhook }) => new Webhook(name ?? 'webhook', webhook!, delivered, log))
  /** Reporters that a reload took out, while they deliver what they have. */
  const leaving = new Set<Reporter>()
  const close = async (reporter: Reporter, signal: AbortSignal) => {
    leaving.add(reporter)
    await reporter.close(signal)
    leaving.delete(reporter)
  }
  const flush = async (signal: AbortSignal) => {
    await Promise.all([...reporters, ...leaving].map(reporter => close(reporter, signal)))
  }

  let reporters = create(checkOptions(UsageOptions, { enabled: true, ...given }))
  fastify.decorate('usage', {
    get reporters() {
      return reporters
    },
    onDelivery,
    update(options) {
      for (const reporter of reporters) void close(reporter, AbortSignal.timeout(LEAVE_TIMEOUT))
      reporters = create(options)
    },
    flush
  } satisfies UsageReports)

  withExchanges(fastify).onEnd('record', exchange => {
    if (exchange.attempts === 0 || reporters.length === 0) return
    const event = toEvent(exchange, fastify.prefix)
    for (const reporter of reporters) reporter.report(event, exchange.request.payload?.bytes)
  })
  fastify.addHook('onClose', () => flush(AbortSignal.abort()))
}

function toEvent(exchange: Exchange, prefix: string): UsageEvent {
  const { request, usage } = exchange
  const tokens = {
    prompt_tokens: usage?.promptTokens ?? 0,
    completion_tokens: usage?.completionTokens ?? 0,
    total_tokens: usage?.totalTokens ?? 0
  }
  return {
    request_id: exchange.id,
    timestamp: new Date().toISOString(),
    user_id: request.caller?.userId ?? null,
    api_key_id: request.caller?.id ?? null,
    model: request.payload?.model ?? null,
    ...tokens,
    is_stream: request.payload?.stream ?? false,
    exactness: usage?.exactness ?? null,
    endpoint: exchange.endpoint?.url ?? request.routeOptions.url ?? '',
    method: request.method,
    path: request.url.slice(prefix.length).split('?', 1)[0]!,
    backend: exchange.backend ?? '',
    backend_url: exchange.backendUrl ?? '',
    attempts: exchange.attempts,
    outcome: exchange.outcome,
    status_code: exchange.statusCode,
    latency_ms: Math.round(exchange.durationMs),
    ...(usage === undefined ? {} : { usage: tokens })
  }
}

export default fp(usagePlugin, { name: 'usage', fastify: '5.x' })
