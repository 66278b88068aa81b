import { findMembers, splice } from './members.ts'

const WITH_USAGE = Buffer.from('{"include_usage":true}')

/**
 * The same request body, with `stream_options.include_usage` set: only that part of it changes.
 *
 * @param bytes a JSON object with at least one member
 * @example
 * String(askForUsage(Buffer.from('{"stream":true}'))) // '{"stream_options":{"include_usage":true},"stream":true}'
 */
export function askForUsage(bytes: Buffer): Buffer {
  const options = bytes.includes('stream_options')
    ? findMembers(bytes).findLast(member => member.name === 'stream_options')
    : undefined
  if (options === undefined) {
    const brace = bytes.indexOf('{') + 1
    return splice(bytes, brace, brace, Buffer.from(`"stream_options":${WITH_USAGE},`))
  }
  if (bytes[options.start] !== 0x7b) return splice(bytes, options.start, options.end, WITH_USAGE)
  const inner = findMembers(bytes, options.start)
  const asked = inner.findLast(member => member.name === 'include_usage')
  if (asked !== undefined) return splice(bytes, asked.start, asked.end, Buffer.from('true'))
  const comma = inner.length === 0 ? '' : ','
  const brace = options.start + 1
  return splice(bytes, brace, brace, Buffer.from(`"include_usage":true${comma}`))
}
