import { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { Readable, type Writable } from 'node:stream'
import type { Dispatcher } from 'undici'
import type { Failure } from '../dialects/failure.ts'
import type { GatewayError } from '../errors.ts'
import type { Framing } from '../http.ts'

/** Looks at every chunk of an answer and says what of it goes on. */
export interface Tap {
  pass(chunk: Buffer): Buffer | undefined
  /** The answer has said that it is over; its last words are kept back. */
  readonly isOver: boolean
  /** It is a stream of events, and what passed ends with a whole one: a comment can follow. */
  readonly isBetweenEvents: boolean
  /** Returns the last words, and keeps nothing back any more. */
  release(): Buffer | undefined
  /** The answer is over; returns what is still kept back. */
  end(): Buffer | undefined
  /** The answer broke off, and what was kept back is dropped; returns what must stand before another event. */
  breakOff(): string
  /** Is it a stream of a kind that says that it is over, and has not said so? */
  isCutShort(): boolean
  /** How the backend failed, where it reported that inside its response. */
  readonly failure: Failure | undefined
}

/** The exchange an answer belongs to. */
export interface Account {
  /** What to tell a client whose stream breaks, in the dialect of its route, and whether that ends the stream. */
  lastWords(error: GatewayError): { events: string; isEnd: boolean }
  /** Writes down what was spent; the answer's last bytes wait for what it returns. */
  conclude(): Promise<void> | undefined
}

/** Who gave the answer. */
export interface Source {
  /** All of it has come. `failure`: the backend reported one inside it. */
  complete(failure: Failure | undefined): void
  /** It is not complete, although nobody had noticed: says what is wrong with it. */
  broke(why: string): GatewayError
}

/** Clients drop what they have not read yet when a connection breaks: they get a moment (ms) to read. */
const LAST_WORDS_MS = 500
const READ_MS = 50

/** Looks (for silence) within the interval of a heartbeat. */
const BEAT_STEPS = 4

/** What is wrong with a stream that does not say that it is over. */
export const ENDLESS = 'the stream ended without its end'

/** Of an answer that nobody is sending. */
export const NOBODY_SENDS: Dispatcher.DispatchController = {
  aborted: false,
  paused: false,
  reason: null,
  abort() {},
  pause() {},
  resume() {}
}

/**
 * A backend's answer on its way to the client.
 *
 * It is a Readable for whoever wants one. Piped straight into an HTTP/1.1 response it writes the
 * backend's chunks there itself: nothing is queued in between, the backend waits while the client
 * does, and an answer that breaks can say so as its last words before the connection is cut.
 */
export class Answer extends Readable {
  tap: Tap | undefined
  /** Objects, not functions: V8 lets a function that is assigned to a member live until its next full collection. */
  account: Account | undefined
  source: Source | undefined
  /** How it is cut into JSON texts; undefined: it is none. */
  framing: Framing | undefined
  /** It comes bit by bit, and a break can be told of in words. */
  isStream = false
  /** How long (ms) a client may let bytes wait; 0: for ever. */
  stallTimeout = 0
  /** No backend has answered: see {@link takeOver}. */
  isAwaited = false
  #controller: Dispatcher.DispatchController
  /** Chunks that came before anybody listened. */
  #early: Buffer[] = []
  #offered = false
  #complete = false
  #flowing = false
  #over: 'ended' | GatewayError | undefined
  /** What was spent is being written down, and has been. */
  #isConcluded = false
  #isRecorded = false
  /** All has passed, and the end waits for that. */
  #isFinished = false
  /** Where the client knows the length: how many bytes it still expects; the chunk with the last of them waits. */
  #expected = Number.POSITIVE_INFINITY
  #lastChunk: Buffer | undefined
  /** What was kept back until the end. */
  #rest: Buffer | undefined
  #response: ServerResponse | undefined
  /** Whether the response writes to its connection itself: see {@link isPlain}. */
  #isPlain = false
  #stalled: NodeJS.Timeout | undefined
  #beating: NodeJS.Timeout | undefined
  /** The backend has sent something since this was set to false. */
  #isHeard = true
  /** Steps of the heartbeat in a row without a chunk. */
  #silentSteps = 0

  constructor(controller: Dispatcher.DispatchController) {
    super()
    this.#controller = controller
    this.on('error', () => {})
  }

  /** An answer whose client hears something before a backend answers. */
  static awaited(): Answer {
    const answer = new Answer(NOBODY_SENDS)
    answer.isAwaited = true
    answer.framing = 'sse'
    answer.#offered = true
    return answer
  }

  /** Says something meanwhile, unless the client has not taken yet what was said before. */
  say(words: string): void {
    const { writableLength: unread } = this.#response ?? { writableLength: this.readableLength }
    if (this.#over === undefined && this.#early.length === 0 && unread === 0)
      this.data(Buffer.from(words))
  }

  /** Sends a comment whenever the backend has been silent for `interval` (ms; 0: never), between two events. */
  beat(interval: number): void {
    if (interval === 0 || this.#over !== undefined) return
    // Without a closure: thousands of streams may run.
    this.#beating = setInterval(Answer.#beatStep, interval / BEAT_STEPS, this).unref()
  }

  static #beatStep(answer: Answer): void {
    answer.#silentSteps = answer.#isHeard ? 0 : answer.#silentSteps + 1
    if (answer.#silentSteps >= BEAT_STEPS && answer.tap?.isBetweenEvents) {
      answer.say(':\n\n')
      answer.#silentSteps = 0
    }
    answer.#isHeard = false
  }

  /** A backend has answered: from now on this is that answer. */
  takeOver(answer: Answer): void {
    this.isAwaited = false
    this.#controller = answer.#controller
    this.source = answer.source
    this.#early.push(...answer.#early)
    this.#over ??= answer.#over
    if (this.destroyed) answer.destroy()
    else if (this.#flowing) this.#flow()
  }

  /** Its backend will not send any more; another one may {@link takeOver take over}. */
  loseSource(): void {
    this.#controller = NOBODY_SENDS
    this.source = undefined
  }

  /** Returns what came before anybody listened, as if it had not come yet. */
  takeBack(): Buffer[] {
    const early = this.#early
    this.#early = []
    return early
  }

  /** A chunk from the backend. */
  data(chunk: Buffer): void {
    if (this.#over !== undefined) return
    if (this.#flowing) return void this.#forward(chunk)
    this.#early.push(chunk)
    if (this.#offered) this.#controller.pause()
  }

  /** It has been handed on: until somebody listens the backend waits. `complete`: nothing more will come. */
  offer(complete: boolean): void {
    this.#offered = true
    this.#complete = complete
  }

  /**
   * All bytes of an answer that was complete before it was handed on; undefined of any other. They are
   * for this response, which gets them without a stream in between.
   */
  takeWhole(response: ServerResponse): Buffer | undefined {
    if (!this.#complete || this.#early.length === 0) return undefined
    const chunks: Buffer[] = []
    for (const chunk of this.takeBack()) {
      const out = this.tap === undefined ? chunk : this.tap.pass(chunk)
      if (out !== undefined) chunks.push(out)
    }
    const last = this.tap?.end()
    this.source?.complete(this.tap?.failure)
    if (last !== undefined) chunks.push(last)
    response.once('prefinish', () => this.#limitFlush(response))
    return chunks.length === 1 ? chunks[0] : Buffer.concat(chunks)
  }

  /** The backend's answer is complete. */
  end(): void {
    if (this.#over !== undefined) return
    this.#over = 'ended'
    if (this.#flowing) this.#finish()
  }

  /** The answer broke off, or must not go on. */
  break(error: GatewayError): void {
    if (this.#over !== undefined) return
    // All has been said; nothing was broken off.
    if (this.tap?.isOver) return this.end()
    this.#over = error
    if (this.#flowing) this.#finish()
  }

  override pipe<T extends NodeJS.WritableStream>(to: T, options?: { end?: boolean }): T {
    if (!(to instanceof ServerResponse) || options?.end === false) return super.pipe(to, options)
    this.#response = to
    this.#isPlain = isPlain(to)
    this.#expected = Number(to.getHeader('content-length') ?? Number.POSITIVE_INFINITY)
    // A head alone waits in Node for the first bytes of the body.
    if (this.isStream && this.#early.length === 0) to.flushHeaders()
    this.#flow()
    return to
  }

  override _read(): void {
    if (this.#flowing) this.#controller.resume()
    else this.#flow()
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    clearTimeout(this.#stalled)
    clearInterval(this.#beating)
    if (this.#over === undefined) this.#controller.abort(error ?? new Error('the client has left'))
    done(error)
  }

  #flow(): void {
    this.#flowing = true
    let open = true
    for (const chunk of this.takeBack()) open = this.#forward(chunk)
    if (this.#over !== undefined) this.#finish()
    else if (open) this.#controller.resume()
  }

  #forward(chunk: Buffer): boolean {
    this.#isHeard = true
    const out = this.tap === undefined ? chunk : this.tap.pass(chunk)
    // An empty chunk would be the end of a chunked body; undici has one after a pause.
    const open = out === undefined || out.length === 0 || this.#pass(out)
    if (this.tap?.isOver) this.#conclude()
    return open
  }

  #pass(out: Buffer): boolean {
    this.#expected -= out.length
    if (this.#expected > 0) return this.#write(out)
    this.#lastChunk = out
    return true
  }

  #write(out: Buffer | undefined): boolean {
    if (out === undefined) return true
    const response = this.#response
    if (response === undefined) {
      const open = this.push(out)
      if (!open) this.#controller.pause()
      return open
    }
    const { socket } = response
    const isDirect = this.#isPlain && socket !== null && isFramed(response, socket, out)
    const to = isDirect ? socket : response
    const open = to.write(to === response ? out : frame(out))
    if (!open) this.#waitFor(to)
    return open
  }

  #waitFor(client: Writable): void {
    this.#controller.pause()
    client.once('drain', () => this.#resume())
    if (this.stallTimeout > 0) this.#watchStall()
  }

  #resume(): void {
    clearTimeout(this.#stalled)
    this.#stalled = undefined
    if (this.#over === undefined) this.#controller.resume()
  }

  #watchStall(): void {
    this.#stalled ??= setTimeout(
      () => this.destroy(new Error('the client takes no data')),
      this.stallTimeout
    ).unref()
  }

  /** The client gets the end of an answer when what it has cost is written down, and not before. */
  #conclude(): void {
    if (this.#isConcluded) return
    this.#isConcluded = true
    const recorded = this.account?.conclude()
    if (recorded === undefined) this.#release()
    else void recorded.then(() => this.#release())
  }

  #release(): void {
    this.#isRecorded = true
    if (this.destroyed) return
    if (this.#isFinished) this.#endProperly()
    else this.#write(this.tap?.release())
  }

  #endProperly(): void {
    this.#write(this.#lastChunk)
    if (this.#response !== undefined) this.#endResponse(this.#response, this.#rest)
    else this.#write(this.#rest)
    this.push(null)
    if (this.#response !== undefined) this.resume()
  }

  #finish(): void {
    clearInterval(this.#beating)
    if (this.#over === 'ended' && this.tap?.isCutShort()) this.#over = this.source?.broke(ENDLESS)
    if (this.#over === 'ended') {
      this.#isFinished = true
      this.#rest = this.tap?.end()
      this.source?.complete(this.tap?.failure)
      if (this.#isRecorded) this.#endProperly()
      else this.#conclude()
      return
    }
    const error = this.#over!
    if (this.#response !== undefined) this.#sayLast(this.#response, error)
    // Destroying drops what is still on its way through a decoder or a reader: it gets a moment.
    else setTimeout(() => this.#pushLast(error), READ_MS)
  }

  #endResponse(response: ServerResponse, last: Buffer | undefined): void {
    response.end(last)
    this.#limitFlush(response)
  }

  #words(error: GatewayError): { text: string; isEnd: boolean } | undefined {
    const before = this.tap?.breakOff() ?? ''
    const words = this.isStream ? this.account?.lastWords(error) : undefined
    return words && { text: before + words.events, isEnd: words.isEnd }
  }

  #sayLast(response: ServerResponse, error: GatewayError): void {
    const words = this.#words(error)
    if (words === undefined) return void this.destroy(error)
    if (words.isEnd) {
      this.#endResponse(response, Buffer.from(words.text))
      this.push(null)
      return void this.resume()
    }
    response.write(words.text, () => {
      const cut = setTimeout(() => this.destroy(error), LAST_WORDS_MS)
      response.once('close', () => clearTimeout(cut))
    })
    this.#limitFlush(response)
  }

  #pushLast(error: GatewayError): void {
    const words = this.#words(error)
    if (words !== undefined) this.push(words.text)
    if (words?.isEnd) this.push(null)
    else setImmediate(() => this.destroy(error))
  }

  /** The end of an answer, too, must be taken within the stall timeout. */
  #limitFlush(response: Writable): void {
    clearTimeout(this.#stalled)
    if (response.writableLength === 0 || this.stallTimeout === 0) return
    const stalled = setTimeout(() => response.destroy(), this.stallTimeout).unref()
    response.once('close', () => clearTimeout(stalled))
  }
}

/**
 * Whether a response writes as Node's own do. One whose `write` was replaced reads or changes its body:
 * `fastify.inject` collects it there, Express middleware compresses it. Such a body must pass `write`.
 */
function isPlain(response: ServerResponse): boolean {
  return response.write === ServerResponse.prototype.write
}

const MAX_FRAMED = 16 * 1024

/** Can a chunk be written to the connection in its framing? Its head must be out, and nothing waiting. */
function isFramed(response: ServerResponse, socket: Socket, chunk: Buffer): boolean {
  return (
    response.chunkedEncoding &&
    response.headersSent &&
    response.writableLength === socket.writableLength &&
    chunk.length <= MAX_FRAMED
  )
}

const CR = 0x0d
const LF = 0x0a
const HEX = Buffer.from('0123456789abcdef')

/**
 * A chunk of the chunked transfer coding (RFC 9112, section 7.1) in one piece. ServerResponse would
 * write its size, its bytes and its end as three, which costs a third of a chunk's whole way.
 */
function frame(chunk: Buffer): Buffer {
  const { length } = chunk
  let digits = 1
  for (let rest = length >> 4; rest > 0; rest >>= 4) digits++
  const framed = Buffer.allocUnsafe(digits + length + 4)
  let size = length
  for (let at = digits - 1; at >= 0; at--, size >>= 4) framed[at] = HEX[size & 15]!
  framed[digits] = CR
  framed[digits + 1] = LF
  framed.set(chunk, digits + 2)
  framed[framed.length - 2] = CR
  framed[framed.length - 1] = LF
  return framed
}
