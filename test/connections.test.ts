import assert from 'node:assert/strict'
import { EventEmitter, once } from 'node:events'
import { rmSync, writeFileSync } from 'node:fs'
import type { Server } from 'node:http'
import { Agent, get } from 'node:https'
import { connect, type Socket } from 'node:net'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { pino } from 'pino'
import { Connections } from '../src/connections.ts'
import { isAmongLast, servableConnections } from '../src/descriptors.ts'
import { giveMemoryBack } from '../src/memory.ts'
import { isLocal } from '../src/pool/failures.ts'
import {
  answerChat,
  CHAT,
  closedPort,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  type TestGateway
} from './helper.ts'
import { CLI, folder, type Process, start, workersOf, writeConfig } from './process.ts'

/** More connections than there are file descriptors, and none left at all. */

const LIMIT = 256
const KEY = { 'x-api-key': 'a' }

/**
 * Takes all file descriptors of a process while a file of its role is there. It looks for it without one: a
 * `stat` takes none.
 */
const HOG = `
  const { closeSync, existsSync, openSync, writeSync } = require('node:fs')
  const cluster = require('node:cluster')
  if (require('node:worker_threads').isMainThread) {
    const role = cluster.isWorker ? 'worker' : 'primary'
    const taken = []
    let isTold = false
    let quiet = 0
    setInterval(() => {
      const isWanted = existsSync(process.env.HOG + '.' + role)
      const before = taken.length
      try {
        if (isWanted) for (;;) taken.push(openSync('/dev/null'))
      } catch {}
      // What is in use for a probe or a request becomes free a moment later.
      quiet = taken.length === before ? quiet + 1 : 0
      const isDone = isWanted ? quiet >= 20 : true
      if (!isWanted) for (const fd of taken.splice(0)) closeSync(fd)
      if (isWanted === isTold || !isDone) return
      isTold = isWanted
      writeSync(1, JSON.stringify({ msg: (isWanted ? 'hogged ' : 'released ') + role }) + '\\n')
    }, 5).unref()
  }
`

interface Limited extends Process {
  hog(role: 'primary' | 'worker', processes?: number): Promise<void>
  release(role: 'primary' | 'worker', processes?: number): Promise<void>
}

/** A gateway that may have 256 file descriptors, and has forwarded some calls. */
async function startLimited(t: TestContext, workers = 1, admin = {}): Promise<Limited> {
  const backends = [await fakeBackend(t, aloneAnswer), await fakeBackend(t, aloneAnswer)]
  const dir = folder(t)
  const hog = join(dir, 'hog.cjs')
  writeFileSync(hog, HOG)
  const file = writeConfig(join(dir, 'config.yaml'), {
    server: { listen: '127.0.0.1:0', workers },
    admin,
    auth: { enabled: true, keys: ['a'], skip_paths: ['/health', '/metrics'] },
    backends: backends.map(({ url }) => ({ url })),
    health_check: { enabled: true, interval: '50ms' },
    routing: { retry: { enabled: false }, model_discovery: { enabled: false } }
  })
  const script = `ulimit -n ${LIMIT}; exec "$0" "$@"`
  const gateway = await start(
    t,
    ['-c', script, process.execPath, '--require', hog, CLI, '--config', file],
    { LLMPROXY_DATA_DIR: dir, HOG: hog },
    'sh'
  )
  for (let call = 0; call < 12; call++) assert.equal(await status(gateway), 200)
  return Object.assign(gateway, {
    async hog(role: string, processes = 1) {
      writeFileSync(`${hog}.${role}`, '')
      await gateway.logged(`hogged ${role}`, processes)
    },
    async release(role: string, processes = 1) {
      rmSync(`${hog}.${role}`)
      await gateway.logged(`released ${role}`, processes)
    }
  })
}

/** The status of a call over a connection of its own. */
async function status({ url }: Process): Promise<number> {
  const headers = { connection: 'close', ...KEY }
  const signal = AbortSignal.timeout(10_000)
  const response = await post(`${url}/v1/chat/completions`, CHAT, headers, signal)
  await response.text()
  return response.status
}

