import { Transform } from 'node:stream'
import type { Failure } from '../dialects/failure.ts'
import type { Framing } from '../http.ts'
import type { Tap } from './answer.ts'

const QUOTE = 0x22
const BACKSLASH = 0x5c
const LF = 0x0a
const CR = 0x0d
/** Objects beside the answer itself that say whose it is: Anthropic's and those of the Responses API. */
const HEADS = new Set(['message', 'response'])
const DATA = 'data:'
/** No name of interest is longer. */
const MAX_NAME = 8

/**
 * An answer in which the model has the name that the caller knows. Only `model` of the answer itself is
 * changed, never what a model has written.
 */
export class Renamed implements Tap {
  readonly #inner: Tap | undefined
  readonly #name: Buffer
  readonly #isSse: boolean
  readonly #isWhole: boolean
  #depth = 0
  /** Of a line of an event stream: how much of `data:` it began with; -1: it is another line. */
  #line = 0
  #isAfterCr = false
  #isString = false
  #isEscaped = false
  /** The string is a member's name; it is the old name of the model. */
  #isName = false
  #isOld = false
  #member = ''
  /** Where a name can stand: at the beginning of a member of the answer, or of its head. */
  #isMemberNext = false
  #isInHead = false
  #isDone = false

  /** @param framing `json`: one object; `ndjson`: one in each line; `sse`: one in each event */
  constructor(inner: Tap | undefined, framing: Framing, model: string) {
    this.#inner = inner
    this.#name = Buffer.from(JSON.stringify(model))
    this.#isSse = framing === 'sse'
    this.#isWhole = framing === 'json'
  }

  /** The same for bytes that do not come as an answer's any more. */
  toTransform(): Transform {
    return new Transform({
      transform: (chunk: Buffer, _encoding, done) => done(null, this.#rename(chunk))
    })
  }

  pass(chunk: Buffer): Buffer | undefined {
    return this.#rename(this.#inner === undefined ? chunk : this.#inner.pass(chunk))
  }

  get isOver(): boolean {
    return this.#inner?.isOver ?? false
  }

  release(): Buffer | undefined {
    return this.#rename(this.#inner?.release())
  }

  end(): Buffer | undefined {
    return this.#rename(this.#inner?.end())
  }

  breakOff(): string {
    return this.#inner?.breakOff() ?? ''
  }

  isCutShort(): boolean {
    return this.#inner?.isCutShort() ?? false
  }

  get failure(): Failure | undefined {
    return this.#inner?.failure
  }

  #rename(bytes: Buffer | undefined): Buffer | undefined {
    if (bytes === undefined || this.#isDone) return bytes
    const parts: Buffer[] = []
    let from = 0
    for (let at = 0; at < bytes.length; at++) {
      const byte = bytes[at]!
      if ((byte === LF || byte === CR) && !this.#isWhole) {
        if (this.#isOld) from = at
        this.#endLine(byte)
      } else if (this.#isSse && this.#line !== DATA.length) this.#beginLine(byte)
      else if (this.#isString) {
        const next = this.#isName || this.#isEscaped ? at : skipText(bytes, at)
        if (next > at) at = next - 1
        else if (this.#endsString(byte) && this.#isOld) {
          this.#isOld = false
          this.#isDone = this.#isWhole
          from = at + 1
        }
      } else if (this.#depth === 0) this.#outside(byte)
      else if (byte === QUOTE) {
        this.#beginString()
        if (this.#isOld) parts.push(bytes.subarray(from, at), this.#name)
      } else this.#structure(byte)
    }
    if (!this.#isOld) parts.push(bytes.subarray(from))
    return parts.length === 1 ? parts[0] : Buffer.concat(parts)
  }

  /** LF, CR or both (https://html.spec.whatwg.org/multipage/server-sent-events.html). */
  #endLine(byte: number): void {
    const isSecond = byte === LF && this.#isAfterCr
    this.#isAfterCr = byte === CR
    if (isSecond) return
    // JSON has no line end within a text: what is wrong ends with the line, and all else with the event.
    const isBlank = this.#line === 0
    this.#line = 0
    if (this.#isSse && !isBlank && !this.#isString) return
    this.#depth = 0
    this.#isString = this.#isEscaped = this.#isName = this.#isOld = this.#isInHead = false
  }

  #beginLine(byte: number): void {
    this.#isAfterCr = false
    const isPrefix = this.#line !== -1 && byte === DATA.charCodeAt(this.#line)
    this.#line = isPrefix ? this.#line + 1 : -1
  }

  #outside(byte: number): void {
    if (byte !== 0x7b) return
    this.#depth = 1
    this.#isMemberNext = true
  }

  #beginString(): void {
    this.#isString = true
    this.#isName = this.#isMemberNext
    this.#isMemberNext = false
    if (this.#isName) this.#member = ''
    else this.#isOld = this.#isNear && this.#member === 'model'
  }

  /** Does the string end here? */
  #endsString(byte: number): boolean {
    if (this.#isEscaped) this.#isEscaped = false
    else if (byte === BACKSLASH) this.#isEscaped = true
    else if (byte === QUOTE) {
      this.#isString = this.#isName = false
      return true
    }
    if (this.#isName && this.#member.length <= MAX_NAME) this.#member += String.fromCharCode(byte)
    return false
  }

  #structure(byte: number): void {
    switch (byte) {
      case 0x7b:
        this.#isInHead ||= this.#depth === 1 && HEADS.has(this.#member)
        this.#depth++
        this.#isMemberNext = this.#isNear
        break
      case 0x5b:
        this.#depth++
        break
      case 0x7d:
      case 0x5d:
        this.#depth--
        if (this.#depth === 1) this.#isInHead = false
        this.#member = ''
        break
      case 0x2c:
        this.#isMemberNext = this.#isNear
        break
    }
  }

  /** Is this the answer itself, or its head? */
  get #isNear(): boolean {
    return this.#depth === 1 || (this.#depth === 2 && this.#isInHead)
  }
}

/** Where the next byte is, from `at` on, that may end a text or be no part of it. */
function skipText(bytes: Buffer, at: number): number {
  let next = at
  while (next < bytes.length) {
    const byte = bytes[next]
    if (byte === QUOTE || byte === BACKSLASH || byte === LF || byte === CR) break
    next++
  }
  return next
}
