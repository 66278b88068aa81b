/**
 * The same request body, with `stream_options.include_usage` set: only that part of it changes.
 *
 * @param bytes a JSON object with at least one member
 * @example
 * String(askForUsage(Buffer.from('{"stream":true}'))) // '{"stream_options":{"include_usage":true},"stream":true}'
 */
export declare function askForUsage(bytes: Buffer): Buffer;
