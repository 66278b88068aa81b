import type { StoredResponses, UnreadResponse } from './stored-responses.ts'

/** Maximum number of responses that are settled simultaneously. */
const MAX_AT_ONCE = 8
/** Time (ms) between two claims of that many responses. */
const PACE = 1_000
/** Wait (ms) after the file could not be read. */
const RETRY_AFTER = 60_000

/**
 * Settles stored responses that are not billed and that no caller has read: it wakes when the next one is due. Several
 * processes share the work, because each response is claimed in the file.
 */
export class UnreadResponses {
  readonly #responses: StoredResponses
  readonly #settle: (unread: UnreadResponse) => Promise<void>
  readonly #pace: number
  #free = MAX_AT_ONCE
  #timer: NodeJS.Timeout | undefined
  #wakesAt = Number.POSITIVE_INFINITY
  #lookedAt = 0
  #isStopped = false

  /**
   * @param settle bills one of them if it is complete
   * @param processes number of processes that share the work, and the load that it is for backends
   */
  constructor(
    responses: StoredResponses,
    settle: (unread: UnreadResponse) => Promise<void>,
    { processes = 1, pace = PACE } = {}
  ) {
    this.#responses = responses
    this.#settle = settle
    this.#pace = pace * processes
  }

  /** Looks for responses that are due, at this time (Unix ms) or before. */
  wakeAt(wanted: number): void {
    const time = Math.max(wanted, this.#lookedAt + this.#pace)
    if (this.#isStopped || time >= this.#wakesAt) return
    clearTimeout(this.#timer)
    this.#wakesAt = time
    this.#timer = setTimeout(() => void this.#look(), Math.max(0, time - Date.now())).unref()
  }

  stop(): void {
    this.#isStopped = true
    clearTimeout(this.#timer)
  }

  async #look(): Promise<void> {
    this.#wakesAt = Number.POSITIVE_INFINITY
    const count = this.#free
    if (count === 0) return
    this.#free = 0
    this.#lookedAt = Date.now()
    const { unread, next } = await this.#responses
      .claim(count)
      .catch(() => ({ unread: [], next: Date.now() + RETRY_AFTER }))
    this.#free = count - unread.length
    if (this.#isStopped) return
    for (const each of unread) void this.#work(each)
    if (next !== undefined) this.wakeAt(next)
  }

  /** A response that cannot be settled now is due again later. */
  async #work(unread: UnreadResponse): Promise<void> {
    await this.#settle(unread).catch(() => {})
    this.#free++
    this.wakeAt(Date.now())
  }
}
