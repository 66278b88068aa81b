import assert from 'node:assert/strict'
import { readFileSync, renameSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { checkOptions } from '../src/options.ts'
import { type DatabaseOptions, openDatabase, StorageOptions } from '../src/store/storage.ts'
import { NO_ETCD, startEtcd } from './etcd.ts'
import { fakeConsul } from './fake-consul.ts'
import { fakeDns } from './fake-dns.ts'
import { type FakeKubernetes, fakeKubernetes, type Slice } from './fake-kubernetes.ts'
import { find, names, shown, until, WATCHED } from './found.ts'
import { eventually, fakeBackend, startGateway, type TestGateway } from './helper.ts'
import { folder } from './process.ts'
import { MYSQL, POSTGRES, uniqueName } from './servers.ts'

/** Each kind of source, as its server speaks. */

const FAILS = 'discovery source fails; its last answer holds'

function gatewayWith(t: TestContext, source: object, more: object = {}): Promise<TestGateway> {
  return startGateway(t, { ...WATCHED, ...find(source), ...more }, {}, folder(t))
}

async function urls(gateway: TestGateway): Promise<string[]> {
  return (await shown(gateway)).map(({ url }) => url)
}

test('http: a list that has not changed is not sent again', async t => {
  let [version, list] = [1, ['http://127.0.0.2:1']]
  const statuses: number[] = []
  const server = await fakeBackend(t, (request, response) => {
    const etag = `"${version}"`
    const isKnown = request.headers['if-none-match'] === etag
    statuses.push(isKnown ? 304 : 200)
    response
      .writeHead(isKnown ? 304 : 200, { etag })
      .end(isKnown ? undefined : JSON.stringify(list))
  })
  const http = {
    url: `${server.url}/list?x=1`,
    method: 'POST',
    headers: { 'X-Token': 't' },
    interval: '10ms'
  }
  const gateway = await gatewayWith(t, { type: 'http', http })
  const third = await server.request(2)
  assert.deepEqual([third.method, third.url, third.headers['x-token']], ['POST', '/list?x=1', 't'])
  assert.deepEqual(statuses.slice(0, 3), [200, 304, 304])
  list = ['http://127.0.0.2:2']
  version = 2
  await until(gateway, '127.0.0.2:2')
})

test('http: an answer that is too long, or comes too late, is none', async t => {
  const long = await fakeBackend(t, async (_request, response) => {
    const megabyte = Buffer.alloc(1024 * 1024, 32)
    for (let sent = 0; sent < 17 && !response.destroyed; sent++) {
      await new Promise<void>(resolve => response.write(megabyte, () => resolve()))
    }
    response.end('[]')
  })
  const late = await fakeBackend(t, (_request, response) => void response.writeHead(200).write('['))
  for (const [server, timeout, reason] of [
    [long, '30s', /an answer of more than 16777216 bytes/],
    [late, '1s', /timeout|aborted/i]
  ] as const) {
    const gateway = await gatewayWith(t, { type: 'http', http: { url: server.url, timeout } })
    assert.match(String((await gateway.logged({ msg: FAILS })).reason), reason)
  }
})

test('http: over TLS, with an authority and a certificate of its own', async t => {
  const file = (name: string) => new URL(`tls/${name}`, import.meta.url).pathname
  const read = (name: string) => readFileSync(file(name))
  const server = createServer(
    {
      cert: read('first.crt'),
      key: read('first.key'),
      ca: read('authority.crt'),
      requestCert: true
    },
    (_request, response) => void response.end('["http://127.0.0.2:1"]')
  )
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
  t.after(() => server.close())
  const url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`
  const tls = {
    ca_file: file('first.crt'),
    cert_file: file('client.crt'),
    key_file: file('client.key')
  }
  const gateway = await gatewayWith(t, { type: 'http', http: { url, tls } })
  assert.equal(await names(gateway), '127.0.0.2:1')
  for (const missing of [{ ...tls, ca_file: file('second.crt') }, { ca_file: tls.ca_file }]) {
    const other = await gatewayWith(t, { type: 'http', http: { url, tls: missing } })
    await other.logged({ msg: FAILS })
    assert.equal(await names(other), '')
  }
})

const DATABASES = [
  { name: 'PostgreSQL', skip: POSTGRES.skip, options: { driver: 'postgres', dsn: POSTGRES.url } },
  { name: 'MariaDB', skip: MYSQL.skip, options: { driver: 'mysql', dsn: MYSQL.url } },
  { name: 'SQLite', skip: false, options: { driver: 'sqlite' } }
] as const

for (const { name, skip, options } of DATABASES) {
  test(`database: ${name}, the original's table and one of its own`, { skip }, async t => {
    const storage = { databases: [{ name: 'main', ...options, path: join(folder(t), 'x.db') }] }
    const [found] = checkOptions(StorageOptions, storage).databases
    const db = openDatabase(found as DatabaseOptions, undefined, 5_000)
    const [original, own] = [uniqueName('services'), uniqueName('own')]
    t.after(async () => {
      for (const table of [original, own]) await db.run(`DROP TABLE ${table}`)
      await db.close()
    })
    await db.run(`CREATE TABLE ${original} (id INTEGER, name VARCHAR(64), url VARCHAR(256),
      type VARCHAR(32), models VARCHAR(1024), weight INTEGER, timeout INTEGER, status VARCHAR(16))`)
    await db.run(`INSERT INTO ${original} VALUES
      (1, 'a', 'http://127.0.0.2:1', 'openai', 'm1,m2', 3, 0, 'enabled'),
      (2, 'b', 'http://127.0.0.2:2', 'openai', '', 0, 0, 'active'),
      (3, 'c', 'http://127.0.0.2:3', 'openai', NULL, 1, 0, 'disabled'),
      (4, 'd', 'nonsense', 'openai', NULL, 1, 0, 'enabled')`)
    await db.run(
      `CREATE TABLE ${own} (label VARCHAR(64), endpoint VARCHAR(256), secret VARCHAR(64))`
    )
    await db.run(`INSERT INTO ${own} VALUES ('e', 'http://127.0.0.2:5', 'sk-e')`)

    const fields = { models: 'models' }
    const database = { storage: 'main', table: original, fields, interval: '20ms' }
    const gateway = await gatewayWith(t, { type: 'database', database }, { storage })
    const brief = (await shown(gateway)).map(({ name, weight, models }) => [name, weight, models])
    assert.deepEqual(brief, [
      ['a', 3, ['m1', 'm2']],
      ['b', 1, null]
    ])
    assert.equal((await gateway.logged({ msg: 'a found backend cannot be used' })).entry, 'd')
    await db.run(`UPDATE ${original} SET status = 'enabled', weight = 7 WHERE id = 3`)
    await until(gateway, 'a b c')
    await db.run(`DELETE FROM ${original} WHERE id < 3`)
    await until(gateway, 'c')

    const named = { name: 'label', url: 'endpoint', api_key: 'secret' }
    const other = await gatewayWith(
      t,
      { type: 'database', database: { storage: 'main', table: own, fields: named } },
      { storage }
    )
    assert.equal(await names(other), 'e')
    assert.doesNotMatch(JSON.stringify(other.lines), /sk-e/)
    const none = await gatewayWith(
      t,
      { type: 'database', database: { storage: 'main', table: 'there_is_none' } },
      { storage }
    )
    await none.logged({ msg: FAILS })
  })
}

