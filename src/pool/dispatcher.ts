import { Readable } from 'node:stream'
import type { FastifyBaseLogger } from 'fastify'
import type { Dispatcher } from 'undici'
import type { Dialect } from '../dialects/dialect.ts'
import { GatewayError, reasonOf } from '../errors.ts'
import { BYTES_PER_TOKEN, type Exchange, type Work } from '../exchange.ts'
import { type Framing, parseRetryAfter } from '../http.ts'
import { usageOfFailure } from '../metering/event.ts'
import { LONGEST } from '../options.ts'
import type { Payload } from '../payload.ts'
import {
  askForUsage,
  type Change,
  changed,
  FINAL_USAGE,
  NO_USAGE,
  nameModel,
  saltCache,
  type UsageField
} from '../payload-edits.ts'
import { inPieces, Pieces } from '../wire/edits.ts'
import type { Answer } from './answer.ts'
import { AsEvent } from './as-event.ts'
import type { Share } from './attained.ts'
import {
  Attempt,
  type AttemptOwner,
  type AttemptResult,
  type Head,
  type Headers,
  type Progress
} from './attempt.ts'
import type { Backend } from './backend.ts'
import { Continuation, type Continuer, changesForRest, openEnd, type Sink } from './continuation.ts'
import { Choice, type Decision } from './decisions.ts'
import { isLocal, isOurs, withoutAnswer } from './failures.ts'
import { complaintOf, Heartbeat, isEventStream, type Patient } from './heartbeat.ts'
import { type Candidate, type FailureKind, isAmong, type Lineup } from './lineup.ts'
import { TotalTimeoutError } from './patience.ts'
import type { Pool } from './pool.ts'
import type { Priority, Waiter } from './queue.ts'
import { Race, type Racer } from './race.ts'
import type { Refusal } from './refusal.ts'
import { Retries } from './retries.ts'

/** The exchange a request belongs to, as a property of its headers: reply-from hands it through. */
export const EXCHANGE = Symbol('exchange')

type Options = Dispatcher.DispatchOptions & { headers: Headers & { [EXCHANGE]?: Exchange } }
type Done = (error: null, answer: Head & { body: Answer }) => void
type Call = { options: Options; done: Done }

/** Whom calls are delivered for. */
interface Front {
  /** How long (ms) the client of a stream hears nothing before a heartbeat; 0: for ever. */
  heartbeat(): number
  attempted(backend: string, result: AttemptResult): void
  /** A backend answers whose client has a head already: its answer may be changed before it goes on. */
  answers(exchange: Exchange, answer: Answer): void
  /** Estimated tokens of a prompt, and of what has passed of its response; 0: they are not counted. */
  asked(exchange: Exchange): number
  passed(exchange: Exchange): number
}

/** After this time (ms) a 500 is not repeated: the backend may have generated all that while. */
const LONG_MS = 10_000

/** How long (ms) the rest of an error answer may take once it is certain that it is the client's. */
const REFUSAL_TIMEOUT = 1_000

/**
 * What @fastify/reply-from takes as its `undici` option: it sends a request to a backend of the
 * pool, and to another one as long as the client has not had a byte of an answer, and calls back
 * once, with the answer that is the client's.
 */
export function createDispatcher(pool: Pool, log: FastifyBaseLogger, front: Front) {
  return {
    request: (options: Options, done: Done) =>
      new Delivery(pool, log, front, options, done).start(),
    close: () => {},
    destroy: () => {}
  }
}

