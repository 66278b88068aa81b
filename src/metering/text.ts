/**
 * How much text has passed, by kinds of characters: how many of each, and in how many runs. That is what
 * tokens come from: a run of letters is a word, and most words are one token; so are three digits, or
 * two thirds of a Chinese character. Weights for them are learned in `estimate.ts`.
 */
export type TextCounts = number[]

/** Also Latin letters with accents, whichever their case: they stand within words. */
const LOWER = 0
const UPPER = 1
const DIGIT = 2
const SPACE = 3
const CONTROL = 4
const SIGN = 5
/** Letters and signs outside ASCII that are not told apart. */
const OTHER = 6
const KANA = 7
const HAN = 8
const HANGUL = 9
const KINDS = 10
/** The second half of the counts: runs. */
export const TEXT_COUNTS = 2 * KINDS

/** A byte that goes on with the character before. */
const INNER = 10
const ESCAPE = 11

const BACKSLASH = 0x5c
const LETTER_U = 0x75
const QUOTE = 0x22

/** Longer text is counted in samples, so that no delta takes longer than about 20 us, and no prompt than 5. */
const MAX_READ = 4 * 1024
const MAX_PROMPT_READ = 1024
const SAMPLE = 128

/** The kind of each first byte of a character in UTF-8, inside a JSON text. */
const KIND_OF = Uint8Array.from({ length: 256 }, (_, byte) => {
  if (byte === BACKSLASH) return ESCAPE
  if (byte < 0x80) return kindOfAscii(byte)
  if (byte < 0xc0) return INNER
  if (byte >= 0xc3 && byte <= 0xc5) return LOWER
  if (byte === 0xe3) return KANA
  if (byte >= 0xe4 && byte <= 0xe9) return HAN
  if (byte >= 0xea && byte <= 0xed) return HANGUL
  return OTHER
})

/** The counts of no text. */
export function noText(): TextCounts {
  return new Array(TEXT_COUNTS).fill(0)
}

/** How many characters were counted. */
export function characters(counts: TextCounts): number {
  return sumFrom(LOWER, counts)
}

/** Those outside ASCII. */
export function wideCharacters(counts: TextCounts): number {
  return sumFrom(OTHER, counts)
}

function sumFrom(first: number, counts: TextCounts): number {
  let sum = 0
  for (let kind = first; kind < KINDS; kind++) sum += counts[kind]!
  return sum
}

/**
 * Adds a piece of text. It begins a new run, as a new delta begins a new token.
 *
 * @param bytes JSON in UTF-8: escapes count as what they stand for
 * @example
 * const counts = noText()
 * const text = Buffer.from('two words')
 * addText(counts, text, 0, text.length)
 * characters(counts) // 9
 */
export function addText(
  counts: TextCounts,
  bytes: Buffer,
  begin: number,
  end: number,
  maxRead = MAX_READ
): void {
  if (end - begin <= maxRead) addAll(counts, bytes, begin, end)
  else addSamples(counts, bytes, begin, end, maxRead / SAMPLE)
}

function addAll(counts: TextCounts, bytes: Buffer, begin: number, end: number): void {
  let before = INNER
  for (let at = begin; at < end; at++) {
    let kind = KIND_OF[bytes[at]!]!
    if (kind === ESCAPE) {
      const escaped = at + 1
      at += bytes[escaped] === LETTER_U ? 5 : 1
      if (at >= end) return
      kind = kindOfEscape(bytes, escaped)
    }
    if (kind === INNER) continue
    counts[kind]!++
    if (kind === before) continue
    counts[KINDS + kind]!++
    before = kind
  }
}

function addSamples(
  counts: TextCounts,
  bytes: Buffer,
  begin: number,
  end: number,
  samples: number
): void {
  const sampled = noText()
  const step = (end - begin) / samples
  for (let index = 0; index < samples; index++) {
    const at = begin + Math.floor(index * step)
    addAll(sampled, bytes, at, at + SAMPLE)
  }
  for (let index = 0; index < TEXT_COUNTS; index++) {
    counts[index]! += (sampled[index]! * step) / SAMPLE
  }
}

/** The text of a request, without what is no text but data: pictures and sounds in Base64. */
export interface PromptText {
  counts: TextCounts
  hasData: boolean
}

/** Where data is looked for, and for how long: what is shorter counts as text. */
const STEP = 4 * 1024
const DATA = 256
/** Pictures behind so many others count as text: what is done for one request has its bounds. */
const MAX_DATA = 64

/** @param bytes a JSON object */
export function promptText(bytes: Buffer): PromptText {
  const counts = noText()
  let from = 0
  let found = 0
  for (let at = STEP; at < bytes.length && found < MAX_DATA; at += STEP) {
    if (!isData(bytes, at)) continue
    found++
    addText(counts, bytes, from, bytes.lastIndexOf(QUOTE, at) + 1, MAX_PROMPT_READ)
    from = bytes.indexOf(QUOTE, at)
    if (from === -1) from = bytes.length
    at = from
  }
  addText(counts, bytes, from, bytes.length, MAX_PROMPT_READ)
  return { counts, hasData: found > 0 }
}

/** No word is as long as that. */
function isData(bytes: Buffer, from: number): boolean {
  const end = Math.min(bytes.length, from + DATA)
  for (let at = from; at < end; at++) {
    const byte = bytes[at]!
    const kind = KIND_OF[byte]!
    const isBase64 =
      kind <= DIGIT ||
      byte === 0x2b ||
      byte === 0x2f ||
      byte === 0x3d ||
      byte === 0x2d ||
      byte === 0x5f
    if (!isBase64) return false
  }
  return end - from === DATA
}

/** What stands behind a backslash. */
function kindOfEscape(bytes: Buffer, at: number): number {
  const byte = bytes[at]!
  if (byte === LETTER_U) return kindOfUnit(bytes, at + 1)
  return byte >= 0x61 ? CONTROL : SIGN
}

/** The kind of the UTF-16 unit whose four hexadecimal digits stand here; a pair of them is one character. */
function kindOfUnit(bytes: Buffer, at: number): number {
  const unit = Number.parseInt(bytes.toString('latin1', at, at + 4), 16)
  if (unit < 0x80) return kindOfAscii(unit)
  if (unit >= 0xc0 && unit < 0x180) return LOWER
  if (unit >= 0xdc00 && unit <= 0xdfff) return INNER
  if (unit >= 0x3000 && unit < 0x4000) return KANA
  if (unit >= 0x4000 && unit < 0xa000) return HAN
  if (unit >= 0xa000 && unit < 0xd800) return HANGUL
  return OTHER
}

function kindOfAscii(byte: number): number {
  if (byte >= 0x61 && byte <= 0x7a) return LOWER
  if (byte >= 0x41 && byte <= 0x5a) return UPPER
  if (byte >= 0x30 && byte <= 0x39) return DIGIT
  if (byte === 0x20) return SPACE
  return byte < 0x20 ? CONTROL : SIGN
}
