import '../check-node.ts'
import { once } from 'node:events'
import { resolve } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import type { FastifyPluginAsync } from 'fastify'
import { type Static, Type } from 'typebox'
import { RECORDS } from '../body-budget.ts'
import { type Exchange, withExchanges } from '../exchange.ts'
import type { Distinct } from '../issues.ts'
import { isTagName } from '../keys/fields.ts'
import { ModelList } from '../model-list.ts'
import { checkOptions, type Given, HeaderName, OptionsError, Section, Size } from '../options.ts'
import { part, share, toPart } from '../parts.ts'
import type { OutboxState } from '../peers.ts'
import { builtinFile, openBuiltin } from '../reporters/builtin.ts'
import type { OnDelivery } from '../reporters/courier.ts'
import { type Keeping, Outbox } from '../reporters/outbox.ts'
import type { Sink } from '../reporters/posts.ts'
import { cost, type Price, type PricedTokens, toRecord } from '../reporters/record.ts'
import { toEntry } from '../reporters/reporter.ts'
import { ReporterOptions, reporterIssues, toReporters } from '../reporters/reporters.ts'
import { readSums, type Sum, type SumQuery } from '../reporters/usage-store.ts'
import type { Sqlite } from '../store/sqlite.ts'
import { StorageOptions } from '../store/storage.ts'

/**
 * Writes down what every exchange that reached a backend has spent, and reports it until it has been taken.
 *
 * @example
 * await fastify.register(usage, {
 *   reporters: [{ name: 'billing', type: 'webhook', webhook: { url: 'http://127.0.0.1:9000/usage' } }]
 * })
 */

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
    cache_write: Type.Optional(
      Money('Price of a million tokens of input that were written to a cache')
    ),
    currency: Type.String({ default: 'USD', pattern: '^[A-Z]{3}$', description: 'Currency' })
  },
  { additionalProperties: false }
)

export const UsageOptions = Section(
  {
    enabled: Type.Boolean({
      default: false,
      description: 'Reports usage; if left out, true where reporters are listed'
    }),
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
    tags: Type.Record(Type.String(), HeaderName, {
      default: {},
      check: (tags: unknown) => Object.keys(tags ?? {}).every(isTagName),
      expects: 'a mapping of names (letters, digits, "_", "." and "-") to headers',
      description: 'Tags of records, and the request headers they are taken from'
    }),
    prices: Type.Array(PriceOptions, { default: [], description: 'What models cost' }),
    unpriced: Type.Enum(['allow', 'refuse'], {
      default: 'allow',
      description:
        'A request for a model without a price while a budget of money applies to it: allow: it is not counted; refuse: 403 model_not_priced. Forms have the price of "*", because their model is not read'
    }),
    reporters: Type.Array(ReporterOptions, {
      default: [],
      distinct: [
        { by: given => (typeof given === 'string' ? undefined : given.name), what: 'name' },
        { by: given => (given as { file?: { path?: unknown } }).file?.path, what: 'file' }
      ] satisfies Distinct[],
      description: 'Who is told'
    })
  },
  'Where the usage of every call goes',
  ['reporters']
)
export type UsageOptions = Static<typeof UsageOptions>

export interface UsageReports extends Readonly<OutboxState> {
  readonly onDelivery: OnDelivery[]
  /** Whether requests without a price are rejected while a budget of money applies. */
  readonly refusesUnpriced: boolean
  update(options: UsageOptions, storage: StorageOptions): Promise<void>
  /**
   * What so many tokens cost in this exchange. Before a backend is chosen it is the highest price of those that may be.
   * undefined: its model has no price.
   */
  cost(exchange: Exchange, tokens: PricedTokens): number | undefined
  /** Whether it has a price wherever it may be served. */
  isPriced(exchange: Exchange): boolean
  /** What was spent; undefined where no reporter of type builtin keeps it in a file. */
  sums(query: SumQuery): Promise<Sum[] | undefined>
  /** Delivers what is pending until the signal fires. */
  flush(signal: AbortSignal): Promise<void>
}

/** Maximum size (bytes) of a request body in a record: it is copied several times, in one turn of the event loop. */
const MAX_BODY = 256 * 1024
/** Time (ms) for pending records when the server closes; a gateway has delivered them before. */
const FLUSH_TIMEOUT = 5_000
const DAY = 24 * 60 * 60 * 1000

/** The options of the plugin; `storage` has what its reporters name. */
export type GivenUsageOptions = Given<UsageOptions> & {
  storage?: Given<StorageOptions>
  /** Directory of records that are not delivered yet; without it, they are kept in memory. */
  dataDir?: string | undefined
}

