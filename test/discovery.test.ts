import assert from 'node:assert/strict'
import { once } from 'node:events'
import type { ServerResponse } from 'node:http'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import { parseConfig } from '../src/config.ts'
import { toBackends } from '../src/discovery/entry.ts'
import { Finder } from '../src/discovery/finder.ts'
import { DiscoveryOptions } from '../src/discovery/sources.ts'
import { masked } from '../src/masked.ts'
import { checkOptions } from '../src/options.ts'
import backends from '../src/plugins/backends.ts'
import discovery from '../src/plugins/discovery.ts'
import type { BackendOptions } from '../src/pool/policy.ts'
import { StorageOptions } from '../src/store/storage.ts'
import { find, names, shown, until, WATCHED } from './found.ts'
import {
  answerChat,
  CHAT,
  chunk,
  closedPort,
  DONE,
  eventually,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  type TestGateway
} from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/** Backends that are found: what becomes of what sources say, and of backends that come and go. */

/** A service that has a list, which the test changes. */
async function lister(t: TestContext, list: unknown) {
  const state = { list, status: 200 }
  const server = await fakeBackend(t, (_request, response) => {
    response.writeHead(state.status, { 'content-type': 'application/json' })
    response.end(JSON.stringify(state.list))
  })
  const source = { name: 'list', type: 'http', http: { url: server.url, interval: '20ms' } }
  return { state, server, source }
}

function reload(gateway: TestGateway, config: object): Promise<void> {
  return gateway.control.reload(parseConfig(JSON.stringify(config), 'test.yaml', {}))
}

const ready = async ({ url }: { url: string }) => (await fetch(`${url}/health/ready`)).status

test('found backends stand beside the configured ones, each server once', async t => {
  const server = (name: string, port: number) => ({ name, url: `http://127.0.0.2:${port}` })
  const fixed = (name: string, ...list: object[]) => ({
    name,
    type: 'static',
    static: { backends: list }
  })
  const config = {
    ...WATCHED,
    backends: [server('a', 1)],
    discovery: {
      enabled: true,
      sources: [
        fixed('empty'),
        fixed(
          'one',
          { ...server('b', 2), weight: 3, timeout: '7s' },
          { url: 'http://127.0.0.2:1/v1/' }
        ),
        fixed('two', server('b', 3), server('c', 2), { url: 'http://127.0.0.2:4/base/v1' }),
        { ...fixed('off', server('d', 5)), enabled: false }
      ]
    }
  }
  const gateway = await startGateway(t, config)
  const brief = (await shown(gateway)).map(({ name, source, weight }) => [name, source, weight])
  assert.deepEqual(brief, [
    ['a', null, 1],
    ['b', 'one', 3],
    ['127.0.0.2:3', 'two', 1],
    ['127.0.0.2:4/base', 'two', 1]
  ])

  const { sources } = config.discovery
  await reload(gateway, { ...config, discovery: { enabled: true, mode: 'first', sources } })
  assert.equal(await names(gateway), 'a b', 'the first that has any')
  await reload(gateway, { ...config, discovery: { enabled: false, sources } })
  assert.equal(await names(gateway), 'a')
})

test('what a source says of a backend holds, then what is said of the source, then the routing', async t => {
  const seen: Record<string, unknown>[] = []
  const backend = await fakeBackend(t, (request, response, raw) => {
    seen.push(request.headers)
    answerChat(request, response, raw)
  })
  const defaults = { api_key: 'sk-all', headers: { 'x-team': 'red' }, models: ['m'], timeout: '9s' }
  const list = [
    { name: 'plain', url: backend.url },
    {
      name: 'own',
      url: `${backend.url}/own`,
      api_key: 'sk-own',
      headers: { 'x-own': '1' },
      models: 'x, y'
    }
  ]
  const { source } = await lister(t, { backends: list, services: [] })
  const gateway = await startGateway(t, { ...WATCHED, ...find({ ...source, backend: defaults }) })
  assert.deepEqual(
    (await shown(gateway)).map(({ models }) => models),
    [['m'], ['x', 'y']]
  )
  for (const model of ['m', 'x']) {
    assert.equal((await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model })).status, 200)
  }
  const brief = seen.map(each => [each.authorization, each['x-team'], each['x-own']])
  assert.deepEqual(brief, [
    ['Bearer sk-all', 'red', undefined],
    ['Bearer sk-own', 'red', '1']
  ])
  assert.doesNotMatch(JSON.stringify(gateway.lines), /sk-/)
  assert.doesNotMatch(await gateway.metrics(), /sk-/)
})