async function metricsOf({ url }: Process): Promise<string> {
  return (await fetch(`${url}/metrics`, { headers: { connection: 'close' } })).text()
}

/** The status of /health, as soon as the gateway has seen that connections are closed. */
async function health({ url }: Process): Promise<number> {
  for (;;) {
    const answer = await fetch(`${url}/health`).catch(() => undefined)
    if (answer !== undefined) return answer.status
    await sleep(10)
  }
}

/** Opens connections that send nothing. */
async function openMany(t: TestContext, port: number, count: number, localAddress = '127.0.0.1') {
  const sockets = Array.from({ length: count }, () =>
    connect({ port, host: '127.0.0.1', localAddress }).on('error', () => {})
  )
  t.after(() => sockets.forEach(each => void each.destroy()))
  await Promise.all(sockets.map(each => Promise.race([once(each, 'connect'), once(each, 'close')])))
  return sockets
}

/** Resolves when this many of the connections are closed. */
function closed(sockets: Socket[], count: number): Promise<void> {
  return new Promise(resolve => {
    const look = () => {
      if (sockets.filter(each => each.closed).length >= count) resolve()
    }
    for (const each of sockets) each.once('close', look)
    look()
  })
}

/** Whatever it waits for, unless the gateway ends before. */
function from<T>({ exit }: Process, event: Promise<T>): Promise<T> {
  return Promise.race([event, exit.then(code => assert.fail(`the gateway exited with ${code}`))])
}

/** Closes each connection, so that the next call needs another descriptor. */
const aloneAnswer: typeof answerChat = (request, response, raw) => {
  response.setHeader('connection', 'close')
  return answerChat(request, response, raw)
}

/** Keyless strangers open many more connections than there are descriptors. */
async function flood(t: TestContext, gateway: Limited, processes: number): Promise<void> {
  const count = (LIMIT + 50) * processes
  const sockets = await openMany(t, gateway.port, count)
  await closed(sockets, count - 96 * processes)
  const line = await from(gateway, gateway.logged('connections closed: server.max_connections'))
  assert.equal(line.latest, '127.0.0.1')
  for (const each of sockets) each.destroy()
  await closed(sockets, count)
  assert.equal(await from(gateway, health(gateway)), 200)
  for (let call = 0; call < 6; call++) assert.equal(await status(gateway), 200)
  const metrics = await metricsOf(gateway)
  let refused = 0
  for (const [, one] of metrics.matchAll(/refused_total\{[^}]*\} (\d+)/g)) refused += Number(one)
  assert.ok(refused >= count - 96 * processes, metrics)
  assert.match(metrics, /^process_open_fds [1-9]\d*$/m)
  assert.match(metrics, new RegExp(`^process_max_fds ${LIMIT * processes}$`, 'm'))
  assert.doesNotMatch(metrics, /ejections_total\{/)
  assert.equal(gateway.child.exitCode, null)
  assert.ok(!gateway.lines.some(({ msg }) => msg === 'a worker has stopped'))
}

test('one process', async t => {
  const gateway = await startLimited(t)

  await t.test('it lives on with more connections than descriptors, and serves', () =>
    flood(t, gateway, 1)
  )

  await t.test('without a free descriptor a call gets 503, and no backend is blamed', async () => {
    // It must have been accepted before there are no descriptors.
    const client = await rawClient(t, gateway.port, 'GET /health HTTP/1.1\r\nhost: g\r\n\r\n')
    await client.until(/\}\}$/)
    await gateway.hog('primary')
    for (let call = 1; call <= 12; call++) {
      client.received = ''
      client.socket.write(rawPost('/v1/chat/completions', JSON.stringify(CHAT), ['x-api-key: a']))
      const answer = await client.until(/\}\}/)
      assert.match(answer, /^HTTP\/1.1 503 [\s\S]*retry-after: 1\r\n[\s\S]*"code":"overloaded"/)
    }
    // The system completes a connection that the gateway cannot accept.
    const [late] = await openMany(t, gateway.port, 1)
    await closed([late!], 1)
    await gateway.release('primary')
    assert.equal(await status(gateway), 200)
    const metrics = await metricsOf(gateway)
    assert.doesNotMatch(metrics, /ejections_total\{|circuit_state\{[^}]*\} [12]/)
    assert.doesNotMatch(metrics, /backend_up\{[^}]*\} 0/)
    assert.match(metrics, /llmproxy_attempts_total\{[^}]*result="local_failure"\} [1-9]/)
    assert.match(metrics, /llmproxy_exchanges_total\{outcome="rejected"\} 12\n/)
    assert.ok(!gateway.lines.some(({ msg }) => msg === 'backend is unhealthy'))
  })
})

