/** Size (bytes) of the first buffer at most, and how much larger each following one is. */
const FIRST = 1024 * 1024
const GROWTH = 4

/**
 * A body that arrives in chunks, side by side in one buffer that nothing else refers to. The buffer grows with what
 * has arrived: a length that is only announced costs nothing.
 *
 * @example
 * const body = new Gathered(4, 4)
 * body.add(Buffer.from('ab'))
 * body.add(Buffer.from('cd'))
 * String(body.bytes) // 'abcd'
 */
export class Gathered {
  /** Bytes so far. */
  length = 0
  #buffer: Buffer
  readonly #most: number

  /**
   * @param expected size (bytes), where it is known
   * @param most size (bytes) that it will not exceed
   */
  constructor(expected: number, most: number) {
    this.#most = most
    this.#buffer = Buffer.allocUnsafeSlow(Math.min(FIRST, expected))
  }

  add(chunk: Buffer): void {
    const length = this.length + chunk.length
    if (length > this.#buffer.length) this.#grow(length)
    chunk.copy(this.#buffer, this.length)
    this.length = length
  }

  /** What has arrived; valid until the next chunk is added. */
  get bytes(): Buffer {
    return this.#buffer.subarray(0, this.length)
  }

  #grow(least: number): void {
    const size = Math.max(least, Math.min(this.#buffer.length * GROWTH, this.#most))
    const larger = Buffer.allocUnsafeSlow(size)
    this.#buffer.copy(larger, 0, 0, this.length)
    this.#buffer = larger
  }
}

/**
 * Frees the memory of a gathered body now, not at the next garbage collection: whatever still refers to it sees
 * no bytes.
 */
export function free(bytes: Buffer): void {
  ;(bytes.buffer as ArrayBuffer).transfer(0)
}
