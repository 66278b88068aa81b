import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import type { ServerResponse } from 'node:http'
import { createServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import type { TestContext } from 'node:test'

/**
 * The part of Kubernetes' API that serves EndpointSlices: list and watch with resource versions, bookmarks,
 * versions that are too old, tokens, TLS of an authority of its own. It is no cluster.
 */

export interface Slice {
  metadata: { name: string; labels: Record<string, string>; resourceVersion?: string }
  addressType: 'IPv4' | 'IPv6'
  endpoints: {
    addresses: string[]
    conditions?: { ready?: boolean }
    targetRef?: { kind: 'Pod'; name: string; uid: string }
  }[]
  ports: { name: string; port: number }[] | null
}

interface Change {
  version: number
  type: 'ADDED' | 'MODIFIED' | 'DELETED'
  object: Slice
}

interface Watcher {
  response: ServerResponse
  selector: string
}

export interface FakeKubernetes {
  url: string
  ca_file: string
  /** The token that is good; others are refused, also of questions to come on connections that are open. */
  token: string
  lists: number
  watches: URLSearchParams[]
  apply(slice: Slice): void
  remove(name: string): void
  /** What happened up to now is forgotten: who asks for it gets 410. */
  compact(): void
  bookmark(): void
  /** Ends the watches as the API does when their time is over, with an event before or cut off. */
  end(how?: 'gone' | 'cut'): void
  /** Resolves when watch number `count` is open. */
  watching(count: number): Promise<void>
}

export async function fakeKubernetes(t: TestContext, namespace: string): Promise<FakeKubernetes> {
  const file = (name: string) => new URL(`tls/${name}`, import.meta.url).pathname
  const slices = new Map<string, Slice>()
  let changes: Change[] = []
  let version = 100
  let oldest = version
  const watchers = new Set<Watcher>()
  const hearers: [number, () => void][] = []

  const server = createServer(
    { cert: readFileSync(file('first.crt')), key: readFileSync(file('first.key')) },
    (request, response) => {
      const { pathname, searchParams: query } = new URL(request.url!, 'https://kubernetes')
      if (request.headers.authorization !== `Bearer ${kubernetes.token}`) {
        return refuse(response, 401, 'Unauthorized')
      }
      if (pathname !== `/apis/discovery.k8s.io/v1/namespaces/${namespace}/endpointslices`) {
        return refuse(response, 403, 'endpointslices is forbidden')
      }
      const selector = query.get('labelSelector') ?? ''
      if (query.get('watch') !== 'true') {
        kubernetes.lists++
        const items = [...slices.values()].filter(slice => fits(slice, selector))
        return reply(response, 200, {
          kind: 'EndpointSliceList',
          metadata: { resourceVersion: String(version) },
          items
        })
      }
      const from = Number(query.get('resourceVersion'))
      if (from < oldest) return refuse(response, 410, 'too old resource version')
      response.writeHead(200, { 'content-type': 'application/json' }).flushHeaders()
      const watcher = { response, selector }
      watchers.add(watcher)
      response.once('close', () => watchers.delete(watcher))
      for (const change of changes) if (change.version > from) tell(watcher, change)
      kubernetes.watches.push(query)
      for (const [count, hear] of hearers) if (kubernetes.watches.length >= count) hear()
    }
  )

  const kubernetes: FakeKubernetes = {
    url: '',
    ca_file: file('first.crt'),
    token: 'token-1',
    lists: 0,
    watches: [],
    apply(slice) {
      const type = slices.has(slice.metadata.name) ? 'MODIFIED' : 'ADDED'
      slices.set(slice.metadata.name, slice)
      change(type, slice)
    },
    remove(name) {
      const slice = slices.get(name)!
      slices.delete(name)
      change('DELETED', slice)
    },
    compact() {
      changes = []
      oldest = version
    },
    bookmark() {
      version++
      const object = { kind: 'EndpointSlice', metadata: { resourceVersion: String(version) } }
      for (const { response } of watchers) line(response, { type: 'BOOKMARK', object })
    },
    end(how) {
      const ended = [...watchers]
      watchers.clear()
      for (const { response } of ended) {
        if (how === 'cut') response.destroy()
        else if (how === 'gone') {
          const object = { kind: 'Status', code: 410, reason: 'Expired', message: 'too old' }
          response.end(`${JSON.stringify({ type: 'ERROR', object })}\n`)
        } else response.end()
      }
    },
    watching: count =>
      new Promise(resolve => {
        if (kubernetes.watches.length >= count) resolve()
        else hearers.push([count, resolve])
      })
  }

  function change(type: Change['type'], slice: Slice): void {
    version++
    slice.metadata.resourceVersion = String(version)
    const made = { version, type, object: structuredClone(slice) }
    changes.push(made)
    for (const watcher of watchers) tell(watcher, made)
  }

  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  kubernetes.url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`
  return kubernetes
}

function tell({ response, selector }: Watcher, { type, object }: Change): void {
  if (fits(object, selector)) line(response, { type, object })
}

/** In two parts, as the network may bring it. */
function line(response: ServerResponse, event: object): void {
  const text = `${JSON.stringify(event)}\n`
  response.write(text.slice(0, 20))
  response.write(text.slice(20))
}

function fits({ metadata }: Slice, selector: string): boolean {
  return selector.split(',').every(each => {
    const [name, value] = each.split('=')
    return metadata.labels[name!] === value
  })
}

function reply(response: ServerResponse, status: number, body: object): void {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body))
}

function refuse(response: ServerResponse, code: number, message: string): void {
  reply(response, code, { kind: 'Status', status: 'Failure', message, code })
}