test('consul: changes are heard at once, and an index that goes backwards begins anew', async t => {
  const consul = await fakeConsul(t, 'llm', 'token-1')
  const first = { id: 'llm-1', address: '127.0.0.2', port: 1, tags: ['prod', 'weight=2'] }
  const second = {
    id: 'llm-2',
    node: '127.0.0.3',
    port: 2,
    tags: ['prod', 'weight=2', 'url=http://evil'],
    meta: { weight: '5', models: 'm1,m2', api_key: 'sk-open', version: '1' }
  }
  consul.set([first, second, { id: 'other', port: 3 }])
  const options = {
    addr: consul.url,
    service: 'llm',
    tag: 'prod',
    token: 'token-1',
    interval: '10m'
  }
  const gateway = await gatewayWith(t, { type: 'consul', consul: options })
  const brief = (await shown(gateway)).map(({ name, url, weight, models }) => [
    name,
    url,
    weight,
    models
  ])
  assert.deepEqual(brief, [
    ['llm-1', 'http://127.0.0.2:1', 2, null],
    ['llm-2', 'http://127.0.0.3:2', 5, ['m1', 'm2']]
  ])
  assert.equal(consul.queries[0]!.get('passing'), 'true')
  assert.equal(consul.queries[0]!.get('index'), null)

  await consul.waiting()
  assert.deepEqual(
    [consul.queries[1]!.get('index'), consul.queries[1]!.get('wait')],
    ['11', '600000ms']
  )
  consul.set([first])
  await until(gateway, 'llm-1')

  // Its state was restored from a snapshot.
  await consul.waiting()
  consul.set([second], 3)
  await until(gateway, 'llm-2')
  await consul.waiting()
  assert.equal(consul.queries.at(-1)!.get('index'), '3')
  assert.equal(consul.queries.at(-2)!.get('index'), null)

  consul.fail(500)
  assert.match(
    String((await gateway.logged({ msg: FAILS })).reason),
    /status 500|closed|ECONNRESET/
  )
  assert.equal(await names(gateway), 'llm-2')
  consul.fail(undefined)
  await gateway.logged({ msg: 'discovery source answers again' })
  consul.set([first, second])
  await until(gateway, 'llm-1 llm-2')
})

