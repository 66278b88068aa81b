import assert from 'node:assert/strict'
import { existsSync, mkdirSync, readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Changes } from '../src/changes.ts'
import { ConfigSchema, loadConfig, parseConfig } from '../src/config.ts'
import { followFile } from '../src/follow.ts'
import { KeyStore } from '../src/keys/key-store.ts'
import { startServer } from '../src/server.ts'
import {
  answerChat,
  CHAT,
  chunk,
  closedPort,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  writable
} from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/** A reload: by whom it can be asked for, that it is all or nothing, and what it does to each section. */

const TOKEN = 'admin-token'
const ADMIN = { admin: { enabled: true, token: TOKEN } }
/** Many gateways in one process, each of which listens for its end. */
process.setMaxListeners(0)

interface Config {
  server?: object
  log?: object
  [section: string]: unknown
}

/** A gateway in this process that follows its file, as `llmproxy serve` does. */
async function serve(t: TestContext, config: Config, sharedDir?: string) {
  let close = async () => {}
  // Before its folder goes.
  t.after(() => close())
  const dataDir = sharedDir ?? folder(t)
  const file = writeConfig(join(dataDir, 'config.yaml'), {
    ...config,
    server: { listen: '127.0.0.1:0', ...config.server },
    log: { output: 'file', ...config.log }
  })
  const loaded = await loadConfig(file)
  const server = await startServer(loaded, dataDir)
  const following = followFile(file, loaded, server)
  let closing: Promise<void> | undefined
  const stop = async () => {
    await following.stop()
    await server.close()
  }
  close = () => {
    closing ??= stop()
    return closing
  }
  const port = Number(new URL(server.url).port)
  return {
    url: server.url,
    port,
    file,
    dataDir,
    following,
    close,
    /** Writes another file; the listener stays as it is unless it is named. */
    async reload(changed: Config): Promise<Changes> {
      writeConfig(file, {
        ...changed,
        server: { listen: '127.0.0.1:0', ...changed.server },
        log: { output: 'file', ...changed.log }
      })
      return JSON.parse(await following.reload())
    }
  }
}

type Running = Awaited<ReturnType<typeof serve>>

async function ask(url: string, path = '/admin/reload', method = 'POST') {
  const response = await fetch(url + path, { method, headers: { 'x-admin-token': TOKEN } })
  return { status: response.status, body: await response.json() }
}

async function statusOf(url: string, headers: Record<string, string> = {}) {
  const response = await post(`${url}/v1/chat/completions`, CHAT, {
    connection: 'close',
    ...headers
  })
  await response.text()
  return response.status
}

const pathsOf = (changes: { path: string }[]) => changes.map(({ path }) => path)

