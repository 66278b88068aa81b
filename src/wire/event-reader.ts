/** How a stream is cut into events: server-sent events, or one JSON text in each line. */
export type StreamFraming = 'sse' | 'ndjson'

const LF = 0x0a
const CR = 0x0d
const COLON = 0x3a
const SPACE = 0x20
const BOM = Buffer.from('\ufeff')
const DATA = Buffer.from('data:')
const NEWLINE = Buffer.from('\n')
const STREAM_END = Buffer.from('\n\n')
/** Old llama.cpp servers write lines with `error: {...}`. They are read as data with an `error` field. */
const ERROR_BEGIN = Buffer.from('{"error":')
const ERROR_NEXT = Buffer.from('\n{"error":')
const ERROR_END = Buffer.from('}')
/** Maximum length of the names of fields and events that are of interest, and one more (bytes). */
const MAX_NAME = 6

/** What the next byte of a line is part of. */
const NAME = 0
const VALUE_START = 1
const VALUE = 2

/**
 * Reads a stream of events in chunks of any size. It keeps no bytes of the stream; it returns where in a chunk the data
 * of an event and the end of an event are.
 *
 * Server-sent events are read as https://html.spec.whatwg.org/multipage/server-sent-events.html specifies: lines end
 * with LF, CRLF or CR, a byte order mark is skipped, and several `data` lines are joined with LF. One difference: an
 * event without its blank line at the end of the stream is complete, because servers leave it out.
 *
 * @example
 * const reader = new EventReader('sse')
 * reader.feed(Buffer.from('data: {"n":1}\n\ndata: [DO'))
 * reader.next() // 'data'
 * String(reader.data) // '{"n":1}'
 * reader.next() // 'end'
 * reader.to // 15
 * reader.next() // 'data'
 * reader.next() // undefined
 */
export class EventReader {
  /** After `data`: a part of the event's data is in `bytes`, from `from` to `to` (exclusive). */
  bytes: Buffer = NEWLINE
  from = 0
  /** After `end`: the index in the chunk of the first byte behind the event. */
  to = 0
  /** Whether the event has data. Clients ignore one without: comments, blank lines. */
  hasData = false
  /** Whether the event is named `error`. */
  isError = false
  readonly #isSse: boolean
  #chunk: Buffer = NEWLINE
  #at = 0
  /** Indexes of the next LF and CR in the chunk, or its length; below `#at` they have been passed. */
  #lf = 0
  #cr = 0
  #state = NAME
  /** Name of the field. */
  #field = ''
  /** Name of the event, as far as its line has been read. */
  #event = ''
  /** The next part of the data, where it is not in the stream itself. */
  #inserted: Buffer | undefined
  /** The line that ended last ended with CR: LF belongs to it. */
  #isAfterCr = false
  /** Number of bytes of the byte order mark that have been read; afterwards its length. */
  #bom = 0
  #isMidEvent = false
  /** The event ends here; its end has been returned. */
  #isEnding = false
  #isEnded = false

  constructor(framing: StreamFraming) {
    this.#isSse = framing === 'sse'
    this.#beginLine()
  }

  /** Whether what has been read ends with a whole event. */
  get isBetweenEvents(): boolean {
    return this.isBetweenLines && !this.#isMidEvent
  }

  get isBetweenLines(): boolean {
    return this.#isSse ? this.#state === NAME && this.#field === '' : !this.#isMidEvent
  }

  /**
   * Takes the next chunk; the one before must have been read to its end.
   *
   * @returns how many of its bytes belong to the event before: 1 for the LF of a CRLF, else 0
   */
  feed(chunk: Buffer): number {
    const isLf = this.#isAfterCr && this.isBetweenEvents && chunk[0] === LF
    if (isLf) this.#isAfterCr = false
    this.#chunk = chunk
    this.#at = isLf ? 1 : 0
    this.#lf = -1
    this.#cr = -1
    return this.#at
  }

  /** Ends the stream: the next `end` is that of an event whose last line or blank line is missing. */
  feedEnd(): void {
    this.feed(STREAM_END)
  }

  /** The part of the data that was read last; only valid directly after `data`. */
  get data(): Buffer {
    return this.bytes.subarray(this.from, this.to)
  }

