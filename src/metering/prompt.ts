import { FRAMES, OPEN, type PromptForm, TOOLS } from '../dialects/prompt.ts'
import type { Body } from '../payload.ts'
import type { Member } from '../wire/json-scanner.ts'
import {
  addText,
  characters,
  isBase64,
  MOST_CHARACTERS,
  noText,
  numbers,
  type TextCounts
} from './text.ts'

/** The text of a request that its model reads, without what is no text but data: images and audio in Base64. */
export interface PromptText {
  counts: TextCounts
  /** The same of text that only some servers put into the prompt. */
  optional: TextCounts
  /** Tokens that the client sent as numbers. */
  tokens: number
  frame: PromptForm['frame']
  hasTools: boolean
  hasData: boolean
  /** Bytes of the body. */
  size: number
  /** The model may read more than the body: images, files, an earlier response, or the same text several times. */
  isMore: boolean
  /** The text does not bound the tokens: the request has a template of its own, or embeddings. */
  isOpen: boolean
}

/** Shared by all requests without optional text, which are most; never changed. */
const NO_TEXT: TextCounts = noText()

const QUOTE = 0x22
/** First byte of null. */
const NULL = 0x6e
const BRACKET = 0x5b
/** Longer text is counted in samples, so that no field takes longer than about 5 us. */
const MAX_READ = 1024
/** Steps at which data is looked for, and its least length (bytes): what is shorter counts as text. */
const STEP = 4 * 1024
const DATA = 256
/** Images behind this many others count as text: the work for one request is bounded. */
const MAX_DATA = 64

/**
 * Counts the text in the fields that reach the model.
 *
 * @example
 * const bytes = Buffer.from('{"prompt":"two words"}')
 * const members = [{ name: 'prompt', start: 10, end: 21, elements: 0 }]
 * const body = { bytes, members, hasLinks: false }
 * promptText(body, { fields: ['prompt'], frame: 'plain' }).counts[0] // 8
 */
export function promptText({ bytes, members, hasLinks }: Body, form: PromptForm): PromptText {
  const { fields, optional = [], frame, repeated = [] } = form
  const text: PromptText = {
    counts: noText(),
    optional: NO_TEXT,
    tokens: 0,
    frame,
    hasTools: false,
    hasData: false,
    size: bytes.length,
    isMore: hasLinks || repeated.length > 0,
    isOpen: false
  }
  const read = members.filter(({ name }) => fields.includes(name))
  const perElement = repeated.length > 0 ? elementsOf(read, repeated) : 1
  const timesOf = ({ name, elements }: Member) =>
    elements <= 1 || repeated.includes(name) ? perElement : 1
  // A request in an unknown form costs something all the same.
  for (const member of read.length > 0 ? read : members) {
    if (isTokens(bytes, member)) addTokens(text, bytes, member, timesOf(member))
    else addField(text, text.counts, bytes, member, timesOf(member))
    if (member.elements > 0 && TOOLS.includes(member.name)) text.hasTools = true
  }
  for (const member of members) {
    if (member.name === 'previous_response_id') text.isMore = true
    if (!optional.includes(member.name) || isNull(bytes, member)) continue
    if (read.length > 0) {
      if (text.optional === NO_TEXT) text.optional = noText()
      addField(text, text.optional, bytes, member, timesOf(member))
    }
    if (OPEN.includes(member.name)) text.isOpen = text.isMore = true
  }
  return text
}

/** Returns how often the model reads a repeated field: with each element of the longest list. */
function elementsOf(members: readonly Member[], repeated: readonly string[]): number {
  const lists = members.filter(({ name }) => !repeated.includes(name))
  return Math.max(1, ...lists.map(({ elements }) => elements))
}

/** Returns the prompt with the text that only some servers put into it. */
export function withOptional(prompt: PromptText): PromptText {
  const { counts, optional } = prompt
  if (characters(optional) === 0) return prompt
  return { ...prompt, counts: counts.map((count, kind) => count + optional[kind]!) }
}

/** Returns whether there is a prompt. */
export function hasText({ counts, tokens }: PromptText): boolean {
  return tokens > 0 || characters(counts) > 0
}

/** Returns what a prompt has at least, whatever its tokenizer. */
export function leastTokens({ counts, tokens }: PromptText): number {
  return tokens + Math.floor(characters(counts) / MOST_CHARACTERS)
}

/** Features on which a prompt's tokens depend: its text, and text that the server puts around it. */
export function promptFeatures({ counts, frame, hasTools }: PromptText): number[] {
  return [...counts, ...FRAMES.map(each => (each === frame ? 1 : 0)), hasTools ? 1 : 0]
}

function isNull(bytes: Buffer, { start }: Member): boolean {
  return bytes[start] === NULL
}

/** Whether it is a list of numbers, or of such lists. */
function isTokens(bytes: Buffer, { elements, last }: Member): boolean {
  if (elements === 0) return false
  const first = bytes[bytes[last] === BRACKET ? last + 1 : last]
  return first !== undefined && first >= 0x30 && first <= 0x39
}

function addTokens(text: PromptText, bytes: Buffer, member: Member, times: number): void {
  const { elements, start, last, end } = member
  text.hasData = true
  if (bytes[last] !== BRACKET) {
    text.tokens += elements * times
    return
  }
  const counts = noText()
  addText(counts, bytes, start, end)
  text.tokens += Math.round(numbers(counts)) * times
}

function addField(
  text: PromptText,
  total: TextCounts,
  bytes: Buffer,
  { start, end }: Member,
  times: number
): void {
  const counts = times === 1 ? total : noText()
  const isString = bytes[start] === QUOTE
  let from = isString ? start + 1 : start
  const to = isString ? end - 1 : end
  let found = 0
  for (let at = start + STEP; at < to && found < MAX_DATA; at += STEP) {
    if (!isData(bytes, at, to)) continue
    found++
    text.hasData = text.isMore = true
    addText(counts, bytes, from, Math.max(from, bytes.lastIndexOf(QUOTE, at) + 1), MAX_READ)
    from = bytes.indexOf(QUOTE, at)
    if (from === -1 || from > to) from = to
    at = from
  }
  addText(counts, bytes, from, to, MAX_READ)
  if (counts === total) return
  for (const [kind, count] of counts.entries()) total[kind]! += count * times
}

/** No word is as long as that. */
function isData(bytes: Buffer, from: number, to: number): boolean {
  if (from + DATA > to) return false
  for (let at = from; at < from + DATA; at++) if (!isBase64(bytes[at]!)) return false
  return true
}
