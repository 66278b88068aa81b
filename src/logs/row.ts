import type { Exchange } from '../exchange.ts'

/** What a log of requests says about one of them. Never a key, and no query string. */
export interface RequestRow {
  request_id: string
  /** When the request came, ISO 8601 in UTC. */
  timestamp: string
  client_ip: string | null
  method: string | null
  path: string | null
  /** The key's id, its name, who pays. */
  api_key_id: string | null
  caller: string | null
  user_id: string | null
  model: string | null
  is_stream: boolean
  /** What the client got; 499: it left before there was one. */
  status_code: number
  outcome: string
  /** Code of the error, as in docs/errors.md. */
  error: string | null
  latency_ms: number
  /** Time to first token. */
  ttft_ms: number | null
  backend: string | null
  backend_url: string | null
  attempts: number
  input_tokens: number | null
  output_tokens: number | null
  user_agent: string | null
  /** The beginning of the request's body, where somebody asked for it. */
  request_body?: string
}

/** What clients send is cut (characters). */
const MAX_NAME = 200
const MAX_PATH = 1000

/** The row of an exchange that is over. */
export function toRow(exchange: Exchange): RequestRow {
  const { request, usage, ttftMs } = exchange
  const { caller, payload, url } = request
  return {
    request_id: exchange.id,
    timestamp: new Date(exchange.time).toISOString(),
    client_ip: exchange.clientIp,
    method: request.method,
    // Before a path there may be a name and a password.
    path: url.startsWith('/') ? url.split('?', 1)[0]!.slice(0, MAX_PATH) : null,
    api_key_id: cut(caller?.id),
    caller: cut(caller?.name),
    user_id: cut(caller?.userId),
    model: cut(payload?.model),
    is_stream: payload?.stream ?? false,
    status_code: exchange.statusCode,
    outcome: exchange.outcome,
    error: exchange.errorCode ?? null,
    latency_ms: Math.round(exchange.durationMs),
    ttft_ms: ttftMs === undefined ? null : Math.round(ttftMs),
    backend: exchange.backend ?? null,
    backend_url: exchange.backendUrl ?? null,
    attempts: exchange.attempts,
    input_tokens: usage?.promptTokens ?? null,
    output_tokens: usage?.completionTokens ?? null,
    user_agent: cut(request.headers['user-agent'])
  }
}

/** The row of a request that could not become an exchange. */
export function toStillbornRow(
  id: string,
  error: { code: string; statusCode: number },
  clientIp: string | undefined
): RequestRow {
  return {
    request_id: id,
    timestamp: new Date().toISOString(),
    client_ip: clientIp ?? null,
    method: null,
    path: null,
    api_key_id: null,
    caller: null,
    user_id: null,
    model: null,
    is_stream: false,
    status_code: error.statusCode,
    outcome: 'rejected',
    error: error.code,
    latency_ms: 0,
    ttft_ms: null,
    backend: null,
    backend_url: null,
    attempts: 0,
    input_tokens: null,
    output_tokens: null,
    user_agent: null
  }
}

function cut(text: string | undefined): string | null {
  return text?.slice(0, MAX_NAME) ?? null
}