test('an entry that is of no use is left out and named, and the others hold', async t => {
  const { source, state, server } = await lister(t, [
    'http://127.0.0.2:1',
    { name: 'ftp', url: 'ftp://127.0.0.2:2' },
    { name: 'user', url: 'http://me:secret@127.0.0.2:3' },
    { name: 'query', url: 'http://127.0.0.2:4/?key=secret' },
    { name: 'demo', url: 'demo://' },
    { name: 'weight', url: 'http://127.0.0.2:5', weight: 'heavy' },
    { name: 'bare', url: 'http://127.0.0.2:6', timeout: 30 },
    { name: 'key', url: 'http://127.0.0.2:6', api_key: 'secret secret' },
    { name: 'line\nend', url: 'http://127.0.0.2:7' },
    { name: 'broken', url: 'http://127.0.0.2:\n7' },
    { name: 'port', url: 'http://127.0.0.2:0' },
    { name: 'text', url: 'http://127.0.0.2:7', headers: 'x-key: secret' },
    { name: 'list', url: 'http://127.0.0.2:7', headers: ['secret'] },
    { weight: 1 },
    null,
    17,
    { name: 'off', url: 'http://127.0.0.2:8', status: 'disabled' },
    {
      id: 3,
      name: 'good',
      url: 'https://127.0.0.2:9',
      weight: '0',
      status: 'Active',
      type: 'x',
      timeout: '1s'
    }
  ])
  const gateway = await startGateway(t, { ...WATCHED, ...find(source) })
  assert.equal(await names(gateway), '127.0.0.2:1 good')
  const complaints = () =>
    gateway.lines.filter(({ msg }) => msg === 'a found backend cannot be used')
  const wanted = [
    'ftp',
    'user',
    'query',
    'demo',
    'weight',
    'bare',
    'key',
    'line\nend',
    'broken',
    'port',
    'text',
    'list',
    '#14',
    '#15',
    '#16'
  ]
  assert.deepEqual(
    complaints().map(({ entry }) => entry),
    wanted
  )
  assert.match(String(complaints()[4]!.reason), /^weight: must be an integer from 1 to 1000000$/)
  assert.match(String(complaints()[5]!.reason), /^timeout: must be a duration such as/)
  assert.doesNotMatch(JSON.stringify(gateway.lines), /secret/)

  await server.request(server.requests.length + 2)
  assert.equal(complaints().length, wanted.length, 'each is said once')
  state.list = { nothing: 1 }
  const line = await gateway.logged({ msg: 'discovery source fails; its last answer holds' })
  assert.match(String(line.reason), /neither a list/)
  assert.equal(await names(gateway), '127.0.0.2:1 good')
})

test('spaces around what a source says are no part of it', () => {
  const entry = { name: 'a  ', url: 'http://h:1  ', status: 'enabled  ', weight: ' 3', models: ' ' }
  const [backend] = toBackends([entry], {}, () => {})
  const { name, url, weight, models } = backend!
  assert.deepEqual([name, url, weight, models], ['a', 'http://h:1', 3, undefined])
})

test('a source has at most a thousand backends', () => {
  const bad: string[] = []
  const many = Array.from({ length: 1_500 }, (_, at) => `http://h:${at + 1}`)
  assert.equal(
    toBackends(many, {}, (entry, reason) => bad.push(`${entry} ${reason}`)).length,
    1_000
  )
  assert.deepEqual(bad, ['#1001 only 1000 backends of a source are taken'])
  const useless = Array.from({ length: 1_500 }, () => ({ id: 1 }))
  bad.length = 0
  toBackends(useless, {}, (entry, reason) => bad.push(`${entry} ${reason}`))
  assert.equal(bad.length, 1_001, 'nor are more looked at')
})

