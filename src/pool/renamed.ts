import { Transform } from 'node:stream'
import type { Failure } from '../dialects/failure.ts'
import type { Framing } from '../http.ts'
import { EventReader } from '../wire/event-reader.ts'
import type { Tap } from './answer.ts'

const QUOTE = 0x22
const BACKSLASH = 0x5c
const LF = 0x0a
const CR = 0x0d
/** Objects beside the answer itself that say whose it is: Anthropic's and those of the Responses API. */
const HEADS = new Set(['message', 'response'])
/** No name of interest is longer. */
const MAX_NAME = 8

/**
 * An answer in which the model has the name that the caller knows. Only `model` of the answer itself is
 * changed, never what a model has written.
 */
export class Renamed implements Tap {
  readonly #inner: Tap | undefined
  readonly #name: Buffer
  /** undefined: the answer is one JSON text. */
  readonly #reader: EventReader | undefined
  #depth = 0
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
    this.#reader = framing === 'json' ? undefined : new EventReader(framing)
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

  get isBetweenEvents(): boolean {
    return this.#inner?.isBetweenEvents ?? false
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
    const reader = this.#reader
    let from = 0
    if (reader === undefined) from = this.#scan(bytes, 0, bytes.length, from, parts)
    else {
      if (this.#isString && (bytes[0] === LF || bytes[0] === CR)) this.#reset()
      reader.feed(bytes)
      for (let next = reader.next(); next !== undefined; next = reader.next()) {
        if (next === 'end') this.#reset()
        else if (reader.bytes === bytes) {
          from = this.#scan(bytes, reader.from, reader.to, from, parts)
          if (reader.to === bytes.length) continue
          if (this.#isOld) from = reader.to
        }
        // JSON has no line end within a string.
        if (this.#isString) this.#reset()
      }
    }
    if (!this.#isOld) parts.push(bytes.subarray(from))
    return parts.length === 1 ? parts[0] : Buffer.concat(parts)
  }

  #reset(): void {
    this.#depth = 0
    this.#isString = this.#isEscaped = this.#isName = this.#isOld = this.#isInHead = false
  }

  /**
   * Reads a part of the JSON.
   *
   * @param start bytes before were added to `parts`
   * @returns the same for the bytes that were added now
   */
  #scan(bytes: Buffer, begin: number, end: number, start: number, parts: Buffer[]): number {
    let from = start
    for (let at = begin; at < end; at++) {
      const byte = bytes[at]!
      if (this.#isString) {
        const next = this.#isName || this.#isEscaped ? at : skipText(bytes, at, end)
        if (next > at) at = next - 1
        else if (this.#endsString(byte) && this.#isOld) {
          this.#isOld = false
          from = at + 1
          // The name stands once in a whole answer: what follows may be long, and is not read.
          this.#isDone = this.#reader === undefined
          if (this.#isDone) break
        }
      } else if (this.#depth === 0) this.#outside(byte)
      else if (byte === QUOTE) {
        this.#beginString()
        if (this.#isOld) parts.push(bytes.subarray(from, at), this.#name)
      } else this.#structure(byte)
    }
    return from
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

/** Returns the index, from `at` on, of the next byte that may end a string. */
function skipText(bytes: Buffer, at: number, end: number): number {
  let next = at
  while (next < end && bytes[next] !== QUOTE && bytes[next] !== BACKSLASH) next++
  return next
}
