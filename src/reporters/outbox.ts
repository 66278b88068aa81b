import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Worker } from 'node:worker_threads'
import type { FastifyBaseLogger } from 'fastify'
import { NewerFormatError } from '../store/sql.ts'
import { startThread } from '../thread.ts'
import { Courier, type OnDelivery } from './courier.ts'
import type { Deferred, Page } from './ledger.ts'
import type { Answer, Order, Value } from './outbox-thread.ts'
import { Posts, type Sink } from './posts.ts'
import type { Reporter } from './reporter.ts'

/** How often (ms) the ledger is pruned. */
const PRUNE_INTERVAL = 10_000
/** Without a file only what still must be delivered is kept, and not much of it. */
const IN_MEMORY: Keeping = { keep: 0, max_size: 64 * 1024 * 1024 }
/** A disk that has not taken a page for so long (ms) holds no answer back any longer. */
const COMMIT_TIMEOUT = 5_000
/** How long (ms) a start waits for the file. */
const OPEN_TIMEOUT = 5_000
/** How long (ms) the thread may take to close its file. */
const CLOSE_TIMEOUT = 1_000

/** How long records stay, and how much room they get. */
export interface Keeping {
  /** How long (ms) records stay that every reporter has had. */
  keep: number
  /** What all records together may take (bytes). */
  max_size: number
}

/**
 * Usage records on their way: each is committed to the ledger by a thread of its own, and then delivered
 * to every reporter until that has taken it.
 */
export class Outbox implements Sink {
  readonly #file: string
  readonly #log: FastifyBaseLogger
  readonly #onDelivery: OnDelivery
  #keeping: Keeping
  readonly #couriers: Courier[]
  #updating = Promise.resolve()
  /** Records on no disk that come while reporters change. */
  #homeless: Page[] | undefined
  #thread: Worker | undefined
  /** What the thread has not committed yet. */
  readonly #posts = new Posts(entries => this.#tell({ kind: 'append', entries }))
  readonly #asked = new Map<number, PromiseWithResolvers<Value>>()
  #lastId = 0
  readonly #watch: NodeJS.Timeout
  readonly #pruning: NodeJS.Timeout
  /** Why records cannot be made safe at the moment. */
  trouble: string | undefined

