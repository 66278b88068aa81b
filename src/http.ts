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
 * The media type that a `content-type` names (RFC 9110, section 8.3.1), without its parameters.
 *
 * @example
 * mediaType('Text/Event-Stream; charset=utf-8') // 'text/event-stream'
 */
export function mediaType(contentType: unknown): string {
  return String(contentType).split(';', 1)[0]!.trim().toLowerCase()
}

/** How an answer is cut into JSON texts: SSE events, lines, or one text. */
export type Framing = 'sse' | 'ndjson' | 'json'

const FRAMINGS: Record<string, Framing | undefined> = {
  'text/event-stream': 'sse',
  'application/x-ndjson': 'ndjson',
  'application/json': 'json'
}

/**
 * The framing of answers with this `content-type`; undefined: they are no JSON.
 *
 * @example
 * framingOf('text/event-stream; charset=utf-8') // 'sse'
 */
export function framingOf(contentType: unknown): Framing | undefined {
  return FRAMINGS[mediaType(contentType)]
}

/** Is it a media type whose answers come bit by bit: server-sent events, or JSON lines? */
export function isStream(type: string): boolean {
  return type === 'text/event-stream' || type === 'application/x-ndjson'
}
