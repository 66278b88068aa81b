import { FRAMES, type PromptForm, TOOLS } from '../dialects/prompt.ts'
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
  /** Tokens that the client sent as numbers. */
  tokens: number
  frame: PromptForm['frame']
  hasTools: boolean
  hasData: boolean
}

const QUOTE = 0x22
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
 * promptText({ bytes, members }, { fields: ['prompt'], frame: 'plain' }).counts[0] // 8
 */
export function promptText({ bytes, members }: Body, { fields, frame }: PromptForm): PromptText {
  const text = { counts: noText(), tokens: 0, frame, hasTools: false, hasData: false }
  const read = members.filter(({ name }) => fields.includes(name))
  // A request in an unknown form costs something all the same.
  for (const member of read.length > 0 ? read : members) {
    if (isTokens(bytes, member)) addTokens(text, bytes, member)
    else addField(text, bytes, member)
    if (member.elements > 0 && TOOLS.includes(member.name)) text.hasTools = true
  }
  return text
}

/** Returns whether there is a prompt. */
export function hasText({ counts, tokens }: PromptText): boolean {
  return tokens > 0 || characters(counts) > 0
}

/** Returns what a prompt has at least, whatever its tokenizer. */
export function leastTokens({ counts, tokens }: PromptText): number {
  return tokens + Math.floor(characters(counts) / MOST_CHARACTERS)
}

/** What a prompt's tokens depend on: its text, and what the server puts around it. */
export function promptFeatures({ counts, frame, hasTools }: PromptText): number[] {
  return [...counts, ...FRAMES.map(each => (each === frame ? 1 : 0)), hasTools ? 1 : 0]
}

/** Whether it is a list of numbers, or of such lists. */
function isTokens(bytes: Buffer, { elements, last }: Member): boolean {
  if (elements === 0) return false
  const first = bytes[bytes[last] === BRACKET ? last + 1 : last]
  return first !== undefined && first >= 0x30 && first <= 0x39
}

function addTokens(text: PromptText, bytes: Buffer, { elements, start, last, end }: Member): void {
  text.hasData = true
  if (bytes[last] !== BRACKET) {
    text.tokens += elements
    return
  }
  const counts = noText()
  addText(counts, bytes, start, end)
  text.tokens += Math.round(numbers(counts))
}

function addField(text: PromptText, bytes: Buffer, { start, end }: Member): void {
  const { counts } = text
  const isString = bytes[start] === QUOTE
  let from = isString ? start + 1 : start
  const to = isString ? end - 1 : end
  let found = 0
  for (let at = start + STEP; at < to && found < MAX_DATA; at += STEP) {
    if (!isData(bytes, at, to)) continue
    found++
    text.hasData = true
    addText(counts, bytes, from, Math.max(from, bytes.lastIndexOf(QUOTE, at) + 1), MAX_READ)
    from = bytes.indexOf(QUOTE, at)
    if (from === -1 || from > to) from = to
    at = from
  }
  addText(counts, bytes, from, to, MAX_READ)
}

/** No word is as long as that. */
function isData(bytes: Buffer, from: number, to: number): boolean {
  if (from + DATA > to) return false
  for (let at = from; at < from + DATA; at++) if (!isBase64(bytes[at]!)) return false
  return true
}
