import { FRAMES, OPEN, type PromptForm, TOOLS } from '../dialects/prompt.ts'
import type { Body } from '../payload.ts'
import type { Member } from '../wire/json-scanner.ts'
import {
  addText,
  characters,
  isBase64Byte,
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
const COLON = 0x3a
const COMMA = 0x2c
const SPACE = 0x20
/** Longer text is counted in samples, so that no field takes longer than about 5 us. */
const MAX_READ = 1024
/** Steps at which data is looked for, and its least length (bytes): what is shorter counts as text. */
const STEP = 4 * 1024
const DATA = 256
/** Pieces of data that are looked for one by one, and those that are looked at closely: the work is bounded. */
const MAX_DATA = 1024
const MAX_CLOSE = 256
/** Members whose Base64 is an image, audio or a file. Anywhere else it is text that the model reads. */
const DATA_NAMES = new Set([
  ...['url', 'image_url', 'video_url', 'audio_url', 'file_url', 'data', 'file_data', 'b64_json'],
  ...['image', 'images', 'image_data', 'audio', 'video', 'result', 'encrypted_content']
])
/** Longest name, and longest beginning such as `data:image/png;base64,` (bytes). */
const MAX_NAME = 32
const MAX_BEGINNING = 128
/** Number of places at which a piece of data is looked at, closely or not, and those of what follows `MAX_DATA` pieces. */
const CLOSE_PLACES = 64
const PLACES = 4
const REST_PLACES = 1024

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

/** Whether it is a list of numbers, or of such lists. Servers also take lists of numbers and texts. */
function isTokens(bytes: Buffer, { elements, start, last, end }: Member): boolean {
  if (elements === 0) return false
  const first = bytes[bytes[last] === BRACKET ? last + 1 : last]
  if (first === undefined || first < 0x30 || first > 0x39) return false
  const quote = bytes.indexOf(QUOTE, start)
  return quote === -1 || quote >= end
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
  for (let at = from + STEP; at < to && found < MAX_DATA; at += STEP) {
    if (!isBase64At(bytes, at, to)) continue
    const quote = bytes.lastIndexOf(QUOTE, at)
    const end = endOfString(bytes, at, to)
    const places = found < MAX_CLOSE ? CLOSE_PLACES : PLACES
    const dataEnd = found > 0 ? from : undefined
    if (isDataMember(bytes, quote, dataEnd) && isBase64(bytes, quote, end, places)) {
      found++
      text.hasData = text.isMore = true
      addText(counts, bytes, from, Math.max(from, quote + 1), MAX_READ)
      from = end
    }
    at = end
  }
  if (found < MAX_DATA) addText(counts, bytes, from, to, MAX_READ)
  else addRest(counts, bytes, from, to)
  if (counts === total) return
  for (const [kind, count] of counts.entries()) total[kind]! += count * times
}

/** Counts what follows many pieces of data: how much of it is text is estimated from places that nobody can foresee. */
function addRest(counts: TextCounts, bytes: Buffer, from: number, to: number): void {
  const sampled = noText()
  const step = Math.max(DATA, (to - from) / REST_PLACES)
  for (let place = from; place + DATA < to; place += step) {
    const at = Math.floor(place + Math.random() * (step - DATA))
    if (!isBase64At(bytes, at, to)) addText(sampled, bytes, at, at + DATA, DATA)
  }
  for (const [kind, count] of sampled.entries()) counts[kind]! += (count * step) / DATA
}

/**
 * Whether the string that begins here is the value of a member that holds data, or is in a list that does.
 *
 * @param dataEnd end of the data before
 */
function isDataMember(bytes: Buffer, quote: number, dataEnd: number | undefined): boolean {
  let at = skipBack(bytes, quote - 1)
  if (bytes[at] === COMMA && skipBack(bytes, at - 1) === dataEnd) return true
  if (bytes[at] === BRACKET) at = skipBack(bytes, at - 1)
  if (bytes[at] !== COLON) return false
  const end = skipBack(bytes, at - 1)
  const begin = end - MAX_NAME - 1
  const before = bytes.subarray(Math.max(0, begin), end).lastIndexOf(QUOTE)
  if (bytes[end] !== QUOTE || before === -1) return false
  return DATA_NAMES.has(bytes.toString('latin1', Math.max(0, begin) + before + 1, end))
}

/** Returns the place of the last byte up to here that is no white space. */
function skipBack(bytes: Buffer, from: number): number {
  let at = from
  while (at > 0 && bytes[at]! <= SPACE) at--
  return at
}

function endOfString(bytes: Buffer, from: number, to: number): number {
  const end = bytes.indexOf(QUOTE, from)
  return end === -1 || end > to ? to : end
}

/** Whether a string is Base64, also behind `data:...;base64,`. A long one is looked at in places that nobody can foresee. */
function isBase64(bytes: Buffer, quote: number, end: number, places: number): boolean {
  const beginning = bytes.toString('latin1', quote + 1, Math.min(end, quote + MAX_BEGINNING))
  const mark = beginning.startsWith('data:') ? beginning.indexOf('base64,') : -1
  const from = mark === -1 ? quote + 1 : quote + 1 + mark + 'base64,'.length
  const step = Math.max(DATA, (end - from) / places)
  for (let place = from; place + DATA < end; place += step) {
    const at = Math.floor(place + Math.random() * (step - DATA))
    if (!isBase64At(bytes, at, end)) return false
  }
  return true
}

/** Whether `DATA` bytes from here on are Base64: no word is as long as that. */
function isBase64At(bytes: Buffer, from: number, to: number): boolean {
  if (from + DATA > to) return false
  for (let at = from; at < from + DATA; at++) if (!isBase64Byte(bytes[at]!)) return false
  return true
}
