/**
 * What one exchange spent, as it is reported: flat fields for simple receivers, and `usage` beside
 * them as the original sends it.
 */
export interface UsageEvent {
  request_id: string
  /** End of the exchange, ISO 8601 in UTC. */
  timestamp: string
  user_id: string | null
  api_key_id: string | null
  model: string | null
  prompt_tokens: number
  completion_tokens: number
  total_tokens: number
  is_stream: boolean
  /** `exact`: the backend said so; `counted`: its deltas were counted; null: no tokens known. */
  exactness: 'exact' | 'counted' | null
  /** The route's pattern, such as `/v1/chat/completions`. */
  endpoint: string
  method: string
  path: string
  backend: string
  backend_url: string
  attempts: number
  outcome: string
  status_code: number
  latency_ms: number
  usage?: { prompt_tokens: number; completion_tokens: number; total_tokens: number } | undefined
}

/** The reporters of one configuration, and how many exchanges began under it and still run. */
export interface Audience {
  reporters: Reporter[]
  wantsBody: boolean
  exchanges: number
}

/** Where usage events go. Nothing here is on the way of an answer. */
export interface Reporter {
  readonly name: string
  /** It sends request bodies, too. */
  readonly wantsBody: boolean
  /** `body`: the request's JSON, for reporters that were asked to send it. */
  report(event: UsageEvent, body: Buffer | undefined): void
  /** Events not delivered yet. */
  readonly pending: number
  /** Delivers what is pending and gives up when the signal fires. May be called again, to hurry. */
  close(signal: AbortSignal): Promise<void>
}
