/** One member of the outermost object: its name, and where it stands in the bytes. */
export interface Member {
  /** Decoded; a name longer than {@link MAX_NAME} bytes is cut. */
  name: string
  /** The opening quote of the name. */
  from: number
  /** First byte of the value, and the byte after its last. */
  start: number
  end: number
  /** Number of elements, where the value is an array, and where the last of them starts. */
  elements: number
  last: number
}

/** Facts about a JSON object that the scanner notes. */
export interface Outline {
  members: readonly Member[]
  /** A name at some level looks like one of a link or of media, or has escapes: the text may refer to content elsewhere. */
  hasLinks: boolean
}

/** Bounds of a JSON text. They keep the cost of a text in proportion to its size, here and at a backend. */
export interface JsonBounds {
  /** Levels of nested objects and arrays. */
  depth: number
  /** Members of the outermost object. */
  members: number
  /** Objects, arrays and members of objects in the whole text. Plain array elements are not counted. */
  nodes: number
}

export const JSON_BOUNDS: JsonBounds = { depth: 128, members: 1_000, nodes: 1_000_000 }

/** What is wrong with a JSON text, and where. The message never repeats a part of the text. */
export class JsonError extends Error {
  override name = 'JsonError'
}

/** Bytes of a string that are read one by one before words are. */
const NEAR = 32
/** Longer names (bytes) are cut. */
const MAX_NAME = 256

const OBJECT = 1
const ARRAY = 2

/** What comes next. */
const START = 0
const VALUE = 1
const VALUE_OR_END = 2
const NAME = 3
const NAME_OR_END = 4
const COLON = 5
const COMMA_OR_END = 6
const STRING = 7
const ESCAPED = 8
const HEX = 9
const NUMBER = 10
const LITERAL = 11
const DONE = 12

const EXPECTED: Record<number, string> = {
  [START]: '"{"',
  [VALUE]: 'a value',
  [VALUE_OR_END]: 'a value or "]"',
  [NAME]: 'a name in double quotes',
  [NAME_OR_END]: 'a name in double quotes or "}"',
  [COLON]: '":"',
  [ESCAPED]: 'an escape such as \\n',
  [HEX]: 'a hexadecimal digit',
  [NUMBER]: 'a digit',
  [LITERAL]: 'true, false or null',
  [DONE]: 'the end of the text'
}

/** Bytes inside a string that need a look: the quote, the backslash and control characters. */
const IS_SPECIAL = Uint8Array.from({ length: 256 }, (_, byte) =>
  byte < 0x20 || byte === 0x22 || byte === 0x5c ? 1 : 0
)
const IS_ESCAPE = Uint8Array.from({ length: 256 }, (_, byte) =>
  '"\\/bfnrt'.includes(String.fromCharCode(byte)) ? 1 : 0
)

/** How names of content elsewhere begin: file, image, video, audio, media. */
const MEDIA = ['file', 'imag', 'vide', 'audi', 'medi'].map(name => Buffer.from(name).readInt32BE())
const URL_END = 0x75726c

/** Stages of a number: the sign, a leading zero, other digits, the point, decimals, `e`, its sign, the exponent. */
const MINUS = 1
const ZERO = 2
const INTEGER = 3
const POINT = 4
const DECIMALS = 5
const E = 6
const E_SIGN = 7
const EXPONENT = 8

/**
 * Checks one JSON object as its bytes arrive (RFC 8259), and notes where the members of the outermost object stand.
 * It builds no values: memory does not grow with the text, and each byte is read once.
 *
 * @example
 * const scanner = new JsonScanner()
 * const bytes = Buffer.from('{"model": "m", "n": 1}')
 * scanner.scan(bytes, 10)
 * scanner.scan(bytes, bytes.length)
 * scanner.end()
 * scanner.members.map(({ name }) => name) // ['model', 'n']
 */
export class JsonScanner implements Outline {
  readonly members: Member[] = []
  hasLinks = false
  readonly #bounds: JsonBounds
  readonly #kinds: number[] = [0]
  #state = START
  #depth = 0
  #nodes = 0
  #at = 0
  /** The string that is being read is a name, and starts here. */
  #isName = false
  #nameStart = 0
  #hexLeft = 0
  #stage = 0
  #literal = ''
  #matched = 0
  /** The bytes as words of four, where a string is long. */
  #words: Int32Array | undefined
  /** The member of the outermost object whose value is being read. */
  #member: Member | undefined

  constructor(bounds = JSON_BOUNDS) {
    this.#bounds = bounds
  }

