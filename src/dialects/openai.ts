import type { GatewayError } from '../errors.ts'
import type { Dialect } from './dialect.ts'
import { failureIn } from './failure.ts'
import { CHAT } from './prompt.ts'

/** OpenAI's error object, https://platform.openai.com/docs/guides/error-codes */
export function openaiError(error: GatewayError) {
  return {
    error: { message: error.message, type: errorType(error), param: null, code: error.code }
  }
}

function errorType({ statusCode, code }: GatewayError): string {
  if (code === 'insufficient_quota') return 'insufficient_quota'
  if (statusCode === 401) return 'authentication_error'
  if (statusCode === 403) return 'permission_error'
  if (statusCode === 429) return 'rate_limit_error'
  return statusCode < 500 ? 'invalid_request_error' : 'server_error'
}

const PIECES = ['content', 'reasoning_content', 'reasoning', 'arguments', 'refusal', 'text']

/** Chat completions and completions, and every route that has no API of its own. */
export const openai: Dialect = {
  name: 'openai',
  idHeader: 'x-request-id',
  streamsEvents: true,
  error: openaiError,
  errorEvents: error => `data: ${JSON.stringify(openaiError(error))}\n\n`,
  endsWithError: false,
  deltaMembers: PIECES,
  answerMembers: PIECES,
  prompt: CHAT,
  reasoningMembers: ['reasoning_content', 'reasoning'],
  endTypes: [],
  failure: report => failureIn(report)
}
