import type { FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import { type Static, Type } from 'typebox'
import { type Exchange, withExchanges } from '../exchange.ts'
import { pathBelow } from '../http.ts'
import { checkOptions, type Given, NotBuilt, Section } from '../options.ts'
import type { Audience, Reporter, UsageEvent } from '../reporters/reporter.ts'
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
      later: ['database', 'builtin'],
      description: 'What it is'
    }),
    enabled: Type.Boolean({ default: true, description: 'Switches it on' }),
    webhook: Type.Optional(WebhookOptions),
    database: NotBuilt('A database that receives usage records'),
    builtin: NotBuilt('The embedded store'),
    script: NotBuilt('Script that reports')
  },
  {
    additionalProperties: false,
    partOfType: true
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

/** How long reporters that were taken out of the configuration may still deliver. */
const LEAVE_TIMEOUT = 60_000

const usagePlugin: FastifyPluginAsync<Given<UsageOptions>> = async function usage(fastify, given) {
  const { log } = fastify
  const onDelivery: UsageReports['onDelivery'] = []
  const delivered = (result: Delivery) => {
    for (const listener of onDelivery) listener(result)
  }
  const create = (options: UsageOptions): Audience => {
    const reporters = options.reporters
      .filter(({ enabled }) => options.enabled && enabled)
      .map(({ name, webhook }) => new Webhook(name ?? 'webhook', webhook!, delivered, log))
    return { reporters, wantsBody: reporters.some(each => each.wantsBody), exchanges: 0 }
  }
  const warnIfNone = ({ enabled, reporters }: UsageOptions) => {
    if (enabled && reporters.length === 0) log.warn('usage is enabled but has no reporters')
  }
  const options = checkOptions(UsageOptions, { enabled: true, ...given })
  warnIfNone(options)
  let current = create(options)
  const all = new Set([current])

  /** An exchange reports to whom it would have when it began; then its reporters may go. */
  const retire = async (audience: Audience) => {
    const signal = AbortSignal.timeout(LEAVE_TIMEOUT)
    await Promise.all(audience.reporters.map(reporter => reporter.close(signal)))
    all.delete(audience)
  }
  const flush = async (signal: AbortSignal) => {
    const reporters = [...all].flatMap(audience => audience.reporters)
    await Promise.all(reporters.map(reporter => reporter.close(signal)))
  }

  fastify.decorate('usage', {
    get reporters() {
      return [...all].flatMap(audience => audience.reporters)
    },
    onDelivery,
    update(options) {
      warnIfNone(options)
      const before = current
      current = create(options)
      all.add(current)
      if (before.exchanges === 0) void retire(before)
    },
    flush
  } satisfies UsageReports)

  const exchanges = withExchanges(fastify)
  fastify.addHook('onRequest', ({ exchange }, _reply, done) => {
    exchange.audience = current
    exchange.keepsBody = current.wantsBody
    current.exchanges++
    done()
  })
  exchanges.onEnd('record', exchange => {
    if (exchange.audience !== undefined) report(exchange, exchange.audience)
  })

  function report(exchange: Exchange, audience: Audience): void {
    audience.exchanges--
    if (exchange.attempts > 0 && audience.reporters.length > 0) {
      const event = toEvent(exchange, fastify.prefix)
      const body = exchange.request.payload?.bytes
      for (const reporter of audience.reporters) reporter.report(event, body)
    }
    if (audience !== current && audience.exchanges === 0) void retire(audience)
  }
  fastify.addHook('onClose', () => flush(AbortSignal.abort()))
}

function toEvent(exchange: Exchange, prefix: string): UsageEvent {
  const { request, usage } = exchange
  const prompt_tokens = usage?.promptTokens ?? 0
  const completion_tokens = usage?.completionTokens ?? 0
  const total_tokens = usage?.totalTokens ?? 0
  return {
    request_id: exchange.id,
    timestamp: new Date().toISOString(),
    user_id: request.caller?.userId ?? null,
    api_key_id: request.caller?.id ?? null,
    model: request.payload?.model ?? null,
    prompt_tokens,
    completion_tokens,
    total_tokens,
    is_stream: request.payload?.stream ?? false,
    exactness: usage?.exactness ?? null,
    endpoint: exchange.endpoint?.url ?? request.routeOptions.url ?? '',
    method: request.method,
    path: pathBelow(request.url, prefix),
    backend: exchange.backend ?? '',
    backend_url: exchange.backendUrl ?? '',
    attempts: exchange.attempts,
    outcome: exchange.outcome,
    status_code: exchange.statusCode,
    latency_ms: Math.round(exchange.durationMs),
    usage: usage && { prompt_tokens, completion_tokens, total_tokens }
  }
}

export default fp(usagePlugin, { name: 'usage', fastify: '5.x' })
