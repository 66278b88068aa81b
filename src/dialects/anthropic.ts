import type { GatewayError } from '../errors.ts'
import type { Dialect } from './dialect.ts'
import { failureIn } from './failure.ts'
import { MESSAGES } from './prompt.ts'

const TYPES: Record<number, string> = {
  401: 'authentication_error',
  403: 'permission_error',
  404: 'not_found_error',
  413: 'request_too_large',
  429: 'rate_limit_error',
  503: 'overloaded_error',
  504: 'timeout_error'
}

function anthropicError(error: GatewayError, requestId: string) {
  const type =
    TYPES[error.statusCode] ?? (error.statusCode < 500 ? 'invalid_request_error' : 'api_error')
  return { type: 'error', error: { type, message: error.message }, request_id: requestId }
}

/** The Messages API, https://docs.claude.com/en/api/errors */
export const anthropic: Dialect = {
  name: 'anthropic',
  idHeader: 'request-id',
  streamsEvents: true,
  error: anthropicError,
  endsWithError: false,
  errorEvents: (error, { requestId }) =>
    `event: error\ndata: ${JSON.stringify(anthropicError(error, requestId))}\n\n`,
  deltaMembers: ['text', 'partial_json', 'thinking'],
  answerMembers: ['text', 'input', 'thinking'],
  prompt: MESSAGES,
  reasoningMembers: ['thinking'],
  endTypes: ['message_stop', 'error'],
  failure: report => failureIn(report, ['error'])
}
