import { isIPv6 } from 'node:net'
import { Type } from 'typebox'
import { isHttpUrl } from '../options.ts'

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

const HOST_PORT = /^(\[[0-9a-fA-F:.]+\]|[^\s:/[\]]+):\d{1,5}$/

/** A server, as a URL or as host and port. */
export function isServer(address: unknown): boolean {
  const url = toUrl(String(address))
  return isHttpUrl(url) && new URL(url).search === ''
}

/** Its URL, without a slash at the end. */
export function toUrl(address: string): string {
  return (HOST_PORT.test(address) ? `http://${address}` : address).replace(/\/+$/, '')
}