test('POST /admin/reload takes the file over in all workers, or says why not and changes nothing', async t => {
  const backend = await fakeBackend(t, answerChat)
  const dataDir = folder(t)
  const config = (keys: string[], more: Config = {}) => ({
    server: { listen: '127.0.0.1:0', workers: 2, ...more.server },
    backends: [{ name: 'gpu', url: backend.url, weight: more.weight ?? 1 }],
    auth: { enabled: true, keys },
    logging: more.logging ?? {},
    ...ADMIN
  })
  const file = writeConfig(join(dataDir, 'config.yaml'), config(['a']))
  const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dataDir })
  const statuses = async (key: string) => {
    const all = new Set<number>()
    for (let count = 0; count < 4; count++)
      all.add(await statusOf(gateway.url, { 'x-api-key': key }))
    return [...all]
  }
  writeConfig(file, config(['b'], { weight: 3, server: { workers: 3 } }))
  assert.deepEqual(await ask(gateway.url), {
    status: 200,
    body: {
      changed: [
        { path: 'backends[gpu].weight', before: 1, after: 3 },
        { path: 'auth.keys[0].key', before: '***', after: '***' }
      ],
      restart_needed: [{ path: 'server.workers', before: 2, after: 3 }]
    }
  })
  assert.deepEqual([await statuses('a'), await statuses('b')], [[401], [200]])
  const line = await gateway.logged('configuration reloaded')
  assert.deepEqual(
    [line.level, line.changed, line.restart_needed],
    [40, ['backends[gpu].weight', 'auth.keys[0].key'], ['server.workers']]
  )
  const audit = await gateway.logged('admin')
  assert.deepEqual([audit.action, audit.by], ['reload', '127.0.0.1'])
  const { body: shown } = await ask(gateway.url, '/admin/config', 'GET')
  assert.deepEqual([shown.server.workers, shown.backends[0].weight], [2, 3])
  const { pid } = gateway.child
  assert.equal(
    readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ').length,
    2
  )

  const wrong = config(['c'])
  wrong.backends[0]!.weight = -1
  writeConfig(file, wrong)
  const refused = await ask(gateway.url)
  assert.deepEqual([refused.status, refused.body.error.code], [422, 'invalid_config'])
  assert.match(refused.body.error.message, /^config\.yaml:1:\d+ backends\[0\]\.weight: must be a/)
  // The file is right, but what it names cannot be written; keys come before logs.
  mkdirSync(join(dataDir, 'taken'))
  const access = { enabled: true, output: 'file', file: { path: 'taken' } }
  writeConfig(file, config(['c'], { logging: { enabled: true, access } }))
  const unusable = await ask(gateway.url)
  assert.deepEqual([unusable.status, unusable.body.error.code], [422, 'invalid_config'])
  assert.match(unusable.body.error.message, /EISDIR/)
  assert.deepEqual([await statuses('b'), await statuses('c')], [[200], [401]])

  writeConfig(file, config(['b'], { weight: 3 }))
  assert.deepEqual((await ask(gateway.url)).body, { changed: [], restart_needed: [] })
  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
})

test('a gateway in somebody else’s server has nothing to read again', async t => {
  const gateway = await startGateway(t, { backends: [{ url: 'demo://' }], ...ADMIN })
  const { status, body } = await ask(gateway.url)
  assert.deepEqual([status, body.error.code], [409, 'conflict'])
  assert.match(body.error.message, /not started from a file/)
})

test('what needs a restart is named until it is made or taken back; who asks at once is answered at once', async t => {
  const backends = [{ url: 'demo://' }]
  const gateway = await serve(t, { backends })
  const named = async (config: Config) => pathsOf((await gateway.reload(config)).restart_needed)
  const metrics = { path: '/prometheus' }
  assert.deepEqual(await named({ backends, metrics }), ['metrics.path'])
  assert.deepEqual(await named({ backends, metrics, log: { level: 'warn' } }), ['metrics.path'])
  assert.deepEqual(await named({ backends, log: { level: 'warn' } }), [])
  const { reload } = gateway.following
  const first = reload()
  assert.equal(reload(), first)
  await first
  assert.notEqual(reload(), first)
  assert.equal(await reload(), '{"changed":[],"restart_needed":[]}')
})

test('a reload shows the first 200 changes, the number of the others, and the length of long values', async t => {
  const backends = [{ url: 'demo://' }]
  const users = Object.fromEntries(Array.from({ length: 250 }, (_, at) => [`u-${at}`, {}]))
  const trust_proxy = Array.from({ length: 500 }, (_, at) => `10.0.${at >> 8}.${at & 255}`)
  const gateway = await serve(t, { backends })
  const { changed, omitted } = await gateway.reload({ backends, rate_limit: { users } })
  assert.deepEqual([changed.length, omitted], [200, 50])
  const { restart_needed } = await gateway.reload({
    backends,
    rate_limit: { users },
    server: { trust_proxy }
  })
  const { path, before, after } = restart_needed[0]!
  assert.deepEqual([path, before], ['server.trust_proxy', false])
  assert.match(String(after), /^too long to show: \d{4} characters$/)
})

test('the log names no more than fifty members', async t => {
  const gateway = await serve(t, { backends: [{ url: 'demo://' }] })
  const keys = Array.from({ length: 60 }, (_, at) => `key-${at}`)
  const { changed } = await gateway.reload({
    backends: [{ url: 'demo://' }],
    auth: { enabled: false, keys }
  })
  assert.equal(changed.length, 60)
  const line = await lineOf(gateway, /configuration reloaded/)
  assert.deepEqual(JSON.parse(line).changed.slice(49), ['auth.keys[49]', 'and 10 more'])
})

