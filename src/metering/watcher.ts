import type { Report } from '../dialects/failure.ts'
import { addText, noText, type TextCounts } from './text.ts'

/**
 * Watches one JSON text go by, in pieces of any size, and notes the few members that metering needs:
 * without parsing the text, without keeping it, and without being fooled by text inside strings.
 *
 * Members are told apart by name and depth: `usage` and `error` at the top or inside a top-level `message`
 * or `response`; Ollama's counts, llama.cpp's `timings`, `id`, `type`, `done` and the fields of an error at the
 * top; `choices` when it is not empty, and the `index` and `finish_reason` of each; and whether one of the delta
 * members, anywhere, has text, and how much.
 */

/** What was seen in one JSON text. */
export interface Seen extends Report {
  /** The usage object, as JSON. */
  usage: string | undefined
  promptEvalCount: number | undefined
  evalCount: number | undefined
  id: string | undefined
  /** How many such texts there were, and where the first stands in the piece that was fed. */
  texts: number
  textBegin: number
  textEnd: number
  /** `done` was true. */
  done: boolean
  /** Number of choices, and the index of the last one. */
  choices: number
  index: number | undefined
  /** There are `timings` (llama.cpp): all numbers are of one choice. */
  hasTimings: boolean
  /** There is reasoning. */
  hasReasoning: boolean
  sequence: number | undefined
}

const NAMES = {
  usage: 1,
  message: 2,
  response: 3,
  choices: 4,
  timings: 5,
  index: 6,
  id: 7,
  type: 8,
  object: 9,
  status: 10,
  error_type: 11,
  finish_reason: 12,
  // Members from here on may be numbers or the like.
  done: 13,
  error: 14,
  prompt_eval_count: 15,
  eval_count: 16,
  code: 17,
  sequence_number: 18
} as const
/** Flags on a name's number: its text is a piece of the answer; it is reasoning. */
const DELTA = 64
const REASONING = 128
const FLAGS = DELTA | REASONING

/** What the next byte belongs to. */
const VALUE = 0
const NAME = 1
const COLON = 2
const AFTER = 3
const NAME_TEXT = 4
const TEXT = 5
const SCALAR = 6
const KEPT_OBJECT = 7
const DEEP = 8
const LOST = 9

const OBJECT = 1
const ARRAY = 2
const MAX_DEPTH = 64
const MAX_KEPT = 16 * 1024
const LONG_TEXT = 48
const LETTER_E = 0x65
/** Maximum number of different finish reasons that are kept of one text. */
const MAX_REASONS = 16
/** Stands for an error that is longer than what is kept; JSON. */
const LONG_ERROR = '"..."'

/** The members a watcher looks for; the same for all answers of one dialect. */
export class MemberNames {
  readonly #codes = new Map<string, number>(Object.entries(NAMES))
  /** By their length. */
  readonly #names: { bytes: Buffer; code: number }[][] = []

  /**
   * @param deltaMembers names of the members whose text is a piece of the answer
   * @param reasoningMembers those of them that are reasoning
   */
  constructor(deltaMembers: readonly string[], reasoningMembers: readonly string[] = []) {
    for (const name of deltaMembers) {
      const flags = reasoningMembers.includes(name) ? FLAGS : DELTA
      this.#codes.set(name, (this.#codes.get(name) ?? 0) | flags)
    }
    for (const [name, code] of this.#codes) {
      const ofLength = this.#names[name.length] ?? []
      ofLength.push({ bytes: Buffer.from(name), code })
      this.#names[name.length] = ofLength
    }
  }

  codeOf(name: string): number {
    return this.#codes.get(name) ?? 0
  }

  /** The same from bytes, without making a string: this runs a dozen times for each token. */
  code(bytes: Buffer, begin: number, end: number): number {
    const names = this.#names[end - begin]
    if (names === undefined) return 0
    next: for (let index = 0; index < names.length; index++) {
      const { bytes: name, code } = names[index]!
      for (let at = 0; at < name.length; at++) if (name[at] !== bytes[begin + at]) continue next
      return code
    }
    return 0
  }
}

/**
 * @example
 * const watcher = new JsonWatcher(new MemberNames(['content']))
 * const text = Buffer.from('{"delta": {"content": "Hi"}, "usage": {"total_tokens": 3}}')
 * watcher.feed(text, 0, text.length)
 * watcher.seen // { delta: true, usage: '{"total_tokens": 3}', ... }
 */
