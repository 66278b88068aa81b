import type { Framing } from '../http.ts'
import type { FailureKind } from './pool.ts'

/** More than this (bytes) is not waited for. */
const MAX_HELD = 16 * 1024
/** What servers call it when they have too much to do. */
const BUSY = /overloaded|rate_limit|too_many/i
/** What they call it when the request is at fault. */
const CALLERS_FAULT = /bad_?request|invalid|validation|not_?found|authentication|permission|exceed/i

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
  #size = 0
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
    this.#size += chunk.length
    const event = this.#event()
    if (event === undefined && this.#size < MAX_HELD) return 'incomplete'
    this.#isSeen = true
    return (event === undefined ? undefined : failureOf(event)) ?? 'answer'
  }

  /** Its JSON, when it is there; comments and the like are none. */
  #event(): string | undefined {
    const text = Buffer.concat(this.chunks).toString()
    let from = 0
    for (;;) {
      const end = text.indexOf('\n', from)
      if (end === -1) return undefined
      const line = text.slice(from, end).trim()
      from = end + 1
      // llama.cpp had errors in lines of their own.
      const data = this.#framing === 'ndjson' ? line : /^(?:data|error):(.*)/.exec(line)?.[1]
      if (data) return data
    }
  }
}

/** How a backend has failed that says this; undefined: it has not, or the request is at fault. */
function failureOf(event: string): FailureKind | undefined {
  if (!event.includes('"error"')) return undefined
  const { error, ...flat } = parse(event)
  if (error === undefined || error === null)
    return flat.object === 'error' ? kindOf(flat) : undefined
  return kindOf(typeof error === 'object' ? { ...flat, ...error } : flat)
}

function kindOf({
  code,
  type,
  error_type = type
}: Record<string, unknown>): FailureKind | undefined {
  const status = Number(code)
  if (status === 429 || BUSY.test(String(error_type))) return '429'
  if (status >= 400 && status < 500) return undefined
  return CALLERS_FAULT.test(String(error_type)) ? undefined : '5xx'
}

function parse(json: string): Record<string, unknown> {
  try {
    return Object(JSON.parse(json))
  } catch {
    return {}
  }
}
