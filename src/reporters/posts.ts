/** Something that usage records can be given to. */
export interface Sink {
  /** Resolves when the record is safe, or when it is certain that it cannot be made so now. */
  append(entry: string): Promise<void>
}

/** Under load posts follow each other after so long (ms): writing one costs as much as ten records do. */
const PACE = 1

/** Records that go on together. */
interface Post {
  entries: string[]
  /** When it began (monotonic, ms). */
  at: number
  settled: PromiseWithResolvers<void>
}

/**
 * Sends records on to whoever writes them down, and lets those wait who gave them. One post is under way
 * at a time, and what comes meanwhile is the next: the longer the writing takes, the larger the posts.
 *
 * @example
 * const posts = new Posts(() => setImmediate(() => posts.settle()))
 * await Promise.all([posts.append('{"id":"a"}'), posts.append('{"id":"b"}')])
 * posts.size // 0
 */
export class Posts implements Sink {
  readonly #send: (entries: string[]) => void
  #gathering: Post | undefined
  #sent: Post | undefined

  constructor(send: (entries: string[]) => void) {
    this.#send = send
  }

  append(entry: string): Promise<void> {
    if (this.#gathering === undefined) {
      this.#gathering = { entries: [], at: performance.now(), settled: Promise.withResolvers() }
      // What ends in the same turn of the event loop goes together.
      if (this.#sent === undefined) setImmediate(() => this.#post())
    }
    this.#gathering.entries.push(entry)
    return this.#gathering.settled.promise
  }

  /** Records that are not settled. */
  get size(): number {
    return (this.#sent?.entries.length ?? 0) + (this.#gathering?.entries.length ?? 0)
  }

  /** Resolves when what there is now has been settled, or let go. */
  async settled(): Promise<void> {
    await (this.#gathering ?? this.#sent)?.settled.promise
  }

  /** What was sent has come to its end: returns what was in it. */
  settle(): string[] {
    const entries = this.#end(this.#sent)
    this.#sent = undefined
    if (this.#gathering !== undefined) setTimeout(() => this.#post(), PACE)
    return entries
  }

  /**
   * Nobody waits any longer for a post that was sent so long ago (ms), nor for what has gathered behind it:
   * returns the latter, for it will not be sent.
   */
  letGo(age: number): string[] | undefined {
    if (this.#sent === undefined || performance.now() - this.#sent.at < age) return undefined
    this.#sent.settled.resolve()
    const entries = this.#end(this.#gathering)
    this.#gathering = undefined
    return entries
  }

  #post(): void {
    if (this.#gathering === undefined || this.#sent !== undefined) return
    this.#sent = this.#gathering
    this.#gathering = undefined
    this.#send(this.#sent.entries)
  }

  #end(post: Post | undefined): string[] {
    post?.settled.resolve()
    return post?.entries ?? []
  }
}
