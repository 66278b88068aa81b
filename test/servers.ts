import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import type { TestContext } from 'node:test'

/**
 * Real servers for the tests: where PG_URL, MYSQL_URL and REDIS_URL say, else at their default ports.
 * What isn't there is skipped by name; with CI=true it fails.
 */

export interface TestServer {
  url: string
  host: string
  port: number
  /** Why its tests are skipped. */
  skip: string | false
}

async function find(name: string, variable: string, standard: string): Promise<TestServer> {
  const url = process.env[variable] ?? standard
  const { hostname, port } = new URL(url)
  const server = { url, host: hostname, port: Number(port) }
  const isThere = process.env[variable] !== undefined || (await answers(hostname, server.port))
  const skip = !isThere && `${name} is not at ${hostname}:${port} (${variable})`
  if (skip && process.env.CI === 'true') throw new Error(skip)
  return { ...server, skip }
}

async function answers(host: string, port: number): Promise<boolean> {
  const socket = connect(port, host)
  const [isThere] = await Promise.race([
    once(socket, 'connect').then(() => [true]),
    once(socket, 'close').then(() => [false])
  ]).catch(() => [false])
  socket.destroy()
  return isThere!
}

export const [POSTGRES, MYSQL, REDIS] = await Promise.all([
  find('PostgreSQL', 'PG_URL', 'postgres://postgres@127.0.0.1:5432/test'),
  find('MariaDB', 'MYSQL_URL', 'mysql://root@127.0.0.1:3306/test'),
  find('Redis', 'REDIS_URL', 'redis://127.0.0.1:6379')
])

/** A table or a stream that no other run of the tests has. */
export function uniqueName(what: string): string {
  return `llmproxy_test_${what}_${process.pid}_${Math.random().toString(36).slice(2, 8)}`
}

export interface Door {
  port: number
  /**
   * `open`: as if it were not there; `shut`: connections are cut; `silent`: nothing comes through;
   * `unheard`: answers do not.
   */
  set(state: 'open' | 'shut' | 'silent' | 'unheard'): void
}

/** A way to a server that can be shut. */
export async function door(t: TestContext, { host, port }: TestServer): Promise<Door> {
  let state = 'open'
  const sockets = new Set<Socket>()
  const server = createServer(client => {
    client.on('error', () => {})
    if (state === 'shut') return void client.destroy()
    const behind = connect(port, host)
    behind.on('error', () => {})
    for (const [from, to] of [
      [client, behind],
      [behind, client]
    ] as const) {
      sockets.add(from)
      from.on('data', data => {
        if (state === 'open' || (state === 'unheard' && to === behind)) to.write(data)
      })
      from.on('close', () => {
        sockets.delete(from)
        to.destroy()
      })
    }
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const cut = () => {
    for (const socket of sockets) socket.destroy()
  }
  t.after(() => {
    server.close()
    cut()
  })
  return {
    port: (server.address() as AddressInfo).port,
    set(next) {
      state = next
      if (next === 'shut') cut()
    }
  }
}
