import assert from 'node:assert/strict'
import { once } from 'node:events'
import { test } from 'node:test'
import {
  answerChat,
  CHAT,
  closedPort,
  eventually,
  fakeBackend,
  post,
  startGateway,
  type TestGateway
} from './helper.ts'

const PANIC = 'health checks say that every backend is down: requests are tried nevertheless'
const TOKEN = 'admin-token-of-some-length-0123456789'
const CHECK = { enabled: true, interval: '20ms', timeout: '1s', path: '/ok' }

test('a backend goes away after unhealthy_threshold and comes back after healthy_threshold', async t => {
  let status = 200
  const probes: number[] = []
  const flaky = await fakeBackend(t, (request, response) => {
    if (request.url === '/ok') probes.push(status)
    response.writeHead(request.url === '/ok' ? status : 200)
    response.end('{}')
  })
  const gateway = await startGateway(t, {
    backends: [{ name: 'flaky', url: flaky.url }],
    health_check: { ...CHECK, unhealthy_threshold: 3, healthy_threshold: 2, panic: false }
  })
  await flaky.request(1)
  assert.equal((await fetch(`${gateway.url}/health/ready`)).status, 200)

  status = 500
  await gateway.logged({ msg: 'backend is unhealthy', backend: 'flaky', reason: 'status 500' })
  assert.ok(probes.filter(each => each === 500).length >= 3)
  assert.equal((await fetch(`${gateway.url}/health/ready`)).status, 503)
  assert.equal((await fetch(`${gateway.url}/health?ready`)).status, 503)
  assert.equal((await fetch(`${gateway.url}/health`)).status, 200)
  assert.equal(await gateway.metric('llmproxy_backend_up', { backend: 'flaky' }), 0)
  const refused = await post(`${gateway.url}/v1/embeddings`, CHAT)
  assert.equal(refused.status, 503)
  assert.equal((await refused.json()).error.code, 'no_backend')

  status = 200
  await gateway.logged({ msg: 'backend is healthy', backend: 'flaky' })
  assert.ok(probes.slice(probes.lastIndexOf(500)).filter(each => each === 200).length >= 2)
  assert.equal((await fetch(`${gateway.url}/health/ready`)).status, 200)
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 200)
})

test('the first probe decides alone, and the others get the calls', async t => {
  const good = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ name: 'dead', url: `http://127.0.0.1:${await closedPort()}` }, { url: good.url }],
    health_check: { ...CHECK, interval: '60s' }
  })
  await gateway.logged({ msg: 'backend is unhealthy', backend: 'dead', reason: 'ECONNREFUSED' })
  for (let call = 0; call < 4; call++) await post(`${gateway.url}/v1/embeddings`, CHAT)
  assert.equal(await gateway.metric('llmproxy_attempts_total', { backend: 'dead' }), 0)
})

test('method, path, expected_status and timeout are obeyed', async t => {
  const picky = await fakeBackend(t, (request, response) => {
    response.writeHead(request.method === 'HEAD' && request.url === '/base/up' ? 204 : 500)
    response.end()
  })
  const silent = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, {
    backends: [
      { name: 'picky', url: `${picky.url}/base/v1` },
      { name: 'silent', url: silent.url }
    ],
    health_check: {
      ...CHECK,
      method: 'HEAD',
      path: '/up',
      expected_status: 204,
      timeout: '50ms'
    }
  })
  await gateway.logged({ msg: 'backend is unhealthy', backend: 'silent' })
  await picky.request(2)
  assert.equal(await gateway.metric('llmproxy_backend_up', { backend: 'picky' }), 1)
  assert.equal(await gateway.metric('llmproxy_backend_up', { backend: 'silent' }), 0)
})

test('/health says what there is, and no URL', async t => {
  const gateway = await startGateway(t, {
    backends: [{ url: `http://127.0.0.1:${await closedPort()}` }]
  })
  const body = await (await fetch(`${gateway.url}/health`)).json()
  assert.deepEqual(body.backends, { total: 1, available: 0 })
  assert.equal(body.status, 'no_backend')
  assert.doesNotMatch(JSON.stringify(body), /127\.0\.0\.1/)
})

