import type { Usage } from '../exchange.ts'
import { isOutput, LONG_OUTPUT, TOKENS_PER_CHARACTER } from './counts.ts'
import type { PromptText } from './prompt.ts'

/** Maximum prompt (tokens) whose length the body does not show. */
const LONG_PROMPT = 10_000_000
/** Tokens that a server may put before a prompt: a chat template, instructions, or one image. */
const TEMPLATE = 16_384
/** Tokens of a sequence that servers may write beyond its limit: speculative decoding writes several at a time. */
const BEYOND = 16

/** A request as far as its usage depends on it. */
export interface Asked {
  /** The prompt as the body shows it; undefined if the request has no prompt. */
  prompt: PromptText | undefined
  /** Maximum number of output tokens of all sequences together; undefined if the request sets none. */
  maxTokens: number | undefined
  sequences: number
  /** Characters that other backends had written when the last one continued the response. */
  continued: number
  /** Returns the context length of the model (tokens); undefined: it is not known. */
  contextLength(): number | undefined
}

/**
 * Whether a backend can have counted this usage.
 *
 * @param passed characters of the response
 */
export function isPlausible(usage: Usage, asked: Asked, passed: number): boolean {
  const { promptTokens, completionTokens } = usage
  return isPlausibleOutput(completionTokens, asked, passed) && isPrompt(promptTokens, asked)
}

/** Whether a response can have this many tokens: all of them were shown, or the request allows them. */
export function isPlausibleOutput(tokens: number, asked: Asked, passed: number): boolean {
  if (isOutput(tokens, passed, 0)) return true
  const { maxTokens = LONG_OUTPUT, sequences } = asked
  // The backend may generate several times for one response.
  if (runsTools(asked)) return isOutput(tokens, passed)
  if (tokens > maxTokens + BEYOND * sequences) return false
  const context = asked.contextLength()
  return context === undefined || tokens <= context * sequences
}

/** Whether a prompt can have this many tokens: as many as the body is long, but for content that is no text. */
function isPrompt(tokens: number, asked: Asked): boolean {
  const { prompt, sequences, continued } = asked
  if (prompt === undefined || runsTools(asked)) return tokens <= LONG_PROMPT
  const text = TOKENS_PER_CHARACTER * (prompt.size + continued)
  if (tokens <= text + TEMPLATE * sequences) return true
  if (!prompt.isMore) return false
  const context = asked.contextLength()
  return tokens <= (context === undefined ? LONG_PROMPT : context * sequences)
}

/** Whether the backend itself may run tools, and reads the prompt again with each result. */
function runsTools({ prompt }: Asked): boolean {
  if (prompt === undefined || !prompt.hasTools) return false
  return prompt.frame === 'messages' || prompt.frame === 'responses'
}
