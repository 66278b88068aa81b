import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyBaseLogger } from 'fastify'
import { Complaint } from '../logs/complaint.ts'
import type { Deferred, Page } from './ledger.ts'
import type { Keep, Outbox } from './outbox.ts'
import { type Reporter, untilStopped } from './reporter.ts'

/** What happened to records: their reporter has them, or will never have them. */
export type Delivery = 'delivered' | 'failed'
export type OnDelivery = (result: Delivery, records: number) => void

/** Records that wait in memory; the others wait in the ledger. */
const MAX_QUEUED = 5_000
const MAX_LENGTH = 16 * 1024 * 1024
const FIRST_WAIT = 100
const MAX_WAIT = 5_000
const MAX_RETRY_AFTER = 60_000
/** So many failures say that a record alone is refused, if others are taken in between. */
const ENOUGH_FAILURES = 5
/** How often (ms) the ledger is told where a reporter has got to, and asked for what was put aside. */
const MARK_INTERVAL = 100
const DEFERRED_INTERVAL = 5_000
const DEFERRED_AT_ONCE = 20
/** Records (characters) behind which a delivery takes no more of them. */
const MAX_DELIVERY = 2 * 1024 * 1024

/** A page with records that are not done, and how many. */
interface OpenPage {
  seq: number
  left: number
}

interface Waiting {
  entry: string
  /** Undefined if it is on no disk. */
  page: OpenPage | undefined
  at: number
}

/**
 * Brings records to one reporter, in the order of the ledger, up to `concurrency` deliveries at a time.
 * A reporter that cannot be reached is tried again until it can; a record that it refuses, or fails at while
 * it takes others, is put aside and tried again from there, unless the order is to be kept. One that is older
 * than `max_age` becomes a dead letter.
 */
export class Courier {
  readonly name: string
  readonly #reporter: Reporter
  readonly #outbox: Outbox
  readonly #log: FastifyBaseLogger
  readonly #onDelivery: OnDelivery
  readonly #refused = this.#complaint('usage records were refused; they will be tried again')
  readonly #givenUp = this.#complaint('usage records given up')
  readonly #lost = this.#complaint('usage records are lost: neither disk nor memory takes them')
  readonly #stopping = new AbortController()
  #queue: Waiting[] = []
  #length = 0
  /** Records outside of any page. */
  #unsafe = 0
  /** The last page that was taken into the queue; undefined until the ledger has told the mark. */
  #position: number | undefined
  /** The page before the first that was offered until then. */
  #before = Number.POSITIVE_INFINITY
  #isFilling = false
  #isFinishing = false
  /** Pages that were taken, oldest first. */
  #open: OpenPage[] = []
  #mark = 0
  #sending = 0
  #sendingRecords = 0
  /** Failed deliveries since the last that succeeded. */
  #failures = 0
  #successes = 0
  #timer: NodeJS.Timeout | undefined
  readonly #marking: NodeJS.Timeout
  readonly #retrying: NodeJS.Timeout
  #markTold = 0
  #isRetrying = false
  #isProbing = false
  /** The last one of those put aside that was tried. */
  #retried = 0
  /** What was under way when it was stopped. */
  readonly #left: Waiting[] = []
  #whenIdle = Promise.withResolvers<void>()

  constructor(reporter: Reporter, outbox: Outbox, log: FastifyBaseLogger, onDelivery: OnDelivery) {
    this.name = reporter.name
    this.#reporter = reporter
    this.#outbox = outbox
    this.#log = log
    this.#onDelivery = onDelivery
    this.#marking = setInterval(() => this.#tellMark(), MARK_INTERVAL).unref()
    this.#retrying = setInterval(() => this.#lookAgain(), DEFERRED_INTERVAL).unref()
  }

  /** Records that are known here and not delivered; there may be more in the ledger. */
  get pending(): number {
    return this.#queue.length + this.#sendingRecords
  }

  /** Those of them that are on no disk. */
  get unsafe(): number {
    return this.#outbox.isDurable ? this.#unsafe : this.pending
  }

