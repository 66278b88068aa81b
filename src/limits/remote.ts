import {
  type Account,
  type Amount,
  type Call,
  type Hold,
  isRefusal,
  type Lease,
  type LimitStore,
  NOTHING,
  type Refusal,
  StoreError
} from './store.ts'
import { type Upload, Uploads } from './uploads.ts'

/** What a process asks of the one that counts for all; it goes through JSON. */
export type LimitQuestion =
  | { op: 'reserve'; id: number; call: Call }
  | { op: 'extend'; id: number; lease: number; spent: Amount; more: Hold; force: boolean }
  | { op: 'book'; id: number; lease: number; spent: Amount }
  | { op: 'settle'; lease: number; spent: Amount }
  | { op: 'look'; id: number; accounts: readonly Account[]; isUpload: boolean }
  /** The request of this look is no upload any more. */
  | { op: 'uploaded'; look: number }

/** What it is answered; of a lease all but its accounts. */
export interface LimitAnswer {
  id: number
  refusal?: Refusal
  lease?: Omit<Lease, 'accounts'>
  held?: boolean
}

interface RemoteLease extends Lease {
  readonly id: number
}

/** Limits that another process counts. */
export class RemoteStore implements LimitStore {
  readonly #ask: (question: LimitQuestion) => void
  readonly #asked = new Map<number, (answer: LimitAnswer | undefined) => void>()
  #lastId = 0

  constructor(ask: (question: LimitQuestion) => void) {
    this.#ask = ask
  }

  readonly isLocal = false

  async look(
    accounts: readonly Account[],
    _uploading: unknown,
    upload?: Upload
  ): Promise<Refusal | undefined> {
    const id = ++this.#lastId
    const isUpload = upload !== undefined
    if (isUpload) upload.onEnd = () => this.#ask({ op: 'uploaded', look: id })
    const question = { op: 'look', id, accounts, isUpload } as const
    const { refusal } = await this.#answer(id, question).catch((): Partial<LimitAnswer> => ({}))
    return refusal && toRefusal(refusal)
  }

  async reserve(call: Call): Promise<Lease | Refusal> {
    const id = ++this.#lastId
    const { refusal, lease } = await this.#answer(id, { op: 'reserve', id, call })
    if (lease !== undefined) return { ...lease, id, accounts: call.accounts } as RemoteLease
    return toRefusal(refusal!)
  }

  async extend(given: Lease, spent: Amount, more: Hold, force: boolean): Promise<boolean> {
    const lease = given as RemoteLease
    const id = ++this.#lastId
    const question = { op: 'extend', id, lease: lease.id, spent, more, force } as const
    const { held = false, lease: now } = await this.#answer(id, question)
    if (now !== undefined) Object.assign(lease, { held: now.held, spent: now.spent })
    return held
  }

  async book(given: Lease, spent: Amount): Promise<void> {
    const lease = given as RemoteLease
    const id = ++this.#lastId
    await this.#answer(id, { op: 'book', id, lease: lease.id, spent }).catch(() => {})
  }

  settle(given: Lease, spent: Amount): void {
    const lease = given as RemoteLease
    if (!lease.isOpen) return
    lease.isOpen = false
    this.#ask({ op: 'settle', lease: lease.id, spent })
  }

  /** The process that counts is told by itself. */
  update(): void {}

  hear(answer: LimitAnswer): void {
    const resolve = this.#asked.get(answer.id)
    this.#asked.delete(answer.id)
    if (resolve !== undefined) return resolve(answer)
    // Whoever asked was told that this store is closed, and will give nothing back.
    if (answer.lease !== undefined && answer.held === undefined) {
      this.#ask({ op: 'settle', lease: answer.id, spent: NOTHING })
    }
  }

  async close(): Promise<void> {
    for (const resolve of this.#asked.values()) resolve(undefined)
    this.#asked.clear()
  }

  async #answer(id: number, question: LimitQuestion): Promise<LimitAnswer> {
    const answer = await new Promise<LimitAnswer | undefined>(resolve => {
      this.#asked.set(id, resolve)
      this.#ask(question)
    })
    if (answer === undefined) throw new StoreError('closed')
    return answer
  }
}

/** What one other process has taken; all of it comes back when that one is gone. */
export class RemoteLeases {
  readonly #store: LimitStore
  readonly #tell: (answer: LimitAnswer) => void
  readonly #open = new Map<number, Lease>()
  readonly #uploads: Uploads
  /** Uploads of the other process, by their looks. */
  readonly #uploading = new Map<number, Upload>()
  #isGone = false

  /** @param uploads of all other processes */
  constructor(
    store: LimitStore,
    tell: (answer: LimitAnswer) => void,
    uploads: Uploads = new Uploads()
  ) {
    this.#store = store
    this.#tell = tell
    this.#uploads = uploads
  }

  async hear(question: LimitQuestion): Promise<void> {
    if (question.op === 'reserve') return this.#reserve(question.id, question.call)
    if (question.op === 'look') return this.#look(question)
    if (question.op === 'uploaded') return this.#endUpload(question.look)
    const lease = this.#open.get(question.lease)
    if (question.op === 'settle') {
      this.#open.delete(question.lease)
      if (lease !== undefined) this.#store.settle(lease, question.spent)
      return
    }
    if (question.op === 'book') {
      if (lease !== undefined) await this.#store.book(lease, question.spent)
      return this.#tell({ id: question.id })
    }
    const { id, spent, more, force } = question
    if (lease === undefined) return this.#tell({ id, held: false })
    const held = await this.#store.extend(lease, spent, more, force)
    this.#tell({ id, held, lease: withoutAccounts(lease) })
  }

  /** The other process is gone. */
  close(): void {
    this.#isGone = true
    for (const lease of this.#open.values()) this.#store.settle(lease, lease.spent)
    this.#open.clear()
    for (const id of this.#uploading.keys()) this.#endUpload(id)
  }

  async #look({ id, accounts, isUpload }: LimitQuestion & { op: 'look' }): Promise<void> {
    const others = this.#uploads.of(accounts)
    // Before the store is asked: all of a burst would be told that there is room.
    if (isUpload && !this.#isGone) this.#uploading.set(id, this.#uploads.begin(accounts))
    const refusal = await this.#store.look(accounts, others)
    if (refusal === undefined) return this.#tell({ id })
    this.#endUpload(id)
    this.#tell({ id, refusal })
  }

  #endUpload(id: number): void {
    const upload = this.#uploading.get(id)
    this.#uploading.delete(id)
    if (upload !== undefined) this.#uploads.end(upload)
  }

  async #reserve(id: number, call: Call): Promise<void> {
    const result = await this.#store.reserve(call)
    if (isRefusal(result)) return this.#tell({ id, refusal: result })
    if (this.#isGone) return this.#store.settle(result, NOTHING)
    this.#open.set(id, result)
    this.#tell({ id, lease: withoutAccounts(result) })
  }
}

function withoutAccounts({ accounts: _, ...lease }: Lease): Omit<Lease, 'accounts'> {
  return lease
}

/** JSON has no Infinity. */
function toRefusal(refusal: Refusal): Refusal {
  return { ...refusal, retryAfterMs: refusal.retryAfterMs ?? Number.POSITIVE_INFINITY }
}
