import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CHAT, closedPort, fakeBackend, post, startGateway } from './helper.ts'

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
    health_check: { ...CHECK, unhealthy_threshold: 3, healthy_threshold: 2 }
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
  assert.deepEqual(body.backends, { total: 1, available: 1 })
  assert.equal(body.status, 'ok')
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