  /** Returns what comes next in the chunk; undefined: it has been read to its end. */
  next(): 'data' | 'end' | undefined {
    if (this.#isEnded) this.#beginEvent()
    const chunk = this.#chunk
    for (;;) {
      if (this.#inserted !== undefined) return this.#insert(this.#inserted)
      if (this.#isEnding) return this.#endEvent(chunk)
      if (this.#at === chunk.length) return this.#letGo()
      const byte = chunk[this.#at]!
      if (this.#skipsLf(byte) || this.#skipsBom(byte)) this.#at++
      else if (this.#state === NAME) this.#readName(chunk, byte)
      else if (this.#state === VALUE_START) {
        this.#state = VALUE
        if (byte === SPACE) this.#at++
      } else if (this.#readValue(chunk)) return 'data'
    }
  }

  /** Drops the chunk: it may be a part of Node's 64 KB pool, which it would keep in memory until the next chunk. */
  #letGo(): undefined {
    this.bytes = this.#chunk = NEWLINE
    this.#at = NEWLINE.length
  }

  /** Skips the LF of CRLF. */
  #skipsLf(byte: number): boolean {
    const isSecond = this.#isAfterCr && byte === LF
    this.#isAfterCr = false
    return isSecond
  }

  #skipsBom(byte: number): boolean {
    if (this.#bom === BOM.length) return false
    const isBom = byte === BOM[this.#bom]
    this.#bom = isBom ? this.#bom + 1 : BOM.length
    return isBom
  }

  /** Reads the name of a field, or a blank line. */
  #readName(chunk: Buffer, byte: number): void {
    if (byte === DATA[0] && this.#field === '' && startsWith(chunk, this.#at, DATA)) {
      this.#at += DATA.length
      this.#field = 'data'
      this.#beginValue()
      return
    }
    this.#at++
    if (byte === COLON) this.#beginValue()
    else if (byte !== LF && byte !== CR) {
      if (this.#field.length < MAX_NAME) this.#field += String.fromCharCode(byte)
    } else if (this.#field === '') {
      this.#isAfterCr = byte === CR
      this.#isEnding = true
    } else {
      // A name alone is a field with an empty value: the end of the line is read as that of the value.
      this.#at--
      this.#beginValue()
    }
  }

  #beginValue(): void {
    this.#state = VALUE_START
    if (this.#field === 'event') this.#event = ''
    if (this.#field !== 'data' && this.#field !== 'error') return
    if (this.#field === 'error') this.#inserted = this.hasData ? ERROR_NEXT : ERROR_BEGIN
    else if (this.hasData) this.#inserted = NEWLINE
    this.hasData = true
  }

  /** Reads a value up to the end of its line or of the chunk. Returns whether it is data. */
  #readValue(chunk: Buffer): boolean {
    const from = this.#at
    const to = this.#lineEnd(chunk, from)
    const field = this.#field
    if (field === 'event' && this.#event.length < MAX_NAME) {
      this.#event += chunk.toString('latin1', from, Math.min(to, from + MAX_NAME))
    }
    if (!this.#isSse && to > from) this.#isMidEvent = this.hasData = true
    this.#at = to
    if (to < chunk.length) {
      this.#at++
      if (field === 'error') this.#inserted = ERROR_END
      this.#endLine(chunk[to]!)
    }
    if (to === from || (field !== 'data' && field !== 'error')) return false
    this.bytes = chunk
    this.from = from
    this.to = to
    return true
  }

  /** Returns the index of the LF or CR that ends a line, or the length of the chunk. Each byte is searched once. */
  #lineEnd(chunk: Buffer, from: number): number {
    if (this.#lf < from) this.#lf = indexOf(chunk, LF, from)
    if (this.#cr < from) this.#cr = indexOf(chunk, CR, from)
    return Math.min(this.#lf, this.#cr)
  }

  #insert(bytes: Buffer): 'data' {
    this.#inserted = undefined
    this.bytes = bytes
    this.from = 0
    this.to = bytes.length
    return 'data'
  }

  #endLine(byte: number): void {
    this.#isAfterCr = byte === CR
    if (this.#isSse) this.#isMidEvent = true
    else this.#isEnding = this.hasData
    if (this.#field === 'event') this.isError = this.#event === 'error'
    this.#beginLine()
  }

  #beginLine(): void {
    this.#state = this.#isSse ? NAME : VALUE
    this.#field = this.#isSse ? '' : 'data'
  }

  #endEvent(chunk: Buffer): 'end' {
    if (this.#isAfterCr && chunk[this.#at] === LF) {
      this.#isAfterCr = false
      this.#at++
    }
    this.to = this.#at
    this.#isMidEvent = this.#isEnding = false
    this.#isEnded = true
    return 'end'
  }

  #beginEvent(): void {
    this.#isEnded = this.hasData = this.isError = false
  }
}

function startsWith(bytes: Buffer, at: number, text: Buffer): boolean {
  for (let index = 0; index < text.length; index++) {
    if (bytes[at + index] !== text[index]) return false
  }
  return true
}

function indexOf(chunk: Buffer, byte: number, from: number): number {
  const at = chunk.indexOf(byte, from)
  return at === -1 ? chunk.length : at
}
