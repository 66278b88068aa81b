import { readFileSync, unwatchFile, watchFile } from 'node:fs'
import type { FastifyBaseLogger } from 'fastify'

const WATCH_INTERVAL = 500

/** What a file holds. It is read again when it changes; a change that cannot be used leaves what there was. */
export class FollowedFile<T> {
  readonly #path: string
  readonly #reread: () => void
  #content: T

  /**
   * @param parse may throw; a line of its message for each error
   * @throws when the file cannot be used as it is
   */
  constructor(path: string, parse: (text: string) => T, log: FastifyBaseLogger) {
    const read = () => parse(readFileSync(path, 'utf8'))
    this.#path = path
    this.#content = read()
    this.#reread = () => {
      try {
        this.#content = read()
        log.info({ file: path }, 'a changed file of keys has been read')
      } catch (error) {
        const errors = (error as Error).message.split('\n')
        log.error(
          { file: path, errors },
          'a changed file of keys cannot be used; the last good one stays'
        )
      }
    }
    watchFile(path, { interval: WATCH_INTERVAL, persistent: false }, this.#reread)
  }

  get content(): T {
    return this.#content
  }

  close(): void {
    unwatchFile(this.#path, this.#reread)
  }
}
