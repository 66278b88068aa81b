import type { GatewayError } from '../errors.ts'
import type { Dialect, StreamPosition } from './dialect.ts'
import { failureIn } from './failure.ts'
import { openaiError } from './openai.ts'
import { RESPONSE } from './prompt.ts'

/** How servers describe a prompt that is too long. */
const TOO_LONG = /context (length|window|size)|maximum context|too many tokens|prompt is too long/i

/** Codex ends a turn at these codes, and repeats it after others. */
function failureCode({ code, statusCode, message }: GatewayError): string {
  if (code === 'insufficient_quota' || code === 'rate_limit_exceeded') return code
  if (statusCode >= 500) return 'server_error'
  return TOO_LONG.test(message) ? 'context_length_exceeded' : 'invalid_prompt'
}

function failedResponse(error: object, { responseId, requestId, model }: StreamPosition): object {
  return {
    id: responseId ?? requestId.replace(/^req_/, 'resp_'),
    object: 'response',
    created_at: Math.floor(Date.now() / 1000),
    status: 'failed',
    error,
    incomplete_details: null,
    model: model ?? '',
    output: [],
    usage: null
  }
}

function event(data: { type: string; [field: string]: unknown }): string {
  return `event: ${data.type}\ndata: ${JSON.stringify(data)}\n\n`
}

/** The Responses API: typed events, usage inside `response.completed`, no `[DONE]`. */
export const responses: Dialect = {
  name: 'responses',
  idHeader: 'x-request-id',
  streamsEvents: true,
  error: openaiError,
  errorEvents(error, position) {
    const { code, message } = error
    const failed = { code: failureCode(error), message }
    // The specification has the fields beside `type`. OpenAI sends them in `error`, and its SDKs throw only then: without
    // that, LangChain takes what has passed for the whole text.
    const body = { code, message, param: null, ...openaiError(error) }
    return (
      event({ type: 'error', sequence_number: position.sequence, ...body }) +
      event({
        type: 'response.failed',
        sequence_number: position.sequence + 1,
        response: failedResponse(failed, position)
      })
    )
  },
  endsWithError: true,
  deltaMembers: ['delta'],
  answerMembers: ['text', 'arguments'],
  prompt: RESPONSE,
  reasoningMembers: [],
  endTypes: ['response.completed', 'response.failed', 'response.incomplete', 'error'],
  failure: report => failureIn(report, ['error', 'response.failed'], ['failed'])
}
