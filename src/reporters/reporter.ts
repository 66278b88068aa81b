/** Where usage records go. Nothing here is on the way of an answer. */
export interface Reporter {
  readonly name: string
  /** It sends request bodies, too. */
  readonly wantsBody: boolean
  /** Deliveries at a time; their order is kept at 1 alone. */
  readonly concurrency: number
  /** How many records go together, and how long (ms) one waits for others. */
  readonly batch: { max_events: number; max_wait: number }
  /** How old (ms) a record may be that is still tried. */
  readonly maxAge: number
  /** Is this record one that it wants? */
  accepts(entry: string): boolean
  /** Delivers these records together. Never throws. */
  send(entries: readonly string[], signal: AbortSignal): Promise<Verdict>
  close(): Promise<void>
}

/**
 * What came of a delivery. `refused`: these records are not taken, others may be; `unavailable`: nobody
 * took anything. `retryAfter`: how long (ms) the receiver asks to be left alone.
 */
export type Verdict =
  | { kind: 'delivered' }
  | { kind: 'refused' | 'unavailable'; reason: string; retryAfter: number }

/** Where a reporter brings records to. */
export type Receiver = Pick<Reporter, 'concurrency' | 'batch' | 'wantsBody' | 'send' | 'close'> & {
  /** @throws {NewerFormatError} when a newer version has written what is there */
  open?(): Promise<void>
}

/** A delivery that is given up when the signal fires; what comes of it then nobody learns. */
export function whileRunning(
  signal: AbortSignal,
  deliver: () => Promise<Verdict>
): Promise<Verdict> {
  return untilStopped(signal, deliver, { kind: 'unavailable', reason: 'STOPPED', retryAfter: 0 })
}

/** What comes of some work, or `otherwise` when the signal fires before. */
export async function untilStopped<T>(
  signal: AbortSignal,
  work: () => Promise<T>,
  otherwise: T
): Promise<T> {
  const stopped = Promise.withResolvers<T>()
  const stop = () => stopped.resolve(otherwise)
  signal.addEventListener('abort', stop, { once: true })
  if (signal.aborted) stop()
  try {
    return await Promise.race([stopped.promise, work()])
  } finally {
    signal.removeEventListener('abort', stop)
  }
}

/** Stands between a record and the request's body, which some reporters send. */
const BODY = '\0'

/** A record as it is stored: its JSON, and the request's body behind it where somebody wants that. */
export function toEntry(json: string, body: Buffer | undefined): string {
  return body === undefined ? json : json + BODY + body
}

/** The JSON of a record; `withBody`: and in it, if it is there, `request_body`. */
export function recordJson(entry: string, withBody: boolean): string {
  const end = entry.indexOf(BODY)
  if (end === -1) return entry
  const json = entry.slice(0, end)
  return withBody ? `${json.slice(0, -1)},"request_body":${entry.slice(end + 1)}}` : json
}
