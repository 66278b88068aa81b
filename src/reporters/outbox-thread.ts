import { type Stats, statSync } from 'node:fs'
import { parentPort, workerData } from 'node:worker_threads'
import { NewerFormatError } from '../store/sql.ts'
import { isUnusable, moveAside } from '../store/sqlite-file.ts'
import { type Deferred, Ledger, type Page } from './ledger.ts'

/**
 * The thread that owns the ledger.
 */

/** What the thread is asked. */
export type Order =
  | { kind: 'append'; entries: string[] }
  | { kind: 'mark'; reporter: string; seq: number }
  | { kind: 'settle'; rowid: number }
  | { kind: 'prune'; reporters: string[]; before: number; maxBytes: number }
  | { kind: 'defer'; id: number; reporter: string; at: number; entry: string }
  | { kind: 'bury'; id: number; reporter: string; reason: string; entries: string[] }
  | { kind: 'open'; id: number }
  | { kind: 'markOf'; id: number; reporter: string }
  | { kind: 'next'; id: number; seq: number }
  | { kind: 'deferred'; id: number; reporter: string; after: number; limit: number }
  | { kind: 'close'; id: number }

export type Answer =
  | { kind: 'committed'; seq: number; at: number }
  | { kind: 'failed'; reason: string }
  | { kind: 'pruned'; lost: number }
  | { kind: 'moved'; aside: string; reason: string }
  | { kind: 'answer'; id: number; value: Value }
  | { kind: 'answer'; id: number; error: string; isNewer: boolean }

export type Value = number | Page | Deferred[] | undefined

const port = parentPort!
const { file } = workerData as { file: string }
/** Set as long as the file can be used. */
let ledger: Ledger | undefined
/** The file as it was when the ledger was opened. */
let opening: Stats | undefined
let isPruning = false

port.on('message', (order: Order) => {
  if (order.kind === 'append') commit(order.entries)
  else if (order.kind === 'prune') beginPruning(order)
  else obey(order)
})

function commit(entries: string[]): void {
  try {
    const at = Date.now()
    say({ kind: 'committed', seq: opened().append(entries, at), at })
  } catch (error) {
    say({ kind: 'failed', reason: reopenAfter(error) })
  }
}

function obey(order: Exclude<Order, { kind: 'append' | 'prune' }>): void {
  try {
    const value = order.kind === 'close' ? end() : carryOut(opened(), order)
    if ('id' in order) say({ kind: 'answer', id: order.id, value })
  } catch (error) {
    const reason = reopenAfter(error)
    const isNewer = error instanceof NewerFormatError
    if ('id' in order) say({ kind: 'answer', id: order.id, error: reason, isNewer })
  }
}

function carryOut(
  ledger: Ledger,
  order: Exclude<Order, { kind: 'append' | 'prune' | 'close' }>
): Value {
  switch (order.kind) {
    case 'open':
      return undefined
    case 'mark':
      return void ledger.mark(order.reporter, order.seq)
    case 'defer':
      return void ledger.defer(order.reporter, order.at, order.entry)
    case 'settle':
      return void ledger.settle(order.rowid)
    case 'bury':
      return void ledger.bury(order.reporter, order.reason, order.entries)
    case 'markOf':
      return ledger.markOf(order.reporter)
    case 'next':
      return ledger.next(order.seq)
    case 'deferred':
      return ledger.deferred(order.reporter, order.after, order.limit)
  }
}

function beginPruning(order: Order & { kind: 'prune' }): void {
  if (isPruning) return
  isPruning = true
  prune(order, 0)
}

/** Step by step: what is to be committed comes in between. */
function prune(order: Order & { kind: 'prune' }, lostBefore: number): void {
  let pruned = { gone: 0, lost: 0 }
  try {
    if (isPruning) pruned = opened().prune(order.reporters, order.before, order.maxBytes)
  } catch (error) {
    reopenAfter(error)
  }
  const lost = lostBefore + pruned.lost
  if (pruned.gone > 0) return void setImmediate(() => prune(order, lost))
  isPruning = false
  if (lost > 0) say({ kind: 'pruned', lost })
}

/** A file that was deleted or replaced would take records, and lose them. */
function opened(): Ledger {
  if (ledger !== undefined && file !== ':memory:' && !isSame(statSync(file), opening)) {
    throw new Error('the file was replaced')
  }
  try {
    ledger ??= new Ledger(file)
  } catch (error) {
    if (!moveUnusable(error)) throw error
    ledger = new Ledger(file)
  }
  if (file !== ':memory:') opening ??= statSync(file)
  return ledger
}

function isSame(one: Stats, other: Stats | undefined): boolean {
  return one.ino === other?.ino && one.dev === other.dev
}

function end(): undefined {
  isPruning = false
  close()
}

/** After an error the file is opened anew: it may have been replaced, or its disk may have room again. */
function reopenAfter(error: unknown): string {
  if (file !== ':memory:') close()
  moveUnusable(error)
  return (error as Error).message
}

/** A file that is damaged or of another program is moved aside, so that a new one can be made. */
function moveUnusable(error: unknown): boolean {
  if (!isUnusable(error)) return false
  say({ kind: 'moved', aside: moveAside(file), reason: (error as Error).message })
  return true
}

function close(): void {
  try {
    ledger?.close()
  } catch {}
  ledger = undefined
  opening = undefined
}

function say(answer: Answer): void {
  port.postMessage(answer)
}
