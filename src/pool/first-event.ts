import type { Dialect } from '../dialects/dialect.ts'
import type { Failure } from '../dialects/failure.ts'
import { type Framing, framingOfText } from '../http.ts'
import { failureOf } from '../metering/event.ts'

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
 * new FirstEvent(expected).see(Buffer.from('data: {"error":{"code":503}}\n')) // '5xx'
 */
export class FirstEvent {
  readonly chunks: Buffer[] = []
  readonly #expected: Expected
  /** What the text shows. */
  #shown: Framing | 'unclear' | undefined = 'unclear'
  #text = ''
  /** Where the line begins that is not complete. */
  #line = 0
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
    this.#text += '\n'
    this.#look()
    return this.#judge(this.framing === 'json' ? this.#text : this.#event())
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
    return failureOf(event, dialect, framing) ?? 'response'
  }

  /** Its JSON, when it is there; comments and the like are none. */
  #event(): string | undefined {
    const { framing } = this
    if (this.#shown === 'unclear' || framing === undefined) return undefined
    if (framing === 'json') {
      const isTooLong = this.#text.length >= MAX_HELD
      return isTooLong || this.#expected.isDecoded ? undefined : this.#text
    }
    for (;;) {
      const end = this.#text.indexOf('\n', this.#line)
      if (end === -1) return undefined
      const line = this.#text.slice(this.#line, end).trim()
      this.#line = end + 1
      if (framing === 'ndjson' && line !== '') return line
      const [, field, data] = /^(data|error):(.+)/.exec(line) ?? []
      if (field !== undefined) return field === 'error' ? `{"error":${data}}` : data
    }
  }
}
