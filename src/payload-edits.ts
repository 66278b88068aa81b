import type { Body } from './payload.ts'
import type { Edit } from './wire/edits.ts'
import { type Member, membersOf } from './wire/json-scanner.ts'

const WITH_USAGE = '{"include_usage":true}'

/**
 * The edit that sets `stream_options.include_usage` in a request; the rest of the body stays.
 *
 * @example
 * const { start, bytes } = askForUsage({ bytes: Buffer.from('{}'), members: [] })
 * start // 1
 * String(bytes) // '"stream_options":{"include_usage":true}'
 */
export function askForUsage({ bytes, members }: Body): Edit {
  const options = members.findLast(({ name }) => name === 'stream_options')
  if (options === undefined) return insertFirst(bytes, `"stream_options":${WITH_USAGE}`, members)
  if (bytes[options.start] !== 0x7b) return replace(options, WITH_USAGE)
  const inside = membersOf(bytes.subarray(options.start, options.end))
  const asked = inside.findLast(({ name }) => name === 'include_usage')
  if (asked === undefined) {
    return insertFirst(bytes, '"include_usage":true', inside, options.start)
  }
  const { start, end } = asked
  return replace({ start: options.start + start, end: options.start + end }, 'true')
}

/** The edit that makes a request one for this model. */
export function nameModel({ bytes, members }: Body, model: string): Edit {
  const named = members.findLast(({ name }) => name === 'model')
  const json = JSON.stringify(model)
  return named === undefined ? insertFirst(bytes, `"model":${json}`, members) : replace(named, json)
}

/** Inserts a member behind the brace of the object that starts at `from`. */
export function insertFirst(
  bytes: Buffer,
  member: string,
  others: readonly Member[],
  from = 0
): Edit {
  const at = bytes.indexOf('{', from) + 1
  return { start: at, end: at, bytes: Buffer.from(others.length === 0 ? member : `${member},`) }
}

function replace({ start, end }: { start: number; end: number }, json: string): Edit {
  return { start, end, bytes: Buffer.from(json) }
}
