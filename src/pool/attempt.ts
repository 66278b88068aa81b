import type { Socket } from 'node:net'
import { Readable } from 'node:stream'
import { type Dispatcher, errors } from 'undici'
import type { Dialect } from '../dialects/dialect.ts'
import { type Failure, isRequestsFault } from '../dialects/failure.ts'
import { GatewayError } from '../errors.ts'
import { type Framing, framingOf, isStream, parseRetryAfter } from '../http.ts'
import type { UsageField } from '../payload-edits.ts'
import { codingsOf } from '../wire/codings.ts'
import { Pieces } from '../wire/edits.ts'
import { Answer, NOBODY_SENDS } from './answer.ts'
import type { Backend, BackendHandler, TimeLimits } from './backend.ts'
import { isAllSent } from './connector.ts'
import type { Sink } from './continuation.ts'
import type { Choice } from './decisions.ts'
import { CodingError, Decoder } from './decoder.ts'
import {
  brokenOff,
  failureKind,
  isLocal,
  isOurs,
  KeyRefusedError,
  statusFailure
} from './failures.ts'
import { FirstEvent } from './first-event.ts'
import { messageIn } from './heartbeat.ts'
import type { Candidate, FailureKind } from './lineup.ts'
import type { Demand, Facts, Job } from './load.ts'
import { Patience, TotalTimeoutError } from './patience.ts'
import { Refusal } from './refusal.ts'

export type Headers = Record<string, string | string[] | undefined>

/** The head of an answer. */
export interface Head {
  statusCode: number
  headers: Headers
}

/** What became of an attempt: a status class, or how it failed. */
export type AttemptResult =
  | FailureKind
  | '2xx'
  | '3xx'
  | '4xx'
  | 'cancelled'
  | 'hedged'
  | 'local_failure'

/** How far an attempt came before it failed. */
export interface Progress {
  /** The backend has had the request, or some of it. */
  isSent: boolean
  /** It went over a connection that had served other requests before, and was closed at once. */
  isStale: boolean
}

/** What an attempt tells the delivery it belongs to. */
export interface AttemptOwner {
  /** The backend gets the request. */
  sent(): void
  /** This is the client's answer; returns where the rest of it goes. */
  deliver(attempt: Attempt, head: Head, answer: Answer): Sink
  /** The backend refuses; returns whether another attempt is made, else the refusal is delivered. */
  refused(attempt: Attempt, kind: FailureKind, refusal: Refusal): boolean
  /** All of an error response has come. */
  read(refusal: Refusal): void
  /** It failed before there was anything to pass on. */
  failed(attempt: Attempt, kind: FailureKind, error: Error, progress: Progress): void
  /** The answer broke off after some of it was passed on. */
  broke(attempt: Attempt, kind: FailureKind, error: GatewayError): void
  /** The backend seems not to take `stream_options` and should be asked without. */
  again(attempt: Attempt): void
  /** When the client will have waited long enough for an answer to begin, and half of that (monotonic, ms). */
  readonly deadline: number
  readonly headDeadline: number
  /** In which the request was made; undefined: nothing is made, and no failure of its own can be reported. */
  readonly dialect: Dialect | undefined
  /** The framing that the request asks for; undefined: none. */
  readonly asked: Framing | undefined
  count(attempt: Attempt, result: AttemptResult): void
}

/**
 * A connection that its server had closed while it was idle shows it within this time (ms) after a
 * request is sent. Whatever fails later may have been worked on, and is not repeated of our own accord.
 */
const STALE_MS = 100
/** A failed attempt counts as this slow (ms) when backends are compared by latency. */
const FAILURE_LATENCY = 10_000
/** A refusal to serve a request counts as at least this slow: it must not attract others. */
const REFUSAL_LATENCY = 1_000

/** How long (ms) the body of a 500 may take before it counts as the fault of the backend. */
const SUSPICION_MS = 1_000

/** No era: what comes later does not count a second time. */
const JUDGED = -1

