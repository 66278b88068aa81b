import { setImmediate as nextTurn } from 'node:timers/promises'

/** A change of a request body: `bytes` takes the place of what stands from `start` to `end`. */
export interface Edit {
  start: number
  end: number
  bytes: Buffer
}

/** Up to this size (bytes) a body is one buffer, and an edited one a copy. */
const MAX_WHOLE = 64 * 1024

/** Maximum size (bytes) that a socket gets in one turn: the kernel copies 16 MB for more than 10 ms. */
const MAX_WRITTEN = 1024 * 1024

/**
 * A body in several pieces, which can be sent more than once until they are released: undici keeps the body of a request
 * for as long as the response runs.
 */
export class Pieces implements AsyncIterable<Buffer> {
  readonly length: number
  /**
   * undici takes it for a Blob and so knows its size. For an iterable of unknown size it opens the connection in a later
   * turn, where the backend cannot tell which attempt opened it.
   */
  readonly [Symbol.toStringTag] = 'Blob'
  /** All pieces were taken the last time. */
  isTaken = false
  #pieces: readonly Buffer[]

  constructor(pieces: readonly Buffer[]) {
    this.#pieces = pieces
    this.length = pieces.reduce((sum, piece) => sum + piece.length, 0)
  }

  /** Yields a megabyte in each turn. A socket writes all pieces in one turn while the kernel has room for them. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Buffer> {
    this.isTaken = false
    let room = MAX_WRITTEN
    for (const piece of this.#pieces) {
      for (let at = 0; at < piece.length; at += MAX_WRITTEN) {
        if (room <= 0) {
          await nextTurn()
          room = MAX_WRITTEN
        }
        const part = piece.subarray(at, at + MAX_WRITTEN)
        room -= part.length
        yield part
      }
    }
    this.isTaken = true
  }

  get size(): number {
    return this.length
  }

  stream(): this {
    return this
  }

  /** Lets go of the bytes: the body will not be sent again. */
  release(): void {
    this.#pieces = []
  }

  /** Copies the pieces into one buffer outside Node's pool, where a few bytes keep 64 KB alive. */
  toBuffer(): Buffer {
    const whole = Buffer.allocUnsafeSlow(this.length)
    let at = 0
    for (const piece of this.#pieces) at += piece.copy(whole, at)
    return whole
  }
}

/** Returns a body in pieces, which can be released, if it is large or the response is a stream. */
export function inPieces<Body>(body: Body, isStream = false): Body | Pieces {
  return Buffer.isBuffer(body) && (isStream || body.length > MAX_WHOLE) ? new Pieces([body]) : body
}

/**
 * Applies edits to a body. A small body is copied into one new buffer. A large one becomes pieces that share its
 * memory: copying 16 MB blocks the event loop for about 7 ms.
 *
 * @param edits must not overlap; two at the same place are applied in their order
 * @example
 * String(edited(Buffer.from('{"n":1}'), [{ start: 5, end: 6, bytes: Buffer.from('2') }])) // '{"n":2}'
 */
export function edited(bytes: Buffer, edits: readonly Edit[]): Buffer | Pieces {
  const pieces: Buffer[] = []
  let from = 0
  for (const edit of edits.toSorted((a, b) => a.start - b.start)) {
    pieces.push(bytes.subarray(from, edit.start), edit.bytes)
    from = edit.end
  }
  const body = new Pieces([...pieces, bytes.subarray(from)].filter(({ length }) => length > 0))
  return body.length <= MAX_WHOLE ? body.toBuffer() : body
}
