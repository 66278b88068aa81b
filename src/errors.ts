/**
 * Every error the gateway itself makes: its code (stable, for programs), status and text.
 * How an error looks on the wire is the business of the route's dialect (`dialects/`).
 */

const STATUS = {
  invalid_request: 400,
  invalid_json: 400,
  invalid_path: 400,
  model_required: 400,
  missing_api_key: 401,
  missing_admin_token: 401,
  invalid_api_key: 401,
  invalid_admin_token: 403,
  key_disabled: 403,
  key_expired: 403,
  key_not_started: 403,
  ip_not_allowed: 403,
  model_not_allowed: 403,
  model_not_priced: 403,
  key_refused: 403,
  not_found: 404,
  model_not_found: 404,
  method_not_allowed: 405,
  request_timeout: 408,
  conflict: 409,
  body_too_large: 413,
  unsupported_encoding: 415,
  unknown_expectation: 417,
  upgrade_not_supported: 426,
  invalid_config: 422,
  rate_limit_exceeded: 429,
  insufficient_quota: 429,
  headers_too_large: 431,
  client_gone: 499,
  internal_error: 500,
  backend_unreachable: 502,
  backend_failed: 502,
  auth_unavailable: 503,
  limits_unavailable: 503,
  store_unavailable: 503,
  no_backend: 503,
  overloaded: 503,
  shutting_down: 503,
  backend_timeout: 504
} as const

export type ErrorCode = keyof typeof STATUS

/**
 * An error made by the gateway, not by a backend.
 *
 * @example
 * const error = new GatewayError('no_backend', 'No backend is available.')
 * error.statusCode // 503
 */
export class GatewayError extends Error {
  readonly code: ErrorCode
  readonly statusCode: number
  /** Response headers that go with it, such as `retry-after`. SDKs follow `x-should-retry`. */
  readonly headers: Record<string, string>

  constructor(
    code: ErrorCode,
    message: string,
    options: { statusCode?: number; headers?: Record<string, string>; cause?: unknown } = {}
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.name = 'GatewayError'
    this.code = code
    this.statusCode = options.statusCode ?? STATUS[code]
    this.headers = isFinal(this.statusCode)
      ? { 'x-should-retry': 'false', ...options.headers }
      : (options.headers ?? {})
  }
}

/** Client errors that are not a matter of time. */
const TEMPORARY = [408, 409, 425, 429, 499]

/** Whether the same request would be rejected again. */
function isFinal(status: number): boolean {
  return status < 500 && !TEMPORARY.includes(status)
}

/**
 * The gateway's view of any error thrown while a request was handled: Fastify's own 4xx errors keep
 * their status and lose their internals, everything unexpected becomes a 500 that tells nothing.
 */
export function toGatewayError(error: unknown): GatewayError {
  if (error instanceof GatewayError) return error
  const { statusCode, code } = error as { statusCode?: number; code?: string }
  if (code === 'FST_ERR_CTP_BODY_TOO_LARGE') {
    return new GatewayError(
      'body_too_large',
      'The request body is larger than this server accepts.'
    )
  }
  if (code === 'FST_ERR_BAD_URL' || code === 'FST_ERR_MAX_PARAM_LENGTH') {
    return new GatewayError('invalid_path', 'The path of this request is not plain.')
  }
  if (statusCode !== undefined && statusCode >= 400 && statusCode < 500) {
    return new GatewayError('invalid_request', (error as Error).message, { statusCode })
  }
  return new GatewayError('internal_error', 'The gateway failed to handle this request.', {
    cause: error
  })
}

/** What went wrong, in a word where there is one: `ECONNREFUSED`. */
export function reasonOf({ code, message }: Error & { code?: unknown }): string {
  return typeof code === 'string' ? code : message
}

/** More of a model's name than this (characters) is not said back. */
const MAX_NAME = 200

/** The request names no model, and there is not exactly one to take. */
export function modelMissing(): GatewayError {
  return new GatewayError(
    'model_required',
    'model: the field is missing. Name a model; GET /v1/models lists those you may use.'
  )
}

/** As OpenAI says it, and without a word of the models there are. */
export function modelNotFound(model: string): GatewayError {
  const name = model.length > MAX_NAME ? `${model.slice(0, MAX_NAME)}...` : model
  return new GatewayError(
    'model_not_found',
    `The model \`${name}\` does not exist or you do not have access to it.`
  )
}