/** A backend that has streamed within this time (ms) is compared by its streams alone. */
const STREAMS_MS = 60_000

const NOBODY: AttemptOwner = {
  sent() {},
  deliver: (_attempt, _head, answer) => answer,
  refused: () => false,
  read() {},
  failed() {},
  broke() {},
  again() {},
  deadline: Number.POSITIVE_INFINITY,
  headDeadline: Number.POSITIVE_INFINITY,
  dialect: undefined,
  asked: undefined,
  count() {}
}

/** One try at one backend. */
export class Attempt implements BackendHandler {
  socket: Socket | undefined
  /** Why it is where it is. */
  readonly choice: Choice
  readonly candidate: Candidate
  readonly backend: Backend
  /** Fields by which the gateway asks for usage in the request, and those that it is repeated without. */
  asked: readonly UsageField[] = []
  withdrawn: readonly UsageField[] = []
  #pieces: Pieces | undefined
  /** Whether all of the request had gone out when the response began. */
  isAllSent = false
  #owner: AttemptOwner
  readonly #startedAt = performance.now()
  #sentAt = 0
  /** The request's body is, and may take its time; see {@link Backend.dispatch}. */
  #isStreamed = false
  #controller: Dispatcher.DispatchController | undefined
  #head: Head | undefined
  #answer: Answer | undefined
  /** Where it goes from when it is the client's. */
  #sink: Sink | undefined
  /** Decodes a response that has content codings. */
  #decoder: Decoder | undefined
  /** A content coding that cannot be undone, if it is one. */
  #coding: string | undefined
  /** What a response begins with, until that is seen. */
  #first: FirstEvent | undefined
  #holding: NodeJS.Timeout | undefined
  /** It began with an error, and is the client's all the same. */
  #failure: Failure | undefined
  readonly #limits: TimeLimits
  readonly #patience: Patience
  /** Waits for a connection, where undici would wait for longer. */
  #connecting: NodeJS.Timeout | undefined
  #isDelivered = false
  #isOver = false
  /** The breaker's era in which it began; {@link JUDGED} when the breaker has had its verdict. */
  #era = JUDGED
  #job: Job | undefined
  #isCancelled = false
  /** The error answer, while it is not certain that it is the client's. */
  #refusal: Refusal | undefined
  /** What the client gets of an error response, kept for the usage that it may report. */
  #copy: Refusal | undefined
  /** It may be our own question for usage that is refused. */
  #isInDoubt = false
  /** Waits for the body of a 500. */
  #suspicion: NodeJS.Timeout | undefined

  constructor(owner: AttemptOwner, candidate: Candidate, choice: Choice, limits: TimeLimits) {
    this.#owner = owner
    this.choice = choice
    this.candidate = candidate
    this.backend = candidate.backend
    this.#limits = limits
    this.#patience = new Patience(limits)
  }