/** One request and all its attempts. */
class Delivery implements AttemptOwner, Racer, Waiter, Work, Patient, Continuer {
  readonly #pool: Pool
  /** The configuration it began with. */
  #lineup: Lineup
  readonly #log: FastifyBaseLogger
  readonly #front: Front
  /** What is to be sent, and who gets the answer; until it is theirs. */
  #call: Call | undefined
  readonly #exchange: Exchange
  deadline: number
  readonly #retries: Retries
  /** It counts among its caller's calls, and since it was given to a backend as this much. */
  #isCounted = false
  #share: Share | undefined
  /** Since when it waits: as if all its waiting had been at a stretch, and really. */
  since = 0
  #queuedAt = 0
  /** For which backends it waits, and what is kept meanwhile. */
  lane = ''
  bytes = 0
  readonly #race: Race
  readonly #decision: Decision
  /** The latest one. */
  #choice = new Choice()
  /** The one whose answer is the client's. */
  #delivered: Attempt | undefined
  #timer: NodeJS.Timeout | undefined
  #hasRepeated = false
  /** Fields for usage that a backend did not accept. */
  #withdrawn: readonly UsageField[] = []
  /** Attempts that ended with a 500, while it is not known whether the request is at fault. */
  #suspects: { attempt: Attempt; text: string }[] = []
  /** The latest error answer of a backend; it is the client's when nothing better comes. */
  #refusal: Refusal | undefined
  #answer: Answer | undefined
  #heartbeat: Heartbeat | undefined
  /** Others may go on with the answer; how it broke off, when they have to. */
  #continuation: Continuation | undefined
  #gap: { outcome: Exchange['outcome']; error: GatewayError } | undefined

  constructor(pool: Pool, log: FastifyBaseLogger, front: Front, options: Options, done: Done) {
    this.#pool = pool
    this.#lineup = pool.enter()
    this.#log = log
    this.#front = front
    this.#call = { options, done }
    this.#exchange = options.headers[EXCHANGE]!
    this.#retries = new Retries(pool.retryBudget)
    const { id, model } = this.#exchange
    this.#decision = pool.decisions.begin(id, model, this.#lineup.strategy)
    const isHedged = this.#lineup.hedges && this.#exchange.canBeHedged
    this.#race = new Race(this, isHedged ? pool.hedges : undefined)
    this.deadline = this.#exchange.startedAt + patienceOf(options.headers)
  }

