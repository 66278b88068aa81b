import { fstatSync, write, writeSync } from 'node:fs'
import { Complaint } from './complaint.ts'
import type { RotatingFile } from './rotating-file.ts'

/** Lines are written beside the work, some at a time: so many bytes together, or after so long (ms). */
const BATCH = 16 * 1024
const BATCH_MS = 100
/** So much a pipe takes as a whole or not at all: lines of several processes don't get into each other. */
const PIPE_BUF = 4096
/** When nobody reads them they are dropped at last. */
const MAX_WAITING = 8 * 1024 * 1024
/** A pipe that is full is tried again; one that fails is left alone for a while (ms). */
const FULL_WAIT = 20
const FAILED_WAIT = 10_000
/** How long the end may wait for whoever reads the log. */
const END_TIMEOUT = 1_000
const EXIT_TRIES = 10

const NOTHING = Buffer.alloc(0)
const NEWLINE = 10

/** What a sink writes to: takes these lines, or a part of them, and says how many bytes that were. */
interface Target {
  write(lines: Buffer): Promise<number>
  writeSync(lines: Buffer): number
  close(): Promise<void>
}

/**
 * A file descriptor or a file for log lines. The gateway serves with or without a log: a full disk, a pipe
 * whose reader has gone or is stuck costs lines, never a request, and never keeps the process from its end.
 *
 * @example
 * const sink = new LogSink(1, 'log')
 * sink.write('{"level":30,"msg":"hello"}\n')
 * await sink.close()
 */
export class LogSink {
  readonly #target: Target
  readonly #pieceOf: (lines: Buffer) => Buffer
  readonly #name: string
  readonly #dropped = new Complaint(lines =>
    complain(`the ${this.#name} is not read; lines dropped: ${lines}`)
  )
  #lines = ''
  /** What is being written: the rest of it, as long as the target has not taken it. */
  #writing = NOTHING
  /** So many bytes at its beginning the target has, and has not said yet what became of them. */
  #underWay = 0
  #timer: NodeJS.Timeout | undefined
  #quietUntil = 0
  #hasComplained = false
  #whenEmpty: (() => void)[] = []
  readonly #atExit = () => this.#writeAtExit()

  /** @param name as it stands in a complaint */
  constructor(target: number | RotatingFile, name: string) {
    this.#target = typeof target === 'number' ? toDescriptor(target) : target
    const isFile = typeof target !== 'number' || fstatSync(target).isFile()
    this.#pieceOf = isFile ? lines => lines : wholeLines
    this.#name = name
    process.on('exit', this.#atExit)
  }

  write(line: string): void {
    if (performance.now() < this.#quietUntil) return
    if (this.#lines.length + this.#writing.length > MAX_WAITING) return this.#dropped.add(1, '')
    this.#lines += line
    if (this.#lines.length >= BATCH) void this.#next()
    else this.#wait()
  }

  /** Calls back when everything is written, or when that takes too long. */
  flush(done: () => void): void {
    const timer = setTimeout(done, END_TIMEOUT)
    this.#whenEmpty.push(() => {
      clearTimeout(timer)
      done()
    })
    void this.#next()
  }

  async close(): Promise<void> {
    await new Promise<void>(resolve => this.flush(resolve))
    process.off('exit', this.#atExit)
    this.#dropped.end()
    await this.#target.close()
  }

  #wait(): void {
    this.#timer ??= setTimeout(() => void this.#next(), BATCH_MS).unref()
  }

  async #next(): Promise<void> {
    clearTimeout(this.#timer)
    this.#timer = undefined
    if (this.#underWay > 0) return
    if (this.#writing.length === 0) {
      this.#writing = Buffer.from(this.#lines)
      this.#lines = ''
    }
    if (this.#writing.length === 0) {
      for (const done of this.#whenEmpty.splice(0)) done()
      return
    }
    const piece = this.#pieceOf(this.#writing)
    this.#underWay = piece.length
    try {
      const written = await this.#target.write(piece)
      this.#writing = this.#writing.subarray(written)
      this.#hasComplained = false
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EAGAIN') {
        this.#underWay = 0
        setTimeout(() => void this.#next(), FULL_WAIT).unref()
        return
      }
      this.#fail(error as Error)
    }
    this.#underWay = 0
    const isDue = this.#writing.length > 0 || this.#lines.length >= BATCH
    if (isDue || this.#whenEmpty.length > 0) void this.#next()
    else if (this.#lines.length > 0) this.#wait()
  }

  /** Drops what waits, and says so once, where that works. */
  #fail({ message }: Error): void {
    this.#writing = NOTHING
    this.#lines = ''
    this.#quietUntil = performance.now() + FAILED_WAIT
    if (this.#hasComplained) return
    this.#hasComplained = true
    complain(`the ${this.#name} cannot be written (${message}); serving goes on`)
  }

  /** The last lines of a process that ends without a flush; what is under way is left to itself. */
  #writeAtExit(): void {
    let rest = Buffer.concat([this.#writing.subarray(this.#underWay), Buffer.from(this.#lines)])
    const clock = new Int32Array(new SharedArrayBuffer(4))
    for (let tries = 0; tries < EXIT_TRIES && rest.length > 0; ) {
      try {
        rest = rest.subarray(this.#target.writeSync(this.#pieceOf(rest)))
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') return
        tries++
        Atomics.wait(clock, 0, 0, FULL_WAIT)
      }
    }
  }
}

function complain(message: string): void {
  write(2, `llmproxy: ${message}\n`, () => {})
}

/** Standard output or standard error. */
function toDescriptor(fd: number): Target {
  // Asking for the stream makes a pipe one that never blocks: a write that waits would wait for ever.
  if (fd === 1) void process.stdout
  else if (fd === 2) void process.stderr
  return {
    write(lines) {
      return new Promise((resolve, reject) => {
        write(fd, lines, (error, written) => (error ? reject(error) : resolve(written)))
      })
    },
    writeSync: lines => writeSync(fd, lines),
    async close() {}
  }
}

/** The lines that a pipe takes as a whole; one that is longer goes alone. */
function wholeLines(lines: Buffer): Buffer {
  if (lines.length <= PIPE_BUF) return lines
  const end = lines.lastIndexOf(NEWLINE, PIPE_BUF - 1)
  return lines.subarray(0, (end === -1 ? lines.indexOf(NEWLINE) : end) + 1 || lines.length)
}
