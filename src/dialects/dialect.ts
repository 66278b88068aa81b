import type { GatewayError } from '../errors.ts'
import type { Failure, Report } from './failure.ts'
import type { PromptForm } from './prompt.ts'

/** How far a stream has come when the gateway ends it. */
export interface StreamPosition {
  requestId: string
  /** Id of the response, if one has been seen. */
  responseId: string | undefined
  /** The model as the client calls it. */
  model: string | undefined
  /** `sequence_number` of the next event. */
  sequence: number
}

/**
 * What the gateway must know about one API: how an error looks, in a body and in a stream, and
 * what counts as a piece of the answer while it streams.
 */
export interface Dialect {
  name: 'openai' | 'responses' | 'anthropic' | 'ollama'
  /** The header in which its clients look for the id of a request. */
  idHeader: 'x-request-id' | 'request-id'
  /** Its streams are server-sent events, in which comments can stand. */
  streamsEvents: boolean
  /** The error as a JSON body. */
  error(error: GatewayError, requestId: string): object
  /** The error as the last events of a stream that has begun. */
  errorEvents(error: GatewayError, position: StreamPosition): string
  /** Whether these events end the response themselves. Otherwise its connection is broken, because clients take an end for success. */
  endsWithError: boolean
  /** How it passes requests to the model, on routes that do not say otherwise. */
  prompt: PromptForm
  /** Members whose text, when it isn't empty, or whose object is a piece of the answer. */
  deltaMembers: readonly string[]
  /** The same in an answer that comes whole, as one JSON object. */
  answerMembers: readonly string[]
  /** Members of both lists that hold reasoning. The Responses API has it in events whose `type` names it. */
  reasoningMembers: readonly string[]
  /** Values of an event's `type` that end a stream properly (beside `[DONE]` and `"done": true`). */
  endTypes: readonly string[]
  /** How the backend failed according to one event or one whole JSON body; undefined: it did not. */
  failure(report: Report): Failure | undefined
}
