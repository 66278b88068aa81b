import type { Dialect } from './dialect.ts';
/** The Responses API: typed events, usage inside `response.completed`, no `[DONE]`. */
export declare const responses: Dialect;
