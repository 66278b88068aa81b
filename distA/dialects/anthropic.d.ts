import type { Dialect } from './dialect.ts';
/** The Messages API, https://docs.claude.com/en/api/errors */
export declare const anthropic: Dialect;
