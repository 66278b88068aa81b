import type { Exchange, Usage } from '../exchange.ts'
import { pathBelow } from '../http.ts'

/**
 * What one exchange spent: the flat fields, and `usage` beside them as the original sends it.
 * `prompt_tokens` and `input_tokens` are the same number, as are `completion_tokens` and `output_tokens`.
 */
export interface UsageRecord {
  /** A UUIDv7: whoever gets a record twice can tell by it. */
  id: string
  /** `req_` and the digits of `id`: as in the log, the answer and the backend's request. */
  request_id: string
  /** End of the exchange, ISO 8601 in UTC. */
  timestamp: string
  user_id: string | null
  api_key_id: string | null
  /** Name of the key, where it has one. */
  caller: string | null
  requested_model: string | null
  model: string | null
  prompt_tokens: number
  completion_tokens: number
  total_tokens: number
  input_tokens: number
  output_tokens: number
  /** Of the input, from a cache. */
  cached_tokens?: number | undefined
  /** Input tokens that were written to a cache. */
  cache_write_tokens?: number | undefined
  /** Of the output, reasoning. */
  reasoning_tokens?: number | undefined
  /** Tokens that backends reported in error responses: not part of the other counts, and without cost. */
  failed_input_tokens?: number | undefined
  failed_output_tokens?: number | undefined
  is_stream: boolean
  stream: boolean
  /** `exact`: the backend said so; `counted`: what passed of an answer that was cut; `estimated`: no usage in it; null: no tokens known. */
  exactness: 'exact' | 'counted' | 'at_least' | 'estimated' | null
  /** What it costs, where a price is configured. */
  cost?: number | undefined
  currency?: string | undefined
  /** Of the API key, and from request headers, as configured. */
  tags?: Record<string, string> | undefined
  /** The route's pattern, such as `/v1/chat/completions`. */
  endpoint: string
  method: string
  path: string
  backend: string
  backend_url: string
  attempts: number
  /** How often another backend went on with the answer; absent: never. */
  continuations?: number | undefined
  outcome: string
  status_code: number
  /** Time to first token; null when there was none. */
  ttft_ms: number | null
  duration_ms: number
  latency_ms: number
  usage?: { prompt_tokens: number; completion_tokens: number; total_tokens: number } | undefined
  /** Size (bytes) of a request body that is too large to be included. */
  request_body_omitted?: number | undefined
}

/** What a model costs: so much of `currency` for a million tokens of each kind. */
export interface Price {
  model: string
  input: number
  output: number
  cached?: number | undefined
  cache_write?: number | undefined
  currency: string
}

const MILLION = 1_000_000
const MAX_TAG = 200

/** The record of an exchange that is over, or about to be. */
export function toRecord(
  exchange: Exchange,
  prefix: string,
  tagHeaders: ReadonlyMap<string, string>,
  price: Price | undefined
): UsageRecord {
  const { request, usage } = exchange
  const { caller, payload } = request
  const input_tokens = usage?.promptTokens ?? 0
  const output_tokens = usage?.completionTokens ?? 0
  const total_tokens = usage?.totalTokens ?? 0
  const requested_model = exchange.model ?? null
  const model = exchange.served?.upstream ?? requested_model
  const stream = payload?.stream ?? false
  const duration_ms = Math.round(exchange.durationMs)
  return {
    id: uuidOf(exchange.id),
    request_id: exchange.id,
    timestamp: new Date().toISOString(),
    user_id: caller?.userId ?? null,
    api_key_id: caller?.id ?? null,
    caller: caller?.name ?? null,
    requested_model,
    model,
    prompt_tokens: input_tokens,
    completion_tokens: output_tokens,
    total_tokens,
    input_tokens,
    output_tokens,
    cached_tokens: usage?.cachedTokens,
    cache_write_tokens: usage?.cacheWriteTokens,
    reasoning_tokens: usage?.reasoningTokens,
    failed_input_tokens: exchange.failed?.input,
    failed_output_tokens: exchange.failed?.output,
    is_stream: stream,
    stream,
    exactness: usage?.exactness ?? null,
    cost: price && cost(price, partsOf(usage)),
    currency: price?.currency,
    tags: tags(request, tagHeaders),
    endpoint: exchange.endpoint?.url ?? request.routeOptions.url ?? '',
    method: request.method,
    path: pathBelow(request.url, prefix),
    backend: exchange.backend ?? '',
    backend_url: exchange.backendUrl ?? '',
    attempts: exchange.attempts,
    continuations: exchange.continuations || undefined,
    outcome: exchange.outcome,
    status_code: exchange.statusCode,
    ttft_ms: exchange.ttftMs === undefined ? null : Math.round(exchange.ttftMs),
    duration_ms,
    latency_ms: duration_ms,
    usage: usage && { prompt_tokens: input_tokens, completion_tokens: output_tokens, total_tokens },
    request_body_omitted: exchange.omittedBody
  }
}

/** Tokens by price; those that a cache was read or written for are part of the input. */
export interface PricedTokens {
  input: number
  output: number
  cached: number
  cacheWrite: number
}

export function partsOf(usage: Usage | undefined): PricedTokens {
  return {
    input: usage?.promptTokens ?? 0,
    output: usage?.completionTokens ?? 0,
    cached: usage?.cachedTokens ?? 0,
    cacheWrite: usage?.cacheWriteTokens ?? 0
  }
}

/** Without a price of their own, tokens from a cache and into it cost as much as the rest of the input. */
export function cost(price: Price, { input, output, cached, cacheWrite }: PricedTokens): number {
  const fresh = (input - cached - cacheWrite) * price.input
  const fromCache = cached * (price.cached ?? price.input)
  const intoCache = cacheWrite * (price.cache_write ?? price.input)
  return (fresh + fromCache + intoCache + output * price.output) / MILLION
}

/** What stands with the key counts more than what a client says: it must not put its bill on another team. */
function tags(
  { caller, headers }: Exchange['request'],
  tagHeaders: ReadonlyMap<string, string>
): Record<string, string> | undefined {
  if (tagHeaders.size === 0) return caller?.tags
  const found: Record<string, string> = {}
  for (const [tag, header] of tagHeaders) {
    const value = headers[header]
    if (value !== undefined) found[tag] = String(value).slice(0, MAX_TAG)
  }
  return { ...found, ...caller?.tags }
}

/** The UUID whose digits are in a request id. */
function uuidOf(requestId: string): string {
  const at = requestId.length - 32
  const digits = requestId.slice(at)
  return `${digits.slice(0, 8)}-${digits.slice(8, 12)}-${digits.slice(12, 16)}-${digits.slice(16, 20)}-${digits.slice(20)}`
}