test('consul: a token that is no good is said, and not shown', async t => {
  const consul = await fakeConsul(t, 'llm', 'token-1')
  const { host } = new URL(consul.url)
  const options = { addr: host, service: 'llm', token: 'token-2' }
  const gateway = await gatewayWith(t, { type: 'consul', consul: options })
  assert.equal((await gateway.logged({ msg: FAILS })).reason, 'status 403')
  assert.doesNotMatch(JSON.stringify(gateway.lines), /token-2/)
})

test('consul: instances without an id of their own, and a token that may not see them any more', async t => {
  const consul = await fakeConsul(t, 'llm', 'token-1')
  const on = (node: string) => ({ id: 'llm', node, port: 8000 })
  consul.set([on('127.0.0.2'), on('127.0.0.3')])
  const options = { addr: consul.url, service: 'llm', token: 'token-1', interval: '10m' }
  const gateway = await gatewayWith(t, { type: 'consul', consul: options })
  assert.equal(await names(gateway), '127.0.0.2:8000 127.0.0.3:8000')
  consul.set([on('127.0.0.3')])
  await until(gateway, '127.0.0.3:8000')
  consul.hide()
  const line = await gateway.logged({ msg: FAILS })
  assert.equal(line.reason, 'the token may not see the instances')
  assert.equal(await names(gateway), '127.0.0.3:8000')
})

function slice(
  name: string,
  pods: Record<string, string | undefined>,
  more: Partial<Slice> = {}
): Slice {
  return {
    metadata: { name, labels: { 'kubernetes.io/service-name': 'vllm', app: 'vllm' } },
    addressType: 'IPv4',
    endpoints: Object.entries(pods).map(([pod, address]) => ({
      addresses: [address!],
      conditions: { ready: true },
      targetRef: { kind: 'Pod', name: pod, uid: `uid-${pod}` }
    })),
    ports: [
      { name: 'metrics', port: 9090 },
      { name: 'http', port: 8000 }
    ],
    ...more
  }
}

async function cluster(t: TestContext, options: object = {}) {
  const kubernetes = await fakeKubernetes(t, 'llm')
  const token_file = join(folder(t), 'token')
  writeFileSync(token_file, `${kubernetes.token}\n`)
  const { url, ca_file } = kubernetes
  const source = {
    type: 'kubernetes',
    kubernetes: {
      service: 'vllm',
      namespace: 'llm',
      port: 'http',
      api_server: url,
      ca_file,
      token_file,
      ...options
    }
  }
  const rotate = (token: string) => {
    writeFileSync(`${token_file}.new`, token)
    renameSync(`${token_file}.new`, token_file)
  }
  return { kubernetes, source, rotate }
}