test('the log goes on elsewhere, and stays where it is when that cannot be written', async t => {
  const backends = [{ url: 'demo://' }]
  const gateway = await serve(t, { backends, log: { file: { path: 'one.log' } } })
  const other = (path: string) => ({ backends, log: { file: { path } } })
  mkdirSync(join(gateway.dataDir, 'taken'))
  await assert.rejects(gateway.reload(other('taken')), { code: 'invalid_config' })
  await lineOf(gateway, /reload refused/, 'one.log')
  await gateway.reload(other('two.log'))
  await lineOf(gateway, /configuration reloaded/, 'two.log')
  assert.doesNotMatch(
    readFileSync(join(gateway.dataDir, 'one.log'), 'utf8'),
    /configuration reloaded/
  )
})

async function lineOf({ dataDir }: Running, wanted: RegExp, name = 'llmproxy.log') {
  const file = join(dataDir, name)
  for (;;) {
    const lines = existsSync(file) ? readFileSync(file, 'utf8').split('\n') : []
    const line = lines.find(each => wanted.test(each) && each.endsWith('}'))
    if (line !== undefined) return line
    await sleep(5)
  }
}

/** A member, another value of it, and how its value shows. */
interface Case {
  path: string
  before?: Config
  after: Config
  /** What can be seen from outside, and differs. */
  see(gateway: Running): Promise<unknown>
}

const fixture = (name: string) => new URL(`./tls/${name}`, import.meta.url).pathname

async function listens(port: number): Promise<boolean> {
  const socket = connect(port, '127.0.0.1')
  try {
    return await new Promise(resolve => {
      socket.once('connect', () => resolve(true)).once('error', () => resolve(false))
    })
  } finally {
    socket.destroy()
  }
}

/** How a raw request is answered: the status, or 0 when the connection ends without one. */
async function rawStatus(t: TestContext, port: number, text: string): Promise<number> {
  const client = await rawClient(t, port, text)
  await Promise.race([client.until(/\r\n/).catch(() => {}), client.closed])
  client.socket.destroy()
  return Number(/^HTTP\/1\.1 (\d+)/.exec(client.received)?.[1] ?? 0)
}

