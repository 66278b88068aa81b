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

/** No tokenizer puts more characters of a text into one token, on average. */
export const MOST_CHARACTERS = 64

/** A byte that goes on with the character before. */
const INNER = 10
const ESCAPE = 11

const BACKSLASH = 0x5c
const LETTER_U = 0x75

/** Longer text is counted in samples, so that no delta takes longer than about 20 us. */
const MAX_READ = 4 * 1024
const SAMPLE = 128

/** Scratch space of `addAll`, faster than an array: characters by kind, and from index `RUNS` on runs by kind. */
const RUNS = 16
const found = new Int32Array(2 * RUNS)

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

/** The counts of no text. A literal is made ten times as fast as an array that is filled. */
export function noText(): TextCounts {
  return [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/** Returns whether a byte can be part of Base64, but for the alphabet of URLs, in which no API has data. */
export function isBase64Byte(byte: number): boolean {
  const isSign = byte === 0x2b || byte === 0x2f || byte === 0x3d
  return isSign || KIND_OF[byte]! <= DIGIT
}

/** Runs of digits: numbers. */
export function numbers(counts: TextCounts): number {
  return counts[KINDS + DIGIT]!
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
  found.fill(0)
  let before = INNER
  let at = begin
  while (at < end) {
    const start = at++
    let kind = KIND_OF[bytes[start]!]!
    if (kind === ESCAPE) {
      at = start + (bytes[start + 1] === LETTER_U ? 6 : 2)
      if (at > end) break
      kind = kindOfEscape(bytes, start + 1)
      found[kind]!++
    } else {
      while (at < end && KIND_OF[bytes[at]!] === kind) at++
      found[kind]! += at - start
    }
    if (kind === before || kind === INNER) continue
    found[RUNS + kind]!++
    before = kind
  }
  for (let kind = 0; kind < KINDS; kind++) {
    counts[kind]! += found[kind]!
    counts[KINDS + kind]! += found[RUNS + kind]!
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
