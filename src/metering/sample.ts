import { type Member, membersOf } from '../wire/json-scanner.ts'

const QUOTE = 0x22
const BACKSLASH = 0x5c
const LF = 0x0a
const CR = 0x0d
const COMMA = 0x2c
const OPENING = 0x7b
const CLOSING = 0x7d
const MAX_SAMPLE = 4 * 1024

/**
 * An event with one piece of the response in it, and maybe with the usage so far. Nearly every event of a stream is
 * like the one before but for its piece. Comparing them is a few native calls; reading each anew would be half of what the
 * gateway itself does for a chunk.
 *
 * @example
 * const event = text => Buffer.from(`data: {"choices":[{"text":"${text}"}]}\n\n`)
 * const sample = Sample.of(event('one'), 27, 30)
 * sample.fits(event('other')) // true
 * sample.textEnd // 32
 */
export class Sample {
  readonly textBegin: number
  /** Where the text of the event that was compared last ends, and where its usage stands. */
  textEnd = 0
  usageBegin = 0
  usageEnd = 0
  readonly #before: Buffer
  /** Bytes behind the text, up to the usage if there is one. */
  readonly #behind: Buffer
  readonly #last: Buffer | undefined
  /** Where in `behind` the member with the usage begins, with its comma. */
  readonly #cut: number

  private constructor(before: Buffer, behind: Buffer, last?: Buffer, cut = 0) {
    this.#before = before
    this.textBegin = before.length
    this.#behind = behind
    this.#last = last
    this.#cut = cut
  }

  /**
   * Returns a sample of an event that came as one chunk, if it can be one.
   *
   * @param usage whether there is usage in it
   */
  static of(chunk: Buffer, textBegin: number, textEnd: number, usage = false): Sample | undefined {
    if (chunk.length > MAX_SAMPLE) return undefined
    const found = usage ? findUsage(chunk) : undefined
    if (usage && (found === undefined || found.from < textEnd || chunk[found.from] !== COMMA)) {
      return undefined
    }
    // Not from Node's pool, of which it would keep 8 KB for as long as the response takes.
    const kept = Buffer.allocUnsafeSlow(chunk.length)
    chunk.copy(kept)
    const before = kept.subarray(0, textBegin)
    if (found === undefined) return new Sample(before, kept.subarray(textEnd))
    const { from, start, end } = found
    return new Sample(before, kept.subarray(textEnd, start), kept.subarray(end), from - textEnd)
  }

  get hasUsage(): boolean {
    return this.#last !== undefined
  }

  /** Whether a chunk is one event like this one. */
  fits(chunk: Buffer): boolean {
    const begin = this.textBegin
    const behind = this.#behind
    const last = this.#last
    const end = last === undefined ? chunk.length - behind.length : chunk.indexOf(QUOTE, begin)
    if (
      end <= begin ||
      // The quote may be escaped.
      chunk[end - 1] === BACKSLASH ||
      (last === undefined && chunk.indexOf(QUOTE, begin) !== end) ||
      chunk.indexOf(LF, begin) !== chunk.length - 2 ||
      chunk.indexOf(CR, begin) !== -1 ||
      this.#before.compare(chunk, 0, begin) !== 0
    ) {
      return false
    }
    this.textEnd = end
    if (last === undefined) return behind.compare(chunk, end) === 0
    this.usageBegin = end + behind.length
    this.usageEnd = chunk.length - last.length
    return (
      this.usageEnd > this.usageBegin &&
      behind.compare(chunk, end, this.usageBegin) === 0 &&
      last.compare(chunk, this.usageEnd) === 0 &&
      isObject(chunk, this.usageBegin, this.usageEnd)
    )
  }

  /** Returns the chunk that was compared last without its usage. */
  withoutUsage(chunk: Buffer): Buffer {
    const length = this.textEnd + this.#cut
    const last = this.#last!
    const rest = Buffer.allocUnsafe(length + last.length)
    chunk.copy(rest, 0, 0, length)
    last.copy(rest, length)
    return rest
  }
}

/** Fields of a usage chunk that other chunks have as well. */
const FRAME = new Set(
  `id object created model choices usage system_fingerprint service_tier obfuscation`.split(' ')
)

/** Returns an event with what else a usage chunk has beside usage (`timings` of llama.cpp), if their data is in one line. */
export function withExtras(event: Buffer, usageChunk: Buffer): Buffer {
  const known = membersIn(event).members.map(({ name }) => name)
  if (known.length === 0) return event
  const { json, members } = membersIn(usageChunk)
  const extras = members.filter(({ name }) => !FRAME.has(name) && !known.includes(name))
  if (extras.length === 0) return event
  const end = event.lastIndexOf(CLOSING)
  const more = extras.flatMap(({ from, end: to }) => [Buffer.from(','), json.subarray(from, to)])
  return Buffer.concat([event.subarray(0, end), ...more, event.subarray(end)])
}

/** Returns an event without the usage in it; the same one where it cannot be taken out. */
export function withoutUsage(event: Buffer): Buffer {
  const found = findUsage(event)
  if (found === undefined) return event
  const { from, end } = found
  const to = event[from] === COMMA ? end : event.indexOf(COMMA, end) + 1
  return Buffer.concat([event.subarray(0, from), event.subarray(to)])
}

/** Finds the top-level usage of an event whose data is in one line; `from`: with the comma before, if there is one. */
function findUsage(event: Buffer): Pick<Member, 'from' | 'start' | 'end'> | undefined {
  const { json, members } = membersIn(event)
  const first = json.byteOffset - event.byteOffset
  const at = members.findIndex(({ name }) => name === 'usage')
  if (at === -1) return undefined
  const { from, start, end } = members[at]!
  const before = at === 0 ? from : json.indexOf(COMMA, members[at - 1]!.end)
  return { from: first + before, start: first + start, end: first + end }
}

/** The JSON of an event whose data is in one line, and its members; of any other event none. */
function membersIn(event: Buffer): { json: Buffer; members: readonly Member[] } {
  const json = event.subarray(event.indexOf(OPENING), event.lastIndexOf(CLOSING) + 1)
  try {
    return { json, members: membersOf(json) }
  } catch {
    return { json, members: [] }
  }
}

/** Whether this is one object, with braces in pairs. */
function isObject(bytes: Buffer, from: number, to: number): boolean {
  let depth = 0
  for (let at = from; at < to; at++) {
    const byte = bytes[at]
    if (byte === OPENING) depth++
    else if (byte === CLOSING) depth--
    if (depth === 0) return byte === CLOSING && at === to - 1
  }
  return false
}
