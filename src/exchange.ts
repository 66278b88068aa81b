import { randomUUID } from 'node:crypto'
import type { FastifyBaseLogger, FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { addressOf, networkOf } from './address.ts'
import { BodyBudget } from './body-budget.ts'
import type { Dialect } from './dialects/dialect.ts'
import { openai } from './dialects/openai.ts'
import type { PromptForm } from './dialects/prompt.ts'
import { type GatewayError, toGatewayError } from './errors.ts'
import type { Framing } from './http.ts'
import { matchesModel } from './keys/key.ts'
import type { OwnLimits } from './limits/limits.ts'
import type { Account, Lease, LimitStore } from './limits/store.ts'
import type { Upload } from './limits/uploads.ts'
import type { UnbilledResponse } from './metering/billed.ts'
import type { Meter } from './metering/meter.ts'
import type { PromptText } from './metering/prompt.ts'
import { part, share } from './parts.ts'
import type { UsageField } from './payload-edits.ts'
import type { Wanted } from './pool/lineup.ts'
import { type Prefixes, prefixesOf } from './pool/prefixes.ts'
import type { Priority } from './pool/queue.ts'
import type { Affinity } from './pool/strategies.ts'
import { type Settlement, Settlements } from './settlement.ts'
import { Turns } from './turns.ts'
import { free } from './wire/gathered.ts'

/**
 * A request and its answer. It begins in `onRequest` and ends exactly once, when the response
 * closes, however that comes: finished, refused, cut by the client, cut by the backend. Whatever
 * must be given back or written down hangs on that one moment, never on Fastify's `onResponse` or
 * `onError`, which do not run when a client leaves.
 */

/**
 * What the finishers do, in this order: when the backend has said all, or the exchange ends before; and
 * when it ends.
 */
const RECORDING = ['budget', 'record'] as const
const ENDING = ['settle', 'slot', 'metrics', 'log'] as const
export type Stage = 'metering' | (typeof RECORDING)[number] | (typeof ENDING)[number]
type Finisher = (exchange: Exchange) => void

export type Outcome = 'ok' | 'client_gone' | 'backend_failed' | 'timed_out' | 'rejected'

/**
 * The tokens of one exchange. `exact`: the backend said so; `counted`: what passed of an answer that was cut;
 * `at_least`: the same, where the backend may have spent tokens that do not pass; `estimated`: from a whole answer
 * without usage.
 */
export interface Usage {
  promptTokens: number
  completionTokens: number
  totalTokens: number
  /** Tokens of the prompt that were read from a cache. */
  cachedTokens?: number
  /** Tokens of the prompt that were written to a cache. */
  cacheWriteTokens?: number
  reasoningTokens?: number
  exactness: 'exact' | 'counted' | 'at_least' | 'estimated'
}

/** The owner of an API key. */
export interface Caller {
  /** Stable and safe to show: never the key. Limits and bills hang on it. */
  id: string
  name?: string | undefined
  userId?: string | undefined
  /** Model names (`*` stands for any text) this caller may use; absent: all. */
  models?: string[] | undefined
  /** Limits of its own. */
  limits?: OwnLimits | undefined
  /** What of its quota was spent before the gateway began to count, and when (Unix ms). */
  spent?: { amount: number; at: number | undefined } | undefined
  /** Tags of its usage records. */
  tags?: Record<string, string> | undefined
  /** Whether its calls wait behind those of others; absent: they don't. */
  priority?: Priority | undefined
  /** It may know which backends were there for its calls, and why one was chosen; absent: it may not. */
  trace?: boolean | undefined
}

/** One route that is forwarded to the backends. */
export interface Endpoint {
  method: 'GET' | 'POST' | 'DELETE'
  /** The route's pattern, as it stands in metrics and logs. */
  url: string
  /** Stands before the client's path at the backend, for routes that leave `/v1` out. */
  upstreamPrefix?: string
  dialect: Dialect
  /** `json`: exactly one JSON object, kept as bytes; `stream`: passed through unread. */
  body: 'none' | 'json' | 'stream'
  /** The backend can be asked for usage with `stream_options.include_usage`. */
  asksForUsage?: boolean
  /**
   * What tokens are for, where the backend does not report how many: `input` is only read. Absent: they cannot be
   * estimated, and what a backend reports counts.
   */
  spends?: 'input' | 'input and output'
  /** It counts or describes something, and runs no model: reported usage counts nothing. */
  isFree?: boolean
  /** How the model gets the request, where that differs from the dialect. */
  prompt?: PromptForm
  /** Fields that limit the generated tokens in this API; `num_predict` stands in Ollama's `options`. */
  limitedBy?: readonly string[]
  /** Ollama's native routes stream unless told not to. */
  streamsByDefault?: boolean
  /** Where the ids of stored responses stand, which bind later calls to the same backend. */
  makesResponses?: boolean
  /** Its response is a stored one: with its usage, once that is known. */
  showsResponse?: boolean
  /**
   * Limits that may reject it, where those are not all: what a stored response spends is reserved already, and a caller
   * without a budget must be able to stop it.
   */
  rejectedBy?: 'rates' | 'nothing'
}

/** What runs for an exchange and must stop with it. */
export interface Work {
  /** The response has closed: stops everything at once. */
  stop(): void
  /** Ends the answer before its time, honestly. */
  interrupt(error: GatewayError): void
}

const NOTHING = Buffer.alloc(0)
/** Of a text whose tokens nobody has estimated. */
export const BYTES_PER_TOKEN = 4

export class Exchange {
  readonly id = newRequestId()
  readonly request: FastifyRequest
  readonly reply: FastifyReply
  readonly endpoint: Endpoint | undefined
  /** The client's address, read immediately: a closed socket has none. */
  readonly clientIp: string
  /** Wall clock (Unix ms) and monotonic clock (ms) at the beginning. */
  readonly time = Date.now()
  readonly startedAt = performance.now()
  firstTokenAt = 0
  endedAt = 0
  lastTokenAt = 0
  attempts = 0
  /** See {@link Wanted.begun}. */
  begun: Wanted['begun']
  /** How often another backend went on with its answer; more than one has written some of its text. */
  continuations = 0
  isDivided = false
  /** How long (ms) it has waited for a backend that has room. */
  queuedMs = 0
  /** Name and base URL of the backend of the latest attempt. */
  backend: string | undefined
  backendUrl: string | undefined
  /** The model of the latest attempt: as callers call it, and as its backend does. */
  served: { model: string | undefined; upstream: string | undefined } | undefined
  outcome: Outcome = 'ok'
  /** Code of the error the gateway answered with, or ended the stream with. */
  errorCode: string | undefined
  usage: Usage | undefined
  /** Tokens that backends reported in error responses. Its caller does not pay for them. */
  failed: { input: number; output: number } | undefined
  /** How a streaming response must be asked for usage, and how the backend that responds was. */
  question: { wanted: readonly UsageField[]; asked: readonly UsageField[] } | undefined
  /** The backend this exchange must go to (name), because it holds the state the call is about. */
  pinned: string | undefined
  /** The model of that state, where the call does not name one. */
  heldModel: string | undefined
  /** Wants to know the `id` that the backend gives its answer, as soon as it is seen. */
  onAnswerId: ((id: string) => void) | undefined
  /** The stored response that it makes, or shows while not all of its usage is billed. */
  stored: UnbilledResponse | undefined
  /** The gateway itself makes this request. */
  settlement: Settlement | undefined
  /** Resolves when it is known what is billed, where that is not known at once. */
  settling: Promise<void> | undefined
  /** What the plugins hold for it until it ends. */
  meter: Meter | undefined
  /** The caller for which the accounts were made, and these accounts. */
  limited: { caller: Caller | undefined; accounts: readonly Account[] } | undefined
  /** Has slots until its body is read. */
  upload: Upload | undefined
  reservation: { store: LimitStore; lease: Lease } | undefined
  /** Resolves when a crash cannot give back what it spent of a quota; absent: there is none. */
  booked: Promise<void> | undefined
  /** Whether its usage record and its row in the request log have the request body: it is kept until then. */
  recordsBody = false
  logsBody = false
  /** Size (bytes) of the request body, where its record has to do without it. */
  omittedBody: number | undefined
  /** A backend has the request, or some of it, and nothing came of it yet. */
  isWaiting = false
  /** Its client got a head, and heartbeats, before there was an answer. */
  hadHeartbeat = false
  /** The text of the request, where its tokens may have to be estimated. */
  prompt: PromptText | undefined
  /** Tokens of the prompt, estimated; 0: not known. */
  promptEstimate = 0
  /** See {@link Call.affinity}. */
  affinity: Affinity | undefined
  /** What it has spent is known, and given to the reporters. */
  concluded = false
  /** Resolves when that is safe, where the end of the answer must wait for it. */
  recorded: Promise<void> | undefined
  closed = false
  /** Where it stands among the open ones. */
  place = 0
  /** What is under way for it. */
  work: Work | undefined

  readonly #exchanges: Exchanges
  #prefixes: Prefixes | undefined
  /** Bytes of its body that count in the budget of all bodies, and for whom. */
  #held = 0
  #heldFor: string | undefined

  constructor(request: FastifyRequest, reply: FastifyReply, exchanges: Exchanges) {
    this.#exchanges = exchanges
    this.request = request
    this.reply = reply
    this.endpoint = request.routeOptions.config.endpoint
    this.clientIp = addressOf(request)
  }

  /** The caller's id, or the client's network if no caller is known. No id of a caller begins with a line end. */
  get client(): string {
    return this.request.caller?.id ?? `\n${networkOf(this.clientIp)}`
  }

  /** The model that is asked for, as the client names it. */
  get model(): string | undefined {
    return this.request.payload?.model ?? this.heldModel
  }

  get isStream(): boolean {
    return this.request.payload?.stream ?? false
  }

  /** The framing of the response that is asked for; undefined: no JSON, or that is not known. */
  get asked(): Framing | undefined {
    const { endpoint, request } = this
    if (endpoint === undefined || request.payload === undefined) return undefined
    if (!request.payload.stream) return 'json'
    return endpoint.dialect.streamsEvents ? 'sse' : 'ndjson'
  }

  /** Tokens of the prompt, about. */
  get promptTokens(): number {
    return this.promptEstimate || (this.request.payload?.bytes.length ?? 0) / BYTES_PER_TOKEN
  }

  /** Where an answer is written; what one caller has asked says nothing to another. */
  get prefixes(): Prefixes | undefined {
    const { payload, caller } = this.request
    if (payload === undefined || this.endpoint?.spends !== 'input and output') return undefined
    this.#prefixes ??= prefixesOf(payload.bytes, `${payload.model}\0${caller?.id ?? ''}`)
    return this.#prefixes
  }

  /** Does its client expect a stream in which comments can stand? */
  get takesComments(): boolean {
    const { endpoint, request } = this
    const isStream = request.payload?.stream === true && endpoint?.spends === 'input and output'
    return isStream && endpoint.dialect.streamsEvents
  }

  /**
   * Does its first byte say how long it waits, and does a backend that is stopped leave nothing behind? A whole
   * answer begins when it is complete, and responses are stored.
   */
  get canBeHedged(): boolean {
    const { endpoint, request } = this
    if (endpoint?.spends === 'input') return true
    const writes = endpoint?.spends === 'input and output' && !endpoint.makesResponses
    return writes && request.payload?.stream === true
  }

  /** Where calls must wait; a header can only make less of it. */
  get priority(): Priority {
    const { caller, headers } = this.request
    const isBatch = caller?.priority === 'batch' || headers['x-llmproxy-priority'] === 'batch'
    return isBatch ? 'batch' : 'interactive'
  }

  /** Its caller asks how its backend was chosen, and may know it. */
  get isTraced(): boolean {
    const { caller, headers } = this.request
    return headers['x-llmproxy-trace'] === '1' && caller?.trace === true
  }

  /** May its caller use this model? */
  mayUse(model: string): boolean {
    const models = this.request.caller?.models
    return models === undefined || matchesModel(models, model)
  }

  /** Ends it honestly now: with an error, or an error event and a broken connection. */
  interrupt(error: GatewayError, outcome: Outcome = 'timed_out'): void {
    this.fail(outcome, error)
    if (this.work === undefined) this.reply.raw.destroy()
    else this.work.interrupt(error)
  }

  /** The status the client gets; 499 when it left before there was one (nginx's number), 503 when it was cut. */
  get statusCode(): number {
    if (this.reply.raw.headersSent || !this.closed) return this.reply.statusCode
    return this.outcome === 'client_gone' ? 499 : 503
  }

  get dialect(): Dialect {
    return this.endpoint?.dialect ?? openai
  }

  /** The last events of a stream that breaks, and whether they end it. */
  lastWords(error: GatewayError): { events: string; isEnd: boolean } {
    const { dialect, id: requestId, meter, model } = this
    const position = { requestId, responseId: meter?.id, model, sequence: meter?.sequence ?? 0 }
    return { events: dialect.errorEvents(error, position), isEnd: dialect.endsWithError }
  }

  get durationMs(): number {
    return (this.endedAt || performance.now()) - this.startedAt
  }

  /** Time to first token in ms; undefined when there was none. */
  get ttftMs(): number | undefined {
    return this.firstTokenAt === 0 ? undefined : this.firstTokenAt - this.startedAt
  }

  /** Writes down that the exchange failed; the first reason stays. */
  fail(outcome: Outcome, error: GatewayError): void {
    if (this.outcome !== 'ok' || this.concluded) return
    this.outcome = outcome
    this.errorCode = error.code
  }

  /** The gateway answers with an error of its own; without an attempt that is a refusal. */
  answeredWith(error: GatewayError): void {
    this.errorCode ??= error.code
    if (this.attempts === 0) this.outcome = 'rejected'
  }

  /**
   * Counts bytes of its body that are kept.
   *
   * @throws {GatewayError} `overloaded` where all bodies together, or those of its caller, would be too large
   */
  hold(bytes: number): void {
    this.#heldFor ??= this.client
    this.#exchanges.bodies.take(this.#heldFor, bytes, this.#held)
    this.#held += bytes
  }

  /** Drops a body that will not be sent again; with `isSent` nothing refers to it any more. */
  forgetBody(isSent = false): void {
    const { payload } = this.request
    if (this.recordsBody || this.logsBody) return
    if (payload === undefined || payload.bytes === NOTHING) return
    this.request.body = undefined
    if (isSent) free(payload.bytes)
    payload.bytes = NOTHING
    payload.members = []
    this.#prefixes = undefined
    this.#release()
  }

  #release(): void {
    if (this.#heldFor !== undefined) this.#exchanges.bodies.give(this.#heldFor, this.#held)
    this.#held = 0
  }

  /**
   * All that a backend will say has been said, or nothing more will be heard: what was spent is written
   * down. Returns what the last bytes of the answer must wait for.
   */
  conclude(): Promise<void> | undefined {
    if (!this.concluded) {
      this.concluded = true
      if (this.outcome === 'ok') {
        if (this.closed && !this.reply.raw.writableEnded) this.outcome = 'client_gone'
        else if (this.attempts > 0 && this.statusCode >= 500) this.outcome = 'backend_failed'
      }
      this.#exchanges.write(this)
    }
    return this.recorded
  }

  /** The response is closed: stops what runs. Returns false when that was done before. */
  close(): boolean {
    if (this.closed) return false
    this.closed = true
    this.endedAt = performance.now()
    this.conclude()
    this.work?.stop()
    this.#release()
    return true
  }
}

/** All open exchanges, and what is done at their end. */
export class Exchanges {
  /**
   * Not a Set: of a Set that changes all the time V8 leaves old hash tables behind, each of which
   * holds the next one and with it every exchange in between, until the next full collection.
   */
  readonly open: Exchange[] = []
  /** The request bodies that are kept at the moment. */
  readonly bodies = new BodyBudget()
  readonly settlements = new Settlements()
  /** How many of forwarded routes have begun since the start. */
  forwarded = 0
  readonly turns: Turns
  /** What is told of requests that were refused before they could become an exchange. */
  readonly onStillborn: ((error: GatewayError, id: string, clientIp?: string) => void)[] = []
  readonly #finishers = new Map<Stage, Finisher[]>()
  readonly #log: FastifyBaseLogger
  #metering: Finisher[] = []
  #recording: Finisher[] = []
  #ending: Finisher[] = []
  #whenEmpty: (() => void) | undefined

  constructor(log: FastifyBaseLogger) {
    this.#log = log
    this.turns = new Turns(log)
  }

  /** Adds a finisher. It runs once for every exchange and must not throw or wait. */
  onEnd(stage: Stage, finisher: Finisher): void {
    const ofStage = this.#finishers.get(stage) ?? []
    ofStage.push(finisher)
    this.#finishers.set(stage, ofStage)
    this.#metering = this.#finishers.get('metering') ?? []
    this.#recording = RECORDING.flatMap(each => this.#finishers.get(each) ?? [])
    this.#ending = ENDING.flatMap(each => this.#finishers.get(each) ?? [])
  }

  begin(request: FastifyRequest, reply: FastifyReply): Exchange {
    const exchange = new Exchange(request, reply, this)
    exchange.place = this.open.push(exchange) - 1
    if (exchange.endpoint !== undefined) this.forwarded++
    exchange.settlement = this.settlements.of(request.headers)
    if (exchange.settlement !== undefined) exchange.settlement.exchange = exchange
    reply.raw.once('close', () => this.#end(exchange))
    return exchange
  }

  /**
   * A request that cannot even be routed is refused: it is logged and counted as others are.
   * Returns its id, for the answer.
   */
  stillborn(error: GatewayError, clientIp?: string): string {
    const requestId = newRequestId()
    const { statusCode: status, code } = error
    this.#log.info({ requestId, status, outcome: 'rejected', error: code }, 'exchange')
    for (const listener of this.onStillborn) listener(error, requestId, clientIp)
    return requestId
  }

  /** Resolves when no exchange is open. */
  async drained(): Promise<void> {
    if (this.open.length === 0) return
    await new Promise<void>(resolve => {
      this.#whenEmpty = resolve
    })
  }

  /** Writes down what an exchange has spent; see {@link Exchange.conclude}. */
  write(exchange: Exchange): void {
    this.#run(this.#metering, exchange)
    if (exchange.settling === undefined) return this.#run(this.#recording, exchange)
    exchange.recorded = exchange.settling.then(() => {
      exchange.recorded = undefined
      this.#run(this.#recording, exchange)
      return exchange.recorded
    })
  }

  #run(finishers: readonly Finisher[], exchange: Exchange): void {
    for (const finish of finishers) {
      try {
        finish(exchange)
      } catch (error) {
        this.#log.error({ err: error, requestId: exchange.id }, 'a finisher failed')
      }
    }
  }

  #end(exchange: Exchange): void {
    if (!exchange.close()) return
    if (exchange.settling === undefined) this.#settle(exchange)
    else void exchange.settling.then(() => this.#settle(exchange))
  }

  #settle(exchange: Exchange): void {
    this.#run(this.#ending, exchange)
    const last = this.open.pop()!
    if (last !== exchange) {
      this.open[exchange.place] = last
      last.place = exchange.place
    }
    if (this.open.length === 0) this.#whenEmpty?.()
  }
}

