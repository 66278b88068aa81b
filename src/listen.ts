import type { Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { FastifyInstance } from 'fastify'

/** Where a server listens: an address and a port as text. */

const PATTERN = '^(\\[[0-9a-fA-F:.]+\\]|[^\\[\\]:/*]*):\\d{1,5}$'

/** What a schema says of such a text. */
export const ADDRESS = {
  pattern: PATTERN,
  check: (address: unknown) => Number(/\d*$/.exec(String(address))![0]) <= 65535,
  expects: 'an address such as :8000 or 127.0.0.1:8000'
}

/** The same, where an empty text has a meaning of its own. */
export const ADDRESS_OR_NONE = { ...ADDRESS, pattern: `^$|${PATTERN}` }

/**
 * Begins to listen; without a host on all addresses, of IPv6 too where the machine has it.
 *
 * @returns the URL
 */
export async function listen(fastify: FastifyInstance, address: string): Promise<string> {
  const colon = address.lastIndexOf(':')
  const host = address.slice(0, colon).replace(/^\[|\]$/g, '')
  const port = Number(address.slice(colon + 1))
  if (host !== '') return fastify.listen({ host, port })
  try {
    await fastify.listen({ host: '::', port })
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code !== 'EAFNOSUPPORT' && code !== 'EADDRNOTAVAIL') throw error
    await fastify.listen({ host: '0.0.0.0', port })
  }
  const scheme = 'setSecureContext' in fastify.server ? 'https' : 'http'
  return `${scheme}://localhost:${(fastify.server.address() as AddressInfo).port}`
}

/**
 * All HTTP servers of an application that listens. For each further address of `localhost` Fastify makes one of its
 * own, which it keeps to itself.
 */
export function serversOf(fastify: FastifyInstance): Server[] {
  const kept = Object.getOwnPropertySymbols(fastify).find(
    ({ description }) => description === 'fastify.serverBindings'
  )
  const more = kept === undefined ? [] : (fastify as unknown as Record<symbol, Server[]>)[kept]!
  return [fastify.server, ...more]
}
