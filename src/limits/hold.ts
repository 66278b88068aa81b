import type { Limits } from './limits.ts'
import { type Amount, type Hold, type Lease, NOTHING } from './store.ts'

/** How much of a request's reserve each account holds, and what is left of it when something is spent. */

/** Amounts that one account holds: of its quota, and tokens of tokens_per_minute (`window`). */
export interface Share extends Amount {
  window: number
}

/** Returns what an account holds: `reserve` decides for its quota, and tokens_per_minute reserves what is typical. */
export function shareOf({ reserve }: Limits, hold: Hold): Share {
  const { typical = hold } = hold
  const { tokens, cost } = reserve === 'typical' ? typical : hold
  return { tokens, cost, window: typical.tokens }
}

/** Whether nothing is held. */
export function isNothing({ tokens, cost, typical }: Hold): boolean {
  return tokens === 0 && cost === 0 && (typical === undefined || isNothing(typical))
}

export function sumOf(hold: Hold, more: Hold): Hold {
  return both(hold, (amount, isTypical) => {
    const { tokens, cost } = (isTypical && more.typical) || more
    return { tokens: amount.tokens + tokens, cost: amount.cost + cost }
  })
}

/** Returns what takes all of a reservation away. */
export function none(hold: Hold): Hold {
  return both(hold, ({ tokens, cost }) => ({ tokens: -tokens, cost: -cost }))
}

/** Returns what of `spent` is new, and by how much less is held for it. */
export function toBook({ spent: before, held }: Lease, spent: Amount) {
  const delta = { tokens: spent.tokens - before.tokens, cost: spent.cost - before.cost }
  if (isNothing(held)) return { delta, less: NOTHING }
  const less = both(held, ({ tokens, cost }) => ({
    tokens: -Math.min(tokens, Math.max(0, delta.tokens)),
    cost: -Math.min(cost, Math.max(0, delta.cost))
  }))
  return { delta, less }
}

function both(hold: Hold, change: (amount: Amount, isTypical: boolean) => Amount): Hold {
  return { ...change(hold, false), typical: change(hold.typical ?? hold, true) }
}
