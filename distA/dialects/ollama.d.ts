import type { Dialect } from './dialect.ts';
/** Ollama's native API: one JSON object a line, usage on the last, errors as `{"error": "text"}`. */
export declare const ollama: Dialect;