test('what is marked needs a restart: a reload changes nothing of it, a start does', async t => {
  const ports = [await closedPort(), await closedPort(), await closedPort()] as const
  const dataDir = folder(t)
  const keys: string[] = []
  for (const name of ['keys.db', 'other.db']) {
    const store = new KeyStore(join(dataDir, name))
    keys.push((await store.create({})).key)
    await store.close()
  }
  const statusesOfKeys = async ({ url }: Running) => {
    const [one, other] = keys
    return [
      await statusOf(url, { 'x-api-key': one! }),
      await statusOf(url, { 'x-api-key': other! })
    ]
  }
  const get = async (url: string) => {
    const response = await fetch(url, { headers: { 'x-admin-token': TOKEN } })
    await response.text()
    return response.status
  }
  const certificate = { cert_file: fixture('first.crt'), key_file: fixture('first.key') }
  const cases: Case[] = [
    {
      path: 'server.listen',
      before: { server: { listen: `127.0.0.1:${ports[0]}` } },
      after: { server: { listen: `127.0.0.1:${ports[1]}` } },
      see: async () => [await listens(ports[0]), await listens(ports[1])]
    },
    {
      path: 'server.max_header_bytes',
      after: { server: { max_header_bytes: '2KB' } },
      see: async ({ port }) =>
        rawStatus(t, port, `GET /health HTTP/1.1\r\nhost: a\r\nx-a: ${'a'.repeat(4096)}\r\n\r\n`)
    },
    {
      path: 'server.max_body_size',
      after: { server: { max_body_size: 10 } },
      see: async ({ url }) => statusOf(url)
    },
    {
      path: 'server.trust_proxy',
      before: { auth: { enabled: true, keys: [{ key: 'a', allowed_ips: ['203.0.113.7'] }] } },
      after: { server: { trust_proxy: true } },
      see: async ({ url }) => statusOf(url, { 'x-api-key': 'a', 'x-forwarded-for': '203.0.113.7' })
    },
    {
      path: 'server.cors',
      after: { server: { cors: { enabled: true, allowed_origins: ['*'] } } },
      see: async ({ url }) =>
        (await fetch(`${url}/health`)).headers.get('access-control-allow-origin')
    },
    {
      path: 'server.tls',
      after: { server: { tls: { enabled: true, ...certificate } } },
      see: async ({ port }) => rawStatus(t, port, 'GET /health HTTP/1.1\r\nhost: a\r\n\r\n')
    },
    {
      path: 'auth.db_path',
      before: { auth: { enabled: true } },
      after: { auth: { enabled: true, db_path: 'other.db' } },
      see: statusesOfKeys
    },
    {
      path: 'metrics',
      after: { metrics: { path: '/prometheus' } },
      see: async ({ url }) => [await get(`${url}/metrics`), await get(`${url}/prometheus`)]
    },
    {
      path: 'admin.enabled',
      after: ADMIN,
      see: async ({ url }) => get(`${url}/admin/config`)
    },
    {
      path: 'admin.listen',
      before: ADMIN,
      after: { admin: { ...ADMIN.admin, listen: `127.0.0.1:${ports[2]}` } },
      see: async ({ url }) => [await get(`${url}/admin/config`), await listens(ports[2])]
    },
    {
      path: 'admin.db_path',
      before: { auth: { enabled: true }, ...ADMIN },
      after: { admin: { ...ADMIN.admin, db_path: 'other.db' } },
      see: statusesOfKeys
    }
  ]
  // Processes are counted in the first test.
  const marked = restartMarks(ConfigSchema as SchemaNode).filter(path => path !== 'server.workers')
  assert.deepEqual(cases.map(({ path }) => path).sort(), marked.sort())
  for (const { path, before, after, see } of cases) {
    const base = { backends: [{ url: 'demo://' }], ...before }
    const gateway = await serve(t, base, dataDir)
    const first = await see(gateway)
    const { changed, restart_needed } = await gateway.reload({ ...base, ...after })
    assert.deepEqual(changed, [], path)
    assert.ok(
      pathsOf(restart_needed).some(each => each.startsWith(path)),
      path
    )
    assert.deepEqual(await see(gateway), first, path)
    await gateway.close()
    const restarted = await serve(t, { ...base, ...after }, dataDir)
    assert.notDeepEqual(await see(restarted), first, path)
    await restarted.close()
  }
})

interface SchemaNode {
  restart?: true
  notBuilt?: true
  properties?: Record<string, SchemaNode>
  items?: SchemaNode
}

/** Where the schema says that a restart is needed; there is no such place in a list. */
function restartMarks({ restart, properties, items }: SchemaNode, path = ''): string[] {
  if (restart) return [path]
  assert.ok(items === undefined || restartMarks(items, `${path}[]`).length === 0)
  return Object.entries(properties ?? {}).flatMap(([name, inner]) =>
    restartMarks(inner, path === '' ? name : `${path}.${name}`)
  )
}

/** The value, or undefined when it is not there within half a second more than a timeout takes to be noticed. */
function soon<T>(value: Promise<T>): Promise<T | undefined> {
  return Promise.race([value, sleep(1_500, undefined, { ref: false })])
}

async function comes(isThere: () => boolean): Promise<boolean> {
  for (let tries = 0; tries < 100; tries++) {
    if (isThere()) return true
    await sleep(10)
  }
  return false
}

