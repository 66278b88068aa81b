/**
 * Just enough of HTTP/1.1 (RFC 9112) to be no bottleneck: reads one message after another from the
 * bytes of a connection.
 */

export interface MessageListener {
  /** Start line and header fields, lower-cased. */
  onHead(head: string): void
  onBody(bytes: Buffer): void
  onEnd(): void
}

const HEAD = 0
const FIXED = 1
const CHUNK_SIZE = 2
const CHUNK = 3
const TRAILER = 4

export class MessageReader {
  readonly #listener: MessageListener
  #state = HEAD
  #rest: Buffer | undefined
  #left = 0

  constructor(listener: MessageListener) {
    this.#listener = listener
  }

  read(incoming: Buffer): void {
    let bytes = this.#rest === undefined ? incoming : Buffer.concat([this.#rest, incoming])
    this.#rest = undefined
    while (bytes.length > 0) {
      const used = this.#step(bytes)
      if (used === 0) {
        this.#rest = bytes
        return
      }
      bytes = bytes.subarray(used)
    }
  }

  /** Handles what stands first; returns how many bytes that were, 0 if it is not complete. */
  #step(bytes: Buffer): number {
    switch (this.#state) {
      case HEAD:
        return this.#head(bytes)
      case CHUNK_SIZE: {
        const end = bytes.indexOf('\r\n')
        if (end === -1) return 0
        const size = Number.parseInt(bytes.toString('latin1', 0, end), 16)
        this.#left = size
        this.#state = size === 0 ? TRAILER : CHUNK
        return end + 2
      }
      case CHUNK: {
        const used = Math.min(this.#left, bytes.length)
        if (this.#left > 0) {
          this.#listener.onBody(bytes.subarray(0, used))
          this.#left -= used
          return used
        }
        if (bytes.length < 2) return 0
        this.#state = CHUNK_SIZE
        return 2
      }
      case TRAILER: {
        const end = bytes.indexOf('\r\n')
        if (end === -1) return 0
        if (end === 0) this.#end()
        return end + 2
      }
      default: {
        const used = Math.min(this.#left, bytes.length)
        this.#listener.onBody(bytes.subarray(0, used))
        this.#left -= used
        if (this.#left === 0) this.#end()
        return used
      }
    }
  }

  #head(bytes: Buffer): number {
    const end = bytes.indexOf('\r\n\r\n')
    if (end === -1) return 0
    const head = bytes.toString('latin1', 0, end + 2).toLowerCase()
    this.#listener.onHead(head)
    this.#left = Number(/\r\ncontent-length: *(\d+)/.exec(head)?.[1] ?? 0)
    if (head.includes('\r\ntransfer-encoding: chunked')) this.#state = CHUNK_SIZE
    else if (this.#left > 0) this.#state = FIXED
    else this.#end()
    return end + 4
  }

  #end(): void {
    this.#state = HEAD
    this.#listener.onEnd()
  }
}

/** Microseconds of the machine's monotonic clock: the same in all processes. */
export function now(): number {
  return Number(process.hrtime.bigint() / 1000n)
}

/** Stands before the time at which an event was sent: 16 digits, which are all the text it has. */
export const TIME_MARK = '"content":" '
