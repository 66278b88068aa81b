import type { LimitStore } from './limits/store.ts'
import type { Say } from './logs/shared-lines.ts'
import type { Explanation } from './pool/decisions.ts'
import type { Sink } from './reporters/posts.ts'
import type { StoredResponse } from './routes/stored-responses.ts'

/** The other processes that serve the same port (`server.workers`). */
export interface Peers {
  /** How many processes there are, with this one. */
  readonly count: number
  /** The metrics of all together, in Prometheus' text format. */
  metrics(): Promise<string>
  /** Tells the others something that goes through JSON. */
  tell(news: News): void
  /** Writes a log line that the others write, too. */
  say: Say
  /** Where usage records go: one process writes them down for all. */
  readonly usage: Sink
  /** What one process counts for all, where limits are kept in memory. */
  readonly limits: LimitStore
  /** How that one fares; of what waits there one of the others tells, so that the sum is right. */
  readonly outbox: OutboxState
  onNews(listener: (news: News) => void): void
  /** Reads the configuration again, in all processes, and returns the changes as JSON. */
  reload(): Promise<string>
}

export interface OutboxState {
  /** Records that are known there and not delivered. */
  pending: number
  /** Why records cannot be made safe at the moment. */
  trouble: string | undefined
}

/** Something that all workers must know. */
export type News =
  | ResponseMade
  | KeysChanged
  | BackendDrained
  | ExplanationWanted
  | ExplanationGiven

/** A stored response was made: later requests about it go to the same backend. */
export interface ResponseMade {
  kind: 'response'
  response: StoredResponse
  /** It is billed or lost: nothing stays reserved for it. */
  isSettled?: boolean
}

/** Keys of the builtin store were changed: what is remembered of them is old. */
export interface KeysChanged {
  kind: 'keys'
  /** SHA-256 of each; absent: all may be. */
  hashes?: readonly string[]
}

/** A backend gets no more calls, or gets them again. */
export interface BackendDrained {
  kind: 'backend'
  backend: string
  drained: boolean
}

/** Whoever has served this request says why as it did; the others say that they have not. */
export interface ExplanationWanted {
  kind: 'explain'
  /** Of this question, for its answers. */
  question: string
  request: string
}

export interface ExplanationGiven {
  kind: 'explained'
  question: string
  explanation: Explanation | null
}
