import type { Usage } from '../exchange.ts'

/**
 * A stored response whose usage was not known when its request ended: one that is made in the background, or
 * whose stream was cut. A later read shows what it has cost.
 */
export interface UnbilledResponse {
  /** Tokens of its prompt, estimated. */
  readonly promptTokens: number
  /** Position of the event that a read begins after. */
  readonly startsAfter?: number
  /** Takes over what its request has reserved; absent: nothing stays reserved. */
  hold?: ((release: () => void) => void) | undefined
  /** Gives back what is reserved; absent: the response is not settled. */
  release?: (() => void) | undefined
  /**
   * Takes what an exchange has seen of its usage.
   *
   * @returns the part that has not been billed before; undefined: none
   */
  bill(seen: Seen): Usage | Promise<Usage | undefined> | undefined
}

/** What an exchange has seen of a stored response. */
export interface Seen {
  /** Undefined: nothing. */
  usage: Usage | undefined
  /** There will be no more. */
  isComplete: boolean
  /** The events that the usage was counted from; absent: it is that of the whole response. */
  part?: Part | undefined
}

/** Events of a stream, by their positions: those after `from`, up to `to`. */
export type Part = readonly [from: number, to: number]

/** The usage of a response that is billed so far, and the parts of its stream that it covers. */
export interface Bill extends Usage {
  parts?: Part[]
}

/** Parts of a stream that are remembered. */
const MAX_PARTS = 64
const DETAILS = ['cachedTokens', 'cacheWriteTokens', 'reasoningTokens'] as const

/**
 * Adds usage to a bill. Usage of a whole response costs by how much it is more than what was billed before. The output of
 * a part costs as large a share of it as was not billed before.
 *
 * @returns the new bill, and the part that is due now; undefined: none
 *
 * @example
 * const usage = { promptTokens: 5, completionTokens: 2, totalTokens: 7, exactness: 'exact' }
 * const { bill, due } = charge(usage, undefined)
 * due?.totalTokens // 7
 * charge(usage, undefined, bill).due // undefined
 * charge({ ...usage, completionTokens: 10, exactness: 'counted' }, [0, 10]).bill.parts // [[0, 10]]
 */
export function charge(
  usage: Usage,
  part?: Part,
  before?: Bill
): { bill: Bill; due: Usage | undefined } {
  const { parts = [], ...billed } = before ?? { ...usage, ...NOTHING }
  const due = merge(usage, billed, (now, then) => Math.max(0, now - then))
  if (part !== undefined) {
    due.completionTokens = Math.ceil(usage.completionTokens * shareOfNew(part, parts))
  }
  due.totalTokens = due.promptTokens + due.completionTokens
  const bill: Bill = merge(due, billed, (now, then) => now + then)
  const isNew = part !== undefined && part[1] > part[0]
  const all = isNew ? union([...parts, part]).slice(-MAX_PARTS) : parts
  if (all.length > 0) bill.parts = all
  return { bill, due: due.totalTokens > 0 ? due : undefined }
}

const NOTHING = {
  promptTokens: 0,
  completionTokens: 0,
  totalTokens: 0,
  cachedTokens: 0,
  cacheWriteTokens: 0,
  reasoningTokens: 0
}

function merge(one: Usage, other: Usage, by: (one: number, other: number) => number): Usage {
  const merged: Usage = {
    promptTokens: by(one.promptTokens, other.promptTokens),
    completionTokens: by(one.completionTokens, other.completionTokens),
    totalTokens: by(one.totalTokens, other.totalTokens),
    exactness: one.exactness
  }
  for (const detail of DETAILS) {
    if (one[detail] !== undefined) merged[detail] = by(one[detail], other[detail] ?? 0)
    else if (other[detail]) merged[detail] = other[detail]
  }
  return merged
}

/** Returns how much of a part is in none of the others, from 0 to 1. */
function shareOfNew([from, to]: Part, others: readonly Part[]): number {
  if (to <= from) return 1
  const known = others.map(([start, end]) => Math.max(0, Math.min(end, to) - Math.max(start, from)))
  return 1 - known.reduce((sum, each) => sum + each, 0) / (to - from)
}

/** Joins parts that touch each other. */
function union(parts: Part[]): Part[] {
  const joined: [number, number][] = []
  for (const [from, to] of parts.toSorted(([one], [other]) => one - other)) {
    const last = joined.at(-1)
    if (last !== undefined && from <= last[1]) last[1] = Math.max(last[1], to)
    else joined.push([from, to])
  }
  return joined
}
