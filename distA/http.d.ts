/**
 * The path of a request below the prefix its plugin was registered with, without the query.
 *
 * @example
 * pathBelow('/llm/v1/models?x=1', '/llm') // '/v1/models'
 */
export declare function pathBelow(url: string, prefix: string): string;
/**
 * `retry-after` (RFC 9110, section 10.2.3) in milliseconds: seconds, with fractions as some servers
 * send them, or a date. 0 for anything else.
 *
 * @example
 * parseRetryAfter('1.5') // 1500
 */
export declare function parseRetryAfter(value: string | string[] | undefined): number;