  /**
   * Reads on to `end`. `bytes` holds the text from its beginning and may be another buffer each time.
   *
   * @throws {JsonError} for a text that is no JSON object, or is beyond the bounds
   */
  scan(bytes: Buffer, end: number): void {
    this.#words = undefined
    while (this.#at < end) {
      switch (this.#state) {
        case STRING:
          this.#string(bytes, end)
          break
        case NUMBER:
          this.#number(bytes, end)
          break
        case ESCAPED:
          this.#escape(bytes[this.#at++]!)
          break
        case HEX:
          this.#hex(bytes[this.#at++]!)
          break
        case LITERAL:
          if (bytes[this.#at++] !== this.#literal.charCodeAt(this.#matched++)) this.#unexpected()
          if (this.#matched === this.#literal.length) this.#endValue()
          break
        default:
          this.#structure(bytes[this.#at++]!)
      }
    }
  }

  /** @throws {JsonError} where the object is not complete */
  end(): void {
    if (this.#state !== DONE) throw new JsonError('it ends too early')
  }

  #structure(byte: number): void {
    if (byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09) return
    switch (this.#state) {
      case START:
        if (byte !== 0x7b) this.#unexpected()
        return this.#open(OBJECT, NAME_OR_END)
      case VALUE_OR_END:
        if (byte === 0x5d) return this.#close()
        return this.#value(byte)
      case VALUE:
        return this.#value(byte)
      case NAME_OR_END:
        if (byte === 0x7d) return this.#close()
        return this.#name(byte)
      case NAME:
        return this.#name(byte)
      case COLON:
        if (byte !== 0x3a) this.#unexpected()
        this.#state = VALUE
        return
      case COMMA_OR_END: {
        const isObject = this.#kinds[this.#depth] === OBJECT
        if (byte === 0x2c) this.#state = isObject ? NAME : VALUE
        else if (byte === (isObject ? 0x7d : 0x5d)) this.#close()
        else throw new JsonError(`${this.#place(1)} must be "," or "${isObject ? '}' : ']'}"`)
        return
      }
      default:
        this.#unexpected()
    }
  }

  #value(byte: number): void {
    const start = this.#at - 1
    if (this.#depth === 1) this.#member!.start = start
    else if (this.#depth === 2 && this.#kinds[2] === ARRAY) {
      this.#member!.elements++
      this.#member!.last = start
    }
    if (byte === 0x22) {
      this.#isName = false
      this.#state = STRING
    } else if (byte === 0x7b) this.#open(OBJECT, NAME_OR_END)
    else if (byte === 0x5b) this.#open(ARRAY, VALUE_OR_END)
    else if (byte === 0x2d) this.#beginNumber(MINUS)
    else if (byte === 0x30) this.#beginNumber(ZERO)
    else if (byte > 0x30 && byte <= 0x39) this.#beginNumber(INTEGER)
    else if (byte === 0x74) this.#beginLiteral('true')
    else if (byte === 0x66) this.#beginLiteral('false')
    else if (byte === 0x6e) this.#beginLiteral('null')
    else this.#unexpected()
  }

  #name(byte: number): void {
    if (byte !== 0x22) this.#unexpected()
    this.#count()
    this.#isName = true
    this.#nameStart = this.#at - 1
    this.#state = STRING
  }

  #open(kind: number, next: number): void {
    this.#count()
    if (this.#depth === this.#bounds.depth) {
      throw new JsonError(`it is nested more than ${this.#bounds.depth} levels deep`)
    }
    this.#kinds[++this.#depth] = kind
    this.#state = next
  }

  #close(): void {
    this.#depth--
    this.#endValue()
  }

  #endValue(): void {
    if (this.#depth === 1) this.#member!.end = this.#at
    this.#state = this.#depth === 0 ? DONE : COMMA_OR_END
  }

  #count(): void {
    if (++this.#nodes <= this.#bounds.nodes) return
    throw new JsonError(`it has more than ${this.#bounds.nodes} objects, arrays and members`)
  }

