import type { Dialect } from '../dialects/dialect.ts'
import type { Failure } from '../dialects/failure.ts'
import { type Framing, framingOfText } from '../http.ts'
import { failureOf } from '../metering/event.ts'
import { EventReader } from '../wire/event-reader.ts'

/** Maximum bytes buffered while waiting for the first event. */
const MAX_HELD = 16 * 1024
/** Tokens have been spent, and the client gets what they were spent on. */
const USAGE = /"usage"\s*:\s*\{/

/** What is known of a response before its body comes. */
export interface Expected {
  /** undefined: no failure is looked for. */
  dialect: Dialect | undefined
  /** The framing that the request asked for; undefined: none. */
  asked: Framing | undefined
  /** The framing that `content-type` names. */
  declared: Framing | undefined
  /** It comes out of a decoder, which can fail at its end: a short JSON body is waited for. */
  isDecoded: boolean
}

/**
 * The beginning of a response: it shows the framing, whatever `content-type` says. Inference servers say 200
 * before they look closely, so the first event of a stream, or a JSON body that comes in one piece, may be an
 * error. As long as nothing else has come another backend can be asked.
 *
 * @example
 * const expected = { dialect: openai, asked: 'sse', declared: undefined, isDecoded: false }
 * new FirstEvent(expected).see(Buffer.from('data: {"error":{"code":503}}\n\n')) // '5xx'
 */
export class FirstEvent {
  readonly chunks: Buffer[] = []
  readonly #expected: Expected
  /** What the text shows. */
  #shown: Framing | 'unclear' | undefined = 'unclear'
  #text = ''
  /** Reads the text, once its framing is known; of the text it has had `#read` characters. */
  #reader: EventReader | undefined
  #read = 0
  #data = ''
  #isSeen = false

  constructor(expected: Expected) {
    this.#expected = expected
  }

  /** Whether the body itself shows its framing; undefined: not enough has come. */
  get isShown(): boolean | undefined {
    return this.#shown === 'unclear' ? undefined : this.#shown !== undefined
  }

  get framing(): Framing | undefined {
    const { asked, declared } = this.#expected
    if (this.#shown === 'unclear') return declared ?? asked
    return this.#shown ?? declared
  }

  /**
   * Takes the next chunk.
   *
   * @returns `incomplete`: it has not come yet; `response`: it reports no failure; else how the backend has
   * failed.
   */
  see(chunk: Buffer): 'incomplete' | 'response' | Failure {
    if (this.#isSeen) return 'response'
    this.chunks.push(chunk)
    // Byte by byte, so that a character may be cut: what is looked for is ASCII.
    this.#text += chunk.toString('latin1', 0, MAX_HELD)
    this.#look()
    const event = this.#event()
    if (event === undefined && this.#isAwaited()) return 'incomplete'
    return this.#judge(event)
  }

  /** All has come. */
  end(): 'response' | Failure {
    if (this.#isSeen) return 'response'
    // A line end shows what a beginning of a line is.
    this.#text += '\n'
    this.#look()
    if (this.framing === 'json') return this.#judge(this.#text)
    const event = this.#event()
    this.#reader?.feedEnd()
    return this.#judge(event ?? this.#nextEvent())
  }

  #look(): void {
    const { asked, declared } = this.#expected
    if (this.#shown !== 'unclear') return
    this.#shown = asked === undefined ? declared : framingOfText(this.#text, asked, declared)
  }

  #isAwaited(): boolean {
    return this.#text.length < MAX_HELD && this.framing !== undefined
  }

  #judge(event: string | undefined): 'response' | Failure {
    this.#isSeen = true
    const { framing } = this
    const { dialect } = this.#expected
    if (event === undefined || framing === undefined || dialect === undefined) return 'response'
    if (framing === 'json' && USAGE.test(event)) return 'response'
    return failureOf(event, dialect, framing, this.#reader?.isError) ?? 'response'
  }

  /** Its JSON, when it is there; comments and the like are none. */
  #event(): string | undefined {
    const { framing } = this
    if (this.#shown === 'unclear' || framing === undefined) return undefined
    if (framing === 'json') {
      const isTooLong = this.#text.length >= MAX_HELD
      return isTooLong || this.#expected.isDecoded ? undefined : this.#text
    }
    this.#reader ??= new EventReader(framing)
    const rest = this.#text.slice(this.#read)
    this.#read = this.#text.length
    this.#reader.feed(Buffer.from(rest, 'latin1'))
    return this.#nextEvent()
  }

  /** The data of the first event that has some, as JSON. */
  #nextEvent(): string | undefined {
    const reader = this.#reader
    for (let next = reader?.next(); reader && next !== undefined; next = reader.next()) {
      if (next === 'data') this.#data += reader.data.toString('latin1')
      else if (reader.hasData) return this.#data
    }
    return undefined
  }
}