test('a reload does not make one failed probe enough', async t => {
  let status = 200
  const flaky = await fakeBackend(t, (_request, response) => {
    response.writeHead(status)
    response.end('{}')
  })
  const config = (interval: string) => ({
    backends: [{ name: 'flaky', url: flaky.url }],
    health_check: { ...CHECK, interval, unhealthy_threshold: 2 }
  })
  const gateway = await startGateway(t, config('10ms'))
  await flaky.request(1)
  status = 500
  const { parseConfig } = await import('../src/config.ts')
  await gateway.control.reload(parseConfig(JSON.stringify(config('60s')), 'test', {}) as never)
  const probes = flaky.requests.length
  await flaky.request(probes)
  assert.equal(await gateway.metric('llmproxy_backend_up'), 1)
})

test('only failures in a row count', async t => {
  let probes = 0
  const flaky = await fakeBackend(t, (_request, response) => {
    // One success, then two failures and a success by turns: never three failures in a row.
    const status = probes++ % 3 === 0 ? 200 : 500
    response.writeHead(status)
    response.end()
  })
  const gateway = await startGateway(t, {
    backends: [{ name: 'flaky', url: flaky.url }],
    health_check: { ...CHECK, interval: '5ms', unhealthy_threshold: 3 }
  })
  await flaky.request(30)
  assert.ok(!gateway.lines.some(({ msg }) => msg === 'backend is unhealthy'))
})

const ready = async ({ url }: TestGateway) => (await fetch(`${url}/health/ready`)).status
const up = (gateway: TestGateway, backend: string) =>
  gateway.metric('llmproxy_backend_up', { backend })
const call = async ({ url }: TestGateway) => {
  const response = await post(`${url}/v1/chat/completions`, CHAT)
  await response.text()
  return response.status
}

test('a gateway without a backend that can be reached is not ready, and warns once about each at its start', async t => {
  const urls = [0, 1].map(async () => `http://127.0.0.1:${await closedPort()}`)
  const [first, second] = await Promise.all(urls)
  const backends = [
    { name: 'first', url: `${first}/v1`, models: ['m'] },
    { name: 'second', url: second }
  ]
  for (const settings of [
    {},
    { routing: { model_discovery: { enabled: false } } },
    { health_check: { ...CHECK, interval: '60s' } }
  ]) {
    const gateway = await startGateway(t, { backends, ...settings })
    assert.equal(await ready(gateway), 503)
    const { status, backends: counts } = await (await fetch(`${gateway.url}/health`)).json()
    assert.deepEqual([status, counts], ['no_backend', { total: 2, available: 0 }])
    assert.deepEqual([await up(gateway, 'first'), await up(gateway, 'second')], [0, 0])
    assert.deepEqual(
      gateway.lines
        .filter(({ level }) => level === 40)
        .map(({ msg, backend, url, reason }) => ({ msg, backend, url, reason }))
        .toSorted((a, b) => String(a.backend).localeCompare(String(b.backend))),
      [
        { backend: 'first', url: first },
        { backend: 'second', url: second }
      ].map(each => ({ msg: 'backend cannot be reached', ...each, reason: 'ECONNREFUSED' }))
    )
  }
})

test('one reachable backend is enough, and a lone one counts after its first refused connection', async t => {
  const good = await fakeBackend(t, answerChat)
  const dead = `http://127.0.0.1:${await closedPort()}`
  const pair = await startGateway(t, {
    backends: [
      { name: 'good', url: good.url },
      { name: 'dead', url: dead }
    ]
  })
  assert.deepEqual([await ready(pair), await up(pair, 'good'), await up(pair, 'dead')], [200, 1, 0])

  const gateway = await startGateway(t, { backends: [{ name: 'good', url: good.url }] })
  assert.deepEqual([await call(gateway), await ready(gateway)], [200, 200])
  good.server.close()
  good.server.closeAllConnections()
  await once(good.server, 'close')
  await eventually(async () => (await call(gateway)) === 502)
  assert.deepEqual([await ready(gateway), await up(gateway, 'good')], [503, 0])

  // A gateway that is not ready gets no requests: it notices by itself.
  good.server.listen(good.port, '127.0.0.1')
  await gateway.logged({ msg: 'backend can be reached', backend: 'good' })
  assert.deepEqual([await ready(gateway), await up(gateway, 'good')], [200, 1])
})

