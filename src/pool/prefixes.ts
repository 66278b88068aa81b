import { skipSpace, skipString, skipValue } from '../wire/json-skip.ts'

/**
 * What inference servers have in their caches is the beginnings of prompts they have read. Here a prompt
 * is a row of 64-bit hashes, one for each of its beginnings: up to the end of a message, or of a block of
 * a long one. Two prompts that begin alike share the first of them.
 */

/** The members that make the prompt, as chat templates put them: tools stand before the messages. */
const PARTS = ['tools', 'system', 'instructions', 'prompt', 'input', 'messages']

/** Blocks are this long (bytes), as long as the prompt is shorter than that: a prompt has few thousand hashes at most. */
const BLOCKS = [
  { size: 1024, below: 256 * 1024 },
  { size: 8 * 1024, below: 2 * 1024 * 1024 },
  { size: 64 * 1024, below: Number.POSITIVE_INFINITY }
]
/** What ends a message within this part of a block gets no hash of its own. */
const LEAST = 1 / 4

/** A place where Anthropic's clients want the cache to be: it moves from turn to turn and is no part of the prompt. */
const CACHE_MARK = Buffer.from('"cache_control"')

/** The hashes of a prompt's beginnings, the shortest first. */
export interface Prefixes {
  /** Of the whole prompt. */
  bytes: number
  /** For each hash: its two halves, and how many bytes of the prompt it stands for. */
  readonly high: number[]
  readonly low: number[]
  readonly ends: number[]
}

class Hasher {
  readonly prefixes: Prefixes = { bytes: 0, high: [], low: [], ends: [] }
  #high = 0x9e3779b9
  #low = 0x85ebca6b
  #ended = 0
  /** A block, where it is hashed. */
  readonly #aligned: Buffer
  readonly #words: Int32Array

  /**
   * @param seed prompts with different ones share nothing
   * @param longest bytes of a message, at most
   */
  constructor(seed: string, longest: number) {
    const bytes = Buffer.from(seed)
    const size = Math.min(Math.max(longest, bytes.length), BLOCKS.at(-1)!.size)
    this.#aligned = Buffer.allocUnsafeSlow((size + 3) & ~3)
    this.#words = new Int32Array(this.#aligned.buffer)
    this.#hash(bytes, 0, Math.min(bytes.length, size))
  }