const usagePlugin: FastifyPluginAsync<GivenUsageOptions> = async function usage(fastify, given) {
  const { log } = fastify
  const { storage: givenStorage, dataDir, ...givenOptions } = given
  const peers = part(fastify, 'peers')
  const onDelivery: UsageReports['onDelivery'] = []
  const delivered: OnDelivery = (result, records) => {
    for (const listener of onDelivery) listener(result, records)
  }
  let options = checkOptions(UsageOptions, { enabled: true, ...givenOptions })
  let rules = await toRules(options)
  let outbox: Outbox | undefined
  /** What a reporter of type builtin writes, for reading. */
  let store: Sqlite | undefined
  let storage = checkOptions(StorageOptions, givenStorage)
  /** Records that wait until their quotas are written. */
  const unwritten = new Set<Promise<void>>()
  const issues = reporterIssues(options, storage)
  if (issues.length > 0) throw new OptionsError(issues)
  await update(options, storage)

  async function update(changed: UsageOptions, changedStorage: StorageOptions): Promise<void> {
    // Deliveries that are under way would be made once more.
    const isSame = isDeepStrictEqual([changed, changedStorage], [options, storage])
    rules = await toRules(changed)
    options = changed
    storage = changedStorage
    // Of several processes another one delivers.
    if (peers !== undefined || (isSame && outbox !== undefined)) return
    const reporters = await toReporters(changed, { storage, dataDir, log })
    if (changed.enabled && reporters.length === 0) log.warn('usage is enabled but has no reporters')
    if (outbox !== undefined) await outbox.update(reporters, toKeeping(changed))
    else if (reporters.length > 0) {
      outbox = new Outbox(usageFile(dataDir), reporters, toKeeping(changed), log, delivered)
      await outbox.open()
    }
  }

  const state = (): OutboxState => peers?.outbox ?? outbox ?? { pending: 0, trouble: undefined }

  share(fastify, 'usage', {
    get pending() {
      return state().pending
    },
    get trouble() {
      return state().trouble
    },
    get refusesUnpriced() {
      return options.unpriced === 'refuse'
    },
    onDelivery,
    update,
    cost(exchange, tokens) {
      const costs = pricesOf(exchange).flatMap(price => (price ? [cost(price, tokens)] : []))
      return costs.length === 0 ? undefined : Math.max(...costs)
    },
    isPriced: exchange => pricesOf(exchange).every(price => price !== undefined),
    async sums(query) {
      if (!rules.isSummed || dataDir === undefined) return undefined
      store ??= openBuiltin(builtinFile(dataDir), log)
      return readSums(store, query)
    },
    async flush(signal) {
      const isAborted = signal.aborted || once(signal, 'abort')
      await Promise.race([Promise.all(unwritten), isAborted])
      await outbox?.close(signal)
      outbox = undefined
    }
  } satisfies UsageReports)

  function keepUntil(recorded: Promise<void>): void {
    unwritten.add(recorded)
    void recorded.then(() => unwritten.delete(recorded))
  }

  const exchanges = withExchanges(fastify)
  fastify.addHook('onRequest', ({ exchange }, _reply, done) => {
    exchange.recordsBody = rules.wantsBody
    done()
  })
  fastify.addHook('preHandler', ({ exchange, payload }, _reply, done) => {
    const size = payload?.bytes.length ?? 0
    if (exchange.recordsBody && size > MAX_BODY) {
      exchange.recordsBody = false
      exchange.omittedBody = size
    }
    done()
  })
  /** The price at the backend that served the exchange. Before that: those at each backend that may, the likely one first. */
  function pricesOf(exchange: Exchange): (Price | undefined)[] {
    if (!rules.hasPrices) return [undefined]
    const { served, model } = exchange
    const candidates = served
      ? [served]
      : (part(fastify, 'backends')?.pool.candidates(exchange) ?? [])
    if (candidates.length === 0) return [rules.price(model)]
    return candidates.map(each => rules.price(each.upstream, each.model))
  }

  /** A body in a record counts with all others until the record is written down. */
  function holdBody(exchange: Exchange, body: Buffer): Buffer | undefined {
    try {
      exchanges.bodies.take(RECORDS, body.length, 0)
      return body
    } catch {
      exchange.omittedBody = body.length
      return undefined
    }
  }

  exchanges.onEnd('record', exchange => {
    const sink: Sink | undefined = peers?.usage ?? outbox
    if (sink === undefined || !rules.isOn) return
    const { settlement, usage, attempts } = exchange
    if (settlement === undefined ? attempts === 0 : usage === undefined) return
    const [price] = pricesOf(exchange)
    // One that began under another configuration may have let its body go.
    const given =
      rules.wantsBody && exchange.recordsBody ? exchange.request.payload?.bytes : undefined
    const body = given && holdBody(exchange, given)
    const json = JSON.stringify(toRecord(exchange, fastify.prefix, rules.tags, price))
    const entry = toEntry(json, body)
    const recorded = exchange.booked?.then(() => sink.append(entry)) ?? sink.append(entry)
    if (body !== undefined) void recorded.then(() => exchanges.bodies.give(RECORDS, body.length))
    if (exchange.booked !== undefined) keepUntil(recorded)
    exchange.recorded = options.durability === 'strict' ? recorded : undefined
  })
  fastify.addHook('onClose', async () => {
    await part(fastify, 'usage')!.flush(AbortSignal.timeout(FLUSH_TIMEOUT))
    await store?.close()
  })
}

/** The file of the ledger. */
export function usageFile(dataDir: string | undefined): string {
  return dataDir === undefined ? ':memory:' : resolve(dataDir, 'usage.db')
}

export function toKeeping({ retention_days, max_size }: UsageOptions): Keeping {
  return { keep: retention_days * DAY, max_size }
}

function* pricesByModel(prices: readonly Price[]): Generator<[string, Price]> {
  for (const price of prices) yield [price.model, price]
}

/** What the options say about each record. */
async function toRules({ enabled, reporters, tags, prices }: UsageOptions) {
  const isOn = reporters.filter(each => enabled && each.enabled)
  const priceOf = await ModelList.of(pricesByModel(prices))
  return {
    isOn: isOn.length > 0,
    hasPrices: prices.length > 0,
    isSummed: isOn.some(each => each.type === 'builtin'),
    wantsBody: isOn.some(each => each.webhook?.include_request_body),
    tags: new Map(Object.entries(tags).map(([tag, header]) => [tag, header.toLowerCase()])),
    /** The first that fits one of the names that a model has, with callers and at its backend. */
    price(...names: (string | undefined)[]): Price | undefined {
      const given = names.filter(name => name !== undefined)
      // A request that names no model gets the price of "*".
      return given.length > 0 ? priceOf.find(...given) : priceOf.find('')
    }
  }
}

export default toPart(usagePlugin, {
  name: 'usage',
  decorates: ['usage']
})
