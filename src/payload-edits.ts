import crypto from 'node:crypto'
import type { Body, Payload } from './payload.ts'
import { type Edit, edited, type Pieces } from './wire/edits.ts'
import { membersOf } from './wire/json-scanner.ts'

/** A change of a request body: of some bytes, or a member to add, as JSON. */
export type Change = Edit | string

/**
 * Returns the body with these changes; every other byte stays.
 *
 * @example
 * const body = { bytes: Buffer.from('{}'), members: [], hasLinks: false }
 * String(changed(body, [nameModel(body, 'm')])) // '{"model":"m"}'
 */
export function changed({ bytes, members }: Body, changes: readonly Change[]): Buffer | Pieces {
  const edits = changes.filter(change => typeof change !== 'string')
  const added = changes.filter(change => typeof change === 'string')
  if (added.length > 0) edits.push(addFirst(bytes, 0, added, members.length))
  return edited(bytes, edits)
}

/** Fields of `stream_options` that ask for usage: at the end, and in every event. */
export type UsageField = 'include_usage' | 'continuous_usage_stats'
/** Requests share these lists, so that a running stream has none of its own. */
const ALL_USAGE: readonly UsageField[] = ['include_usage', 'continuous_usage_stats']
const RUNNING_USAGE: readonly UsageField[] = ['continuous_usage_stats']
export const FINAL_USAGE: readonly UsageField[] = ['include_usage']
export const NO_USAGE: readonly UsageField[] = []

/** Returns the fields that the client has not set itself. */
export function unaskedUsage({ includeUsage, runningUsage }: Payload): readonly UsageField[] {
  if (runningUsage) return includeUsage ? NO_USAGE : FINAL_USAGE
  return includeUsage ? RUNNING_USAGE : ALL_USAGE
}

/** Sets these fields of `stream_options`. */
export function askForUsage({ bytes, members }: Body, fields: readonly UsageField[]): Change[] {
  const asks = fields.map(field => `"${field}":true`)
  const options = members.findLast(({ name }) => name === 'stream_options')
  if (options === undefined) return [`"stream_options":{${asks}}`]
  const { start, end } = options
  if (bytes[start] !== 0x7b) return [{ start, end, bytes: Buffer.from(`{${asks}}`) }]
  const inside = membersOf(bytes.subarray(start, end))
  const missing = asks.filter((_, at) => !inside.some(({ name }) => name === fields[at]))
  const set = inside.filter(({ name }) => fields.includes(name as UsageField))
  const edits = set.map(each => ({
    start: start + each.start,
    end: start + each.end,
    bytes: Buffer.from('true')
  }))
  return missing.length === 0 ? edits : [addFirst(bytes, start, missing, inside.length), ...edits]
}

/** Makes a request one for this model. */
export function nameModel(body: Body, model: string): Change {
  return setString(body, 'model', model)
}

/** Gives a caller its own part of the prefix cache. */
export function saltCache(body: Body, caller: string): Change {
  return setString(body, 'cache_salt', crypto.hash('sha256', `cache_salt\n${caller}`, 'base64url'))
}

function setString({ members }: Body, name: string, value: string): Change {
  const member = members.findLast(each => each.name === name)
  const json = JSON.stringify(value)
  if (member === undefined) return `"${name}":${json}`
  return { start: member.start, end: member.end, bytes: Buffer.from(json) }
}

/** Adds members behind the brace of the object that starts at `from`. */
function addFirst(bytes: Buffer, from: number, added: readonly string[], others: number): Edit {
  const at = bytes.indexOf('{', from) + 1
  const text = added.join(',') + (others === 0 ? '' : ',')
  return { start: at, end: at, bytes: Buffer.from(text) }
}
