import { resolve } from 'node:path'
import type { FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import { type Static, Type } from 'typebox'
import { withExchanges } from '../exchange.ts'
import type { Distinct } from '../issues.ts'
import { matchesModel } from '../keys/key.ts'
import {
  checkOptions,
  Duration,
  type Given,
  HeaderName,
  NotBuilt,
  Section,
  Size
} from '../options.ts'
import type { OnDelivery } from '../reporters/courier.ts'
import { FileReporter, FileReporterOptions } from '../reporters/file.ts'
import { type Keeping, Outbox } from '../reporters/outbox.ts'
import type { Sink } from '../reporters/posts.ts'
import { type Price, toRecord, type UsageRecord } from '../reporters/record.ts'
import { type Reporter, recordJson, toEntry } from '../reporters/reporter.ts'
import { Webhook, WebhookOptions } from '../reporters/webhook.ts'

/**
 * Writes down what every exchange that reached a backend has spent, and reports it until it has been taken.
 *
 * @example
 * await fastify.register(usage, {
 *   reporters: [{ name: 'billing', type: 'webhook', webhook: { url: 'http://127.0.0.1:9000/usage' } }]
 * })
 */

const OUTCOMES = ['ok', 'client_gone', 'backend_failed', 'timed_out'] as const

const Names = (description: string) =>
  Type.Array(Type.String({ minLength: 1 }), { default: [], description })

const Filter = Type.Object(
  {
    models: Names('Models, * as a wildcard; none: all'),
    callers: Names('Names or ids of API keys; none: all'),
    outcomes: Type.Array(Type.Enum([...OUTCOMES]), {
      default: [],
      description: 'How exchanges ended; none: all'
    })
  },
  { additionalProperties: false, default: {}, description: 'Which records it gets' }
)
type Filter = Static<typeof Filter>

const ReporterOptions = Type.Object(
  {
    name: Type.Optional(
      Type.String({
        minLength: 1,
        description: 'Name in logs and metrics, and of its place in the outbox'
      })
    ),
    type: Type.Enum(['webhook', 'file'], {
      later: ['database', 'builtin', 'redis'],
      description: 'What it is'
    }),
    enabled: Type.Boolean({ default: true, description: 'Switches it on' }),
    filter: Filter,
    max_age: Duration(
      '7d',
      'How old a record may be that is still tried; then it is a dead letter'
    ),
    webhook: Type.Optional(WebhookOptions),
    file: Type.Optional(FileReporterOptions),
    database: NotBuilt('A database that receives usage records'),
    builtin: NotBuilt('The embedded store'),
    script: NotBuilt('Script that reports')
  },
  {
    additionalProperties: false,
    partOfType: true
  }
)
type ReporterOptions = Static<typeof ReporterOptions>

const Money = (description: string) => Type.Number({ minimum: 0, description })

const PriceOptions = Type.Object(
  {
    model: Type.String({
      minLength: 1,
      description: 'Model, * as a wildcard; the first that fits counts'
    }),
    input: Money('Price of a million tokens of input'),
    output: Money('Price of a million tokens of output'),
    cached: Type.Optional(Money('Price of a million tokens of input that came from a cache')),
    currency: Type.String({ default: 'USD', pattern: '^[A-Z]{3}$', description: 'Currency' })
  },
  { additionalProperties: false }
)

export const UsageOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Reports usage' }),
    durability: Type.Enum(['strict', 'relaxed'], {
      default: 'strict',
      description:
        'strict: the end of an answer waits until its record is on the disk; relaxed: it does not'
    }),
    retention_days: Type.Integer({
      minimum: 1,
      default: 30,
      description: 'How long records stay that every reporter has had'
    }),
    max_size: Size('1GB', 'What all records on the disk may take'),
    tags: Type.Record(Type.String({ pattern: '^[A-Za-z0-9_.-]{1,64}$' }), HeaderName, {
      default: {},
      description: 'Tags of records, and the request headers they are taken from'
    }),
    prices: Type.Array(PriceOptions, { default: [], description: 'What models cost' }),
    reporters: Type.Array(ReporterOptions, {
      default: [],
      distinct: [
        { by: given => (typeof given === 'string' ? undefined : given.name), what: 'name' },
        { by: given => (given as { file?: { path?: unknown } }).file?.path, what: 'file' }
      ] satisfies Distinct[],
      description: 'Who is told'
    })
  },
  'Where the usage of every call goes'
)
export type UsageOptions = Static<typeof UsageOptions>

declare module 'fastify' {
  interface FastifyInstance {
    usage: UsageReports
    /** Where files go; without it nothing outlives the process. */
    dataDir: string | undefined
  }
}

export interface UsageReports {
  /** Records that are known here and not delivered. */
  readonly pending: number
  /** Why records cannot be made safe at the moment. */
  readonly trouble: string | undefined
  readonly onDelivery: OnDelivery[]
  update(options: UsageOptions): Promise<void>
  /** Delivers what is pending until the signal fires. */
  flush(signal: AbortSignal): Promise<void>
}