test('two workers', async t => {
  const gateway = await startLimited(t, 2)

  await t.test('they live on with more connections than descriptors, and serve', () =>
    flood(t, gateway, 2)
  )

  await t.test('without a free descriptor they lose connections, and say so', async () => {
    await gateway.hog('worker', 2)
    const sockets = await openMany(t, gateway.port, 6)
    await from(gateway, closed(sockets, 6))
    assert.equal((await gateway.logged('connections could not be accepted')).latest, 'EMFILE')
    await gateway.release('worker', 2)
    for (let call = 0; call < 4; call++) assert.equal(await status(gateway), 200)
    assert.match(await metricsOf(gateway), /refused_total\{reason="accept"\} 6/)
  })

  await t.test('a primary without a free descriptor replaces one as soon as it can', async () => {
    await gateway.hog('primary')
    process.kill(workersOf(gateway.child.pid!)[0]!, 'SIGKILL')
    const failed = await from(gateway, gateway.logged('a worker has stopped', 2))
    assert.equal(failed.reason, 'EMFILE')
    await gateway.release('primary')
    await gateway.logged('a worker has been replaced')
    for (let call = 0; call < 4; call++) assert.equal(await status(gateway), 200)
  })
})

for (const workers of [1, 2]) {
  test(`connections to admin.listen leave the port of clients open: ${workers} processes`, async t => {
    const port = await closedPort()
    const listen = `127.0.0.1:${port}`
    const gateway = await startLimited(t, workers, { enabled: true, token: 'secret', listen })
    const count = 300 * workers
    const sockets = await openMany(t, port, count)
    await closed(sockets, count - 12 * workers)
    const line = await from(
      gateway,
      gateway.logged('connections closed: the share of admin.listen')
    )
    assert.equal(line.latest, '127.0.0.1')
    assert.equal(await health(gateway), 200)
    for (let call = 0; call < 6; call++) assert.equal(await status(gateway), 200)
    const metrics = await metricsOf(gateway)
    assert.match(metrics, /refused_total\{reason="admin_connections"\} [1-9]/)
    for (const each of sockets) each.destroy()
    await closed(sockets, count)
    // And connections of clients leave the admin API reachable.
    const clients = await openMany(t, gateway.port, count)
    await closed(clients, count - 84 * workers)
    const headers = { 'x-admin-token': 'secret', connection: 'close' }
    for (;;) {
      const answer = await fetch(`http://${listen}/admin/config`, { headers }).catch(
        () => undefined
      )
      if (answer === undefined) continue
      assert.equal(answer.status, 200)
      break
    }
  })
}

/** Resolves when the gateway has seen a connection close. */
function freed({ fastify }: TestGateway): Promise<void> {
  const { open } = fastify.connections!
  return new Promise(resolve => {
    const look = () => (fastify.connections!.open < open ? resolve() : setTimeout(look, 1))
    look()
  })
}

const REACHED = 'connections closed: server.max_connections is reached'
const config = (server: object) => ({ backends: [{ url: 'http://127.0.0.1:1' }], server })

