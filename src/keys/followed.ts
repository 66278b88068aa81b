import { unwatchFile, watchFile } from 'node:fs'
import type { FastifyBaseLogger } from 'fastify'

const WATCH_INTERVAL = 500

/** What a file holds. It is read again when it changes; a change that cannot be used leaves what there was. */
export class FollowedFile<T> {
  readonly #path: string
  readonly #load: (signal: AbortSignal) => Promise<T>
  readonly #log: FastifyBaseLogger
  readonly #closing: AbortController
  readonly #reread = () => void this.#read()
  #content: T
  #isReading = false
  /** The file has changed while it was read. */
  #isOld = false

  /**
   * @param load may throw; a line of its message for each error
   * @throws when the file cannot be used as it is
   */
  static async open<T>(
    path: string,
    load: (signal: AbortSignal) => Promise<T>,
    log: FastifyBaseLogger
  ): Promise<FollowedFile<T>> {
    const closing = new AbortController()
    return new FollowedFile(path, load, await load(closing.signal), log, closing)
  }

  private constructor(
    path: string,
    load: (signal: AbortSignal) => Promise<T>,
    content: T,
    log: FastifyBaseLogger,
    closing: AbortController
  ) {
    this.#path = path
    this.#load = load
    this.#content = content
    this.#log = log
    this.#closing = closing
    watchFile(path, { interval: WATCH_INTERVAL, persistent: false }, this.#reread)
  }

  get content(): T {
    return this.#content
  }

  close(): void {
    unwatchFile(this.#path, this.#reread)
    this.#closing.abort()
  }

  async #read(): Promise<void> {
    this.#isOld = true
    if (this.#isReading) return
    this.#isReading = true
    while (this.#isOld && !this.#closing.signal.aborted) {
      this.#isOld = false
      await this.#readOnce()
    }
    this.#isReading = false
  }

  async #readOnce(): Promise<void> {
    const { signal } = this.#closing
    const file = this.#path
    try {
      this.#content = await this.#load(signal)
      this.#log.info({ file }, 'a changed file of keys has been read')
    } catch (error) {
      if (signal.aborted) return
      const errors = (error as Error).message.split('\n')
      this.#log.error(
        { file, errors },
        'a changed file of keys cannot be used; the last good one stays'
      )
    }
  }
}
