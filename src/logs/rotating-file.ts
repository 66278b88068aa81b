import { closeSync, mkdirSync, openSync, type Stats, writeSync } from 'node:fs'
import { type FileHandle, mkdir, open, rename } from 'node:fs/promises'
import { dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Static, Type } from 'typebox'
import { Age, Size } from '../options.ts'
import { oldName, statOf, tidy } from './old-files.ts'

/** The members of a section that describe a file of lines. */
export function fileOptions(path: string | undefined, max_files: number) {
  return {
    path: Type.String({
      minLength: 1,
      ...(path === undefined ? {} : { default: path }),
      description: 'File, below the data directory if relative'
    }),
    rotate: Type.Enum(['size', 'daily', 'hourly', 'none'], {
      default: 'size',
      description:
        'When another file is begun: at max_size; daily and hourly: also at the turn of the day or the hour; none: never'
    }),
    max_size: Size('100MB', 'Size at which another file is begun; a bare number is MB', 'MB'),
    max_files: Type.Integer({
      minimum: 0,
      default: max_files,
      description: 'Old files that are kept; 0: all'
    }),
    max_age: Age('0', 'How long old files are kept; 0: for ever; a bare number is days'),
    compress: Type.Boolean({ default: false, description: 'Compresses old files (gzip)' })
  }
}
const FileOptions = Type.Object(fileOptions(undefined, 0))
export type FileOptions = Static<typeof FileOptions>

/** How often (ms) it is looked at whether the file is still where it was. */
const CHECK_INTERVAL = 100
/** Old files are left alone until every process has noticed that they are old (ms). */
const TIDY_AFTER = 1_000
const TIDY_INTERVAL = 60 * 60 * 1000
/** How long (ms) a disk that hangs may keep the end from coming. */
const CLOSE_TIMEOUT = 1_000
/** How long (ms) a line may take that another process writes. */
const WRITE_MS = 20
const NEWLINE = Buffer.from('\n')

/**
 * A file of lines that another one follows when it is full, or when its time is over. The old one keeps
 * its name and gets a time behind it. Several processes may write to one file: each appends whole lines,
 * notices within 100 ms that the file was moved away, by another process or by logrotate, and goes on in
 * the new one. Should two begin another file at the same moment, the second old file is a short one.
 *
 * @example
 * const file = new RotatingFile({
 *   path: '/dev/null', rotate: 'size', max_size: 1024, max_files: 3, max_age: 0, compress: true
 * })
 * await file.write(Buffer.from('a line\n'))
 * await file.close()
 */
export class RotatingFile {
  readonly #options: FileOptions
  readonly #mode: number
  readonly #folderMode: number
  readonly #isSafe: boolean
  #handle: FileHandle | undefined
  /** Which file it is, and what is in it as far as is known here. */
  #identity = ''
  #isPlain = false
  #size = 0
  #isTorn = false
  #hasComplained = false
  #checkedAt = 0
  #movedAt = 0
  #tidiedAt = Number.NEGATIVE_INFINITY
  #tidying: Promise<void> | undefined
  #timer: NodeJS.Timeout | undefined
  readonly #closing = new AbortController()
  /** One write at a time. */
  #last: Promise<unknown> = Promise.resolve()

  /**
   * @param mode of the files; folders get the same, with the right to enter them
   * @param isSafe writes end when the lines are on the disk, not only with the system
   */
  constructor(options: FileOptions, { mode = 0o640, isSafe = false } = {}) {
    this.#options = options
    this.#mode = mode
    // Whoever may read a file may enter its folder.
    this.#folderMode = mode | 0o100 | ((mode & 0o040) >> 2)
    this.#isSafe = isSafe
  }