test('server.max_connections bounds them, also while it runs; one that is closed makes room', async t => {
  const gateway = await startGateway(
    t,
    config({ max_connections: 3, max_connections_per_address: 0 })
  )
  const sockets = await openMany(t, gateway.port, 5)
  await closed(sockets, 2)
  const { connections, open } = await gateway.logged({ msg: REACHED })
  assert.deepEqual([connections, open], [1, 3])
  sockets.find(each => !each.closed)!.destroy()
  await freed(gateway)
  const metrics = await gateway.metrics()
  assert.match(metrics, /^llmproxy_connections_open 3$/m)
  assert.match(metrics, /^llmproxy_connections_refused_total\{reason="max_connections"\} 2$/m)
})

test('one address has server.max_connections_per_address; a trusted proxy, and 0, has no such bound', async t => {
  const server = { max_connections_per_address: 2, trust_proxy: ['127.0.0.3'] }
  const gateway = await startGateway(t, config(server))
  const sockets = await openMany(t, gateway.port, 5, '127.0.0.2')
  await closed(sockets, 3)
  const others = await openMany(t, gateway.port, 5, '127.0.0.3')
  assert.equal(await gateway.metric('llmproxy_connections_open'), 8)
  const refused = gateway.lines.find(({ msg }) => String(msg).includes('per_address is reached'))
  assert.equal(refused?.latest, '127.0.0.2')
  for (const each of others) each.destroy()

  const free = await startGateway(t, config({ max_connections_per_address: 0 }))
  await openMany(t, free.port, 5)
  assert.equal(await free.metric('llmproxy_connections_open'), 6)
})

test('a closed TLS connection is counted off, and one beyond the bound closed before a handshake', async t => {
  const path = (name: string) => new URL(`./tls/${name}`, import.meta.url).pathname
  const tls = { enabled: true, cert_file: path('first.crt'), key_file: path('first.key') }
  const gateway = await startGateway(
    t,
    config({ max_connections: 2, max_connections_per_address: 0, tls })
  )
  const sockets = await openMany(t, gateway.port, 1)
  const agent = new Agent({ keepAlive: true })
  t.after(() => agent.destroy())
  const health = () =>
    new Promise<number | string>(resolve => {
      const options = { agent, rejectUnauthorized: false }
      get(`${gateway.url}/health`, options, answer =>
        answer.resume().on('end', () => resolve(answer.statusCode!))
      ).on('error', ({ code }: NodeJS.ErrnoException) => resolve(code!))
    })
  assert.equal(await health(), 200)
  assert.equal(gateway.fastify.connections!.open, 2)
  const [late] = await openMany(t, gateway.port, 1)
  await closed([late!], 1)
  agent.destroy()
  await freed(gateway)
  assert.equal(await health(), 200)
  assert.ok(!sockets[0]!.closed, 'it has not said anything')
  assert.ok(!gateway.lines.some(({ error }) => error !== undefined))
})

/** Connections of addresses that this machine does not have; each is accepted, or not. */
function simulated(max_connections_per_address: number, max_connections = 100) {
  const connections = new Connections(pino({ level: 'silent' }), 1)
  connections.update({ max_connections, max_connections_per_address, trust_proxy: false })
  const server = new EventEmitter()
  connections.watch(server as Server)
  const connect = (remoteAddress: string, to = server) => {
    const { open } = connections
    to.emit('connection', Object.assign(new EventEmitter(), { remoteAddress, destroy() {} }))
    return connections.open > open
  }
  return { connections, connect }
}

test('an eighth of all connections, and 64 at most, are those of admin.listen', () => {
  for (const [max, ofAdmin, ofClients] of [
    [96, 12, 84],
    [2_000, 64, 1_936],
    [1, 1, 1]
  ] as const) {
    const { connections, connect } = simulated(0, max)
    const server = new EventEmitter()
    connections.watch(server as Server, true)
    const admins = Array.from({ length: 200 }, (_, at) => connect(`10.0.0.${at}`, server))
    assert.equal(admins.filter(Boolean).length, ofAdmin)
    const clients = Array.from({ length: 2_000 }, () => connect('10.0.0.1'))
    assert.equal(clients.filter(Boolean).length, ofClients)
  }
})