  async start(): Promise<void> {
    while (this.#position === undefined && !this.#isStopped) {
      const mark = await this.#outbox.markOf(this.name).catch(() => undefined)
      if (mark === undefined) await this.#pause(MAX_WAIT)
      else {
        // To a new reporter's mark all belongs that was there when it was asked for at last.
        this.#position = this.#mark = Math.min(mark, this.#before)
        this.#markTold = mark
      }
    }
    void this.#retryDeferred()
    await this.#fill()
  }

  /** A page that was just committed; without a number it is in memory alone. */
  offer(page: Page): void {
    if (page.seq > 0 && this.#position === undefined) {
      this.#before = Math.min(this.#before, page.seq - 1)
    }
    if (page.seq > 0 && this.#position !== undefined && page.seq <= this.#position) {
      this.#beginAnew(page.seq - 1)
    }
    if (page.seq === 0 || (page.seq - 1 === this.#position && this.#hasRoom())) this.#take(page)
    else if (this.#position !== undefined) void this.#fill()
  }

  /**
   * Delivers what there is, without waiting for full batches, until the signal fires.
   * Nobody is waited for who does not answer, if nothing is lost by that.
   */
  async finish(signal: AbortSignal): Promise<void> {
    this.#isFinishing = true
    const stop = Promise.withResolvers<void>()
    signal.addEventListener('abort', () => stop.resolve(), { once: true })
    if (signal.aborted) return
    this.#proceed()
    const isOver = () => signal.aborted || this.#isStopped
    while (!isOver() && (this.pending > 0 || (await this.#fill()))) {
      if (this.unsafe === 0 && this.#failures > 0) return
      await Promise.race([this.#idle(), stop.promise])
    }
  }

  /** Ends what is under way. Returns what was not delivered and is on no disk; the rest stays in the ledger. */
  async stop(): Promise<Page[]> {
    this.#stopping.abort()
    clearTimeout(this.#timer)
    clearInterval(this.#marking)
    clearInterval(this.#retrying)
    if (this.#sending > 0) await this.#idle()
    this.#tellMark()
    for (const each of [this.#refused, this.#givenUp, this.#lost]) each.end()
    await this.#reporter.close()
    return [...this.#left, ...this.#queue]
      .filter(({ page }) => page === undefined)
      .map(({ at, entry }) => ({ seq: 0, at, entries: [entry] }))
  }

  /** The ledger is another one, which counts from the beginning: its file was replaced, or it was in memory. */
  #beginAnew(seq: number): void {
    this.#position = this.#mark = seq
    this.#open = []
    this.#tellMark()
  }

  get #isStopped(): boolean {
    return this.#stopping.signal.aborted
  }

  #hasRoom(): boolean {
    return this.#queue.length < MAX_QUEUED && this.#length < MAX_LENGTH
  }

  /** Reads on in the ledger as far as there is room; returns whether anything came. */
  async #fill(): Promise<boolean> {
    if (this.#isFilling || this.#position === undefined) return false
    this.#isFilling = true
    let found = false
    try {
      while (this.#hasRoom() && !this.#isStopped) {
        const page = await this.#outbox.next(this.#position)
        if (page === undefined) break
        // It may have been offered in the meantime.
        if (page.seq > this.#position) this.#take(page)
        found = true
      }
    } catch {
      // The outbox has said so; there are more tries to come.
    }
    this.#isFilling = false
    return found
  }

  #lookAgain(): void {
    void this.#retryDeferred()
    if (this.pending === 0) void this.#fill()
  }

  #take({ seq, at, entries }: Page): void {
    const page = seq === 0 ? undefined : { seq, left: entries.length }
    if (page !== undefined) {
      this.#position = seq
      this.#open.push(page)
    }
    let lost = 0
    for (const entry of entries) {
      if (page === undefined && !this.#hasRoom()) lost++
      else if (!this.#reporter.accepts(entry)) {
        if (page !== undefined) page.left--
      } else {
        if (page === undefined) this.#unsafe++
        this.#queue.push({ entry, page, at })
        this.#length += entry.length
      }
    }
    if (lost > 0) this.#lose(lost)
    this.#advance()
    this.#proceed()
  }

  /** Starts deliveries that are due, and sees to it that the others start in time. */
  #proceed(): void {
    const { concurrency, batch } = this.#reporter
    while (this.#queue.length > 0 && !this.#isStopped) {
      if (this.#sending >= concurrency) return
      if (this.#queue.length < batch.max_events && !this.#isFinishing) {
        this.#timer ??= setTimeout(() => void this.#send(), batch.max_wait)
        return
      }
      void this.#send()
    }
  }

  async #send(): Promise<void> {
    clearTimeout(this.#timer)
    this.#timer = undefined
    const batch = this.#queue.splice(0, this.#nextBatch())
    this.#sending++
    this.#sendingRecords += batch.length
    for (const { entry } of batch) this.#length -= entry.length
    await this.#deliver(batch)
    this.#sending--
    this.#sendingRecords -= batch.length
    if (this.#sending === 0) {
      this.#whenIdle.resolve()
      this.#whenIdle = Promise.withResolvers()
    }
    if (this.#hasRoom()) void this.#fill()
    this.#proceed()
  }

  /** Returns how many records go together: no more than fit, and at least one. */
  #nextBatch(): number {
    const most = Math.min(this.#queue.length, this.#reporter.batch.max_events)
    let length = 0
    for (let count = 0; count < most; count++) {
      length += this.#queue[count]!.entry.length
      if (length > MAX_DELIVERY) return Math.max(1, count)
    }
    return most
  }

  async #deliver(given: Waiting[]): Promise<void> {
    let batch = given
    let successes = this.#successes
    for (let attempt = 0; !this.#isStopped; attempt++) {
      const entries = batch.map(({ entry }) => entry)
      const verdict = await this.#reporter.send(entries, this.#stopping.signal)
      if (verdict.kind === 'delivered') {
        this.#succeed()
        return this.#done(batch, 'delivered')
      }
      if (this.#isStopped) break
      const { reason } = verdict
      const isAlone = attempt + 1 >= ENOUGH_FAILURES && this.#successes > successes
      const kind = isAlone ? 'refused' : verdict.kind
      successes = this.#successes
      // One of them spoils it for all.
      if (kind === 'refused' && batch.length > 1) {
        for (const one of batch) await this.#deliver([one])
        return
      }
      this.#fail(kind, reason)
      const old = batch.filter(({ at }) => this.#isOld(at))
      if (old.length > 0 && (await this.#bury(old, reason))) {
        this.#done(old, 'failed')
        batch = batch.filter(each => !old.includes(each))
      } else if (kind === 'refused' && this.#reporter.concurrency > 1) {
        if (await this.#defer(batch[0]!)) return
      }
      if (batch.length === 0) return
      if (attempt + 1 >= ENOUGH_FAILURES && this.#successes === successes) await this.#probe()
      const wait = Math.min(FIRST_WAIT * 2 ** attempt, MAX_WAIT) * (0.75 + Math.random() / 4)
      await this.#pause(Math.max(wait, Math.min(verdict.retryAfter, MAX_RETRY_AFTER)))
    }
    this.#left.push(...batch)
  }

  /** Nothing is taken any more: of all that is under way, or of all? The record that came last tells. */
  async #probe(): Promise<void> {
    if (this.#isProbing || this.#reporter.concurrency === 1) return
    const last = this.#queue.pop()
    if (last === undefined) return
    this.#isProbing = true
    const verdict = await this.#reporter.send([last.entry], this.#stopping.signal)
    this.#isProbing = false
    if (verdict.kind !== 'delivered') return void this.#queue.push(last)
    this.#length -= last.entry.length
    this.#succeed()
    this.#done([last], 'delivered')
  }

  #done(batch: Waiting[], result: Delivery): void {
    for (const { page } of batch) this.#close(page)
    this.#advance()
    this.#onDelivery(result, batch.length)
  }

  #close(page: OpenPage | undefined): void {
    if (page === undefined) this.#unsafe--
    else page.left--
  }

  /** Moves the mark behind the last page before which all is done. */
  #advance(): void {
    while (this.#open[0]?.left === 0) this.#mark = this.#open.shift()!.seq
  }

  #tellMark(): void {
    if (this.#mark === this.#markTold) return
    this.#markTold = this.#mark
    this.#outbox.tell({ kind: 'mark', reporter: this.name, seq: this.#mark })
  }

  #isOld(at: number): boolean {
    return Date.now() - at > this.#reporter.maxAge
  }

  async #defer({ entry, at, page }: Waiting): Promise<boolean> {
    if (!(await this.#keep({ kind: 'defer', reporter: this.name, at, entry }))) return false
    this.#close(page)
    this.#advance()
    return true
  }

  async #bury(batch: { entry: string }[], reason: string): Promise<boolean> {
    const entries = batch.map(({ entry }) => entry)
    if (!(await this.#keep({ kind: 'bury', reporter: this.name, reason, entries }))) return false
    this.#givenUp.add(batch.length, reason)
    return true
  }

  /** Resolves with whether it is on the disk; what is not stays where it is, and is tried again. */
  #keep(order: Keep): Promise<boolean> {
    const keep = () =>
      this.#outbox.keep(order).then(
        () => true,
        () => false
      )
    return untilStopped(this.#stopping.signal, keep, false)
  }

  #lose(records: number): void {
    this.#lost.add(records, this.#outbox.trouble ?? 'the disk did not take them')
    this.#onDelivery('failed', records)
  }

  /** Tries again what was put aside, one by one, until nobody answers; the next time it goes on behind that. */
  async #retryDeferred(): Promise<void> {
    if (this.#isRetrying) return
    this.#isRetrying = true
    let isTaking = true
    while (isTaking && !this.#isStopped && this.#failures === 0) {
      const records = await this.#outbox
        .deferred(this.name, this.#retried, DEFERRED_AT_ONCE)
        .catch(() => [])
      if (records.length === 0) {
        this.#retried = 0
        break
      }
      for (const each of records) {
        this.#retried = each.rowid
        isTaking = await this.#retry(each)
        if (!isTaking) break
      }
    }
    this.#isRetrying = false
  }

  /** Returns false when the receiver cannot be reached. */
  async #retry({ rowid, at, entry }: Deferred): Promise<boolean> {
    const verdict = await this.#reporter.send([entry], this.#stopping.signal)
    if (this.#isStopped) return false
    if (verdict.kind !== 'delivered') {
      if (!this.#isOld(at)) return verdict.kind === 'refused'
      // A crash in between makes two dead letters of it, and never none.
      if (!(await this.#bury([{ entry }], verdict.reason))) return false
    }
    this.#outbox.tell({ kind: 'settle', rowid })
    this.#onDelivery(verdict.kind === 'delivered' ? 'delivered' : 'failed', 1)
    return true
  }

  #succeed(): void {
    if (this.#failures > 0) this.#log.info({ reporter: this.name }, 'usage is reported again')
    this.#failures = 0
    this.#successes++
  }

  #fail(kind: 'refused' | 'unavailable', reason: string): void {
    if (kind === 'refused') return this.#refused.add(1, reason)
    this.#failures++
    if (this.#failures > 1) return
    const message = 'usage cannot be reported; it will be tried again'
    this.#log.error({ reporter: this.name, reason }, message)
  }

  #complaint(message: string): Complaint {
    return new Complaint((records, reason) =>
      this.#log.error({ reporter: this.name, reason, records }, message)
    )
  }

  #idle(): Promise<void> {
    return this.#sending === 0 ? Promise.resolve() : this.#whenIdle.promise
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#stopping.signal }).catch(() => {})
  }
}