/**
 * Gives every request of this scope an exchange. Plugins that need one call this first; only the
 * first call in a scope does anything.
 */
export function withExchanges(fastify: FastifyInstance): Exchanges {
  const known = part(fastify, 'exchanges')
  if (known !== undefined) return known
  const exchanges = new Exchanges(fastify.log)
  share(fastify, 'exchanges', exchanges)
  if (!fastify.hasRequestDecorator('exchange')) {
    fastify.decorateRequest('exchange', null as unknown as Exchange)
  }
  fastify.addHook('onRequest', (request, reply, done) => {
    const begin = () => {
      request.exchange = exchanges.begin(request, reply)
      reply.header('x-llmproxy-request-id', request.exchange.id)
      done()
    }
    // A response has no socket while another one is written to its connection.
    if (reply.raw.socket === null) exchanges.turns.wait(request, reply, begin)
    else begin()
  })
  fastify.addHook('onError', (request, _reply, error, done) => {
    request.exchange.answeredWith(toGatewayError(error))
    done()
  })
  return exchanges
}

/**
 * `req_` and 32 hexadecimal digits that begin with the time (a UUIDv7, RFC 9562), so that ids sort
 * by age.
 */
function newRequestId(now = Date.now()): string {
  // A random UUID has the same variant bits at the same place, and its randomness is drawn in stock.
  const random = randomUUID()
  const time = now.toString(16).padStart(12, '0')
  return `req_${time}7${random.slice(15, 18)}${random.slice(19, 23)}${random.slice(24)}`
}
