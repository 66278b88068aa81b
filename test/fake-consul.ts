import { once } from 'node:events'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { TestContext } from 'node:test'

/** Consul's health API with blocking queries, as its documentation has it. It is no Consul. */

export interface Instance {
  id: string
  address?: string
  node?: string
  port: number
  tags?: string[]
  meta?: Record<string, string>
}

export interface FakeConsul {
  url: string
  /** The queries so far, in order. */
  queries: URLSearchParams[]
  /** The state of one service changes: the index goes up, or to what is given. */
  set(instances: Instance[], index?: number): void
  /** The token may see nothing from now on. */
  hide(): void
  /** Answers errors from now on, or not any more. */
  fail(status: number | undefined): void
  /** Resolves when a query waits for a change. */
  waiting(): Promise<void>
}

export async function fakeConsul(
  t: TestContext,
  service: string,
  token: string
): Promise<FakeConsul> {
  let instances: Instance[] = []
  let index = 10
  let failure: number | undefined
  let isHidden = false
  const held = new Set<() => void>()
  const hearers = new Set<() => void>()
  const queries: URLSearchParams[] = []
  const server = createServer((request, response) => {
    const { pathname, searchParams: query } = new URL(request.url!, 'http://consul')
    if (pathname !== `/v1/health/service/${service}`) return void response.writeHead(404).end()
    queries.push(query)
    if (failure !== undefined) return void response.writeHead(failure).end('rpc error')
    if (request.headers['x-consul-token'] !== token) {
      return void response.writeHead(403).end('Permission denied')
    }
    const asked = Number(query.get('index') ?? 0)
    // Consul blocks only while its index is not higher than the one that is known.
    if (asked === 0 || asked < index) return answer(response, query)
    const wait = /^(\d+)ms$/.exec(query.get('wait') ?? '300000ms')
    const end = () => {
      held.delete(end)
      clearTimeout(timer)
      answer(response, query)
    }
    const timer = setTimeout(end, Number(wait![1]))
    held.add(end)
    response.once('close', () => {
      held.delete(end)
      clearTimeout(timer)
    })
    for (const hear of hearers) hear()
    hearers.clear()
  })

  function answer(response: ServerResponse, query: URLSearchParams): void {
    if (response.destroyed) return
    const tag = query.get('tag')
    const found = instances.filter(({ tags }) => tag === null || tags?.includes(tag))
    response.writeHead(200, {
      'content-type': 'application/json',
      'x-consul-index': index,
      ...(isHidden ? { 'x-consul-results-filtered-by-acls': 'true' } : {})
    })
    response.end(JSON.stringify(isHidden ? [] : found.map(toJson)))
  }

  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    queries,
    set(changed, next = index + 1) {
      instances = changed
      index = next
      for (const end of [...held]) end()
    },
    hide() {
      isHidden = true
      index++
      for (const end of [...held]) end()
    },
    fail(status) {
      failure = status
      if (status !== undefined) server.closeAllConnections()
    },
    waiting: () =>
      new Promise(resolve => {
        if (held.size > 0) resolve()
        else hearers.add(resolve)
      })
  }
}

function toJson({ id, address = '', node = '127.0.0.1', port, tags = [], meta = {} }: Instance) {
  return {
    Node: { Node: 'node-1', Address: node },
    Service: {
      ID: id,
      Service: 'llm',
      Tags: tags,
      Address: address,
      Meta: meta,
      Port: port,
      Weights: { Passing: 1, Warning: 1 }
    },
    Checks: [{ Status: 'passing' }]
  }
}