  #string(bytes: Buffer, end: number): void {
    const near = Math.min(end, this.#at + NEAR)
    let at = plainBytes(bytes, this.#at, near)
    if (at === near && at < end) at = this.#plainEnd(bytes, at, end)
    this.#at = at
    if (at === end) return
    this.#at++
    const byte = bytes[at]!
    if (byte === 0x5c) {
      this.#state = ESCAPED
      this.hasLinks ||= this.#isName
    } else if (byte !== 0x22) throw new JsonError(`${this.#place(1)} is a control character`)
    else if (!this.#isName) this.#endValue()
    else {
      if (this.#depth === 1) this.#addMember(bytes)
      this.hasLinks ||= isLink(bytes, this.#nameStart + 1, at)
      this.#state = COLON
    }
  }

  /** Returns where the first special byte of a long string is, or `end`. */
  #plainEnd(bytes: Buffer, start: number, end: number): number {
    const { byteOffset, buffer } = bytes
    this.#words ??= new Int32Array(buffer, 0, buffer.byteLength >> 2)
    const first = (byteOffset + start + 3) >> 2
    const at = plainBytes(bytes, start, Math.min(first * 4 - byteOffset, end))
    if (at !== first * 4 - byteOffset) return at
    const word = plainWords(this.#words, first, (byteOffset + end) >> 2)
    return plainBytes(bytes, word * 4 - byteOffset, end)
  }

  #addMember(bytes: Buffer): void {
    if (this.members.length === this.#bounds.members) {
      throw new JsonError(`it has more than ${this.#bounds.members} members`)
    }
    const length = this.#at - this.#nameStart
    const text = bytes.toString(
      'utf8',
      this.#nameStart + 1,
      this.#nameStart + Math.min(length - 1, MAX_NAME)
    )
    const name: string = length <= MAX_NAME && text.includes('\\') ? JSON.parse(`"${text}"`) : text
    this.#member = { name, from: this.#nameStart, start: 0, end: 0, elements: 0, last: 0 }
    this.members.push(this.#member)
  }

  #escape(byte: number): void {
    if (byte === 0x75) {
      this.#hexLeft = 4
      this.#state = HEX
    } else if (IS_ESCAPE[byte] === 1) this.#state = STRING
    else this.#unexpected()
  }

  #hex(byte: number): void {
    const isHex = isDigit(byte) || ((byte | 0x20) >= 0x61 && (byte | 0x20) <= 0x66)
    if (!isHex) this.#unexpected()
    if (--this.#hexLeft === 0) this.#state = STRING
  }

  #beginNumber(stage: number): void {
    this.#stage = stage
    this.#state = NUMBER
  }

  #number(bytes: Buffer, end: number): void {
    let at = this.#at
    let stage = this.#stage
    while (at < end) {
      const next = nextStage(stage, bytes[at]!)
      if (next === 0) break
      stage = next
      at++
    }
    this.#at = at
    this.#stage = stage
    if (at === end) return
    if (stage === MINUS || stage === POINT || stage === E || stage === E_SIGN) {
      this.#at++
      this.#unexpected()
    }
    this.#endValue()
  }

  #beginLiteral(literal: string): void {
    this.#literal = literal
    this.#matched = 1
    this.#state = LITERAL
  }

  #unexpected(): never {
    throw new JsonError(`${this.#place(1)} must be ${EXPECTED[this.#state]}`)
  }

  #place(back: number): string {
    return `byte ${this.#at - back + 1}`
  }
}

/** Reads a JSON object that is there as a whole. */
export function outlineOf(bytes: Buffer): Outline {
  const scanner = new JsonScanner()
  scanner.scan(bytes, bytes.length)
  scanner.end()
  return scanner
}

/** The members of a JSON object that is there as a whole. */
export function membersOf(bytes: Buffer): readonly Member[] {
  return outlineOf(bytes).members
}

function plainBytes(bytes: Buffer, from: number, end: number): number {
  let at = from
  while (at < end && IS_SPECIAL[bytes[at]!] === 0) at++
  return at
}

/**
 * Returns the index of the first word from `at` on that has a special byte, or `end`: half the time of a loop over
 * bytes. A byte is zero where taking 1 from it sets its highest bit, which was not set before; the same way, taking
 * 0x20 shows a control character.
 */
function plainWords(words: Int32Array, from: number, end: number): number {
  let at = from
  for (; at < end; at++) {
    const word = words[at]!
    const quote = word ^ 0x22222222
    const backslash = word ^ 0x5c5c5c5c
    const special =
      ((quote - 0x01010101) & ~quote) |
      ((backslash - 0x01010101) & ~backslash) |
      ((word - 0x20202020) & ~word)
    if ((special & 0x80808080) !== 0) break
  }
  return at
}

/** Whether a name ends in "url", or begins with one of {@link MEDIA}, whatever its case. */
function isLink(bytes: Buffer, from: number, end: number): boolean {
  if ((wordAt(bytes, end - 4) & 0xffffff) === URL_END) return end - from >= 3
  return end - from >= 4 && MEDIA.includes(wordAt(bytes, from))
}

/** Returns four bytes as one number, with letters in lower case. */
function wordAt(bytes: Buffer, at: number): number {
  const word = (bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!
  return word | 0x20202020
}

/** What a number is after this byte; 0: the byte is no part of it. */
function nextStage(stage: number, byte: number): number {
  if (isDigit(byte)) {
    switch (stage) {
      case MINUS:
        return byte === 0x30 ? ZERO : INTEGER
      case INTEGER:
        return INTEGER
      case POINT:
      case DECIMALS:
        return DECIMALS
      case E:
      case E_SIGN:
      case EXPONENT:
        return EXPONENT
      default:
        return 0
    }
  }
  if (byte === 0x2e) return stage === ZERO || stage === INTEGER ? POINT : 0
  if ((byte | 0x20) === 0x65)
    return stage === ZERO || stage === INTEGER || stage === DECIMALS ? E : 0
  if (byte === 0x2b || byte === 0x2d) return stage === E ? E_SIGN : 0
  return 0
}

function isDigit(byte: number): boolean {
  return byte >= 0x30 && byte <= 0x39
}
