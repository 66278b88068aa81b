import type { Framing } from '../http.ts'
import type { FailureKind } from './lineup.ts'

/** More than this (bytes) is not waited for. */
const MAX_HELD = 16 * 1024
/** What servers call it when they have too much to do. */
const BUSY = /overloaded|rate_limit|too_many|queue|busy/i
/** What they call it, or say, when the request is at fault. */
const CALLERS_FAULT =
  /bad_?request|invalid|validation|not_?found|not found|authentication|permission|exceed|context_length|content_filter|not support|too long|must be|required/i

/**
 * The first event of a stream. Inference servers say 200 before they look closely, so a stream may begin
 * with an error; as long as nothing else has come another backend can be asked.
 *
 * @example
 * new FirstEvent('sse').see(Buffer.from('data: {"error":{"code":503}}\n')) // '5xx'
 */
export class FirstEvent {
  readonly chunks: Buffer[] = []
  readonly #framing: Exclude<Framing, 'json'>
  #text = ''
  /** Where the line begins that is not complete. */
  #line = 0
  #isSeen = false

  constructor(framing: Exclude<Framing, 'json'>) {
    this.#framing = framing
  }

  /**
   * Takes the next chunk.
   *
   * @returns `incomplete`: it has not come yet; `answer`: it is none that another backend could do better;
   * else how the backend has failed.
   */
  see(chunk: Buffer): 'incomplete' | 'answer' | FailureKind {
    if (this.#isSeen) return 'answer'
    this.chunks.push(chunk)
    // Byte by byte, so that a character may be cut: what is looked for is ASCII.
    this.#text += chunk.toString('latin1')
    const event = this.#event()
    if (event === undefined && this.#text.length < MAX_HELD) return 'incomplete'
    this.#isSeen = true
    return (event === undefined ? undefined : failureOf(event)) ?? 'answer'
  }

  /** Its JSON, when it is there; comments and the like are none. */
  #event(): string | undefined {
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

/** How a backend has failed that says this; undefined: it has not, or the request is at fault. */
export function failureOf(event: string): FailureKind | undefined {
  if (!event.includes('"error"')) return undefined
  const { error, response, choices, ...flat } = parse(event)
  if (choices !== undefined) return undefined
  if (flat.type === 'response.failed') return kindOf(Object(Object(response).error))
  if (flat.object === 'error') return kindOf(flat)
  if (typeof error === 'string' && error !== '') return kindOf({ message: error, ...flat })
  const isSaid = typeof error === 'object' && error !== null && Object.keys(error).length > 0
  return isSaid ? kindOf({ ...flat, ...error }) : undefined
}

function kindOf(error: Record<string, unknown>): FailureKind | undefined {
  const { code, type, error_type = type, message } = error
  const status = Number(code)
  if (status === 429) return '429'
  if (status >= 500) return '5xx'
  if (status >= 400) return undefined
  const said = `${error_type} ${code} ${message}`
  if (CALLERS_FAULT.test(said)) return undefined
  return BUSY.test(said) ? '429' : '5xx'
}

function parse(json: string): Record<string, unknown> {
  try {
    return Object(JSON.parse(json))
  } catch {
    return {}
  }
}
