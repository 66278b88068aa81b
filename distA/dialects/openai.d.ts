import type { GatewayError } from '../errors.ts';
import type { Dialect } from './dialect.ts';
/** OpenAI's error object, https://platform.openai.com/docs/guides/error-codes */
export declare function openaiError(error: GatewayError): {
    error: {
        message: string;
        type: string;
        param: null;
        code: "auth_unavailable" | "backend_failed" | "backend_timeout" | "backend_unreachable" | "body_too_large" | "client_gone" | "headers_too_large" | "insufficient_quota" | "internal_error" | "invalid_api_key" | "invalid_json" | "invalid_path" | "invalid_request" | "ip_not_allowed" | "key_disabled" | "key_expired" | "key_not_started" | "key_refused" | "missing_api_key" | "model_not_allowed" | "no_backend" | "not_found" | "rate_limit_exceeded" | "request_timeout" | "shutting_down" | "unsupported_encoding";
    };
};
/** Chat completions and completions, and every route that has no API of its own. */
export declare const openai: Dialect;