  start(): void {
    if (this.#exchange.closed) return this.#pool.leave(this.#lineup)
    this.#exchange.work = this
    this.#pool.retryBudget.earn()
    if (this.#lineup.isBounded) {
      this.#isCounted = true
      this.#pool.queue.attained.enter(this.caller, performance.now())
    }
    this.#beat()
    this.#next()
  }

  stop(): void {
    this.#cancel()
    this.#learn()
    if (this.#choice.outcome === 'queued') this.#settleQueued(this.#exchange.outcome)
    this.#race.end()
    if (this.#isCounted) {
      const { attained } = this.#pool.queue
      const now = performance.now()
      if (this.#share) attained.end(this.caller, this.#share, this.#exchange.usage, now)
      attained.leave(this.caller)
    }
    this.#pool.leave(this.#lineup)
  }

  interrupt(error: GatewayError): void {
    this.#cancel()
    this.#tell(error)
  }

  get position(): number | undefined {
    const { queue } = this.#pool
    return queue.has(this) ? queue.position(this, performance.now()) : undefined
  }

  /** Half of the time that the client waits for a head (monotonic, ms). */
  get headDeadline(): number {
    return (this.#exchange.startedAt + this.deadline) / 2
  }

  open(head: Head, answer: Answer): void {
    this.#exchange.hadHeartbeat = true
    this.deadline = Number.POSITIVE_INFINITY
    this.#answer = answer
    this.#showTrace()
    this.#call!.done(null, { ...head, body: answer })
  }

  sent(): void {
    this.#exchange.isWaiting = true
  }

  deliver(attempt: Attempt, head: Head, answer: Answer): Sink {
    if (this.#gap !== undefined) return this.#goOn(attempt, head, answer)
    const losers = this.#race.win(attempt, head.statusCode < 300)
    if (losers.length > 0) this.#retries.forgive(losers.map(each => each.candidate))
    this.#attribute(attempt)
    this.#condemn()
    this.deadline = Number.POSITIVE_INFINITY
    this.#delivered = attempt
    if (!this.#isContinuable(attempt, head, answer)) return this.#handOver(head, answer)
    this.#exchange.begun = { model: attempt.candidate.model }
    const call = this.#call
    const early = answer.takeBack()
    this.#continuation = new Continuation(this, this.#answer ?? answer)
    this.#handOver(head, answer, call)
    for (const chunk of early) this.#continuation.data(chunk)
    return this.#continuation
  }

  refused(attempt: Attempt, kind: FailureKind, refusal: Refusal): boolean {
    const { statusCode, headers } = refusal.head
    this.#retries.rest(attempt.backend, parseRetryAfter(headers['retry-after']))
    if (statusCode === 500) {
      if (this.#isAgreed(attempt, refusal)) return false
      this.#suspects.push({ attempt, text: refusal.text })
    }
    const goesOn = this.#race.goesOnWithout(attempt)
    // The backend has worked on it for long, and another one would again.
    const isLong = statusCode === 500 && attempt.age > LONG_MS
    const wait = goesOn ? 0 : isLong ? undefined : this.#plan(kind, true)
    if (wait === undefined && this.#gap === undefined) {
      this.#condemn()
      return false
    }
    const why = statusCode < 300 ? 'an error as its first event' : `status ${statusCode}`
    this.#logFailure(attempt, kind, why)
    if (wait === undefined) {
      this.#giveUp(this.#gap!.error, this.#gap!.outcome)
      return true
    }
    this.#refusal = refusal
    if (!goesOn) this.#retry(wait)
    return true
  }

  read({ text }: Refusal): void {
    const exchange = this.#exchange
    const usage = usageOfFailure(text, exchange.dialect)
    if (usage === undefined) return
    const { input, output } = exchange.failed ?? { input: 0, output: 0 }
    exchange.failed = { input: input + usage.promptTokens, output: output + usage.completionTokens }
  }

  /**
   * Whether another backend gave the same 500: then the request is at fault, and none of them. Backends to fall back on
   * may have another model, and are tried nevertheless.
   */
  #isAgreed({ backend, candidate: { tier } }: Attempt, { text }: Refusal): boolean {
    const { tried } = this.#retries
    const hasFallback = this.#lineup
      .candidates(this.#exchange)
      .some(each => each.tier !== tier && !isAmong(tried, each))
    if (hasFallback || text === '') return false
    const isSame = this.#suspects.some(
      each => each.attempt.backend !== backend && each.text === text
    )
    if (isSame) this.#suspects = []
    return isSame
  }

  /** Backends are at fault for their 500s, because no other has given the same. */
  #condemn(): void {
    for (const { attempt } of this.#suspects) attempt.condemn()
    this.#suspects = []
  }

  failed(attempt: Attempt, kind: FailureKind, error: Error, progress: Progress): void {
    // The client's body broke off, or went on for too long: a backend has had some of it.
    if (error instanceof GatewayError) {
      this.#cancel()
      return this.#giveUp(error, error.code === 'backend_timeout' ? 'timed_out' : 'client_gone')
    }
    // A server may close an idle connection just as it is used again; that is nobody's fault.
    if (progress.isStale && !this.#hasRepeated && this.#canResend()) {
      this.#hasRepeated = true
      return this.#repeat(attempt, true)
    }
    const isOwn = isLocal(error)
    this.#logFailure(attempt, isOwn ? 'local_failure' : kind, reasonOf(error))
    if (this.#race.goesOnWithout(attempt)) return
    const wait = isOurs(error) ? undefined : this.#plan(kind, progress.isSent)
    if (wait !== undefined) return this.#retry(wait)
    const outcome = isOwn ? 'rejected' : kind === 'timeout' ? 'timed_out' : 'backend_failed'
    this.#giveUp(withoutAnswer(kind, error, progress.isSent), outcome)
  }

  broke(attempt: Attempt, kind: FailureKind, error: GatewayError): void {
    attempt.choice.outcome = 'broke_off'
    this.#logFailure(attempt, kind, `${reasonOf(error.cause as Error)}, in the middle of an answer`)
    const outcome = kind === 'timeout' ? 'timed_out' : 'backend_failed'
    attempt.cancel()
    const canGoOn = !(error.cause instanceof TotalTimeoutError) && this.canContinue()
    if (!canGoOn || !this.#retries.spend()) {
      if (canGoOn || this.#exchange.continuations > 0) this.#pool.continuations.failed++
      return this.#exchange.fail(outcome, error)
    }
    this.#gap = { outcome, error }
    this.#lineup = this.#pool.renew(this.#lineup)
    this.#continuation!.wait()
    this.#beat()
    this.#next()
  }

  canContinue(): boolean {
    const { closed, request } = this.#exchange
    if (closed || this.#call === undefined || !this.#continuation?.isOpen) return false
    if (this.#passed >= (request.payload?.maxTokens ?? Number.POSITIVE_INFINITY)) return false
    const { tried } = this.#retries
    return this.#pool.candidates(this.#exchange).some(each => !isAmong(tried, each))
  }

  forget(): void {
    this.#call = undefined
    this.#forgetBody()
  }

  #forgetBody(): void {
    // Other attempts may still be sending the same bytes.
    const isSent = this.#exchange.attempts === 1 && this.#delivered?.isAllSent === true
    if (isSent) this.#delivered!.releaseBody()
    this.#exchange.forgetBody(isSent)
  }

  late({ candidate: { tier } }: Attempt): Attempt | undefined {
    if (!this.#canResend()) return undefined
    const choice = new Choice()
    const other = this.#lineup.pick(this.#retries.tried, this.#exchange, performance.now(), choice)
    if (other === undefined || other === 'full' || other.tier !== tier) return undefined
    if (!this.#pool.hedges.spend()) return undefined
    this.#pool.decisions.add(this.#decision, choice)
    this.#exchange.attempts++
    return this.#send(other, choice)
  }

  again(attempt: Attempt): void {
    // It may accept the older of the two.
    const running = attempt.asked.filter(field => field === 'continuous_usage_stats')
    this.#withdrawn = [...this.#withdrawn, ...(running.length > 0 ? running : attempt.asked)]
    attempt.choice.outcome = '4xx'
    this.#repeat(attempt)
  }

  count(attempt: Attempt, result: AttemptResult): void {
    attempt.choice.outcome = result
    this.#front.attempted(attempt.backend.name, result)
  }

  #plan(kind: FailureKind, isSent: boolean): number | undefined {
    if (this.#exchange.closed || !this.#canResend()) return undefined
    return this.#retries.plan(kind, {
      lineup: this.#lineup,
      wanted: this.#exchange,
      attempts: this.#exchange.attempts - this.#race.hedged,
      isSent,
      deadline: this.deadline
    })
  }

  #retry(wait: number): void {
    this.#exchange.isWaiting = false
    if (wait === 0) return this.#next()
    this.#retries.wait(wait)
    this.#timer = setTimeout(() => this.#next(), wait)
  }

  #next(): void {
    const chosen = this.#choose()
    if (chosen === 'full') return this.#queue()
    if (chosen !== undefined) {
      if (this.#isCounted) {
        this.#share ??= this.#pool.queue.attained.begin(this.caller, performance.now())
      }
      this.#exchange.attempts++
      return void this.#send(chosen, this.#choice)
    }
    const error = new GatewayError('no_backend', 'No backend is available at the moment.', {
      headers: { 'retry-after': '1' }
    })
    this.turnAway(error)
  }

  #choose(): Candidate | 'full' | undefined {
    this.#choice = new Choice()
    const chosen = this.#lineup.pick(
      this.#retries.tried,
      this.#exchange,
      performance.now(),
      this.#choice
    )
    this.#decision.strategy = this.#lineup.strategy
    this.#pool.decisions.add(this.#decision, this.#choice)
    return chosen
  }

  /** Nobody has room: it waits, if it may. */
  #queue(): void {
    this.#choice.outcome = 'queued'
    this.#queuedAt = performance.now()
    // What it has spent at backends meanwhile is no waiting.
    this.since = this.#queuedAt - this.#exchange.queuedMs
    const { id, pinned = '', model = '', request } = this.#exchange
    const models = this.#lineup.names(model, this.#exchange)
    // Who has tried some already, or knows others than are configured now, waits for others than the rest.
    this.lane = this.#exchange.attempts === 0 ? `${pinned} ${models.join(' ')}` : id
    this.bytes = request.payload?.bytes.length ?? 0
    const refused = this.#pool.queue.join(this, this.#queuedAt)
    if (refused !== undefined) this.turnAway(refused)
  }

  get dialect(): Dialect | undefined {
    return this.#exchange.endpoint?.body === 'none' ? undefined : this.#exchange.dialect
  }

  get asked(): Framing | undefined {
    return this.#exchange.asked
  }

  get caller(): string {
    const { request, clientIp = '' } = this.#exchange
    return request.caller?.id ?? clientIp
  }

  get priority(): Priority {
    return this.#exchange.priority
  }

  isReady(): boolean {
    if (this.#exchange.attempts === 0) this.#lineup = this.#pool.renew(this.#lineup)
    return this.#lineup.isReady(this.#retries.tried, this.#exchange)
  }

  proceed(): void {
    const now = performance.now()
    this.#exchange.queuedMs += now - this.#queuedAt
    this.#choice.queuedMs = now - this.#queuedAt
    this.#next()
  }

  turnAway(error: GatewayError): void {
    this.#settleQueued(error.code)
    this.#giveUp(error, this.#exchange.attempts === 0 ? 'rejected' : 'backend_failed')
  }

  /** The same once more: nothing is chosen. */
  #repeat({ candidate }: Attempt, fresh = false): void {
    const choice = new Choice()
    choice.choose(candidate.backend, candidate.model)
    this.#pool.decisions.add(this.#decision, choice)
    this.#send(candidate, choice, fresh)
  }

  /** No backend was chosen, nor will be. */
  #settleQueued(outcome: string): void {
    if (this.#choice.outcome === 'queued') {
      this.#choice.queuedMs = performance.now() - this.#queuedAt
    }
    this.#choice.outcome = outcome
  }

  #send(chosen: Candidate, choice: Choice, fresh = false): Attempt {
    this.#retries.tried = this.#retries.tried.concat(chosen)
    const attempt = new Attempt(this, chosen, choice, this.#lineup.timeLimits(chosen))
    const request = this.#request(attempt)
    this.#attribute(attempt)
    this.#race.begin(attempt)
    attempt.start(request, this.#lineup.demand(chosen, this.#exchange), fresh)
    return attempt
  }

  /** What is told of the exchange is about this attempt. */
  #attribute({ backend, candidate: { model, upstream }, asked }: Attempt): void {
    const exchange = this.#exchange
    exchange.served = { model, upstream }
    exchange.backend = backend.name
    exchange.backendUrl = backend.live.origin + backend.live.basePath
    if (exchange.question !== undefined) exchange.question.asked = asked
  }

  #request(attempt: Attempt): Dispatcher.DispatchOptions {
    const { headers: given, path, method, body: original } = this.#call!.options
    const { payload } = this.#exchange.request
    const changes = payload === undefined ? [] : this.#changes(attempt, payload)
    const edited = changes.length > 0 ? changed(payload!, changes) : original
    const body = inPieces(edited, payload?.stream)
    const headers = withOwn(given, attempt.backend.config.headers, body)
    return { path, method, body, headers } as Dispatcher.DispatchOptions
  }

  /** What this backend must read in the request's body in place of what the client has sent. */
  #changes(attempt: Attempt, payload: Payload): Change[] {
    const { backend, upstream } = attempt.candidate
    const { endpoint, model } = this.#exchange
    const changes: Change[] = []
    attempt.withdrawn = this.#withdrawn
    attempt.asked = this.#usageFields(backend, payload)
    if (attempt.asked.length > 0) changes.push(...askForUsage(payload, attempt.asked))
    if (this.#gap !== undefined) {
      const way = backend.config.continuation!
      changes.push(...changesForRest(payload, this.#continuation!.text, this.#passed, way))
    }
    const isRenamed = upstream !== model || payload.isModelImplied
    if (isRenamed && upstream !== undefined) changes.push(nameModel(payload, upstream))
    if (backend.config.saltsCache && endpoint?.spends === 'input and output') {
      changes.push(saltCache(payload, this.caller))
    }
    return changes
  }

  /** How this backend is asked for usage. */
  #usageFields(backend: Backend, { includeUsage }: Payload): readonly UsageField[] {
    const { question } = this.#exchange
    if (question === undefined) return NO_USAGE
    // A response that began without a question must not get what answers one.
    const wanted = this.#gap === undefined ? question.wanted : question.asked
    const isTaken = (field: UsageField) =>
      !this.#withdrawn.includes(field) && backend.live.takesUsage(field)
    const fields = wanted.every(isTaken) ? wanted : wanted.filter(isTaken)
    const isFinalAsked = fields.includes('include_usage')
    if ((includeUsage || isFinalAsked) && backend.reportsRunningUsage) return fields
    return isFinalAsked ? FINAL_USAGE : NO_USAGE
  }

  /** Tells the client that it waits, if that is wanted, from now on. */
  #beat(): void {
    const interval = this.#front.heartbeat()
    if (interval > 0 && this.#exchange.takesComments)
      this.#heartbeat = new Heartbeat(this, interval, this.#answer)
  }

  /** Is it an answer that another backend could go on with? */
  #isContinuable({ candidate }: Attempt, head: Head, answer: Answer): boolean {
    const { endpoint, request } = this.#exchange
    if (!endpoint?.asksForUsage || !this.#lineup.continues(candidate)) return false
    const { payload } = request
    return isEventStream(head, answer) && payload !== undefined && openEnd(payload) !== undefined
  }

  /** How many tokens the client has had. */
  get #passed(): number {
    const { text } = this.#continuation!
    return Math.round(this.#front.passed(this.#exchange) || text.length / BYTES_PER_TOKEN)
  }

  /** A backend answers that was asked to go on. */
  #goOn(attempt: Attempt, head: Head, answer: Answer): Sink {
    if (!isEventStream(head, answer)) {
      attempt.cancel()
      this.#logFailure(attempt, '5xx', `status ${head.statusCode} where a stream was to go on`)
      this.#tryOther('5xx')
      return answer
    }
    const text = this.#passed
    this.#gap = undefined
    this.#delivered = attempt
    this.#heartbeat?.stop()
    this.#exchange.isWaiting = false
    this.#exchange.continuations++
    if (text > 0) this.#exchange.isDivided = true
    if (this.#exchange.meter !== undefined) this.#exchange.meter.isUsageOld = true
    this.#pool.continuations.continued++
    const before = { prompt: this.#front.asked(this.#exchange), text }
    this.#continuation!.goOn(answer, before, attempt.candidate.backend.config.continuation!)
    return this.#continuation!
  }

  /** Another one is asked to go on, or it ends as it broke off. */
  #tryOther(kind: FailureKind): void {
    const wait = this.#plan(kind, true)
    if (wait !== undefined) this.#retry(wait)
    else this.#giveUp(this.#gap!.error, this.#gap!.outcome)
  }

  /** Nothing will be sent again, unless `call` is kept for that: it is not kept beside a long answer. */
  #handOver(head: Head, answer: Answer, call?: Call): Answer {
    const { done } = this.#call!
    this.#call = call
    this.#heartbeat?.stop()
    this.#exchange.isWaiting = false
    if (call === undefined) this.#forgetBody()
    if (this.#answer !== undefined) return this.#join(this.#answer, head, answer)
    this.#showTrace()
    this.#answer = answer
    done(null, { ...head, body: answer })
    if (this.#exchange.takesComments && answer.framing === 'sse') {
      answer.beat(this.#front.heartbeat())
    }
    return answer
  }

  /** The client has its head, and heartbeats. */
  #join(open: Answer, head: Head, answer: Answer): Answer {
    const { framing } = answer
    if (head.statusCode < 300 && framing !== undefined) {
      open.framing = framing
      this.#front.answers(this.#exchange, open)
      if (framing !== 'sse') open.tap = new AsEvent(open.tap, framing === 'ndjson')
      open.takeOver(answer)
      if (framing === 'sse') open.beat(this.#front.heartbeat())
      return open
    }
    void complaintOf(head, answer).then(error => {
      if (this.#exchange.closed) return
      this.#exchange.fail(error.code === 'backend_failed' ? 'backend_failed' : 'rejected', error)
      open.break(error)
    })
    return answer
  }

  #tell(error: GatewayError): void {
    // Not by the callback: reply-from would log it a second time, with its stack.
    if (this.#answer !== undefined) return this.#answer.break(error)
    this.#showTrace()
    this.#exchange.reply.send(error)
  }

  /** What was spent is known by now: the backend's speed shows in it. */
  #learn(): void {
    const { outcome, usage, continuations, endpoint, firstTokenAt, lastTokenAt } = this.#exchange
    // A stored response is read faster than it was written.
    if (endpoint?.showsResponse) return
    if (outcome !== 'ok' || usage === undefined || continuations > 0) return
    const { promptTokens, completionTokens, cachedTokens } = usage
    this.#delivered?.learn({
      promptTokens,
      completionTokens,
      cachedTokens,
      firstTokenAt,
      lastTokenAt
    })
  }

  /** To whoever may know it, and asks. */
  #showTrace(): void {
    const { isTraced, reply } = this.#exchange
    if (isTraced) reply.header('x-llmproxy-trace', this.#decision.toLine())
  }

  #cancel(): void {
    this.#condemn()
    clearTimeout(this.#timer)
    this.#heartbeat?.stop()
    this.#pool.queue.leave(this)
    this.#race.cancel()
  }

  #giveUp(error: GatewayError, outcome: Exchange['outcome']): void {
    this.#condemn()
    if (this.#exchange.closed) return
    if (this.#gap !== undefined) {
      this.#heartbeat?.stop()
      this.#pool.continuations.failed++
      this.#attribute(this.#delivered!)
      this.#exchange.fail(this.#gap.outcome, this.#gap.error)
      return this.#answer!.break(this.#gap.error)
    }
    const refusal = this.#refusal
    if (refusal === undefined) {
      this.#heartbeat?.stop()
      this.#exchange.fail(outcome, error)
      return this.#tell(error)
    }
    refusal.whenSettled(REFUSAL_TIMEOUT, isComplete => {
      if (this.#exchange.closed) return
      if (isComplete) return void this.#handOver(refusal.head, refusal.toAnswer())
      this.#refusal = undefined
      this.#giveUp(error, outcome)
    })
  }

  /** A streamed body can be sent again only as long as nothing of it has been read. */
  #canResend(): boolean {
    const body = this.#call?.options.body
    return !(body instanceof Readable) || !(body.readableDidRead || body.destroyed)
  }

  #logFailure({ backend }: Attempt, kind: FailureKind | 'local_failure', why: string): void {
    const { id } = this.#exchange
    if (kind !== 'local_failure') backend.live.fail(why)
    this.#log.warn({ requestId: id, backend: backend.name, kind, reason: why }, 'attempt failed')
  }
}

/** How long (ms) the client waits for the head of an answer, if it says so; in seconds, as OpenAI's SDKs do. */
function patienceOf(headers: Headers): number {
  const seconds = Number(headers['x-request-timeout'] ?? headers['x-stainless-timeout'])
  const ms = seconds * 1000
  return ms > 0 && ms < LONGEST ? ms : Number.POSITIVE_INFINITY
}

/** The client's headers and the backend's own, which count more, as undici takes them: names and values in turn. */
function withOwn(given: Headers, own: Record<string, string>, body: unknown) {
  const headers: (string | string[])[] = []
  const isKnown = Buffer.isBuffer(body) || body instanceof Pieces
  const length = isKnown ? String(body.length) : undefined
  for (const name in given) {
    const value = name === 'content-length' ? (length ?? given[name]) : given[name]
    if (value === undefined || name === 'host' || own[name] !== undefined) continue
    headers.push(name, value)
  }
  for (const name in own) headers.push(name, own[name]!)
  return headers
}