  /**
   * Makes the file, so that a wrong path is seen at the start.
   *
   * @throws what the system says, such as EACCES
   */
  touch(): void {
    mkdirSync(dirname(this.#options.path), { recursive: true, mode: this.#folderMode })
    closeSync(openSync(this.#options.path, 'a', this.#mode))
  }

  /**
   * Appends whole lines: all of them, or none. Returns how many bytes that were.
   *
   * @throws what the system says, such as ENOSPC
   */
  write(lines: Buffer): Promise<number> {
    const written = this.#last.then(() => this.#append(lines))
    this.#last = written.catch(() => {})
    return written
  }

  /** For the end of the process. */
  writeSync(lines: Buffer): number {
    return writeSync(openSync(this.#options.path, 'a', this.#mode), lines)
  }

  /** Ends what is under way, unless the disk hangs. */
  async close(): Promise<void> {
    clearTimeout(this.#timer)
    this.#closing.abort()
    const ended = this.#last.then(() => this.#tidying).then(() => this.#letGo())
    await Promise.race([ended, sleep(CLOSE_TIMEOUT, undefined, { ref: false })])
  }

  async #append(lines: Buffer): Promise<number> {
    const handle = await this.#ready(lines.length)
    const bytes = this.#isTorn ? Buffer.concat([NEWLINE, lines]) : lines
    let written = 0
    try {
      while (written < bytes.length) written += (await handle.write(bytes, written)).bytesWritten
      if (this.#isSafe && this.#isPlain) await handle.datasync()
    } catch (error) {
      await this.#takeBack(handle, written).catch(() => {})
      await this.#letGo()
      throw error
    }
    this.#isTorn = false
    this.#size += written
    return lines.length
  }

  /** Half a line would spoil the file for its readers. Where others have written behind it, it stays. */
  async #takeBack(handle: FileHandle, written: number): Promise<void> {
    if (!this.#isPlain) return
    const { size } = await handle.stat()
    if (size === this.#size + written) await handle.truncate(this.#size)
  }

  /** The file that so many bytes go into. */
  async #ready(length: number): Promise<FileHandle> {
    const now = performance.now()
    const isKnown = this.#handle !== undefined && now - this.#checkedAt < CHECK_INTERVAL
    if (!isKnown || this.#isFull(this.#size, length)) {
      await this.#look(length)
      this.#checkedAt = now
    }
    this.#handle ??= await this.#open()
    if (now - this.#tidiedAt > TIDY_INTERVAL) this.#tidySoon()
    return this.#handle
  }

  /** Is the file still there, and are there to be more lines in it? */
  async #look(length: number): Promise<void> {
    const there = await statOf(this.#options.path)
    const isDue = there?.isFile() && (this.#isFull(there.size, length) || this.#isOver(there))
    if (isDue && (await this.#moveAway())) return this.#letGo()
    if (there === undefined || identityOf(there) !== this.#identity) return this.#letGo()
    this.#size = there.size
  }

  #isFull(size: number, length: number): boolean {
    const { rotate, max_size } = this.#options
    return rotate !== 'none' && size > 0 && size + length > max_size
  }

  /** Was its last line written on another day, or in another hour? */
  #isOver({ size, mtime }: Stats): boolean {
    const { rotate } = this.#options
    if (size === 0 || (rotate !== 'daily' && rotate !== 'hourly')) return false
    const now = new Date()
    const isSameDay = mtime.toDateString() === now.toDateString()
    return !isSameDay || (rotate === 'hourly' && mtime.getHours() !== now.getHours())
  }

  /** A file that cannot be moved is written on: too large is better than lost. */
  async #moveAway(): Promise<boolean> {
    const { path } = this.#options
    this.#movedAt = Math.max(Date.now(), this.#movedAt + 1)
    try {
      await rename(path, oldName(path, this.#movedAt))
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      // Another process was faster.
      if (code === 'ENOENT') return true
      if (!this.#hasComplained)
        console.error(`llmproxy: ${path} grows on: it cannot be moved (${code})`)
      this.#hasComplained = true
      return false
    }
    this.#hasComplained = false
    this.#tidySoon()
    return true
  }

  async #open(): Promise<FileHandle> {
    const folder = dirname(this.#options.path)
    await mkdir(folder, { recursive: true, mode: this.#folderMode })
    const handle = await open(this.#options.path, 'a+', this.#mode)
    try {
      const stats = await handle.stat()
      this.#identity = identityOf(stats)
      this.#isPlain = stats.isFile()
      this.#size = stats.size
      this.#isTorn = this.#isPlain && !(await endsLine(handle)) && !(await endsLineSoon(handle))
      if (this.#isSafe && this.#isPlain) await syncFolder(folder)
    } catch (error) {
      await handle.close()
      throw error
    }
    return handle
  }

  async #letGo(): Promise<void> {
    const handle = this.#handle
    this.#handle = undefined
    await handle?.close().catch(() => {})
  }

  #tidySoon(): void {
    if (this.#closing.signal.aborted) return
    this.#tidiedAt = performance.now()
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => {
      const { signal } = this.#closing
      const before = Promise.resolve(this.#tidying)
      this.#tidying = before.then(() => tidy(this.#options, this.#mode, signal))
    }, TIDY_AFTER).unref()
  }
}

function identityOf({ dev, ino }: Stats): string {
  return `${dev}:${ino}`
}

/** Another process may be in the middle of a line: the system shows what it has of it so far. */
async function endsLineSoon(handle: FileHandle): Promise<boolean> {
  await sleep(WRITE_MS)
  return endsLine(handle)
}

async function endsLine(handle: FileHandle): Promise<boolean> {
  const { size } = await handle.stat()
  if (size === 0) return true
  const { bytesRead, buffer } = await handle.read(Buffer.alloc(1), 0, 1, size - 1)
  return bytesRead === 0 || buffer[0] === NEWLINE[0]
}

/** A file outlives a power cut only if its name does. */
async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, 'r')
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}
