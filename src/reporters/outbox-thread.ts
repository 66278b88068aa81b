import { parentPort, workerData } from 'node:worker_threads'
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
  | { kind: 'markOf'; id: number; reporter: string }
  | { kind: 'next'; id: number; seq: number }
  | { kind: 'deferred'; id: number; reporter: string; after: number; limit: number }
  | { kind: 'close'; id: number }

export type Answer =
  | { kind: 'committed'; seq: number; at: number }
  | { kind: 'failed'; reason: string }
  | { kind: 'pruned'; lost: number }
  | { kind: 'answer'; id: number; value?: number | Page | Deferred[] | undefined; error?: string }

const port = parentPort!
const { file } = workerData as { file: string }
/** Set as long as the file can be used. */
let ledger: Ledger | undefined
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
    if ('id' in order) say({ kind: 'answer', id: order.id, error: reason })
  }
}

function carryOut(
  ledger: Ledger,
  order: Exclude<Order, { kind: 'append' | 'prune' | 'close' }>
): number | Page | Deferred[] | undefined {
  switch (order.kind) {
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

function opened(): Ledger {
  ledger ??= new Ledger(file)
  return ledger
}

function end(): undefined {
  isPruning = false
  close()
}

/** After an error the file is opened anew: it may have been replaced, or its disk may have room again. */
function reopenAfter(error: unknown): string {
  if (file !== ':memory:') close()
  return (error as Error).message
}

function close(): void {
  try {
    ledger?.close()
  } catch {}
  ledger = undefined
}

function say(answer: Answer): void {
  port.postMessage(answer)
}