test('kubernetes: several slices, ready pods alone, each once; changes are heard at once', async t => {
  const { kubernetes, source } = await cluster(t)
  const starting = slice('a', { 'pod-1': '127.0.0.2', 'pod-2': '127.0.0.3' })
  starting.endpoints[1]!.conditions = { ready: false }
  kubernetes.apply(starting)
  const unknown = slice('b', { 'pod-3': '127.0.0.4' })
  unknown.endpoints[0]!.conditions = {}
  kubernetes.apply(unknown)
  kubernetes.apply(slice('c', { 'pod-1': 'fd00::1', 'pod-6': 'fd00::6' }, { addressType: 'IPv6' }))
  kubernetes.apply(slice('d', {}, { ports: null }))
  const labels = { 'kubernetes.io/service-name': 'other' }
  kubernetes.apply(slice('e', { 'pod-9': '127.0.0.9' }, { metadata: { name: 'e', labels } }))

  const gateway = await gatewayWith(t, source)
  assert.deepEqual(await urls(gateway), [
    'http://[fd00::6]:8000',
    'http://127.0.0.2:8000',
    'http://127.0.0.4:8000'
  ])
  assert.equal(await names(gateway), 'pod-6 pod-1 pod-3')

  await kubernetes.watching(1)
  kubernetes.apply(slice('a', { 'pod-1': '127.0.0.2', 'pod-2': '127.0.0.3' }))
  await until(gateway, 'pod-6 pod-1 pod-2 pod-3')
  kubernetes.remove('c')
  kubernetes.remove('b')
  await until(gateway, 'pod-1 pod-2')
  assert.equal(kubernetes.lists, 1, 'nothing was listed again')
})

test('kubernetes: a watch that ends goes on from the last bookmark, and lists again after 410', async t => {
  const { kubernetes, source } = await cluster(t)
  kubernetes.apply(slice('a', { 'pod-1': '127.0.0.2' }))
  const gateway = await gatewayWith(t, source)
  await kubernetes.watching(1)
  assert.equal(kubernetes.watches[0]!.get('allowWatchBookmarks'), 'true')

  // What came before the bookmark may be forgotten.
  kubernetes.bookmark()
  kubernetes.compact()
  kubernetes.end()
  await kubernetes.watching(2)
  assert.equal(kubernetes.watches[1]!.get('resourceVersion'), '102')
  assert.equal(kubernetes.lists, 1)

  // The watch itself says that it has fallen behind.
  kubernetes.end('gone')
  await kubernetes.watching(3)
  assert.equal(kubernetes.lists, 2)

  // What happens between two watches is too old for the next one: it is refused with 410.
  kubernetes.end()
  kubernetes.apply(slice('b', { 'pod-2': '127.0.0.3' }))
  kubernetes.compact()
  await until(gateway, 'pod-1 pod-2')
  assert.equal(kubernetes.lists, 3)
  assert.ok(!gateway.lines.some(({ msg }) => msg === FAILS), 'none of this is a failure')

  await kubernetes.watching(4)
  kubernetes.end('cut')
  await gateway.logged({ msg: FAILS })
  assert.equal(await names(gateway), 'pod-1 pod-2')
  await gateway.logged({ msg: 'discovery source answers again' })
})

test('kubernetes: a token that is renewed is read again', async t => {
  const { kubernetes, source, rotate } = await cluster(t)
  kubernetes.apply(slice('a', { 'pod-1': '127.0.0.2' }))
  const gateway = await gatewayWith(t, source)
  await kubernetes.watching(1)
  rotate('token-2')
  kubernetes.token = 'token-2'
  kubernetes.end()
  await kubernetes.watching(2)
  assert.equal(kubernetes.lists, 1)

  kubernetes.token = 'token-3'
  kubernetes.end()
  const line = await gateway.logged({ msg: FAILS })
  assert.equal(line.reason, 'status 401: Unauthorized')
  rotate('token-3')
  await gateway.logged({ msg: 'discovery source answers again' })
  kubernetes.apply(slice('a', { 'pod-2': '127.0.0.3' }))
  await until(gateway, 'pod-2')
  assert.doesNotMatch(JSON.stringify(gateway.lines), /token-/)
})

test('kubernetes: ports by number, by name or the first; other authorities are not trusted', async t => {
  const port = async (kubernetes: FakeKubernetes, source: object) => {
    kubernetes.apply(slice('a', { 'pod-1': '127.0.0.2' }))
    const gateway = await gatewayWith(t, source)
    return [
      ...(await urls(gateway)),
      ...gateway.lines.filter(({ msg }) => msg === FAILS).map(({ reason }) => reason)
    ]
  }
  const by = async (options: object) => {
    const { kubernetes, source } = await cluster(t, options)
    return port(kubernetes, source)
  }
  assert.deepEqual(await by({ port: 1234, scheme: 'https' }), ['https://127.0.0.2:1234'])
  assert.deepEqual(await by({ port: undefined, label_selector: 'app=vllm' }), [
    'http://127.0.0.2:9090'
  ])
  assert.deepEqual(await by({ port: 'grpc' }), ['no port is named grpc'])
  assert.deepEqual(await by({ label_selector: 'app=other' }), [])
  const [forbidden] = await by({ namespace: 'kube-system' })
  assert.equal(forbidden, 'status 403: endpointslices is forbidden')
  const [untrusted] = await by({ ca_file: new URL('tls/second.crt', import.meta.url).pathname })
  assert.match(String(untrusted), /self-signed|unable to verify/)
})

