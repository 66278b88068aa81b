import type { Dialect } from './dialect.ts'
import { failureIn } from './failure.ts'
import { CHAT } from './prompt.ts'

const PIECES = ['content', 'response', 'thinking', 'arguments']

/** Ollama's native API: one JSON object a line, usage on the last, errors as `{"error": "text"}`. */
export const ollama: Dialect = {
  name: 'ollama',
  idHeader: 'x-request-id',
  streamsEvents: false,
  error: error => ({ error: error.message }),
  endsWithError: false,
  errorEvents: error => `${JSON.stringify({ error: error.message })}\n`,
  deltaMembers: PIECES,
  answerMembers: PIECES,
  prompt: CHAT,
  reasoningMembers: ['thinking'],
  endTypes: [],
  failure: report => failureIn(report)
}
