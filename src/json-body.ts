/** JSON that a request of the admin API contains. */

/** The deepest nesting of what the gateway reads of a request for itself. */
const MAX_DEPTH = 32

export const TOO_DEEP = `must not be nested deeper than ${MAX_DEPTH} levels`

/**
 * Returns whether a JSON text is nested deeper than {@link MAX_DEPTH}. Functions that copy and compare values call
 * themselves for each level, and 10,000 levels overflow the stack.
 */
export function isTooDeep(text: string): boolean {
  let depth = 0
  let isInString = false
  for (let at = 0; at < text.length; at++) {
    const char = text[at]
    if (isInString) {
      if (char === '\\') at++
      else if (char === '"') isInString = false
    } else if (char === '"') isInString = true
    else if (char === ']' || char === '}') depth--
    else if ((char === '[' || char === '{') && ++depth > MAX_DEPTH) return true
  }
  return false
}

/**
 * Returns a copy in which the members of objects are replaced; undefined leaves a member out. Items of lists stay.
 *
 * @example
 * replaced({ a: null, b: [null] }, each => each ?? undefined) // { b: [null] }
 */
export function replaced(value: unknown, replace: (member: unknown) => unknown): unknown {
  if (Array.isArray(value)) return value.map(item => replaced(item, replace))
  if (typeof value !== 'object' || value === null) return value
  const members = Object.entries(value).map(([name, each]) => [
    name,
    replaced(replace(each), replace)
  ])
  return Object.fromEntries(members.filter(([, each]) => each !== undefined))
}
