import { openSync, write, writeSync } from 'node:fs'

/** Lines are written beside the work, some at a time: so many bytes together, or after so long (ms). */
const BATCH = 4096
const BATCH_MS = 100
/** When nobody reads them they are dropped at last. */
const MAX_WAITING = 8 * 1024 * 1024
/** A pipe that is full is tried again; one that fails is left alone for a while (ms). */
const FULL_WAIT = 20
const FAILED_WAIT = 10_000
/** How long the end may wait for whoever reads the log. */
const END_TIMEOUT = 1_000
const EXIT_TRIES = 10

const NOTHING = Buffer.alloc(0)

/**
 * A file descriptor for log lines. The gateway serves with or without a log: a full disk, a pipe
 * whose reader has gone or is stuck costs lines, never a request, and never keeps the process from its end.
 *
 * @example
 * const sink = new LogSink(1)
 * sink.write('{"level":30,"msg":"hello"}\n')
 */
export class LogSink {
  readonly #fd: number
  #lines = ''
  /** What is being written: the rest of it, as long as the descriptor has not taken it. */
  #writing = NOTHING
  #isWriting = false
  #timer: NodeJS.Timeout | undefined
  #quietUntil = 0
  #hasComplained = false
  #whenEmpty: (() => void)[] = []

  constructor(target: number | string) {
    this.#fd = typeof target === 'number' ? target : openSync(target, 'a')
    process.on('exit', () => this.#writeAtExit())
  }

  write(line: string): void {
    const isFull = this.#lines.length + this.#writing.length > MAX_WAITING
    if (isFull || performance.now() < this.#quietUntil) return
    this.#lines += line
    if (this.#lines.length >= BATCH) this.#next()
    else this.#timer ??= setTimeout(() => this.#next(), BATCH_MS).unref()
  }

  /** Calls back when everything is written, or when that takes too long. */
  flush(done: () => void): void {
    const timer = setTimeout(done, END_TIMEOUT)
    this.#whenEmpty.push(() => {
      clearTimeout(timer)
      done()
    })
    this.#next()
  }

  #next(): void {
    if (this.#isWriting) return
    clearTimeout(this.#timer)
    this.#timer = undefined
    if (this.#writing.length === 0) {
      this.#writing = Buffer.from(this.#lines)
      this.#lines = ''
    }
    if (this.#writing.length === 0) {
      for (const done of this.#whenEmpty.splice(0)) done()
      return
    }
    this.#isWriting = true
    write(this.#fd, this.#writing, (error, written) => {
      this.#isWriting = false
      if (error?.code === 'EAGAIN') {
        setTimeout(() => this.#next(), FULL_WAIT).unref()
        return
      }
      if (error) this.#fail(error)
      else {
        this.#writing = this.#writing.subarray(written)
        this.#hasComplained = false
      }
      if (error || this.#writing.length > 0 || this.#lines.length >= BATCH) this.#next()
      else if (this.#whenEmpty.length > 0) this.#next()
    })
  }

  /** Drops what waits, and says so once, where that works. */
  #fail(error: Error): void {
    this.#writing = NOTHING
    this.#lines = ''
    this.#quietUntil = performance.now() + FAILED_WAIT
    if (this.#hasComplained) return
    this.#hasComplained = true
    write(2, `llmproxy: the log cannot be written (${error.message}); serving goes on\n`, () => {})
  }

  /** The last lines of a process that ends without a flush; what is under way is left to itself. */
  #writeAtExit(): void {
    let rest = Buffer.concat([this.#isWriting ? NOTHING : this.#writing, Buffer.from(this.#lines)])
    const clock = new Int32Array(new SharedArrayBuffer(4))
    for (let tries = 0; tries < EXIT_TRIES && rest.length > 0; ) {
      try {
        rest = rest.subarray(writeSync(this.#fd, rest))
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') return
        tries++
        Atomics.wait(clock, 0, 0, FULL_WAIT)
      }
    }
  }
}