const DAY = 24 * 60 * 60 * 1000

const usagePlugin: FastifyPluginAsync<Given<UsageOptions>> = async function usage(fastify, given) {
  const { log } = fastify
  const onDelivery: UsageReports['onDelivery'] = []
  const delivered: OnDelivery = (result, records) => {
    for (const listener of onDelivery) listener(result, records)
  }
  let options = checkOptions(UsageOptions, { enabled: true, ...given })
  let rules = toRules(options)
  let outbox: Outbox | undefined
  await update(options)

  async function update(changed: UsageOptions): Promise<void> {
    options = changed
    rules = toRules(changed)
    // Of several processes another one delivers.
    if (fastify.peers !== undefined) return
    const reporters = toReporters(changed, fastify.dataDir)
    if (changed.enabled && reporters.length === 0) log.warn('usage is enabled but has no reporters')
    if (outbox !== undefined) await outbox.update(reporters, toKeeping(changed))
    else if (reporters.length > 0) {
      outbox = new Outbox(usageFile(fastify.dataDir), reporters, toKeeping(changed), log, delivered)
    }
  }

  fastify.decorate('usage', {
    get pending() {
      return outbox?.pending ?? 0
    },
    get trouble() {
      return outbox?.trouble
    },
    onDelivery,
    update,
    async flush(signal) {
      await outbox?.close(signal)
      outbox = undefined
    }
  } satisfies UsageReports)

  const exchanges = withExchanges(fastify)
  fastify.addHook('onRequest', ({ exchange }, _reply, done) => {
    exchange.keepsBody = rules.wantsBody
    done()
  })
  exchanges.onEnd('record', exchange => {
    const sink: Sink | undefined = fastify.peers?.usage ?? outbox
    if (sink === undefined || !rules.isOn || exchange.attempts === 0) return
    const price = rules.price(exchange.request.payload?.model)
    const json = JSON.stringify(toRecord(exchange, fastify.prefix, rules.tags, price))
    const body = rules.wantsBody ? exchange.request.payload?.bytes : undefined
    const recorded = sink.append(toEntry(json, body))
    if (options.durability === 'strict') exchange.recorded = recorded
  })
  fastify.addHook('onClose', () => fastify.usage.flush(AbortSignal.abort()))
}

/** The file of the ledger. */
export function usageFile(dataDir: string | undefined): string {
  return dataDir === undefined ? ':memory:' : resolve(dataDir, 'usage.db')
}

export function toKeeping({ retention_days, max_size }: UsageOptions): Keeping {
  return { keep: retention_days * DAY, max_size }
}

/** What the options say about each record. */
function toRules({ enabled, reporters, tags, prices }: UsageOptions) {
  const isOn = reporters.filter(each => enabled && each.enabled)
  return {
    isOn: isOn.length > 0,
    wantsBody: isOn.some(each => each.webhook?.include_request_body),
    tags: new Map(Object.entries(tags).map(([tag, header]) => [tag, header.toLowerCase()])),
    price(model: string | undefined): Price | undefined {
      return model === undefined
        ? undefined
        : prices.find(each => matchesModel([each.model], model))
    }
  }
}

/** The reporters that are switched on. */
export function toReporters(
  { enabled, reporters }: UsageOptions,
  dataDir: string | undefined
): Reporter[] {
  if (!enabled) return []
  const names = new Set<string>()
  return reporters.filter(each => each.enabled).map(each => toReporter(each, names, dataDir))
}

function toReporter(
  options: ReporterOptions,
  names: Set<string>,
  dataDir: string | undefined
): Reporter {
  const { type, filter, max_age } = options
  let name = options.name ?? type
  for (let count = 2; names.has(name); count++) name = `${type}-${count}`
  names.add(name)
  const receiver =
    type === 'file' ? new FileReporter(options.file!, dataDir) : new Webhook(options.webhook!)
  return {
    name,
    maxAge: max_age,
    wantsBody: receiver.wantsBody,
    concurrency: receiver.concurrency,
    batch: receiver.batch,
    accepts: entry => isWanted(entry, filter),
    send: (entries, signal) => receiver.send(entries, signal),
    close: () => receiver.close()
  }
}

function isWanted(entry: string, { models, callers, outcomes }: Filter): boolean {
  if (models.length + callers.length + outcomes.length === 0) return true
  const record: UsageRecord = JSON.parse(recordJson(entry, false))
  return (
    (models.length === 0 || matchesModel(models, record.model ?? '')) &&
    (callers.length === 0 ||
      callers.some(each => each === record.caller || each === record.api_key_id)) &&
    (outcomes.length === 0 || outcomes.some(each => each === record.outcome))
  )
}

export default fp(usagePlugin, { name: 'usage', fastify: '5.x' })
