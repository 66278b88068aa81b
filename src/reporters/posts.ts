/** Something that usage records can be given to. */
export interface Sink {
  /** Resolves when the record is safe, or when it is certain that it cannot be made so now. */
  append(entry: string): Promise<void>
}

/** Records that came in one turn of the event loop, and go on together. */
interface Post {
  entries: string[]
  /** When it began (monotonic, ms). */
  at: number
  settled: PromiseWithResolvers<void>
}

/**
 * Sends records on to whoever writes them down, a post for each turn of the event loop, and lets those
 * wait who gave them. Posts are settled in the order in which they were sent.
 *
 * @example
 * const posts = new Posts(() => setImmediate(() => posts.settle(1)))
 * await Promise.all([posts.append('{"id":"a"}'), posts.append('{"id":"b"}')])
 * posts.size // 0
 */
export class Posts implements Sink {
  readonly #send: (entries: string[]) => void
  #gathering: Post | undefined
  /** Sent and not settled, oldest first. */
  readonly #sent: Post[] = []

  constructor(send: (entries: string[]) => void) {
    this.#send = send
  }

  append(entry: string): Promise<void> {
    if (this.#gathering === undefined) {
      this.#gathering = { entries: [], at: performance.now(), settled: Promise.withResolvers() }
      setImmediate(() => this.#post())
    }
    this.#gathering.entries.push(entry)
    return this.#gathering.settled.promise
  }

  /** Records that are not settled. */
  get size(): number {
    const sent = this.#sent.reduce((sum, each) => sum + each.entries.length, 0)
    return sent + (this.#gathering?.entries.length ?? 0)
  }

  /** Resolves when what there is now has been settled, or let go. */
  async settled(): Promise<void> {
    await (this.#gathering ?? this.#sent.at(-1))?.settled.promise
  }

  /** Settles the oldest posts and returns what was in them. */
  settle(count = this.#sent.length): string[] {
    const posts = this.#sent.splice(0, count)
    for (const { settled } of posts) settled.resolve()
    return posts.flatMap(({ entries }) => entries)
  }

  /** Nobody waits any longer for posts that are older than this (ms); returns whether there are any. */
  letGo(age: number): boolean {
    const late = this.#sent.filter(({ at }) => performance.now() - at > age)
    for (const { settled } of late) settled.resolve()
    return late.length > 0
  }

  #post(): void {
    const post = this.#gathering!
    this.#gathering = undefined
    this.#sent.push(post)
    this.#send(post.entries)
  }
}