test('kubernetes: pods that do not have the port do not stand in the way of those that have', async t => {
  const { kubernetes, source } = await cluster(t)
  kubernetes.apply(slice('a', { 'pod-1': '127.0.0.2' }))
  kubernetes.apply(slice('b', { 'pod-2': '127.0.0.3' }, { ports: [{ name: 'web', port: 80 }] }))
  const gateway = await gatewayWith(t, source)
  assert.equal(await names(gateway), 'pod-1')
  const line = await gateway.logged({ msg: 'a found backend cannot be used' })
  assert.deepEqual([line.entry, line.reason], ['pod-2', 'url: is missing'])
})

test('etcd: keys under a prefix, changes, compaction, and a server that comes back', {
  skip: NO_ETCD
}, async t => {
  const etcd = await startEtcd(t)
  await etcd.put('/llm/a', '{"url": "http://127.0.0.2:1", "weight": 4}')
  await etcd.put('/llm/b', 'http://127.0.0.2:2')
  await etcd.put('/llm/c', '{"name": "named", "url": "http://127.0.0.2:3", "status": "disabled"}')
  await etcd.put('/llm/d', '{broken')
  await etcd.put('/llm0', 'http://127.0.0.2:9')
  const dead = 'http://127.0.0.1:1'
  const source = {
    type: 'etcd',
    etcd: { endpoints: [dead, new URL(etcd.url).host], prefix: '/llm/' }
  }
  const gateway = await gatewayWith(t, source)
  const brief = (await shown(gateway)).map(({ name, url, weight }) => [name, url, weight])
  assert.deepEqual(brief, [
    ['a', 'http://127.0.0.2:1', 4],
    ['b', 'http://127.0.0.2:2', 1]
  ])
  assert.equal((await gateway.logged({ msg: 'a found backend cannot be used' })).entry, 'd')

  await etcd.put('/llm/c', '{"name": "named", "url": "http://127.0.0.2:3"}')
  await until(gateway, 'a b named')
  await etcd.delete('/llm/a')
  await until(gateway, 'b named')
  await etcd.compact()
  await etcd.put('/llm/b', 'http://127.0.0.2:4')
  await eventually(async () => (await urls(gateway))[0] === 'http://127.0.0.2:4')
  assert.ok(!gateway.lines.some(({ msg }) => msg === FAILS))
  await etcd.stop()
  await gateway.logged({ msg: FAILS })
  assert.equal(await names(gateway), 'b named')
})

test('etcd: what was forgotten before a watch began is read again (played)', async t => {
  const encode = (text: string) => Buffer.from(text).toString('base64')
  const kv = (name: string) => ({
    key: encode(`/llm/${name}`),
    value: encode('http://127.0.0.2:1')
  })
  let watches = 0
  let reads = 0
  const starts: unknown[] = []
  const etcd = await fakeBackend(t, (request, response) => {
    if (request.url === '/v3/kv/range') {
      const revision = String(++reads * 10)
      return void response.end(
        JSON.stringify({ header: { revision }, kvs: [kv(`at-${revision}`)] })
      )
    }
    starts.push(JSON.parse(request.body).create_request.start_revision)
    response.write('{"result": {"created": true}}\n')
    if (++watches > 1) return
    response.write('{"result": {"canceled": true, "compact_revision": "15"}}\n')
  })
  const source = { type: 'etcd', etcd: { endpoints: [etcd.url], prefix: '/llm/' } }
  const gateway = await gatewayWith(t, source)
  await until(gateway, 'at-20')
  await etcd.request(3)
  assert.deepEqual(starts, ['11', '21'])
  assert.ok(!gateway.lines.some(({ msg }) => msg === FAILS))
})