test('what is not marked takes effect at a reload, in every section', async t => {
  const named = (name: string) =>
    fakeBackend(t, (request, response, raw) => {
      response.setHeader('x-backend', name)
      answerChat(request, response, raw)
    })
  const [one, two] = [await named('one'), await named('two')]
  const failing = await fakeBackend(t, (_request, response) => response.writeHead(503).end('{}'))
  const flood = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    while (!response.destroyed) if (!response.write(LONG_CHUNK)) await writable(response)
  })
  const hook = await fakeBackend(t, (_request, response) => response.end())
  const stream = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }))
  const database = (path: string) => ({
    databases: [{ name: 'main', driver: 'sqlite', path }]
  })
  const batch = { max_wait: '10ms' }
  const spent = { type: 'database', database: { storage: 'main', table: 'spent', batch } }

  const cases: (Case & { expected: unknown })[] = [
    {
      path: 'server.idle_timeout',
      after: { server: { idle_timeout: '7s' } },
      see: async ({ url }) => (await fetch(`${url}/health`)).headers.get('keep-alive'),
      expected: 'timeout=7'
    },
    {
      path: 'server.header_timeout',
      after: { server: { header_timeout: '100ms' } },
      see: ({ port }) => soon(rawStatus(t, port, 'GET /health HTTP/1.1\r\nho')),
      expected: 408
    },
    {
      path: 'server.read_timeout',
      after: { server: { header_timeout: '100ms', read_timeout: '200ms' } },
      see: ({ port }) => soon(rawStatus(t, port, stream.slice(0, -5))),
      expected: 408
    },
    {
      path: 'server.write_timeout',
      before: { backends: [{ url: flood.url }] },
      after: { server: { write_timeout: '200ms' } },
      async see({ port }) {
        const count = flood.requests.length
        const client = await rawClient(t, port)
        client.socket.removeAllListeners('data').pause()
        client.socket.write(stream)
        const { closed } = await flood.request(count)
        const end = await soon(closed.then(() => 'cut'))
        client.socket.destroy()
        return end
      },
      expected: 'cut'
    },
    {
      path: 'log.level',
      before: { log: { level: 'warn' } },
      after: { log: { level: 'info' } },
      async see({ url, dataDir }) {
        await statusOf(url)
        const file = join(dataDir, 'llmproxy.log')
        return comes(() => /"msg":"exchange"/.test(readFileSync(file, 'utf8')))
      },
      expected: true
    },
    {
      path: 'backends',
      after: { backends: [{ url: two.url }] },
      see: async ({ url }) =>
        (await post(`${url}/v1/chat/completions`, CHAT)).headers.get('x-backend'),
      expected: 'two'
    },
    {
      path: 'discovery.sources',
      before: {
        backends: [],
        discovery: {
          enabled: true,
          sources: [{ type: 'static', static: { backends: [{ url: one.url }] } }]
        }
      },
      after: {
        discovery: {
          enabled: true,
          sources: [{ type: 'static', static: { backends: [{ url: two.url }] } }]
        }
      },
      see: async ({ url }) =>
        (await post(`${url}/v1/chat/completions`, CHAT)).headers.get('x-backend'),
      expected: 'two'
    },
    {
      path: 'routing.retry',
      before: { backends: [{ url: failing.url }] },
      after: { routing: { retry: { enabled: true, max_retries: 1, initial_wait: '1ms' } } },
      async see({ url }) {
        const count = failing.requests.length
        await statusOf(url)
        return failing.requests.length - count
      },
      expected: 2
    },
    {
      path: 'health_check',
      after: { health_check: { enabled: true, path: '/healthy' } },
      see: () => comes(() => one.requests.some(request => request.url === '/healthy')),
      expected: true
    },
    {
      path: 'auth.keys',
      before: { auth: { enabled: true, keys: ['a'] } },
      after: { auth: { enabled: true, keys: ['b'] } },
      see: ({ url }) => statusOf(url, { 'x-api-key': 'b' }),
      expected: 200
    },
    {
      path: 'rate_limit.global',
      after: { rate_limit: { enabled: true, global: { requests_per_minute: 7 } } },
      see: async ({ url }) =>
        (await post(`${url}/v1/chat/completions`, CHAT)).headers.get('x-ratelimit-limit-requests'),
      expected: '7'
    },
    {
      path: 'usage.reporters',
      after: {
        usage: { enabled: true, reporters: [{ type: 'webhook', webhook: { url: hook.url } }] }
      },
      async see({ url }) {
        await statusOf(url)
        return comes(() => hook.requests.length > 0)
      },
      expected: true
    },
    {
      path: 'storage.databases',
      before: {
        storage: database('one.db'),
        usage: { enabled: true, reporters: [spent] }
      },
      after: { storage: database('two.db') },
      async see({ url, dataDir }) {
        await statusOf(url)
        return comes(() => existsSync(join(dataDir, 'two.db')))
      },
      expected: true
    },
    {
      path: 'logging.access',
      after: { logging: { enabled: true, access: { enabled: true, output: 'file' } } },
      async see({ url, dataDir }) {
        await statusOf(url)
        return comes(() => existsSync(join(dataDir, 'access.log')))
      },
      expected: true
    },
    {
      path: 'admin.token',
      before: { admin: { ...ADMIN.admin, token: 'first' } },
      after: ADMIN,
      see: async ({ url }) => (await ask(url, '/admin/config', 'GET')).status,
      expected: 200
    }
  ]
  const { properties } = ConfigSchema as SchemaNode
  const sections = Object.entries(properties!).filter(
    ([, { restart, notBuilt }]) => !restart && !notBuilt
  )
  assert.deepEqual(
    [...new Set(cases.map(({ path }) => path.split('.')[0]))].sort(),
    sections.map(([name]) => name).sort()
  )
  await Promise.all(
    cases.map(async ({ path, before, after, see, expected }) => {
      const base = { backends: [{ url: one.url }], ...before }
      const gateway = await serve(t, base)
      assert.notDeepEqual(await see(gateway), expected, path)
      const { changed, restart_needed } = await gateway.reload({ ...base, ...after })
      assert.deepEqual(restart_needed, [], path)
      assert.ok(
        pathsOf(changed).some(each => each.startsWith(path)),
        path
      )
      assert.deepEqual(await see(gateway), expected, path)
    })
  )
})