test('a source that fails keeps its last good answer, and is asked again', async t => {
  const { source, state } = await lister(t, ['http://127.0.0.2:1'])
  const gateway = await startGateway(t, { ...WATCHED, ...find(source) })
  const up = () => gateway.metric('llmproxy_discovery_source_up', { source: 'list' })
  const count = () => gateway.metric('llmproxy_discovery_backends', { source: 'list' })
  assert.deepEqual([await up(), await count()], [1, 1])
  const since = await gateway.metric('llmproxy_discovery_last_change_timestamp_seconds')
  assert.ok(Math.abs(since - Date.now() / 1000) < 60)

  state.status = 500
  const line = await gateway.logged({ msg: 'discovery source fails; its last answer holds' })
  assert.deepEqual([line.source, line.reason, line.backends], ['list', 'status 500', 1])
  assert.deepEqual([await up(), await count()], [0, 1])
  assert.ok((await gateway.metric('llmproxy_discovery_errors_total', { source: 'list' })) >= 1)
  assert.equal(await names(gateway), '127.0.0.2:1')

  state.status = 200
  state.list = []
  await gateway.logged({ msg: 'discovery source answers again' })
  await until(gateway, '')
  assert.deepEqual([await up(), await count()], [1, 0])
})

test('a source that fails now and then is not asked more and more seldom', async t => {
  let asked = 0
  const server = await fakeBackend(t, (_request, response) => {
    response.writeHead(++asked % 2 === 1 ? 200 : 500).end('["http://127.0.0.2:1"]')
  })
  const http = { url: server.url, interval: '1100ms' }
  const gateway = await startGateway(t, { ...WATCHED, ...find({ type: 'http', http }) })
  await server.request(4)
  const lines = gateway.lines.filter(({ msg }) => /^discovery source fails/.test(String(msg)))
  assert.deepEqual(
    lines.map(({ wait }) => wait),
    [500, 500]
  )
})

test('the gateway starts without its source, says that it has no backend, and finds them later', async t => {
  const port = await closedPort()
  const backend = await fakeBackend(t, answerChat)
  const url = `http://127.0.0.1:${port}`
  const gateway = await startGateway(t, {
    ...WATCHED,
    ...find({ type: 'http', http: { url, interval: '20ms' } })
  })
  await gateway.logged({ msg: 'discovery source fails; its last answer holds', source: 'http' })
  assert.equal(await ready(gateway), 503)
  const refused = await post(`${gateway.url}/v1/chat/completions`, CHAT)
  assert.equal(refused.status, 503)
  assert.equal((await refused.json()).error.code, 'no_backend')
  assert.equal((await fetch(`${gateway.url}/v1/models`)).status, 503)

  const list = await fakeBackend(t, (_request, response) =>
    response.end(JSON.stringify([{ name: 'late', url: backend.url }]))
  )
  list.server.close()
  await once(list.server.listen(port, '127.0.0.1'), 'listening')
  await until(gateway, 'late')
  assert.equal(await ready(gateway), 200)
  assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
})

test('a source that does not answer holds up the start for so long, and no longer', async t => {
  const silent = await fakeBackend(t, () => {})
  const { source } = await lister(t, ['http://127.0.0.2:1'])
  const sources = [{ type: 'http' as const, http: { url: silent.url } }, source]
  const options = checkOptions(DiscoveryOptions, { enabled: true, sources })
  const fastify = Fastify()
  const around = { log: fastify.log, dataDir: undefined, onChange() {} }
  const finder = new Finder(around, 100)
  t.after(() => finder.close())
  const found = await finder.update(options, checkOptions(StorageOptions, {}))
  assert.deepEqual(
    found.map(({ source, backend }) => [source, backend.url]),
    [['list', 'http://127.0.0.2:1']]
  )
  assert.deepEqual(
    finder.sources.map(({ isUp }) => isUp),
    [false, true]
  )
})

/** A backend whose streams the test ends. */
async function streamer(t: TestContext) {
  const responses: ServerResponse[] = []
  const backend = await fakeBackend(t, (request, response, raw) => {
    if (!request.body.includes('"stream":true')) return void answerChat(request, response, raw)
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    responses.push(response)
  })
  return { backend, end: () => responses[0]!.end(chunk(' you') + DONE) }
}

const STREAM = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }))

