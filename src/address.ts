import { type BlockList, isIP, SocketAddress } from 'node:net'

/** In place of the address of a client whose address is not known. It is in no network. */
const UNKNOWN = 'unknown'

/** As proxies write addresses: with a port (Azure), IPv6 in brackets. */
const WITH_PORT = /^(?:\[([^\]]+)\]|([^:]+))(?::\d{1,5})?$/
const MAPPED = '::ffff:'

/**
 * The client's address, as Fastify's `trustProxy` has it, in the one form in which addresses are compared.
 *
 * @example
 * addressOf({ ip: '203.0.113.7:51234' }) // '203.0.113.7'
 * addressOf({ ip: '010.0.0.1' }) // 'unknown'
 */
export function addressOf({ ip }: { ip: string | undefined }): string {
  return toAddress(ip ?? '') ?? UNKNOWN
}

/** Returns an address without its port and zone, and an IPv4-mapped one as IPv4; undefined if the text is no address. */
export function toAddress(text: string): string | undefined {
  if (isIP(text) === 4) return text
  const [, inBrackets, beforePort] = WITH_PORT.exec(text) ?? []
  if (beforePort !== undefined) return isIP(beforePort) === 4 ? beforePort : undefined
  const [bare = ''] = (inBrackets ?? text).split('%')
  if (isIP(bare) !== 6) return undefined
  const { address } = new SocketAddress({ address: bare, family: 'ipv6' })
  const mapped = address.startsWith(MAPPED) ? address.slice(MAPPED.length) : ''
  return isIP(mapped) === 4 ? mapped : address
}

/** Whether a list of addresses and networks has this address. */
export function isListed(list: BlockList, address: string): boolean {
  const family = isIP(address)
  return family !== 0 && list.check(address, family === 6 ? 'ipv6' : 'ipv4')
}

/** Fastify's `trustProxy` for a list of proxies, read as strictly as the addresses of clients. */
export function trusting(proxies: BlockList): (address: string | undefined) => boolean {
  return address => isListed(proxies, addressOf({ ip: address }))
}

/**
 * The addresses that one client has: a single one of IPv4, a network of 64 bits of IPv6.
 *
 * @example
 * networkOf('2001:db8::1') // '2001:db8:0:0'
 */
export function networkOf(address: string): string {
  if (!address.includes(':')) return address
  const [head, tail] = address.split('::') as [string, string | undefined]
  const first = head === '' ? [] : head.split(':')
  const last = tail === undefined || tail === '' ? [] : tail.split(':')
  const zeros = new Array(Math.max(0, 8 - first.length - last.length)).fill('0')
  return [...first, ...zeros, ...last].slice(0, 4).join(':')
}
