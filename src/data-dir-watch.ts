import { constants, type Stats } from 'node:fs'
import { access, type FileHandle, open, stat } from 'node:fs/promises'
import { resolve } from 'node:path'
import type { FastifyBaseLogger } from 'fastify'

const INTERVAL = 2_000
const WRITABLE = constants.W_OK | constants.X_OK

/** Sees when the directory, or the file of API keys, is deleted or replaced, and when the directory is not writable. */
export class DataDirWatch {
  /** Why its files are not safe. */
  trouble: string | undefined
  readonly #dir: string
  readonly #keys: string | undefined
  readonly #log: FastifyBaseLogger
  readonly #timer: NodeJS.Timeout
  #looking: Promise<void> | undefined
  /** The directory as it was at first; undefined: it was not there yet. While it is open, no other one has its number. */
  #first: FileHandle | undefined
  /** The file of API keys as it was at first. It is not kept open: closing it would release SQLite's locks of it. */
  #firstKeys: Stats | undefined

  /** @param keys the file of API keys, if they are in one: an empty file in its place would revoke them */
  constructor(path: string, log: FastifyBaseLogger, keys?: string) {
    this.#dir = resolve(path)
    this.#keys = keys
    this.#log = log
    this.#begin()
    this.#timer = setInterval(() => this.#begin(), INTERVAL).unref()
  }

  /** Does not wait for a disk that does not respond. */
  close(): void {
    clearInterval(this.#timer)
    void (this.#looking ?? Promise.resolve()).then(() => this.#first?.close())
  }

  #begin(): void {
    this.#looking ??= this.#look().finally(() => {
      this.#looking = undefined
    })
  }

  async #look(): Promise<void> {
    const reason = await this.#reason()
    if (reason === this.trouble) return
    this.trouble = reason
    const dir = this.#dir
    if (reason === undefined) this.#log.warn({ dir }, 'the data directory can be used again')
    else
      this.#log.error({ dir, reason }, 'the data directory cannot be used: its files are not safe')
  }

  async #reason(): Promise<string | undefined> {
    try {
      this.#first ??= await open(this.#dir)
      const [now, first] = await Promise.all([stat(this.#dir), this.#first.stat()])
      if (now.ino !== first.ino || now.dev !== first.dev) {
        return 'it was replaced by another directory; restart the gateway'
      }
      await access(this.#dir, WRITABLE)
      return await this.#reasonOfKeys()
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      if (code === 'EMFILE' || code === 'ENFILE') return this.trouble
      if (code !== 'ENOENT') return `it is not writable (${code})`
      return this.#first && 'it was deleted; restart the gateway'
    }
  }

  async #reasonOfKeys(): Promise<string | undefined> {
    if (this.#keys === undefined) return undefined
    const now = await stat(this.#keys).catch(() => undefined)
    this.#firstKeys ??= now
    const { ino, dev } = this.#firstKeys ?? {}
    if (now?.ino === ino && now?.dev === dev) return undefined
    return `${this.#keys} was deleted or replaced; restart the gateway`
  }
}