test('a backend that goes away finishes its streams, and what was counted of it goes with it', async t => {
  const going = await streamer(t)
  const staying = await fakeBackend(t, answerChat)
  const both = [
    { name: 'going', url: going.backend.url },
    { name: 'staying', url: staying.url, weight: 1 }
  ]
  const { source, state } = await lister(t, both)
  const gateway = await startGateway(t, { ...WATCHED, ...find(source) })
  const clients = [
    await rawClient(t, gateway.port, STREAM),
    await rawClient(t, gateway.port, STREAM)
  ]
  await Promise.any(clients.map(client => client.until(/Hi"/)))
  const client = clients.find(({ received }) => received.includes('Hi'))!
  const inFlight = (backend: string) => gateway.metric('llmproxy_backend_in_flight', { backend })

  state.list = [both[1]]
  await until(gateway, 'staying')
  assert.equal(await inFlight('going'), 1, 'its stream goes on')
  for (let call = 0; call < 4; call++) {
    assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
  }
  assert.equal(going.backend.requests.length, 1)
  going.end()
  await client.until(/\r\n0\r\n/)
  await gateway.logged({ msg: 'exchange', backend: 'going', outcome: 'ok' })
  assert.match(await gateway.metrics(), /llmproxy_requests_total\{[^}]*backend="going"[^}]*\} 1\n/)

  const now = performance.now.bind(performance)
  const moved = t.mock.method(performance, 'now', () => now() + 59_000)
  await gateway.metrics()
  assert.match(await gateway.metrics(), /backend="going"/, 'it can be scraped for a minute')
  moved.mock.mockImplementation(() => now() + 61_000)
  await gateway.metrics()
  const text = await gateway.metrics()
  assert.doesNotMatch(text, /going/)
  assert.match(text, /llmproxy_requests_total\{[^}]*backend="staying"[^}]*\} [45]\n/)
  assert.match(text, /llmproxy_latency_ms_bucket\{[^}]*backend="staying"/)
})

