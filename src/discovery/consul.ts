import { type Static, Type } from 'typebox'
import { Duration } from '../options.ts'
import { BackendOptions } from '../pool/policy.ts'
import { hostPort, isServer, Scheme, toUrl } from './address.ts'
import { pause, readJson, TlsFiles, withServer } from './ask.ts'
import type { Entry } from './entry.ts'
import type { Watch } from './source.ts'

export const ConsulOptions = Type.Object(
  {
    addr: Type.String({
      check: isServer,
      expects: 'an address such as http://consul:8500 or consul:8500',
      default: 'http://localhost:8500',
      description: 'Its agent'
    }),
    service: Type.String({
      minLength: 1,
      description: 'Service whose healthy instances are taken'
    }),
    tag: Type.Optional(Type.String({ minLength: 1, description: 'Only instances with this tag' })),
    token: Type.Optional(
      Type.String({
        pattern: '^[\\x21-\\x7e]+$',
        expects: 'text without spaces and line ends',
        secret: true,
        description: 'ACL token'
      })
    ),
    scheme: Scheme,
    interval: Type.Optional(
      Duration(
        undefined,
        'Longest wait for a change, which is heard at once; else discovery.interval'
      )
    ),
    tls: Type.Optional(TlsFiles)
  },
  { additionalProperties: false, description: 'The health API of Consul' }
)
type ConsulOptions = Static<typeof ConsulOptions>

/** What the metadata and the tags of a service may say; they are no place for secrets. */
const MEMBERS = Object.keys(BackendOptions.properties).filter(
  each => !['name', 'url', 'api_key', 'headers'].includes(each)
)
const TIMEOUT = 10_000
const MAX_WAIT = 10 * 60_000
/** Least time (ms) between two questions, however often something changes. */
const GAP = 200

/** Blocking queries: a question is answered when something has changed, or when it has waited long enough. */
export function watchConsul(options: ConsulOptions, interval: number): Watch {
  const { addr, service, tag, token, scheme, tls } = options
  const wait = Math.min(Math.max(interval, 1_000), MAX_WAIT)
  const url = new URL(`${toUrl(addr)}/v1/health/service/${encodeURIComponent(service)}`)
  return (say, signal) =>
    withServer(tls, async server => {
      let index = 0
      while (!signal.aborted) {
        const askedAt = performance.now()
        url.search = new URLSearchParams({
          passing: 'true',
          ...(tag === undefined ? {} : { tag }),
          ...(index === 0 ? {} : { index: String(index), wait: `${wait}ms` })
        }).toString()
        // Consul adds up to a sixteenth to the wait.
        const timeout = TIMEOUT + (index === 0 ? 0 : wait * (17 / 16))
        const headers = token === undefined ? {} : { 'x-consul-token': token }
        const { body, headers: said } = await server.ask(url.href, { headers, timeout, signal })
        const instances = await readJson(body)
        if (!Array.isArray(instances)) throw new Error('the answer is no list')
        if (instances.length === 0 && said['x-consul-results-filtered-by-acls'] === 'true') {
          throw new Error('the token may not see the instances')
        }
        say(instances.map(each => toEntry(each, scheme)))
        const next = Number(said['x-consul-index'])
        // Backwards: its state was restored, and waiting for the old index could take for ever.
        index = next >= index ? next : 0
        const gap = next > 0 ? GAP : wait
        await pause(askedAt + gap - performance.now(), signal)
      }
    })
}

interface Instance {
  Node?: { Address?: string }
  Service?: {
    ID?: string
    Service?: string
    Address?: string
    Port?: number
    Tags?: string[] | null
    Meta?: Record<string, string> | null
    Weights?: { Passing?: number }
  }
}

function toEntry({ Node, Service }: Instance, scheme: string): Entry {
  const { ID, Service: service, Address, Port, Tags, Meta, Weights } = Service ?? {}
  const tags = (Tags ?? []).map(each => each.split(/=(.*)/s, 2))
  const said = { weight: Weights?.Passing, ...Object.fromEntries(tags), ...Meta }
  const members = Object.entries(said).filter(([name]) => MEMBERS.includes(name))
  const url = `${scheme}://${hostPort(Address || Node?.Address || '', Port ?? 0)}`
  // Where no id is given it is the name of the service, on each node the same.
  return { ...Object.fromEntries(members), name: ID === service ? undefined : ID, url }
}