test('open circuits count, a rest that was asked for does not', async t => {
  let headers = {}
  const bads = await Promise.all(
    [0, 1].map(() =>
      fakeBackend(t, (_request, response) => response.writeHead(503, headers).end('{}'))
    )
  )
  const start = () =>
    startGateway(t, { backends: bads.map(({ url }, at) => ({ name: `b${at}`, url })) })
  const gateway = await start()
  for (let sent = 0; sent < 20; sent++) assert.equal(await call(gateway), 503)
  assert.equal(await ready(gateway), 503)
  assert.deepEqual([await up(gateway, 'b0'), await up(gateway, 'b1')], [0, 0])

  headers = { 'retry-after': '30' }
  const busy = await start()
  for (let sent = 0; sent < 2; sent++) assert.equal(await call(busy), 503)
  assert.equal(await busy.metric('llmproxy_backend_circuit_state'), 2)
  assert.equal(await ready(busy), 200)
})

test('a backend that refuses to list its models to the gateway cannot be called, until a request succeeds', async t => {
  const refusing = await fakeBackend(
    t,
    (request, response, raw) =>
      request.method === 'GET'
        ? response.writeHead(401).end('{}')
        : answerChat(request, response, raw),
    { listsModels: true }
  )
  const gateway = await startGateway(t, { backends: [{ name: 'a', url: refusing.url }] })
  await gateway.logged({ msg: 'backend lists no models', level: 40 })
  assert.deepEqual([await ready(gateway), await up(gateway, 'a')], [503, 0])
  assert.equal(await call(gateway), 200)
  assert.deepEqual([await ready(gateway), await up(gateway, 'a')], [200, 1])
})

test('a backend that fails to list its models cannot be called, until a request succeeds', async t => {
  for (const [listing, expected] of [
    ...[500, 502, 503].map(status => [status, 503] as const),
    ...[404, 405, 501].map(status => [status, 200] as const)
  ]) {
    const backend = await fakeBackend(
      t,
      (request, response, raw) =>
        request.method === 'POST'
          ? answerChat(request, response, raw)
          : response.writeHead(listing).end('{}'),
      { listsModels: true }
    )
    const gateway = await startGateway(t, {
      backends: [{ name: 'a', url: backend.url }],
      routing: { model_discovery: { interval: '10ms' } }
    })
    await gateway.logged({ msg: 'backend lists no models', level: expected === 200 ? 30 : 40 })
    assert.deepEqual([listing, await ready(gateway)], [listing, expected])
    assert.equal(await up(gateway, 'a'), expected === 200 ? 1 : 0)
    assert.equal(await call(gateway), 200)
    // Each question is one or two requests; the third one comes after the answer to the first.
    await backend.request(backend.requests.length + 4)
    assert.deepEqual([listing, await ready(gateway)], [listing, 200], 'the same answer again')
  }
})

test('when health checks alone say that all are down requests are tried; health_check.panic: false rejects them', async t => {
  let status = 404
  const wrongPath = await fakeBackend(t, (request, response, raw) =>
    request.url === '/ok' ? response.writeHead(status).end() : answerChat(request, response, raw)
  )
  const config = (panic: boolean) => ({
    backends: [
      { name: 'up', url: wrongPath.url },
      { name: 'dead', url: `http://127.0.0.1:${dead}` }
    ],
    health_check: { ...CHECK, panic },
    admin: { enabled: true, token: TOKEN }
  })
  const dead = await closedPort()
  const gateway = await startGateway(t, config(true))
  const turn = (action: string) =>
    post(`${gateway.url}/admin/backends/up/${action}`, {}, { authorization: `Bearer ${TOKEN}` })
  await gateway.logged({ level: 40, msg: `${PANIC} (health_check.panic)` })
  for (let sent = 0; sent < 4; sent++) assert.equal(await call(gateway), 200)
  assert.equal(await gateway.metric('llmproxy_attempts_total', { backend: 'dead' }), 0)
  assert.equal(await gateway.metric('llmproxy_health_check_panic'), 1)
  assert.equal(await up(gateway, 'up'), 0)
  const health = await fetch(`${gateway.url}/health/ready`)
  assert.deepEqual([health.status, (await health.json()).status], [200, 'panic'])

  await turn('drain')
  assert.deepEqual([await call(gateway), await ready(gateway)], [503, 503])
  await turn('undrain')
  assert.equal(await call(gateway), 200)

  status = 200
  await gateway.logged({ msg: 'backend is healthy', backend: 'up' })
  await gateway.logged({ msg: 'health checks decide again which backends get requests' })
  assert.equal(await gateway.metric('llmproxy_health_check_panic'), 0)

  status = 404
  const strict = await startGateway(t, config(false))
  await strict.logged({ msg: 'backend is unhealthy', backend: 'up' })
  assert.deepEqual([await call(strict), await ready(strict)], [503, 503])
})