export class JsonWatcher {
  seen = nothing()
  /** The text of the delta members, of all JSON texts so far. */
  readonly text = noText()
  /** The part of it in the first choice, where one JSON text has several. */
  firstChoice: TextCounts | undefined
  readonly #names: MemberNames
  readonly #kinds = new Uint8Array(MAX_DEPTH)
  readonly #members = new Uint8Array(MAX_DEPTH)
  #state = VALUE
  #depth = 0
  /** Inside text that is a piece of the answer; inside an object that is one: its depth. */
  #isPiece = false
  #pieceDepth = 0
  #pieceBegin = 0
  /** Inside text: the byte before was a backslash. */
  #escaped = false
  /** A name or value that is being kept, and what of it stood in earlier pieces. */
  #keeps = false
  #kept = ''
  /** Inside the usage object, or too deep: open braces and brackets, and whether we are in text. */
  #braces = 0
  #inText = false

  constructor(names: MemberNames) {
    this.#names = names
  }

  /** Gets ready for another text. */
  reset(): void {
    this.seen = nothing()
    this.#state = VALUE
    this.#depth = 0
    this.#isPiece = false
    this.#pieceDepth = 0
    this.#escaped = false
    this.#keeps = false
    this.#kept = ''
  }

  feed(bytes: Buffer, from: number, to: number): void {
    /** Where the name or value that is being kept begins in this piece. */
    let begin = from
    let at = from
    this.#pieceBegin = from
    while (at < to) {
      const byte = bytes[at]!
      switch (this.#state) {
        case NAME_TEXT:
        case TEXT: {
          if (this.#state === TEXT && byte !== 0x22) this.#noteText(at)
          const textBegin = at
          at = this.#endOfText(bytes, at, to)
          if (this.#isPiece) addText(this.text, bytes, textBegin, at)
          if (at === to) break
          if (this.#state === NAME_TEXT) this.#endName(bytes, begin, at)
          else this.#endText(bytes, begin, at)
          at++
          break
        }
        case SCALAR:
          if (byte === 0x2c || byte === 0x7d || byte === 0x5d || byte <= 0x20) {
            this.#endScalar(bytes, begin, at)
          } else at++
          break
        case KEPT_OBJECT:
          at++
          if (this.#endsNested(byte)) {
            const json = this.#take(bytes, begin, at)
            if (this.#isError()) this.seen.error = json
            else this.seen.usage = json
            this.#state = AFTER
          }
          break
        case DEEP:
          at++
          if (this.#endsNested(byte)) this.#state = AFTER
          break
        case VALUE:
          begin = this.#beginValue(bytes, at) ? at + 1 : at
          at++
          break
        case NAME:
          at++
          begin = at
          if (byte === 0x22) {
            this.#state = NAME_TEXT
            this.#keeps = true
          } else if (byte === 0x7d) this.#close(bytes, at)
          break
        case COLON:
          at++
          if (byte === 0x3a) this.#state = VALUE
          break
        case AFTER:
          at++
          if (byte === 0x2c) this.#state = this.#kinds[this.#depth] === OBJECT ? NAME : VALUE
          else if (byte === 0x7d || byte === 0x5d) this.#close(bytes, at)
          break
        default:
          return
      }
    }
    if (this.#pieceDepth > 0) addText(this.text, bytes, this.#pieceBegin, to)
    if (this.#keeps) this.#keep(bytes, begin, to)
  }

  /** Returns whether what is kept of the value begins after this byte. */
  #beginValue(bytes: Buffer, at: number): boolean {
    switch (bytes[at]) {
      case 0x20:
      case 0x0a:
      case 0x0d:
      case 0x09:
        return false
      case 0x22:
        this.#state = TEXT
        this.#isPiece = this.#pieceDepth === 0 && this.#isDelta()
        this.#keeps = this.#isKept(bytes[at + 1])
        return true
      case 0x7b:
        if (this.#isUsage() || this.#isError()) return this.#keepObject()
        this.#noteObject(at)
        if (this.#depth === 2 && this.#members[1] === NAMES.choices) this.#noteChoice()
        else if (this.#isTop(NAMES.timings)) this.seen.hasTimings = true
        this.#open(OBJECT, NAME)
        return false
      case 0x5b:
        if (this.#isError()) return this.#keepObject()
        if (this.#isTop(NAMES.choices)) this.seen.hasChoices = true
        this.#open(ARRAY, VALUE)
        return false
      case 0x5d:
        if (this.#depth === 2 && this.#members[1] === NAMES.choices) this.seen.hasChoices = false
        this.#close(bytes, at)
        return false
      default:
        this.#state = SCALAR
        this.#keeps =
          this.#depth === 1 ? this.#members[1]! >= NAMES.done : this.#isOfChoice(NAMES.index)
        return false
    }
  }

  #keepObject(): boolean {
    this.#state = KEPT_OBJECT
    this.#keeps = true
    this.#braces = 1
    this.#inText = false
    return false
  }

  #open(kind: number, state: number): void {
    this.#depth++
    this.#kinds[this.#depth] = kind
    this.#members[this.#depth] = 0
    this.#state = state
    if (this.#depth < MAX_DEPTH - 1) return
    // Nothing of interest is as deep as that: only find the way out again.
    this.#depth--
    this.#state = DEEP
    this.#braces = 1
    this.#inText = false
  }

  /** @param end the byte after the brace or bracket */
  #close(bytes: Buffer, end: number): void {
    if (this.#depth > 0) this.#depth--
    this.#state = AFTER
    if (this.#depth >= this.#pieceDepth) return
    addText(this.text, bytes, this.#pieceBegin, end)
    this.#pieceDepth = 0
  }

  #endName(bytes: Buffer, begin: number, end: number): void {
    this.#members[this.#depth] =
      this.#kept === ''
        ? this.#names.code(bytes, begin, end)
        : this.#names.codeOf(this.#take(bytes, begin, end))
    this.#keeps = false
    this.#state = COLON
  }

  #noteChoice(): void {
    if (++this.seen.choices === 2) this.firstChoice ??= [...this.text]
  }

  #noteText(at: number): void {
    if (!this.#isDelta()) return
    this.seen.delta = true
    if ((this.#members[this.#depth]! & REASONING) !== 0) this.seen.hasReasoning = true
    if (this.seen.texts++ === 0) this.seen.textBegin = at
  }

  /** Tool-call arguments may be an object, whose JSON the model has written. */
  #noteObject(at: number): void {
    if (!this.#isDelta()) return
    this.seen.delta = true
    // At the top it is a setting that the answer repeats (`text` of Responses).
    if (this.#pieceDepth > 0 || this.#depth === 1) return
    this.#pieceDepth = this.#depth + 1
    this.#pieceBegin = at
  }

  #isDelta(): boolean {
    return this.#kinds[this.#depth] === OBJECT && (this.#members[this.#depth]! & DELTA) !== 0
  }

  #endText(bytes: Buffer, begin: number, end: number): void {
    this.#isPiece = false
    if (this.seen.texts === 1 && this.seen.textEnd === 0) this.seen.textEnd = end
    if (this.#keeps) this.#noteValue(this.#take(bytes, begin, end))
    this.#state = AFTER
  }

  #noteValue(text: string): void {
    const { seen } = this
    if (this.#isId()) seen.id = text
    else if (this.#isError()) seen.error = `"${text}"`
    else if (this.#depth > 1) this.#noteFinishReason(text)
    else {
      switch (this.#members[1]) {
        case NAMES.type:
          seen.type = text
          break
        case NAMES.object:
          seen.object = text
          break
        case NAMES.status:
          seen.status = text
          break
        case NAMES.message:
          seen.message = text
          break
        case NAMES.code:
          seen.code = text
          break
        case NAMES.error_type:
          seen.errorType = text
      }
    }
  }

  #noteFinishReason(reason: string): void {
    const known = this.seen.finishReasons ?? []
    if (reason === '' || known.includes(reason) || known.length >= MAX_REASONS) return
    this.seen.finishReasons = [...known, reason]
  }

  #endScalar(bytes: Buffer, begin: number, end: number): void {
    if (this.#keeps) {
      const text = this.#take(bytes, begin, end)
      if (text !== 'null') this.#noteScalar(text)
    }
    this.#state = AFTER
  }

  #noteScalar(text: string): void {
    const { seen } = this
    if (this.#depth > 1) {
      seen.index = toInteger(text)
      return
    }
    switch (this.#members[1]) {
      case NAMES.done:
        seen.done = text === 'true'
        break
      case NAMES.error:
        seen.error = text
        break
      case NAMES.code:
        seen.code = text
        break
      case NAMES.sequence_number:
        seen.sequence = toInteger(text)
        break
      case NAMES.eval_count:
        seen.evalCount = Number(text)
        break
      case NAMES.prompt_eval_count:
        seen.promptEvalCount = Number(text)
    }
  }

  /** Was this the byte that ends the object or list whose inside is not looked at? */
  #endsNested(byte: number): boolean {
    if (this.#inText) {
      if (this.#escaped) this.#escaped = false
      else if (byte === 0x5c) this.#escaped = true
      else if (byte === 0x22) this.#inText = false
      return false
    }
    if (byte === 0x22) this.#inText = true
    else if (byte === 0x7b || byte === 0x5b) this.#braces++
    else if (byte === 0x7d || byte === 0x5d) this.#braces--
    return this.#braces === 0
  }

  #isTop(code: number): boolean {
    return this.#depth === 1 && (this.#members[1]! & ~FLAGS) === code
  }

  /** Whether this string, which begins with this byte (undefined: not known), is one of those that are noted. */
  #isKept(first: number | undefined): boolean {
    if (this.#depth === 1) {
      const member = this.#members[1]!
      // Every chunk has an `object`: only "error" is of interest.
      if (member === NAMES.object && first !== undefined) return first === LETTER_E
      return member === NAMES.message || (member >= NAMES.id && member <= NAMES.code)
    }
    if (this.#depth === 2) return this.#isId() || this.#isError()
    return this.#isOfChoice(NAMES.finish_reason)
  }

  /** Is this the named member of a choice? */
  #isOfChoice(code: number): boolean {
    return this.#depth === 3 && this.#members[3] === code && this.#members[1] === NAMES.choices
  }

  #isError(): boolean {
    return this.#isTop(NAMES.error) || this.#isInside(NAMES.error)
  }

  #isUsage(): boolean {
    return this.#isTop(NAMES.usage) || this.#isInside(NAMES.usage)
  }

  #isId(): boolean {
    return this.#isTop(NAMES.id) || this.#isInside(NAMES.id)
  }

  /** Is this the named member of a top-level `message` or `response`? */
  #isInside(code: number): boolean {
    if (this.#depth !== 2 || this.#members[2] !== code) return false
    const outer = this.#members[1]! & ~FLAGS
    return outer === NAMES.message || outer === NAMES.response
  }

  /** The closing quote's place, or `to` when the text goes on in the next piece. */
  #endOfText(bytes: Buffer, from: number, to: number): number {
    let at = from
    const near = Math.min(to, from + LONG_TEXT)
    for (; at < near; at++) {
      const byte = bytes[at]
      if (this.#escaped) this.#escaped = false
      else if (byte === 0x5c) this.#escaped = true
      else if (byte === 0x22) return at
    }
    while (at < to) {
      if (this.#escaped) {
        this.#escaped = false
        at++
        continue
      }
      const quote = bytes.indexOf(0x22, at)
      const end = quote === -1 || quote > to ? to : quote
      let slashes = 0
      while (end - 1 - slashes >= at && bytes[end - 1 - slashes] === 0x5c) slashes++
      if (end === to) {
        this.#escaped = slashes % 2 === 1
        return to
      }
      if (slashes % 2 === 0) return end
      at = end + 1
    }
    return to
  }

  #keep(bytes: Buffer, begin: number, end: number): void {
    this.#kept += bytes.toString('latin1', begin, end)
    if (this.#kept.length <= MAX_KEPT) return
    if (this.#isError()) this.seen.error = LONG_ERROR
    this.#state = LOST
  }

  #take(bytes: Buffer, begin: number, end: number): string {
    const text = this.#kept + bytes.toString('latin1', begin, end)
    this.#keeps = false
    this.#kept = ''
    return text
  }
}

/** A backend may send `true`, or 1e999, where a number belongs. */
function toInteger(text: string): number {
  const number = Number(text)
  return Number.isSafeInteger(number) ? number : 0
}

function nothing(): Seen {
  return {
    usage: undefined,
    promptEvalCount: undefined,
    evalCount: undefined,
    id: undefined,
    type: undefined,
    object: undefined,
    status: undefined,
    message: undefined,
    code: undefined,
    error: undefined,
    errorType: undefined,
    delta: false,
    isErrorEvent: false,
    texts: 0,
    textBegin: 0,
    textEnd: 0,
    hasChoices: false,
    finishReasons: undefined,
    done: false,
    choices: 0,
    index: undefined,
    hasTimings: false,
    hasReasoning: false,
    sequence: undefined
  }
}