test('addresses of one /64 network count together, IPv4 addresses each for itself', () => {
  const { connections, connect } = simulated(2)
  const addresses = [
    '2001:db8:0:1::1',
    '2001:db8:0:1:2:3:4:5',
    '2001:db8:0:1::2',
    '2001:db8:0:2::1'
  ]
  assert.deepEqual(
    addresses.map(each => connect(each)),
    [true, true, false, true]
  )
  assert.deepEqual(
    ['::1', '::', '::2', 'fe80::1', 'fe80::2'].map(each => connect(each)),
    [true, true, false, true, true]
  )
  const mapped = ['::ffff:10.0.0.1', '10.0.0.1', '::ffff:10.0.0.1', '::ffff:10.0.0.2']
  assert.deepEqual(
    mapped.map(each => connect(each)),
    [true, true, false, true]
  )
  assert.equal(connections.refused.get('max_connections_per_address'), 3)
})

/** What follows from a limit of file descriptors. */
test('clients get half of the descriptors, and none of the last', () => {
  assert.deepEqual([256, 1024, 20_000].map(servableConnections), [96, 480, 9_968])
  assert.deepEqual([10, Number.POSITIVE_INFINITY].map(servableConnections), [
    1,
    Number.POSITIVE_INFINITY
  ])
  const last = (limit: number) => [...Array(limit).keys()].find(each => isAmongLast(each, limit))
  assert.deepEqual([last(256), last(64)], [224, 48])
  assert.ok(!isAmongLast(1_000_000, Number.POSITIVE_INFINITY))
})

test('memory is given back also while its size cannot be read', t => {
  t.mock.timers.enable({ apis: ['setInterval'] })
  const rss = t.mock.method(process.memoryUsage, 'rss', () => {
    throw Object.assign(new Error('too many open files'), { code: 'EMFILE' })
  })
  const timer = giveMemoryBack({ open: [], forwarded: 20, bodies: { total: 0 } } as never)
  t.mock.timers.tick(3_000)
  clearInterval(timer)
  assert.ok(rss.mock.callCount() > 1)
})

test('freed memory is given back at work, but not beside large request bodies', t => {
  t.mock.timers.enable({ apis: ['setInterval'] })
  let now = 0
  t.mock.method(performance, 'now', () => now)
  const exchanges = { open: [{}], forwarded: 20, bodies: { total: 0 } }
  let trims = 0
  const timer = giveMemoryBack(exchanges as never, () => trims++)
  const seconds = (count: number, bytes: number, forwarded: number) => {
    const before = trims
    for (let second = 0; second < count; second++) {
      now += 1_000
      exchanges.bodies.total += bytes
      exchanges.forwarded += forwarded
      t.mock.timers.tick(1_000)
    }
    return trims - before
  }
  assert.equal(seconds(10, 100_000, 1), 10)
  assert.equal(seconds(10, 5_000_000, 1), 0)
  // The exchange stays open: a stream that never ends does not keep the memory of large bodies for good.
  assert.equal(seconds(10, 100_000, 1), 9)
  assert.equal(seconds(1, 100_000_000, 1), 0)
  exchanges.open = []
  assert.equal(seconds(4, 0, 0), 0)
  assert.equal(seconds(4, 0, 0), 1)
  clearInterval(timer)
})

test('the gateway has failed to connect where every address has', () => {
  const error = (code: string) => Object.assign(new Error(code), { code })
  const codes = ['EMFILE', 'ENFILE', 'EADDRNOTAVAIL', 'ENOBUFS', 'ENOMEM', 'EAGAIN']
  assert.ok(codes.every(code => isLocal(error(code))))
  assert.ok(!['ECONNREFUSED', 'ENOTFOUND', 'ECONNRESET'].some(code => isLocal(error(code))))
  const several = (...codes: string[]) =>
    Object.assign(new AggregateError(codes.map(error)), { code: codes[0] })
  assert.ok(isLocal(several('EMFILE', 'EADDRNOTAVAIL')))
  assert.ok(!isLocal(several('EADDRNOTAVAIL', 'ECONNREFUSED')))
})