const LONG_CHUNK = chunk('x'.repeat(16_000))

test('drain_timeout and drain_delay are those of the latest reload', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
  })
  const config = { backends: [{ url: backend.url }] }
  const gateway = await serve(t, { ...config, server: { drain_delay: '60s' } })
  await gateway.reload({ ...config, server: { drain_timeout: '50ms' } })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/Hi/)
  await gateway.close()
  assert.match(client.received, /"code":"shutting_down"/)
})

test('each further address of localhost has the new timeouts, too', async t => {
  const backends = [{ url: 'demo://' }]
  const server = { listen: `localhost:${await closedPort()}` }
  const gateway = await serve(t, { backends, server })
  await gateway.reload({ backends, server: { ...server, idle_timeout: '7s' } })
  for (const host of ['127.0.0.1', '[::1]']) {
    const url = `http://${host}:${gateway.port}/health`
    const response = await fetch(url).catch(() => undefined)
    // Not every machine has an address of IPv6.
    if (response === undefined && host !== '127.0.0.1') continue
    assert.equal(response!.headers.get('keep-alive'), 'timeout=7', host)
  }
})

test('a shutdown waits for a reload that is under way, and no other begins', async t => {
  const backends = [{ url: 'demo://' }]
  const gateway = await serve(t, { backends })
  const reloading = gateway.reload({ backends, log: { level: 'warn' } })
  // It has begun to read the file.
  await Promise.resolve()
  const closing = gateway.close()
  assert.deepEqual(pathsOf((await reloading).changed), ['log.level'])
  await assert.rejects(gateway.following.reload(), { code: 'shutting_down' })
  await closing
})

test('reporters that a reload takes away do not keep a shutdown from its end', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await fakeBackend(t, () => {})
  const config = (reporters: object[]) => ({
    backends: [{ url: backend.url }],
    usage: { enabled: true, reporters }
  })
  const webhook = { type: 'webhook', webhook: { url: hook.url, concurrency: 1 } }
  const gateway = await startGateway(t, config([webhook]), {}, folder(t))
  // One record is being sent, another one waits for its turn.
  for (let count = 0; count < 2; count++) await statusOf(gateway.url)
  await hook.request()
  const closing = gateway.fastify.close()
  await sleep(100)
  const changed = parseConfig(JSON.stringify(config([])), 'c', {})
  await gateway.control.reload(changed)
  await closing
})