  /** @param file of the ledger; `:memory:` keeps records for this process alone */
  constructor(
    file: string,
    reporters: readonly Reporter[],
    keeping: Keeping,
    log: FastifyBaseLogger,
    onDelivery: OnDelivery
  ) {
    this.#file = file
    this.#keeping = keeping
    this.#log = log
    this.#onDelivery = onDelivery
    this.#couriers = reporters.map(each => new Courier(each, this, log, onDelivery))
    for (const courier of this.#couriers) void courier.start()
    this.#watch = setInterval(() => this.#hurry(), 1_000).unref()
    this.#pruning = setInterval(() => this.#prune(), PRUNE_INTERVAL).unref()
  }

  /**
   * Opens the file. One that cannot be opened now may be later.
   *
   * @throws {NewerFormatError} when a newer version has written it
   */
  async open(): Promise<void> {
    const opened = this.#ask({ kind: 'open' }).catch(error => {
      if (error instanceof NewerFormatError) throw error
    })
    // A disk that does not respond keeps no gateway from starting.
    const wait = new AbortController()
    const timeout = sleep(OPEN_TIMEOUT, undefined, { signal: wait.signal })
    await Promise.race([opened, timeout]).finally(() => wait.abort())
  }

  append(entry: string): Promise<void> {
    return this.#posts.append(entry)
  }

  /** Records that a reporter has not had yet, as far as they are known here. */
  get pending(): number {
    return this.#couriers.reduce((sum, each) => sum + each.pending, this.#posts.size)
  }

  /** Other reporters from now on; one that keeps its name goes on where it was. */
  update(reporters: readonly Reporter[], keeping: Keeping): Promise<void> {
    const before = this.#updating.catch(() => {})
    this.#updating = before.then(() => this.#replace(reporters, keeping))
    return this.#updating
  }

  async #replace(reporters: readonly Reporter[], keeping: Keeping): Promise<void> {
    this.#keeping = keeping
    const homeless: Page[] = []
    this.#homeless = homeless
    const before = this.#couriers.splice(0)
    const left = await Promise.all(before.map(each => each.stop()))
    this.#homeless = undefined
    for (const each of reporters) {
      this.#couriers.push(new Courier(each, this, this.#log, this.#onDelivery))
    }
    for (const courier of this.#couriers) void courier.start()
    for (const [at, { name }] of before.entries()) {
      const heir = this.#couriers.find(each => each.name === name)
      if (heir === undefined) this.#lose(left[at]!.length)
      else for (const page of left[at]!) heir.offer(page)
    }
    for (const page of homeless) this.#offer(page)
  }

  /** Delivers what is there until the signal fires. What is left stays in the file. */
  async close(signal: AbortSignal): Promise<void> {
    this.#thread?.ref()
    if (!signal.aborted) await Promise.race([this.#posts.settled(), once(signal, 'abort')])
    await Promise.all(this.#couriers.map(each => each.finish(signal)))
    clearInterval(this.#watch)
    clearInterval(this.#pruning)
    this.#sayWhatIsLeft()
    await Promise.all(this.#couriers.map(each => each.stop()))
    const thread = this.#thread
    if (thread === undefined) return
    await Promise.race([this.#ask({ kind: 'close' }), sleep(CLOSE_TIMEOUT)])
    this.#thread = undefined
    // It does not end while its disk does not respond.
    await Promise.race([thread.terminate(), sleep(CLOSE_TIMEOUT, undefined, { ref: false })])
  }

  // What couriers need of the ledger.

  get isDurable(): boolean {
    return this.#file !== ':memory:'
  }

  async markOf(reporter: string): Promise<number> {
    return (await this.#ask({ kind: 'markOf', reporter })) as number
  }

  async next(seq: number): Promise<Page | undefined> {
    return (await this.#ask({ kind: 'next', seq })) as Page | undefined
  }

  async deferred(reporter: string, after: number, limit: number): Promise<Deferred[]> {
    return (await this.#ask({ kind: 'deferred', reporter, after, limit })) as Deferred[]
  }

  /** What may be lost: then a record comes twice. */
  tell(order: Order & { kind: 'mark' | 'settle' }): void {
    this.#tell(order)
  }

  /** Resolves when it is on the disk. */
  async keep(order: Keep): Promise<void> {
    await this.#ask(order)
  }

  #ask(question: Question): Promise<Value> {
    const id = ++this.#lastId
    const asked = Promise.withResolvers<Value>()
    this.#asked.set(id, asked)
    this.#tell({ ...question, id } as Order)
    return asked.promise
  }

  #tell(order: Order): void {
    this.#thread ??= this.#start()
    this.#thread.postMessage(order)
  }

  #start(): Worker {
    const thread = startThread('reporters/outbox-thread', { workerData: { file: this.#file } })
    thread.on('message', (answer: Answer) => this.#hear(answer))
    thread.on('error', error => this.#giveUp(thread, error as Error))
    thread.on('exit', () => this.#giveUp(thread, new Error('the thread has stopped')))
    // Last, because a message listener refs the thread again.
    thread.unref()
    return thread
  }

  #hear(answer: Answer): void {
    switch (answer.kind) {
      case 'committed': {
        this.#recover()
        const { seq, at } = answer
        return this.#offer({ seq, at, entries: this.#posts.settle() })
      }
      case 'failed':
        return this.#offerUnsafe(answer.reason, this.#posts.settle())
      case 'moved': {
        const { aside, reason } = answer
        return void this.#log.error(
          { file: this.#file, aside, reason },
          'the file of usage records is of no use and was moved aside: what was not delivered is in there'
        )
      }
      case 'pruned':
        return void this.#log.error(
          { records: answer.lost },
          'usage records are lost: the outbox is full of what its reporters do not take'
        )
      case 'answer': {
        const asked = this.#asked.get(answer.id)
        this.#asked.delete(answer.id)
        if (!('error' in answer)) asked?.resolve(answer.value)
        else if (answer.isNewer) asked?.reject(new NewerFormatError(answer.error))
        else asked?.reject(new Error(answer.error))
      }
    }
  }

  #offer(page: Page): void {
    if (page.seq === 0) this.#homeless?.push(page)
    for (const courier of this.#couriers) courier.offer(page)
  }

  /** Records that are on no disk are delivered from memory. */
  #offerUnsafe(reason: string, entries: string[]): void {
    this.#complain(reason)
    this.#offer({ seq: 0, at: Date.now(), entries })
  }

  /** A thread that died is replaced by the next order. */
  #giveUp(thread: Worker, error: Error): void {
    if (thread !== this.#thread) return
    this.#thread = undefined
    for (const asked of this.#asked.values()) asked.reject(error)
    this.#asked.clear()
    this.#offerUnsafe(error.message, this.#posts.settle())
  }

  /** Answers are not held back for ever by a disk that hangs. */
  #hurry(): void {
    const entries = this.#posts.letGo(COMMIT_TIMEOUT)
    if (entries !== undefined) this.#offerUnsafe('the disk does not answer', entries)
  }

  #sayWhatIsLeft(): void {
    const records = this.pending
    const lost = this.#couriers.reduce((sum, each) => sum + each.unsafe, this.#posts.size)
    this.#lose(lost)
    if (records > lost) {
      this.#log.warn({ records: records - lost }, 'usage records are left for the next start')
    }
  }

  #lose(records: number): void {
    if (records === 0) return
    this.#log.error({ records }, 'usage records were not delivered, and are lost')
    this.#onDelivery('failed', records)
  }

  #complain(reason: string): void {
    if (this.trouble === reason) return
    this.trouble = reason
    this.#log.error(
      { file: this.#file, reason },
      'usage records cannot be written; they are kept in memory, and lost if this process ends'
    )
  }

  #recover(): void {
    if (this.trouble === undefined) return
    this.trouble = undefined
    this.#log.warn({ file: this.#file }, 'usage records are written again')
  }

  #prune(): void {
    if (this.#thread === undefined) return
    const reporters = this.#couriers.map(each => each.name)
    const { keep, max_size } = this.#file === ':memory:' ? IN_MEMORY : this.#keeping
    this.#tell({ kind: 'prune', reporters, before: Date.now() - keep, maxBytes: max_size })
  }
}

/** Where a record goes that leaves its page before it was delivered. */
export type Keep =
  | { kind: 'defer'; reporter: string; at: number; entry: string }
  | { kind: 'bury'; reporter: string; reason: string; entries: string[] }

/** Orders that are answered, without their numbers. */
type Question =
  | Keep
  | { kind: 'markOf'; reporter: string }
  | { kind: 'next'; seq: number }
  | { kind: 'deferred'; reporter: string; after: number; limit: number }
  | { kind: 'open' }
  | { kind: 'close' }