test('what is known of a backend stays while others come and go', async t => {
  const steady = await streamer(t)
  const base = [{ name: 'steady', url: steady.backend.url }]
  const { source, state } = await lister(t, base)
  const gateway = await startGateway(t, {
    ...WATCHED,
    ...find(source),
    health_check: { enabled: true, interval: '60s' }
  })
  const client = await rawClient(t, gateway.port, STREAM)
  await client.until(/Hi"/)
  for (let round = 0; round < 3; round++) {
    state.list = [...base, { name: `guest-${round}`, url: `http://127.0.0.2:${round + 1}` }]
    await until(gateway, `steady guest-${round}`)
  }
  const found = (await shown(gateway)).find(({ name }) => name === 'steady')!
  assert.equal(found.in_flight, 1)
  const asked = steady.backend.requests.map(({ url }) => url)
  assert.deepEqual(asked.sort(), ['/health', '/v1/chat/completions'], 'no check for each change')
  steady.end()
  await client.until(/\r\n0\r\n/)
})

test('a reload keeps what was found, takes over other settings, and forgets what is gone', async t => {
  const steady = await streamer(t)
  const { source, state, server } = await lister(t, [{ name: 'found', url: steady.backend.url }])
  const config = (more: object) => ({ ...WATCHED, ...more })
  const gateway = await startGateway(t, config(find(source)))
  const client = await rawClient(t, gateway.port, STREAM)
  await client.until(/Hi"/)

  state.status = 500
  await gateway.logged({ msg: 'discovery source fails; its last answer holds' })
  const configured = { name: 'fixed', url: 'http://127.0.0.2:1' }
  await reload(gateway, config({ backends: [configured], ...find(source) }))
  assert.equal(await names(gateway), 'fixed found', 'the source is as it was')
  state.status = 200
  await gateway.logged({ msg: 'discovery source answers again' })

  // What was found stands in the file now: it is the same server, and its source is not needed any more.
  const taken = { name: 'found', url: steady.backend.url }
  await reload(gateway, config({ backends: [taken] }))
  const [only] = await shown(gateway)
  assert.deepEqual([only!.name, only!.source, only!.in_flight], ['found', null, 1])
  assert.doesNotMatch(await gateway.metrics(), /source="list"/)
  const asked = server.requests.length
  await sleep(60)
  assert.equal(server.requests.length, asked, 'nobody asks it any more')

  state.list = ['http://127.0.0.2:2']
  await reload(gateway, config({ backends: [taken], ...find({ ...source, name: 'again' }) }))
  assert.equal(await names(gateway), 'found 127.0.0.2:2', 'new sources are waited for')
  steady.end()
  await client.until(/\r\n0\r\n/)
})

test('a source that is changed while it fails keeps what it found, with its new settings', async t => {
  const { source, state } = await lister(t, [{ name: 'found', url: 'http://127.0.0.2:1' }])
  const config = (more: object) => ({ ...WATCHED, ...find({ ...source, ...more }) })
  const gateway = await startGateway(t, config({ backend: { weight: 2 } }))
  const since = await gateway.metric('llmproxy_discovery_last_change_timestamp_seconds')
  state.status = 403
  await gateway.logged({ msg: 'discovery source fails; its last answer holds' })
  const http = { ...source.http, headers: { 'x-token': 'new' } }
  await reload(gateway, config({ http, backend: { weight: 3 } }))
  const brief = (await shown(gateway)).map(({ name, weight }) => [name, weight])
  assert.deepEqual(brief, [['found', 3]])
  assert.equal(await gateway.metric('llmproxy_discovery_source_up', { source: 'list' }), 0)
  assert.equal(await gateway.metric('llmproxy_discovery_last_change_timestamp_seconds'), since)
  state.status = 200
  state.list = []
  await until(gateway, '')
})

test('the same backends in another order are no news', async t => {
  const list = ['http://127.0.0.2:1', 'http://127.0.0.2:2', 'http://127.0.0.2:3']
  const { source, state, server } = await lister(t, list)
  const gateway = await startGateway(t, { ...WATCHED, ...find(source) })
  state.list = list.toReversed()
  await server.request(server.requests.length + 2)
  state.list = [...list, 'http://127.0.0.2:4']
  await until(gateway, '127.0.0.2:1 127.0.0.2:2 127.0.0.2:3 127.0.0.2:4')
  assert.equal(gateway.lines.filter(({ msg }) => msg === 'backends found').length, 2)
})

test('overlapping reloads leave no source behind', async t => {
  const lists = await Promise.all([1, 2, 3].map(port => lister(t, [`http://127.0.0.2:${port}`])))
  const gateway = await startGateway(t, { ...WATCHED, backends: [{ url: 'demo://' }] })
  await Promise.all(lists.map(({ source }) => reload(gateway, { ...WATCHED, ...find(source) })))
  assert.equal(await names(gateway), '127.0.0.2:3')
  const asked = lists.map(({ server }) => server.requests.length)
  await sleep(60)
  assert.deepEqual(
    lists.slice(0, 2).map(({ server }) => server.requests.length),
    asked.slice(0, 2)
  )
  assert.ok(lists[2]!.server.requests.length > asked[2]!)
})

test('a reload that waits for its sources when the gateway closes begins nothing', async t => {
  const silent = await fakeBackend(t, () => {})
  const backends = [{ name: 'a', url: 'http://127.0.0.2:1' }]
  const gateway = await startGateway(t, { ...WATCHED, backends })
  const source = { type: 'http', http: { url: silent.url } }
  const reloaded = reload(gateway, { ...WATCHED, ...find(source) })
  await silent.request()
  await gateway.fastify.close()
  await reloaded
  // A rejection that nobody handles fails the test, if it is still running then.
  await sleep(0)
})

test('each worker finds backends by itself', async t => {
  const backend = await fakeBackend(t, answerChat)
  const { source, state } = await lister(t, [{ name: 'one', url: backend.url }])
  const file = writeConfig(`${folder(t)}/config.yaml`, {
    server: { listen: '127.0.0.1:0', workers: 2 },
    ...find(source)
  })
  const gateway = await start(t, [CLI, '--config', file])
  const metrics = async () => (await fetch(`${gateway.url}/metrics`)).text()
  const call = () =>
    post(`${gateway.url}/v1/chat/completions`, CHAT, { connection: 'close' }).then(
      ({ status }) => status
    )
  assert.deepEqual([await call(), await call()], [200, 200])
  state.list = []
  await gateway.logged('backends found', 4)
  assert.match(await metrics(), /llmproxy_discovery_backends\{source="list"\} 0\n/)
  await eventually(async () => (await call()) === 503 && (await call()) === 503)
})

test('the plugin works alone, beside the backends', async t => {
  const fastify = Fastify()
  t.after(() => fastify.close())
  await fastify.register(backends)
  const fixed: Partial<BackendOptions>[] = [{ url: 'http://127.0.0.2:1' }]
  await fastify.register(discovery, { sources: [{ type: 'static', static: { backends: fixed } }] })
  assert.deepEqual(
    fastify.backends.pool.backends.map(({ name }) => name),
    ['127.0.0.2:1']
  )
  assert.equal(fastify.backends.sourceOf('127.0.0.2:1'), 'static')
})

function complaints(yaml: string): string[] {
  try {
    parseConfig(yaml, 'config.yaml', {})
    return []
  } catch (error) {
    return (error as Error).message.split('\n')
  }
}

test('mistakes are refused at their place', () => {
  const sources = (text: string) => `discovery:\n  enabled: true\n  sources:\n    - ${text}\n`
  for (const [text, message] of [
    ['type: consul', /^config\.yaml:4:7 discovery\.sources\[0\]\.consul: is missing$/],
    [
      '{type: dns, dns: {host: a.b}}',
      /dns: must be a mapping with host, and with port unless record/
    ],
    [
      '{type: dns, dns: {host: a.b, port: 1, servers: [ns1]}}',
      /servers\[0\]: must be an address such/
    ],
    ['{type: etcd, etcd: {endpoints: [], prefix: x}}', /endpoints: must be a list of at least one/],
    [
      '{type: etcd, etcd: {endpoints: ["ftp://x"], prefix: x}}',
      /endpoints\[0\]: must be an address/
    ],
    [
      '{type: kubernetes, kubernetes: {service: s, port: "80"}}',
      /port: must be the number or the name/
    ],
    ['{type: kubernetes, kubernetes: {service: S}}', /service: must be the name of a Service/],
    ['{type: http, http: {url: x}}', /http\.url: must be a URL/],
    [
      '{type: http, http: {url: "http://x", tls: {ca_file: /no}}}',
      /tls\.ca_file: must be a file that is there/
    ],
    ['{type: database, database: {storage: x}}', /storage: must be the name of a database/],
    ['{type: static, static: {backends: [{url: "demo://"}]}}', /backends\[0\]\.url: must be a URL/],
    [
      '{type: static, static: {backends: []}}\n    - {type: static, static: {backends: []}}',
      /same name/
    ],
    [
      '{type: static, enabled: false, static: {backends: []}}',
      /sources: must have at least one that is/
    ],
    ['{type: zookeeper}', /type: must be one of static, http, database/]
  ] as const) {
    const lines = complaints(sources(text))
    assert.equal(lines.length, 1, `${text}: ${lines.join('\n')}`)
    assert.match(lines[0]!, message)
  }
  assert.deepEqual(complaints('discovery: {enabled: false}').length, 1, 'no backends at all')
})

test('a configuration of the original is taken as it is', () => {
  const yaml = `
discovery:
  enabled: true
  mode: merge
  interval: 30s
  sources:
    - name: fixed
      type: static
      enabled: true
      static: {backends: [{name: a, url: "http://a:8000", weight: 5}]}
    - name: db
      type: database
      enabled: true
      database: {storage: main, table: services, fields: {name: name, url: endpoint, weight: weight, status: status}}
    - name: consul
      type: consul
      enabled: true
      consul: {addr: "http://consul:8500", service: llm, tag: prod, interval: 10s}
    - name: kubernetes
      type: kubernetes
      enabled: true
      kubernetes: {namespace: default, service: vllm, port: 8000, label_selector: app=vllm}
    - name: etcd
      type: etcd
      enabled: true
      etcd: {endpoints: ["http://etcd:2379"], prefix: /llm/backends/, username: root, password: secret-1}
    - name: registry
      type: http
      enabled: true
      http: {url: "http://registry/services", method: GET, timeout: 5s, headers: {authorization: Bearer secret-2}, interval: 30s}
storage:
  databases:
    - {name: main, enabled: true, driver: sqlite, path: x.db}
`
  const config = parseConfig(yaml, 'config.yaml', {})
  const shownConfig = JSON.stringify(masked(DiscoveryOptions, config.discovery))
  assert.match(shownConfig, /"interval":"10s"/)
  assert.doesNotMatch(shownConfig, /secret-/)
  const tokens = { token: 'secret-3' }
  const consul = checkOptions(DiscoveryOptions, {
    sources: [
      { type: 'consul', consul: { service: 'x', ...tokens }, backend: { api_key: 'secret-4' } }
    ]
  })
  assert.doesNotMatch(JSON.stringify(masked(DiscoveryOptions, consul)), /secret-/)
})
