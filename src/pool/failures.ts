import { errors } from 'undici'
import { GatewayError } from '../errors.ts'
import { CodingError } from './decoder.ts'
import type { FailureKind } from './lineup.ts'
import { TotalTimeoutError } from './patience.ts'

/** How backends fail, and what clients are told of it. */

const TIMEOUTS: unknown[] = [
  'UND_ERR_HEADERS_TIMEOUT',
  'UND_ERR_BODY_TIMEOUT',
  TotalTimeoutError.CODE
]

/** 501 is no failure: the backend does not know what the request asks for, and another one would not either. */
export function statusFailure(statusCode: number): FailureKind | undefined {
  if (statusCode === 501) return undefined
  if (statusCode >= 500) return '5xx'
  return statusCode === 429 ? '429' : undefined
}

export function failureKind(error: Error & { code?: string }): FailureKind {
  // The backend has had the request, and has answered it in some way.
  if (error instanceof CodingError || error instanceof KeyRefusedError) return '5xx'
  if (isInvalidHttp(error)) return '5xx'
  return TIMEOUTS.includes(error.code) ? 'timeout' : 'connect_failure'
}

/** undici refused to send the request at all: no backend is to blame. */
export function isOurs(error: Error & { code?: string }): boolean {
  return error.code === 'UND_ERR_INVALID_ARG' || error.code === 'UND_ERR_NOT_SUPPORTED'
}

/** Codes of what this machine has run out of: descriptors, ports, buffers, memory. */
const SHORTAGES: unknown[] = ['EMFILE', 'ENFILE', 'EADDRNOTAVAIL', 'ENOBUFS', 'ENOMEM', 'EAGAIN']

/**
 * Whether the gateway itself could not open a connection. Of several addresses each must have failed in this way:
 * one that refused says that the backend is unavailable.
 */
export function isLocal(error: Error & { code?: unknown }): boolean {
  if (error instanceof AggregateError) return error.errors.every(isLocal)
  return SHORTAGES.includes(error.code)
}

/** The backend wants another key than the gateway has for it. The caller's own key never reaches a backend. */
export class KeyRefusedError extends Error {
  constructor() {
    super('status 401: backends[].api_key is missing or wrong')
  }
}

/** The response is not HTTP as undici reads it: an odd head, or `100 Continue` without being asked. */
function isInvalidHttp(error: Error): boolean {
  return (
    error instanceof errors.HTTPParserError ||
    error instanceof errors.HeadersOverflowError ||
    error instanceof errors.ResponseContentLengthMismatchError ||
    (error instanceof errors.SocketError && error.message === 'bad response')
  )
}

/**
 * There is no answer.
 *
 * @param isSent whether the backend has had the request, or a part of it
 */
export function withoutAnswer(kind: FailureKind, cause: Error, isSent: boolean): GatewayError {
  if (isOurs(cause)) {
    return new GatewayError('invalid_request', 'The request cannot be forwarded as it is.', {
      cause
    })
  }
  if (isLocal(cause)) {
    const message = 'The gateway cannot open a connection at the moment. Retry in 1 s.'
    return new GatewayError('overloaded', message, { headers: { 'retry-after': '1' }, cause })
  }
  if (cause instanceof KeyRefusedError) {
    const message = 'The backend did not accept the credentials of the gateway.'
    return new GatewayError('backend_failed', message, { cause })
  }
  if (isInvalidHttp(cause)) {
    const message = 'The backend gave an answer that is not valid HTTP, or has too large a head.'
    return new GatewayError('backend_failed', message, { cause })
  }
  if (cause instanceof CodingError) return undecodable(cause)
  if (kind === 'timeout') {
    return new GatewayError('backend_timeout', 'The backend did not answer in time.', { cause })
  }
  if (isSent) {
    const message = 'The backend closed the connection before it responded.'
    return new GatewayError('backend_failed', message, { cause })
  }
  return new GatewayError('backend_unreachable', 'No backend could be reached.', { cause })
}

/** The client has some of an answer. */
export function brokenOff(cause: Error): GatewayError {
  if (cause instanceof CodingError) return undecodable(cause)
  if (failureKind(cause) === 'connect_failure') {
    const message = 'The backend broke off in the middle of its answer.'
    return new GatewayError('backend_failed', message, { cause })
  }
  const message =
    cause instanceof TotalTimeoutError
      ? 'The answer took longer than it may.'
      : 'The backend fell silent in the middle of its answer.'
  return new GatewayError('backend_timeout', message, { cause })
}

function undecodable(cause: CodingError): GatewayError {
  const message = 'The response of the backend cannot be decoded: its content-encoding is wrong.'
  return new GatewayError('backend_failed', message, { cause })
}