  start(options: Dispatcher.DispatchOptions, demand: Demand, fresh: boolean): void {
    this.#isStreamed = options.body instanceof Readable
    if (options.body instanceof Pieces) this.#pieces = options.body
    this.backend.live.begin()
    this.#job = this.backend.live.load.begin(demand, this.#startedAt)
    this.#era = this.backend.live.breaker.begin(this.#startedAt)
    const { connectTimeout } = this.#limits
    if (connectTimeout < this.backend.config.longestConnect) {
      const late = () => this.socket?.destroy(new errors.ConnectTimeoutError())
      this.#connecting = setTimeout(late, connectTimeout).unref()
    }
    // What the client sends only once cannot be repeated where a pooled connection turns out to be closed.
    this.backend.dispatch(options, this, fresh || this.#isStreamed)
  }

  /** An answer may still come of it. */
  get isPending(): boolean {
    const isOpen = this.#refusal === undefined || this.#isInDoubt || this.#suspicion !== undefined
    return !this.#isOver && isOpen
  }

  /** How long it has taken so far (ms). */
  get age(): number {
    return performance.now() - this.#startedAt
  }

  /** Closes the connection, in whatever phase it is: the client has left, or another one has `hedged` it. */
  cancel(result: 'cancelled' | 'hedged' = 'cancelled'): void {
    if (this.#isOver) return
    this.#isCancelled = true
    if (!this.#isDelivered && this.#refusal === undefined) this.#owner.count(this, result)
    this.#end()
    const reason = new GatewayError('client_gone', 'Nobody waits for the answer any more.')
    if (this.#controller !== undefined) (this.#decoder ?? this.#controller).abort(reason)
    else this.socket?.destroy(reason)
  }

  /** What the answer was like that it has given. */
  learn(facts: Facts): void {
    if (this.#job !== undefined) this.backend.live.learn(this.#job, facts)
  }

  /**
   * The exchange is over. V8 promotes what is in flight to its old generation, where the dead keep
   * each other alive until a full collection: whatever is let go of here dies young.
   */
  letGo(): void {
    this.#owner = NOBODY
    this.#controller = undefined
    this.#decoder = undefined
    this.#head = undefined
    this.#job = undefined
  }

  /** The response has begun, and nothing will be sent again. */
  releaseBody(): void {
    this.#pieces?.release()
  }

  onRequestStart(controller: Dispatcher.DispatchController): void {
    this.#controller = controller
    clearTimeout(this.#connecting)
    if (this.#isCancelled) return controller.abort(new Error('cancelled before it began'))
    this.#sentAt = performance.now()
    this.#owner.sent()
    if (!this.#isStreamed) this.#wait(controller)
  }

  onResponseStart(
    source: Dispatcher.DispatchController,
    statusCode: number,
    headers: Headers
  ): void {
    if (statusCode < 200) return
    if (statusCode > 599) return source.abort(new errors.HTTPParserError(`status ${statusCode}`))
    this.#wait(source)
    this.#head = { statusCode, headers }
    // The bytes of the head would hold Node's pool for as long as the answer takes.
    source.rawHeaders = []
    const controller = this.#decode(source)
    this.isAllSent = isAllSent() && this.#pieces?.isTaken !== false
    if (statusCode === 400 || statusCode === 422) {
      if (this.asked.length > 0) {
        this.#isInDoubt = true
        this.#refusal = new Refusal(this.#head, controller)
        return
      }
    } else if (statusCode < 400) this.backend.live.refuseUsage(this.withdrawn)
    if (statusCode === 401) {
      const error = new KeyRefusedError()
      this.#failed(error)
      return source.abort(error)
    }
    if (statusCode === 500) {
      // Its body tells whether the request is at fault.
      this.#suspicion = setTimeout(() => this.#suspect(), SUSPICION_MS).unref()
      this.#refusal = new Refusal(this.#head, controller)
      return
    }
    const kind = statusFailure(statusCode)
    if (kind !== undefined) {
      this.#penalise()
      this.#judgeRefusal(this.#head)
      const refusal = new Refusal(this.#head, controller)
      if (this.#owner.refused(this, kind, refusal)) {
        this.#owner.count(this, kind)
        this.#refusal = refusal
        return
      }
      this.#copy = refusal
    }
    this.#answer = new Answer(controller)
    this.#first = this.#expect(this.#head)
    // A server may send the head before it begins: clients with a short timeout wait for the head.
    if (this.#first !== undefined && isStream(framingOf(headers['content-type']))) this.#hold()
  }

  onResponseData(source: Dispatcher.DispatchController, chunk: Buffer): void {
    this.#patience.heard = true
    if (!this.#patience.isListening) this.#patience.listen(this.#decoder ?? source)
    if (this.#decoder === undefined) this.#data(source, chunk)
    else this.#decoder.write(chunk)
  }

  onResponseEnd(): void {
    if (this.#decoder === undefined) this.#ended()
    else this.#decoder.end()
  }

  onResponseError(_source: Dispatcher.DispatchController, error: Error): void {
    if (this.#decoder === undefined) this.#failed(error)
    else this.#decoder.break(error)
  }

  complete(failure: Failure | undefined): void {
    if (this.#failure === undefined && failure !== undefined) this.#judgeFailure(failure)
    else this.backend.live.breaker.succeeded(this.#era, performance.now())
    this.#era = JUDGED
  }

  broke(why: string): GatewayError {
    return this.#broke(new Error(why))
  }

  /** Returns what controls the response: a decoder, if the response has content codings. */
  #decode(source: Dispatcher.DispatchController): Dispatcher.DispatchController {
    const { statusCode, headers } = this.#head!
    if (headers['content-encoding'] === undefined) return source
    const { 'content-encoding': given, ...others } = headers
    const { codings, unknown } = codingsOf(given)
    this.#coding = unknown
    this.#head = { statusCode, headers: others }
    if (unknown !== undefined) others['content-encoding'] = unknown
    if (codings.length === 0) return source
    delete others['content-length']
    const decoder = new Decoder(codings, source, {
      data: chunk => this.#data(decoder, chunk),
      end: () => this.#ended(),
      fail: error => this.#failed(error)
    })
    this.#decoder = decoder
    return decoder
  }

  /** Only a response that can be read can begin with an error that is seen. */
  #expect({ statusCode, headers }: Head): FirstEvent | undefined {
    if (statusCode > 299) return undefined
    const { dialect, asked } = this.#owner
    const declared = framingOf(headers['content-type'])
    return new FirstEvent({ dialect, asked, declared, isDecoded: this.#decoder !== undefined })
  }

  #data(controller: Dispatcher.DispatchController, chunk: Buffer): void {
    if (this.#copy?.data(chunk) === false) this.#copy = undefined
    if (this.#sink !== undefined) this.#sink.data(chunk)
    else if (this.#refusal === undefined) {
      this.#answer!.data(chunk)
      if (!this.#isDelivered) this.#begin(chunk)
    } else if (!this.#refusal.data(chunk)) this.#outgrown(controller, chunk)
  }

  #ended(): void {
    if (this.#isOver) return
    const isBegun = this.#isDelivered || this.#refusal !== undefined
    if (!isBegun) this.#judge(this.#first?.end() ?? 'response')
    this.#end()
    const refusal = this.#refusal ?? this.#copy
    if (refusal !== undefined) this.#owner.read(refusal)
    if (this.#isInDoubt) return this.#settleDoubt(this.#refusal!)
    if (this.#suspicion !== undefined) {
      this.#suspect(true)
      if (this.#isDelivered) return
    }
    if (this.#refusal !== undefined) return this.#refusal.end()
    if (!this.#isDelivered) this.#deliver(true)
    this.#sink!.end()
  }

  #failed(error: Error): void {
    if (this.#isOver) return
    this.#end()
    // An answer that was destroyed is one that its client gave up.
    if ((this.#sink ?? this.#answer)?.destroyed) return
    this.#suspect()
    if (this.#isDelivered) return this.#sink!.break(this.#broke(error))
    if (this.#refusal !== undefined && !this.#isInDoubt) return this.#refusal.lose()
    const kind = failureKind(error)
    const isStale =
      kind === 'connect_failure' &&
      this.socket === undefined &&
      this.#head === undefined &&
      performance.now() - this.#sentAt < STALE_MS
    // An error of our own making is about the request, or the client's patience: the backend is not to blame.
    if (error instanceof GatewayError) this.#owner.count(this, 'cancelled')
    else if (isLocal(error)) this.#owner.count(this, 'local_failure')
    else {
      this.#owner.count(this, kind)
      if (!isStale && !isOurs(error)) {
        this.#penalise()
        this.#fail()
      }
    }
    this.#owner.failed(this, kind, error, { isSent: this.#controller !== undefined, isStale })
  }

  #begin(chunk: Buffer): void {
    const beginning = this.#first?.see(chunk) ?? 'response'
    if (this.#isHidden()) return this.#refuse()
    if (beginning === 'incomplete') return this.#hold()
    this.#judge(beginning)
    if (this.#refusal !== undefined) return
    // What came in the same piece is on its way: an answer may be whole when it is delivered.
    queueMicrotask(() => this.#deliverOnce())
  }

  /** What begins with a failure is kept while others are tried. */
  #judge(beginning: 'response' | Failure): void {
    if (beginning === 'response') return
    this.#judgeFailure(beginning)
    this.#failure = beginning
    if (beginning === '4xx') return
    const { chunks, framing } = this.#first!
    const refusal = new Refusal(this.#head!, this.#decoder ?? this.#controller!, framing)
    for (const each of chunks) refusal.data(each)
    if (!this.#owner.refused(this, beginning, refusal)) return
    this.#owner.count(this, beginning)
    this.#refusal = refusal
  }

  /** Whether an unknown coding hides what was asked for. Where the body can be read it was none. */
  #isHidden(): boolean {
    if (this.#coding === undefined || this.#first === undefined) return false
    const { isShown } = this.#first
    if (isShown) delete this.#head!.headers['content-encoding']
    return isShown === false && this.#owner.asked !== undefined
  }

  #refuse(): void {
    const error = new CodingError(`the content coding ${this.#coding} is unknown`)
    const controller = this.#decoder ?? this.#controller!
    this.#failed(error)
    controller.abort(error)
  }

  #wait(controller: Dispatcher.DispatchController): void {
    const owner = this.#owner
    this.#patience.begin(controller, () => owner.deadline)
  }

  /** Waits for the first event, but not for long: its client waits for a head. */
  #hold(): void {
    const left = this.#owner.headDeadline - performance.now()
    const hold = Math.max(0, Math.min(this.#limits.holdFirstEvent, left))
    this.#holding ??= setTimeout(() => this.#deliverOnce(), hold).unref()
  }

  #deliverOnce(): void {
    if (!this.#isDelivered && !this.#isOver) this.#deliver()
  }

  #deliver(complete = false): void {
    this.#isDelivered = true
    clearTimeout(this.#holding)
    this.#holding = undefined
    const { statusCode, headers } = this.#head!
    const framing =
      this.#first === undefined ? framingOf(headers['content-type']) : this.#first.framing
    this.#first = undefined
    this.#answer!.framing = framing
    this.#answer!.source = this
    this.#answer!.offer(complete)
    this.#owner.count(
      this,
      this.#failure ??
        statusFailure(statusCode) ??
        (`${Math.floor(statusCode / 100)}xx` as AttemptResult)
    )
    if (this.#failure === undefined) {
      this.#observe(statusCode, framing)
      this.#judgeHead(statusCode)
    }
    this.#sink = this.#owner.deliver(this, this.#head!, this.#answer!)
  }

  /** Being refused fast is no merit; a refusal of the gateway's own key is a failure. */
  #observe(statusCode: number, framing: Framing | undefined): void {
    if (statusCode >= 500 || statusCode === 429) return
    if (statusCode === 401 || statusCode === 403) return this.#penalise()
    const now = performance.now()
    const ms = now - this.#startedAt
    if (statusCode < 400) {
      this.backend.live.refusal = undefined
      this.backend.live.reputation.observeSuccess(now)
    }
    // A whole answer comes when it is complete: beside streams its first byte says nothing of the queue.
    if (isStream(framing)) {
      this.backend.live.streamedAt = now
      this.#job?.begun(now)
    } else if (now - this.backend.live.streamedAt < STREAMS_MS) return
    const least =
      statusCode < 400 ? 0 : (this.backend.live.reputation.latency(now) ?? REFUSAL_LATENCY)
    this.backend.live.reputation.observeLatency(Math.max(ms, least), now)
  }

  /** An error answer is too long to be kept. If it is the only one, it goes on as it comes. */
  #outgrown(controller: Dispatcher.DispatchController, chunk: Buffer): void {
    const refusal = this.#refusal!
    if (this.#suspicion !== undefined) {
      this.#suspect()
      if (this.#refusal === undefined) return this.#sink!.data(chunk)
    }
    if (!this.#isInDoubt)
      return controller.abort(new Error('the error answer is too long to be kept'))
    this.#isInDoubt = false
    this.#refusal = undefined
    this.#answer = new Answer(controller)
    for (const kept of [...refusal.chunks, chunk]) this.#answer.data(kept)
    this.#deliver()
  }

  /** A 500 has come, or what there is of it in time: either the request is at fault, or the backend. */
  #suspect(isComplete = false): void {
    if (this.#suspicion === undefined) return
    clearTimeout(this.#suspicion)
    this.#suspicion = undefined
    const refusal = this.#refusal!
    const isFault = isRequestsFault(messageIn(refusal.text) ?? '')
    if (!isFault && this.#owner.refused(this, '5xx', refusal)) return this.#owner.count(this, '5xx')
    this.#refusal = undefined
    if (isFault) this.#failure = '4xx'
    this.#answer = new Answer(this.#isOver ? NOBODY_SENDS : (this.#decoder ?? this.#controller!))
    for (const chunk of refusal.chunks) this.#answer.data(chunk)
    this.#deliver()
    if (this.#isOver && isComplete) this.#sink!.end()
  }

  /** The backend is at fault for an attempt that failed. */
  condemn(): void {
    this.#penalise()
    this.#fail()
  }

  #settleDoubt(refusal: Refusal): void {
    if (/stream_options|include_usage|continuous_usage/.test(refusal.text))
      return this.#owner.again(this)
    this.#answer = refusal.toAnswer()
    this.#deliver()
  }

  #broke(error: Error): GatewayError {
    const gatewayError = brokenOff(error)
    // It was busy, and longer than is allowed.
    if (!(error instanceof TotalTimeoutError)) {
      this.#penalise()
      this.#fail()
    }
    this.#owner.broke(this, failureKind(error), gatewayError)
    return gatewayError
  }

  /** A 4xx says that the request is at fault: nothing for the backend, and nothing against it. */
  #judgeHead(statusCode: number): void {
    const { breaker } = this.backend.live
    if (statusCode < 400) return breaker.answered(this.#era)
    breaker.leave(this.#era)
    this.#era = JUDGED
  }

  /** The backend reports a failure inside its response. A request that is at fault counts neither way. */
  #judgeFailure(failure: Failure): void {
    this.backend.live.fail(`an error inside a response (${failure})`)
    if (failure !== '4xx') this.#penalise()
    if (failure === '5xx') return this.#fail()
    this.backend.live.breaker.leave(this.#era)
    this.#era = JUDGED
  }

  #judgeRefusal({ statusCode, headers }: Head): void {
    const isBusy = statusCode === 429 || statusCode === 503
    const rest = isBusy ? parseRetryAfter(headers['retry-after']) : 0
    if (rest > 0) this.backend.live.breaker.rest(rest, performance.now())
    // 501: it does not know what was asked for, and may serve all else.
    else if (statusCode >= 500 && statusCode !== 501) this.#fail()
  }

  #fail(): void {
    this.backend.live.breaker.failed(this.#era, performance.now())
    this.#era = JUDGED
  }

  #penalise(): void {
    const now = performance.now()
    this.backend.live.reputation.observeFailure(
      Math.max(FAILURE_LATENCY, now - this.#startedAt),
      now
    )
  }

  #end(): void {
    if (this.#isOver) return
    this.#isOver = true
    this.#patience.end()
    clearTimeout(this.#connecting)
    clearTimeout(this.#holding)
    clearTimeout(this.#suspicion)
    this.backend.live.end()
    this.#job?.end()
    this.backend.live.breaker.leave(this.#era)
  }
}
