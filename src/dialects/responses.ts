import type { Dialect } from './dialect.ts'
import { failureIn } from './failure.ts'
import { openaiError } from './openai.ts'
import { RESPONSE } from './prompt.ts'

/** The Responses API: typed events, usage inside `response.completed`, no `[DONE]`. */
export const responses: Dialect = {
  name: 'responses',
  idHeader: 'x-request-id',
  streamsEvents: true,
  error: openaiError,
  errorEvent: error => {
    const { code, message } = error
    return `event: error\ndata: ${JSON.stringify({ type: 'error', code, message, param: null })}\n\n`
  },
  deltaMembers: ['delta'],
  answerMembers: ['text', 'arguments'],
  prompt: RESPONSE,
  reasoningMembers: [],
  endTypes: ['response.completed', 'response.failed', 'response.incomplete', 'error'],
  failure: report => failureIn(report, ['error', 'response.failed'], ['failed'])
}