  /** Goes on with another message. */
  add(bytes: Buffer, begin: number, end: number): void {
    const { prefixes } = this
    let from = begin
    while (from < end) {
      const { size } = BLOCKS.find(each => prefixes.bytes < each.below)!
      const to = Math.min(end, from + size)
      this.#hash(bytes, from, to)
      prefixes.bytes += to - from
      if (prefixes.bytes - this.#ended >= size * LEAST) this.#mark()
      from = to
    }
  }

  #mark(): void {
    const { high, low, ends, bytes } = this.prefixes
    high.push(this.#high >>> 0)
    low.push(this.#low >>> 0)
    ends.push(bytes)
    this.#ended = bytes
  }

  /** Two multiplicative hashes over words of four bytes, which must be aligned: half a nanosecond a byte. */
  #hash(bytes: Buffer, begin: number, end: number): void {
    const length = end - begin
    const last = (length + 3) >> 2
    this.#words[last - 1] = 0
    bytes.copy(this.#aligned, 0, begin, end)
    const words = this.#words
    let high = this.#high ^ length
    let low = this.#low
    for (let at = 0; at < last; at++) {
      const word = words[at]!
      high = Math.imul(high ^ word, 0xcc9e2d51)
      high ^= high >>> 15
      low = (Math.imul((low << 13) | (low >>> 19), 5) + Math.imul(word, 0x1b873593)) | 0
    }
    this.#high = mix(high)
    this.#low = mix(low ^ high)
  }
}

/** What of a body (bytes) is looked at: about 500,000 tokens. A larger part would block the event loop for too long. */
const MAX_READ = 2 * 1024 * 1024
/** Messages, and marks of a cache, that are looked at. */
const MAX_MESSAGES = 10_000

/**
 * The hashes of the prompt in a request body, in one pass and without parsing it: one to two ms for 1 MB.
 *
 * @param whole a JSON object; what stands after its first 2 MB is ignored
 * @param seed what else must be the same: the model and whose prompt it is
 * @example
 * const first = prefixesOf(Buffer.from('{"messages":[{"role":"user","content":"Hi"}],"stream":true}'), 'm')
 * const second = prefixesOf(Buffer.from('{"messages":[{"role":"user","content":"Hi"}, {"role":"assistant"}]}'), 'm')
 * first.bytes // 30
 * second.bytes // 50
 */
export function prefixesOf(whole: Buffer, seed: string): Prefixes {
  const body = whole.subarray(0, MAX_READ)
  const bytes = body.includes(CACHE_MARK) ? withoutMarks(body) : body
  const parts = findParts(bytes)
  const hasher = new Hasher(seed, bytes.length)
  for (const name of PARTS) {
    const ends = parts.get(name) ?? []
    for (let at = 0; at < ends.length; at += 2) hasher.add(bytes, ends[at]!, ends[at + 1]!)
  }
  return hasher.prefixes
}

/** Where the parts of the prompt begin and end: pairs of places, several for a list. */
function findParts(bytes: Buffer): Map<string, number[]> {
  const parts = new Map<string, number[]>()
  let at = skipSpace(bytes, skipSpace(bytes, 0) + 1)
  while (bytes[at] === QUOTE) {
    const nameEnd = skipString(bytes, at)
    const name = bytes.toString('latin1', at + 1, nameEnd - 1)
    const begin = skipSpace(bytes, skipSpace(bytes, nameEnd) + 1)
    const places: number[] = []
    if (!PARTS.includes(name)) at = skipValue(bytes, begin)
    else {
      if (bytes[begin] === BRACKET && !isDigit(bytes[skipSpace(bytes, begin + 1)]))
        at = skipElements(bytes, begin, places)
      else {
        at = skipValue(bytes, begin)
        places.push(begin, at)
      }
      parts.set(name, places)
    }
    at = skipSpace(bytes, skipSpace(bytes, at) + 1)
  }
  return parts
}

/** Notes where the elements of a list stand, and returns the byte after it. */
function skipElements(bytes: Buffer, list: number, places: number[]): number {
  let at = skipSpace(bytes, list + 1)
  while (at < bytes.length && bytes[at] !== BRACKET_END) {
    if (places.length === 2 * MAX_MESSAGES) return bytes.length
    const end = skipValue(bytes, at)
    places.push(at, end)
    at = skipSpace(bytes, end)
    if (bytes[at] === COMMA) at = skipSpace(bytes, at + 1)
  }
  return at + 1
}

/** The same without its `cache_control` members, and the commas before or behind them. */
function withoutMarks(bytes: Buffer): Buffer {
  const kept: Buffer[] = []
  let from = 0
  let next = 0
  for (let at = bytes.indexOf(CACHE_MARK); at !== -1; at = bytes.indexOf(CACHE_MARK, next)) {
    next = at + 1
    const value = skipSpace(bytes, at + CACHE_MARK.length)
    // As a value, or at the end of a text, it is no member.
    if (bytes[value] !== COLON || bytes[at - 1] === BACKSLASH) continue
    if (kept.length === MAX_MESSAGES) break
    let begin = at
    let end = skipSpace(bytes, skipValue(bytes, skipSpace(bytes, value + 1)))
    while (isSpace(bytes[begin - 1])) begin--
    if (bytes[begin - 1] === COMMA) begin--
    else if (bytes[end] === COMMA) end = skipSpace(bytes, end + 1)
    kept.push(bytes.subarray(from, begin))
    from = end
    // Not into the value: one mark within another, and so on, would be read again for each of them.
    next = end
  }
  kept.push(bytes.subarray(from))
  return Buffer.concat(kept)
}

/** The last step of MurmurHash3, https://en.wikipedia.org/wiki/MurmurHash: every bit depends on every other. */
function mix(hash: number): number {
  let mixed = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35)
  return mixed ^ (mixed >>> 16)
}

const QUOTE = 0x22
const COMMA = 0x2c
const COLON = 0x3a
const BRACKET = 0x5b
const BRACKET_END = 0x5d
const BACKSLASH = 0x5c

/** Does a token begin here? Of a prompt of tokens each would be a message. */
function isDigit(byte: number | undefined): boolean {
  return byte !== undefined && byte >= 0x30 && byte <= 0x39
}

function isSpace(byte: number | undefined): boolean {
  return byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09
}
