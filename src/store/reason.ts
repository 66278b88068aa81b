/**
 * What went wrong, in the server's or the system's own words; where there are none, its code.
 *
 * @example
 * reasonOf(Object.assign(new AggregateError([]), { code: 'ECONNREFUSED' })) // 'ECONNREFUSED'
 */
export function reasonOf(error: unknown): string {
  const { message, code } = error as NodeJS.ErrnoException
  return message || code || 'failed'
}
