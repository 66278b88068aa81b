import { isIPv6 } from 'node:net'
import { Type } from 'typebox'

/** For sources that know hosts and ports but no URLs. */
export const Scheme = Type.Enum(['http', 'https'], {
  default: 'http',
  description: 'How its backends are spoken to'
})

/**
 * A host and a port as they stand in a URL.
 *
 * @example
 * hostPort('::1', 8000) // '[::1]:8000'
 */
export function hostPort(host: string, port: number): string {
  return `${isIPv6(host) ? `[${host}]` : host}:${port}`
}
