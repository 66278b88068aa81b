/**
 * Every error the gateway itself makes: its code (stable, for programs), status and text.
 * How an error looks on the wire is the business of the route's dialect (`dialects/`).
 */
declare const STATUS: {
    readonly invalid_request: 400;
    readonly invalid_json: 400;
    readonly invalid_path: 400;
    readonly missing_api_key: 401;
    readonly invalid_api_key: 401;
    readonly key_disabled: 403;
    readonly key_expired: 403;
    readonly key_not_started: 403;
    readonly ip_not_allowed: 403;
    readonly model_not_allowed: 403;
    readonly key_refused: 403;
    readonly not_found: 404;
    readonly request_timeout: 408;
    readonly body_too_large: 413;
    readonly unsupported_encoding: 415;
    readonly rate_limit_exceeded: 429;
    readonly insufficient_quota: 429;
    readonly headers_too_large: 431;
    readonly client_gone: 499;
    readonly internal_error: 500;
    readonly backend_unreachable: 502;
    readonly backend_failed: 502;
    readonly auth_unavailable: 503;
    readonly no_backend: 503;
    readonly shutting_down: 503;
    readonly backend_timeout: 504;
};
export type ErrorCode = keyof typeof STATUS;
/**
 * An error made by the gateway, not by a backend.
 *
 * @example
 * const error = new GatewayError('no_backend', 'No backend is available.')
 * error.statusCode // 503
 */
export declare class GatewayError extends Error {
    readonly code: ErrorCode;
    readonly statusCode: number;
    /** Response headers that go with it, such as `retry-after`. */
    readonly headers: Record<string, string>;
    constructor(code: ErrorCode, message: string, options?: {
        statusCode?: number;
        headers?: Record<string, string>;
        cause?: unknown;
    });
}
/**
 * The gateway's view of any error thrown while a request was handled: Fastify's own 4xx errors keep
 * their status and lose their internals, everything unexpected becomes a 500 that tells nothing.
 */
export declare function toGatewayError(error: unknown): GatewayError;
export {};