test('etcd: a user and a password', { skip: NO_ETCD }, async t => {
  const etcd = await startEtcd(t)
  await etcd.requireUser('root', 'secret-1')
  await etcd.put('/llm/a', 'http://127.0.0.2:1')
  const source = (more: object) => ({
    type: 'etcd',
    etcd: { endpoints: [etcd.url], prefix: '/llm/', ...more }
  })
  const gateway = await gatewayWith(t, source({ username: 'root', password: 'secret-1' }))
  assert.equal(await names(gateway), 'a')
  await etcd.put('/llm/b', 'http://127.0.0.2:2')
  await until(gateway, 'a b')
  const wrong = await gatewayWith(t, source({ username: 'root', password: 'secret-2' }))
  assert.match(String((await wrong.logged({ msg: FAILS })).reason), /authentication failed/)
  assert.doesNotMatch(JSON.stringify([gateway.lines, wrong.lines]), /secret-/)
  const none = await gatewayWith(t, source({}))
  assert.match(String((await none.logged({ msg: FAILS })).reason), /user name is empty/)
})

test('dns: addresses, asked again when they have expired', async t => {
  const a = (address: string) => ({ type: 'A' as const, address, ttl: 0 })
  const dns = await fakeDns(t, { 'vllm.test': [a('127.0.0.3'), a('127.0.0.2')] })
  const options = {
    host: 'vllm.test',
    port: 8000,
    servers: [dns.address],
    timeout: '300ms',
    interval: '1h'
  }
  const gateway = await gatewayWith(t, { type: 'dns', dns: options })
  assert.deepEqual(await urls(gateway), ['http://127.0.0.2:8000', 'http://127.0.0.3:8000'])
  dns.zone['vllm.test'] = [a('127.0.0.3'), a('127.0.0.4')]
  await until(gateway, '127.0.0.3:8000 127.0.0.4:8000')

  dns.trouble = 'servfail'
  assert.match(String((await gateway.logged({ msg: FAILS })).reason), /ESERVFAIL/)
  assert.equal(await names(gateway), '127.0.0.3:8000 127.0.0.4:8000')
  dns.trouble = undefined
  dns.zone = {}
  await gateway.logged({ msg: 'discovery source answers again' })
  await until(gateway, '')
})

test('dns: IPv6, and a server that is silent', async t => {
  const dns = await fakeDns(t, { 'vllm.test': [{ type: 'AAAA', address: '::1' }] })
  const options = { host: 'vllm.test', record: 'AAAA', port: 8000, servers: [dns.address] }
  const gateway = await gatewayWith(t, { type: 'dns', dns: options })
  assert.deepEqual(await urls(gateway), ['http://[::1]:8000'])
  dns.trouble = 'silence'
  const other = await gatewayWith(t, { type: 'dns', dns: { ...options, timeout: '50ms' } })
  assert.match(String((await other.logged({ msg: FAILS })).reason), /ETIMEOUT/)
})

test('dns: SRV has ports and weights, and its priorities are tiers', async t => {
  const srv = (priority: number, weight: number, port: number, target: string) => ({
    type: 'SRV' as const,
    ...{ priority, weight, port, target }
  })
  const dns = await fakeDns(t, {
    '_http._tcp.vllm.test': [
      srv(20, 1, 8003, 'backup.test'),
      srv(10, 5, 8002, 'two.test'),
      srv(10, 0, 8001, 'one.test'),
      srv(10, 1, 8004, 'gone.test')
    ],
    'one.test': [{ type: 'A', address: '127.0.0.2' }],
    'two.test': [
      { type: 'A', address: '127.0.0.4' },
      { type: 'A', address: '127.0.0.3' }
    ],
    'backup.test': [{ type: 'A', address: '127.0.0.9' }]
  })
  const options = { host: '_http._tcp.vllm.test', record: 'SRV', servers: [dns.address] }
  const brief = async (more: object) => {
    const gateway = await gatewayWith(t, { type: 'dns', dns: { ...options, ...more } })
    return (await shown(gateway)).map(({ name, url, weight, priority }) => [
      name,
      url,
      weight,
      priority
    ])
  }
  assert.deepEqual(await brief({}), [
    ['backup.test:8003', 'http://127.0.0.9:8003', 1, 1],
    ['one.test:8001', 'http://127.0.0.2:8001', 1, 0],
    ['127.0.0.3:8002', 'http://127.0.0.3:8002', 5, 0],
    ['127.0.0.4:8002', 'http://127.0.0.4:8002', 5, 0]
  ])
  const https = (await brief({ scheme: 'https' })).map(([, url]) => url)
  assert.deepEqual(https, [
    'https://backup.test:8003',
    'https://gone.test:8004',
    'https://one.test:8001',
    'https://two.test:8002'
  ])
})
