import { Resolver } from 'node:dns/promises'
import { isIP } from 'node:net'
import { type Static, Type } from 'typebox'
import { Duration } from '../options.ts'
import { MAX_PRIORITY } from '../pool/policy.ts'
import { hostPort, Scheme } from './address.ts'
import { pause } from './ask.ts'
import type { Entry } from './entry.ts'
import type { Watch } from './source.ts'

const SERVER = /^(\[[0-9a-fA-F:.]+\]|[^\s:[\]]+)(:\d{1,5})?$/

export const DnsOptions = Type.Object(
  {
    host: Type.String({
      minLength: 1,
      description: 'Full name, such as vllm.internal or _http._tcp.vllm.internal'
    }),
    record: Type.Enum(['A', 'AAAA', 'SRV'], {
      default: 'A',
      description: 'What is asked for; SRV brings ports and weights'
    }),
    port: Type.Optional(
      Type.Integer({ minimum: 1, maximum: 65535, description: 'Port, for A and AAAA' })
    ),
    scheme: Scheme,
    servers: Type.Array(
      Type.String({
        check: (server: unknown) => {
          const host = SERVER.exec(String(server))?.[1] ?? String(server)
          return isIP(host.replace(/^\[|\]$/g, '')) !== 0
        },
        expects: 'an address such as 10.0.0.53 or 10.0.0.53:8600',
        description: 'Server'
      }),
      { default: [], description: 'DNS servers that are asked; else those of the system' }
    ),
    interval: Type.Optional(
      Duration(undefined, 'Longest time between two questions; else discovery.interval')
    ),
    timeout: Duration('5s', 'How long an answer may take, before the question is asked once more')
  },
  {
    additionalProperties: false,
    check: hasPort,
    expects: 'a mapping with host, and with port unless record is SRV',
    description: 'DNS, asked again when an answer has expired'
  }
)
type DnsOptions = Static<typeof DnsOptions>

function hasPort(options: unknown): boolean {
  const { port, record } = (options ?? {}) as Partial<DnsOptions>
  return port !== undefined || record === 'SRV'
}

/** An answer is asked for no sooner than this (ms) after the one before, whatever its time to live. */
const LEAST_WAIT = 1_000
/** How long (s) it holds that there is nothing; the resolver does not tell. */
const NONE_TTL = 5

/** Asks again when the first of its answers has expired, and after `interval` at the latest. */
export function watchDns(options: DnsOptions, interval: number): Watch {
  return async (say, signal) => {
    const lookup = new Lookup(options, signal)
    while (!signal.aborted) {
      const { entries, ttl } = await lookup.find()
      say(entries)
      await pause(Math.min(interval, Math.max(ttl * 1000, LEAST_WAIT)), signal)
    }
  }
}

interface Address {
  address: string
  /** Seconds. */
  ttl: number
}

class Lookup {
  readonly #options: DnsOptions
  readonly #resolver: Resolver

  constructor(options: DnsOptions, signal: AbortSignal) {
    this.#options = options
    this.#resolver = new Resolver({ timeout: options.timeout, tries: 2 })
    if (options.servers.length > 0) this.#resolver.setServers(options.servers)
    signal.addEventListener('abort', () => this.#resolver.cancel(), { once: true })
  }

  async find(): Promise<{ entries: Entry[]; ttl: number }> {
    const { host, record, port, scheme } = this.#options
    if (record === 'SRV') return this.#findServices()
    const addresses = await this.#addresses(host, record)
    return {
      entries: addresses.map(({ address }) => ({ url: `${scheme}://${hostPort(address, port!)}` })),
      ttl: leastTtl(addresses)
    }
  }

  /** SRV records (RFC 2782): the lowest priority is the first tier; within one, by their weights. */
  async #findServices(): Promise<{ entries: Entry[]; ttl: number }> {
    const { host, scheme } = this.#options
    const records = await orNone(this.#resolver.resolveSrv(host))
    const ranks = [...new Set(records.map(({ priority }) => priority))].sort((a, b) => a - b)
    // A target of "." says that there is no such service.
    const targets = records
      .filter(({ name }) => name !== '' && name !== '.')
      .sort((a, b) => a.name.localeCompare(b.name) || a.port - b.port)
    const found = await Promise.all(
      targets.map(async ({ name, port, weight, priority }) => {
        // A certificate is for the name. Otherwise the servers that know it are asked for its address.
        const addresses =
          scheme === 'https' ? [{ address: name, ttl: Infinity }] : await this.#targets(name)
        const entries = addresses.map(({ address }) => ({
          ...(addresses.length === 1 ? { name: hostPort(name, port) } : {}),
          url: `${scheme}://${hostPort(address, port)}`,
          weight,
          priority: Math.min(ranks.indexOf(priority), MAX_PRIORITY)
        }))
        return { entries, ttl: leastTtl(addresses) }
      })
    )
    return { entries: found.flatMap(({ entries }) => entries), ttl: leastTtl(found) }
  }

  async #targets(name: string): Promise<Address[]> {
    const addresses = await this.#addresses(name, 'A')
    return addresses.length > 0 ? addresses : this.#addresses(name, 'AAAA')
  }

  async #addresses(name: string, record: 'A' | 'AAAA'): Promise<Address[]> {
    const ttl = { ttl: true } as const
    const addresses = await orNone<Address>(
      record === 'A' ? this.#resolver.resolve4(name, ttl) : this.#resolver.resolve6(name, ttl)
    )
    return addresses.sort((a, b) => a.address.localeCompare(b.address))
  }
}

/** That there is no such name, or none with such a record, is an answer, too. */
async function orNone<T>(asked: Promise<T[]>): Promise<T[]> {
  try {
    return await asked
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code === 'ENOTFOUND' || code === 'ENODATA') return []
    throw error
  }
}

function leastTtl(answers: { ttl: number }[]): number {
  return answers.length === 0 ? NONE_TTL : Math.min(...answers.map(({ ttl }) => ttl))
}
