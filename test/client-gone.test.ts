import assert from 'node:assert/strict'
import { existsSync, readFileSync } from 'node:fs'
import { test } from 'node:test'
import {
  CHAT,
  chunk,
  eventually,
  fakeBackend,
  fullPort,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'

/** `npm run test:long` holds the figure; here a busy machine may take its time. */
const SOON = process.env.STRICT ? 100 : 5_000

/** Resolves to how long it took in ms until the backend's connection was closed. */
async function timed(closed: Promise<unknown>): Promise<number> {
  const start = performance.now()
  await closed
  return performance.now() - start
}

const LIMITS = { rate_limit: { enabled: true, per_key: { max_concurrent: 1 } } }

async function assertNothingIsLeft(gateway: Awaited<ReturnType<typeof startGateway>>) {
  const line = await gateway.logged({ msg: 'exchange' })
  assert.equal(line.outcome, 'client_gone')
  assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
  assert.equal(gateway.fastify.server.listening, true)
  return line
}

for (const stream of [true, false]) {
  test(`gone before the head of the answer, stream: ${stream}`, async t => {
    const backend = await fakeBackend(t, () => {})
    const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...LIMITS })
    const body = JSON.stringify({ ...CHAT, stream })
    const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
    const seen = await backend.request()
    client.socket.destroy()
    assert.ok((await timed(seen.closed)) < SOON)
    const line = await assertNothingIsLeft(gateway)
    assert.equal(line.status, 499)
    assert.equal(await gateway.metric('llmproxy_attempts_total', { result: 'cancelled' }), 1)
  })
}

test('gone in the middle of a stream', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    response.write(chunk(' you'))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...LIMITS })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/you/)
  const seen = await backend.request()
  client.socket.destroy()
  assert.ok((await timed(seen.closed)) < SOON)
  const line = await assertNothingIsLeft(gateway)
  assert.equal(line.completionTokens, 2)
  assert.equal(line.exactness, 'counted')
  assert.ok(Number(line.promptTokens) > 0)
})

test('gone in the middle of a whole answer', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json', 'content-length': 1000 })
    response.write('{"id":')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...LIMITS })
  const client = await rawClient(t, gateway.port, rawPost('/v1/embeddings', JSON.stringify(CHAT)))
  await client.until(/"id"/)
  const seen = await backend.request()
  client.socket.destroy()
  assert.ok((await timed(seen.closed)) < SOON)
  await assertNothingIsLeft(gateway)
})

test('gone while waiting between two attempts', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(503)
    response.end('{}')
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    routing: { retry: { enabled: true, initial_wait: '60s', max_wait: '60s' } }
  })
  const client = await rawClient(t, gateway.port, rawPost('/v1/embeddings', JSON.stringify(CHAT)))
  await gateway.logged({ msg: 'attempt failed' })
  client.socket.destroy()
  const line = await assertNothingIsLeft(gateway)
  assert.equal(line.attempts, 1)
  assert.equal(backend.requests.length, 1)
})

const NO_PROC = existsSync('/proc/net/tcp') ? false : 'needs /proc/net/tcp (Linux)'

test('gone while the connection to the backend is being opened', { skip: NO_PROC }, async t => {
  const port = await fullPort(t)
  const gateway = await startGateway(t, {
    backends: [{ url: `http://127.0.0.1:${port}` }],
    routing: { connect_timeout: '60s', model_discovery: { enabled: false } }
  })
  const client = await rawClient(t, gateway.port, rawPost('/v1/embeddings', JSON.stringify(CHAT)))
  // The other one is the gateway's own, by which it finds out whether the backend can be reached.
  await eventually(() => opening(port) === 2)
  client.socket.destroy()
  const start = performance.now()
  await eventually(() => opening(port) < 2)
  assert.ok(performance.now() - start < SOON)
  await assertNothingIsLeft(gateway)
})

test('gone while the body is still on its way', async t => {
  const backend = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...LIMITS })
  const text = rawPost('/v1/embeddings', '{"model":"m"}').replace('length: 13', 'length: 1000')
  const client = await rawClient(t, gateway.port, text)
  await eventually(async () => (await gateway.metric('llmproxy_requests_in_flight')) === 1)
  client.socket.destroy()
  await eventually(async () => (await gateway.metric('llmproxy_requests_in_flight')) === 0)
  assert.equal(backend.requests.length, 0)
})

test('a slot comes back however a call ends', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...LIMITS })
  const text = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }))
  for (let round = 0; round < 3; round++) {
    const client = await rawClient(t, gateway.port, text)
    await client.until(/Hi/)
    const refused = await rawClient(t, gateway.port, text)
    assert.match(await refused.until(/\}\}/), /^HTTP\/1.1 429 /)
    refused.socket.destroy()
    client.socket.destroy()
    await eventually(async () => (await gateway.metric('llmproxy_requests_in_flight')) === 0)
  }
  assert.equal(backend.requests.length, 3)
})

/** Connections to this port that wait for their SYN to be answered (state 02). */
function opening(port: number): number {
  const remote = `0100007F:${port.toString(16).toUpperCase().padStart(4, '0')}`
  return readFileSync('/proc/net/tcp', 'utf8')
    .split('\n')
    .filter(line => line.trim().split(/\s+/)[2] === remote && line.trim().split(/\s+/)[3] === '02')
    .length
}
