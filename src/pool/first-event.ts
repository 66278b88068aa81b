import type { Dialect } from '../dialects/dialect.ts'
import type { Failure } from '../dialects/failure.ts'
import type { Framing } from '../http.ts'
import { failureOf } from '../metering/event.ts'

/** More than this (bytes) is not waited for. */
const MAX_HELD = 16 * 1024
/** Tokens have been spent, and the client gets what they were spent on. */
const USAGE = /"usage"\s*:\s*\{/

/**
 * The first event of a stream, or a JSON body that comes in one piece. Inference servers say 200 before they
 * look closely, so a response may begin with an error; as long as nothing else has come another backend can
 * be asked.
 *
 * @example
 * new FirstEvent('sse', openai).see(Buffer.from('data: {"error":{"code":503}}\n')) // '5xx'
 */
export class FirstEvent {
  readonly chunks: Buffer[] = []
  readonly #framing: Framing
  readonly #dialect: Dialect
  #text = ''
  /** Where the line begins that is not complete. */
  #line = 0
  #isSeen = false

  constructor(framing: Framing, dialect: Dialect) {
    this.#framing = framing
    this.#dialect = dialect
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
    this.#text += chunk.toString('latin1')
    const event = this.#event()
    if (event === undefined && this.#text.length < MAX_HELD) return 'incomplete'
    this.#isSeen = true
    if (event === undefined) return 'response'
    return failureOf(event, this.#dialect, this.#framing) ?? 'response'
  }

  /** Its JSON, when it is there; comments and the like are none. A JSON body is not waited for. */
  #event(): string | undefined {
    if (this.#framing === 'json') return USAGE.test(this.#text) ? '' : this.#text
    for (;;) {
      const end = this.#text.indexOf('\n', this.#line)
      if (end === -1) return undefined
      const line = this.#text.slice(this.#line, end).trim()
      this.#line = end + 1
      if (this.#framing === 'ndjson' && line !== '') return line
      const [, field, data] = /^(data|error):(.+)/.exec(line) ?? []
      // llama.cpp had errors in lines of their own.
      if (field !== undefined) return field === 'error' ? `{"error":${data}}` : data
    }
  }
}
