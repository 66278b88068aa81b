/**
 * The path of a request below the prefix its plugin was registered with, without the query.
 *
 * @example
 * pathBelow('/llm/v1/models?x=1', '/llm') // '/v1/models'
 */
export function pathBelow(url: string, prefix: string): string {
  return url.slice(prefix.endsWith('/') ? prefix.length - 1 : prefix.length).split('?', 1)[0]!
}

/**
 * `retry-after` (RFC 9110, section 10.2.3) in milliseconds: seconds, with fractions as some servers
 * send them, or a date. 0 for anything else.
 *
 * @example
 * parseRetryAfter('1.5') // 1500
 */
export function parseRetryAfter(value: string | string[] | undefined): number {
  if (typeof value !== 'string') return 0
  const ms = /^\d+(\.\d+)?$/.test(value) ? Number(value) * 1000 : Date.parse(value) - Date.now()
  return Number.isNaN(ms) ? 0 : Math.max(0, ms)
}

/**
 * The media type that a `content-type` names (RFC 9110, section 8.3.1), without its parameters, however they
 * are set off.
 *
 * @example
 * mediaType('Text/Event-Stream; charset=utf-8') // 'text/event-stream'
 */
export function mediaType(contentType: unknown): string {
  return String(contentType)
    .trim()
    .split(/[;,\s]/, 1)[0]!
    .toLowerCase()
}

/** How a response is cut into JSON texts: SSE events, lines, or one text. */
export type Framing = 'sse' | 'ndjson' | 'json'

const FRAMINGS: Record<string, Framing | undefined> = {
  'text/event-stream': 'sse',
  'application/x-ndjson': 'ndjson',
  'application/ndjson': 'ndjson',
  'application/jsonl': 'ndjson',
  'application/json': 'json'
}

/**
 * The framing of responses with this `content-type`; undefined: it names none.
 *
 * @example
 * framingOf('text/event-stream; charset=utf-8') // 'sse'
 */
export function framingOf(contentType: unknown): Framing | undefined {
  const type = mediaType(contentType)
  return FRAMINGS[type] ?? (type.endsWith('+json') ? 'json' : undefined)
}

/** Whether a response of this framing comes bit by bit. */
export function isStream(framing: Framing | undefined): boolean {
  return framing === 'sse' || framing === 'ndjson'
}

/** A byte order mark, read as Latin-1, and white space. */
const BLANK = /^(?:\u00ef\u00bb\u00bf)?\s*/
/** Names of fields in an event stream; llama.cpp had errors in lines of their own. A comment has none. */
const FIELDS = ['data:', 'event:', 'id:', 'retry:', 'error:', ':']

/**
 * The framing of a response that begins with this text (Latin-1), whatever its `content-type` says.
 * `unclear`: not enough has come; undefined: it is none of these.
 *
 * @param asked the framing that the request asked for
 * @param declared the framing that `content-type` names
 * @example
 * framingOfText('data: {"id":', 'sse', undefined) // 'sse'
 */
export function framingOfText(
  beginning: string,
  asked: Framing,
  declared: Framing | undefined
): Framing | 'unclear' | undefined {
  const text = beginning.replace(BLANK, '')
  if (text[0] === '{' || text[0] === '[') {
    return asked === 'ndjson' || declared === 'ndjson' ? 'ndjson' : 'json'
  }
  if (FIELDS.some(field => text.startsWith(field))) return 'sse'
  return FIELDS.some(field => field.startsWith(text)) ? 'unclear' : undefined
}
