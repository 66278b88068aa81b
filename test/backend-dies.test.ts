import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setTimeout } from 'node:timers/promises'
import {
  CHAT,
  chunk,
  events,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  writable
} from './helper.ts'

/** A stream in each API that the backend cuts after its first event, and what the client must see. */
const STREAMS = [
  {
    path: '/v1/chat/completions',
    type: 'text/event-stream',
    first: chunk('Hi'),
    last: /data: \{"error":\{"message":"The backend broke off.*"code":"backend_failed"\}\}\n\n/
  },
  {
    path: '/v1/responses',
    type: 'text/event-stream',
    first:
      'event: response.created\ndata: {"type":"response.created","response":{"id":"r1"}}\n\n' +
      'event: response.in_progress\ndata: {"type":"response.in_progress","sequence_number":true}\n\n',
    last: /event: error\ndata: \{"type":"error","sequence_number":1,"code":"backend_failed","message":.*\n\nevent: response.failed\ndata: \{"type":"response.failed","sequence_number":2,"response":\{"id":"r1",.*"status":"failed","error":\{"code":"server_error","message":"The backend broke/
  },
  {
    path: '/v1/messages',
    type: 'text/event-stream',
    first: 'event: ping\ndata: {"type":"ping"}\n\n',
    last: /event: error\ndata: \{"type":"error","error":\{"type":"api_error","message":.*"request_id":"req_/
  },
  {
    path: '/api/chat',
    type: 'application/x-ndjson',
    first: '{"model":"m","message":{"role":"assistant","content":"Hi"},"done":false}\n',
    last: /\{"error":"The backend broke off[^"]*"\}\n/
  }
]

for (const { path, type, first, last } of STREAMS) {
  const isFailed = path === '/v1/responses'
  test(`${path}: a backend that dies in the middle of a stream is no ${isFailed ? 'completed response' : 'clean end'}`, async t => {
    const backend = await fakeBackend(t, (_request, response, raw) => {
      response.writeHead(200, { 'content-type': type })
      response.write(first, () => raw.socket.destroy())
    })
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    const body = JSON.stringify({ ...CHAT, stream: true })
    const client = await rawClient(t, gateway.port, rawPost(path, body))
    // `response.failed` is an end of its own: clients that see a broken connection after it repeat the request.
    if (isFailed) await client.until(/\r\n0\r\n\r\n$/)
    else await client.closed
    assert.match(client.received, /^HTTP\/1.1 200 /)
    assert.ok(client.received.includes(first))
    assert.match(client.received, last)
    assert.doesNotMatch(client.received, /\[DONE\]/)
    if (!isFailed) {
      assert.doesNotMatch(client.received, /\r\n0\r\n/, 'no end of a chunked body')
    }
    const line = await gateway.logged({ msg: 'exchange' })
    assert.equal(line.outcome, 'backend_failed')
    assert.equal(line.error, 'backend_failed')
    assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
  })
}

test('a whole answer that breaks off is not completed', async t => {
  const backend = await fakeBackend(t, (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'application/json', 'content-length': 100 })
    response.write('{"id":"x"', () => raw.socket.destroy())
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const client = await rawClient(t, gateway.port, rawPost('/v1/embeddings', JSON.stringify(CHAT)))
  await client.closed
  assert.match(client.received, /\{"id":"x"$/)
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'backend_failed')
})

test('a stream that only the closed connection ends, without saying so, is no clean end', async t => {
  const backend = await fakeBackend(t, (_request, _response, raw) => {
    const head = 'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n'
    raw.socket.end(head + chunk('Hi'))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.closed
  assert.match(client.received, /"code":"backend_failed"/)
  assert.doesNotMatch(client.received, /\r\n0\r\n/)
})

test('a stream that the closed connection ends after [DONE] is complete', async t => {
  const backend = await fakeBackend(t, (_request, _response, raw) => {
    const head = 'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n'
    raw.socket.end(`${head}${chunk('Hi')}data: [DONE]\n\n`)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/\r\n0\r\n/)
  assert.equal(events(client.received).at(-1), '[DONE]')
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'ok')
})

test('a backend that falls silent in a stream is cut after idle_timeout', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, idle_timeout: '200ms' }]
  })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.closed
  assert.match(client.received, /"code":"backend_timeout"/)
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'timed_out')
  await (await backend.request()).closed
})

test('a backend that sends no head in time is a 504', async t => {
  const backend = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    routing: { timeout: '200ms' }
  })
  const client = await rawClient(t, gateway.port, rawPost('/v1/embeddings', JSON.stringify(CHAT)))
  await client.until(/backend_timeout/)
  assert.match(client.received, /^HTTP\/1.1 504 /)
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'timed_out')
  await (await backend.request()).closed
})

test('timeouts are kept to the tenth of a second', async t => {
  const silent = await fakeBackend(t, () => {})
  const stuck = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    for (const at of [0, 60, 120, 180]) globalThis.setTimeout(() => response.write(chunk('Hi')), at)
  })
  const body = JSON.stringify({ ...CHAT, stream: true })
  for (const [backend, least] of [
    [silent, 100],
    [stuck, 280]
  ] as const) {
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      routing: { timeout: '100ms', idle_timeout: '100ms' }
    })
    const begin = performance.now()
    const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
    await client.until(/"code":"backend_timeout"/)
    const ms = performance.now() - begin
    assert.ok(ms >= least && ms < least + 250, `${ms} ms`)
  }
})

test('a slow client is no silence of the backend', async t => {
  const big = 'x'.repeat(64 * 1024)
  const backend = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    for (let at = 0; at < 300; at++) if (!response.write(chunk(big))) await writable(response)
    response.end('data: [DONE]\n\n')
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    routing: { idle_timeout: '100ms' }
  })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  client.socket.pause()
  await setTimeout(500)
  client.socket.resume()
  await client.until(/\[DONE\]/)
})

for (const head of [true, false]) {
  test(`routing.timeout counts until the first byte of an answer ${head ? 'whose head came' : 'without a head'}`, async t => {
    const backend = await fakeBackend(t, (_request, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      if (head) response.flushHeaders()
      globalThis.setTimeout(() => response.end(`${chunk('Hi')}data: [DONE]\n\n`), 400)
    })
    const ask = async (timeout: string) => {
      const gateway = await startGateway(t, {
        backends: [{ url: backend.url }],
        routing: { timeout, idle_timeout: '100ms' }
      })
      return post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
    }
    assert.match(await (await ask('5s')).text(), /\[DONE\]/)
    const late = await ask('200ms')
    assert.equal(late.status, 504)
    assert.equal((await late.json()).error.code, 'backend_timeout')
  })
}

test('an upload may take longer than routing.timeout, its answer may not', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json' })
    response.flushHeaders()
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    routing: { timeout: '200ms' }
  })
  const head =
    'POST /v1/audio/transcriptions HTTP/1.1\r\nhost: g\r\ncontent-type: audio/wav\r\ncontent-length: 8\r\n\r\n'
  const client = await rawClient(t, gateway.port, `${head}1234`)
  await setTimeout(600)
  assert.equal(client.received, '')
  const begin = performance.now()
  client.socket.write('5678')
  await client.until(/^HTTP\/1.1 504 /)
  assert.ok(performance.now() - begin < 400)
})

const NOT_HTTP = {
  'another protocol': 'SSH-2.0-OpenSSH_9.9\r\n',
  'a status that does not exist': 'HTTP/1.1 600 What\r\ncontent-length: 2\r\n\r\n{}',
  'a head above 64 KB': `HTTP/1.1 200 OK\r\nx-large: ${'x'.repeat(70_000)}\r\ncontent-length: 2\r\n\r\n{}`
}

for (const [name, sent] of Object.entries(NOT_HTTP)) {
  test(`a backend that answers with ${name} is a 502 that says so`, async t => {
    const backend = await fakeBackend(t, (_request, _response, raw) => raw.socket.end(sent))
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    const answer = await post(`${gateway.url}/v1/embeddings`, CHAT)
    assert.equal(answer.status, 502)
    const { error } = (await answer.json()) as { error: { code: string; message: string } }
    assert.equal(error.code, 'backend_failed')
    assert.match(error.message, /not valid HTTP/)
  })
}

test('a large head of an answer passes', async t => {
  const large = 'x'.repeat(20_000)
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'x-large': large }).end('{}')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const client = await rawClient(t, gateway.port, rawPost('/v1/embeddings', JSON.stringify(CHAT)))
  await client.until(/\r\n\r\n\{\}/)
  assert.ok(client.received.includes(large))
})

const START = 'event: message_start\ndata: {"type":"message_start"}\n\n'
const LINE = '{"message":{"content":"he"}}\n'
const HALVES = [
  {
    path: '/v1/chat/completions',
    asked: true,
    sent: `${chunk('Hi')}data: {"choices":[{"delta":{"con`,
    before: 'con\n\n'
  },
  { path: '/v1/chat/completions', asked: false, sent: `${chunk('Hi')}data: {"cho`, before: '\n\n' },
  {
    path: '/v1/messages',
    asked: false,
    sent: `${START}event: content_bl`,
    before: 'content_bl\n\n'
  },
  { path: '/v1/messages', asked: false, sent: `${START}event: ping\n`, before: 'ping\n\n' },
  { path: '/api/chat', asked: false, sent: `${LINE}${LINE.slice(0, 25)}`, before: 'he\n' }
]

for (const { path, asked, sent, before } of HALVES) {
  test(`${path}: the error event stands alone when a backend dies after ${JSON.stringify(sent)}`, async t => {
    const type = path === '/api/chat' ? 'application/x-ndjson' : 'text/event-stream'
    const backend = await fakeBackend(t, (_request, response, raw) => {
      response.writeHead(200, { 'content-type': type })
      response.write(sent, () => raw.socket.destroy())
    })
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    const options = asked ? { stream_options: { include_usage: true } } : {}
    const body = JSON.stringify({ ...CHAT, stream: true, ...options })
    const client = await rawClient(t, gateway.port, rawPost(path, body))
    await client.closed
    const plain = client.received.replaceAll(/\r\n[0-9a-f]+\r\n/g, '')
    const at = plain.search(/data: \{"error"|event: error|\{"error"/)
    assert.ok(at > 0, plain)
    assert.ok(plain.slice(0, at).endsWith(before), plain)
  })
}

test('a stream with a content-length that breaks off is no clean end either', async t => {
  const backend = await fakeBackend(t, (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream', 'content-length': 300 })
    response.write(chunk('Hi'), () => raw.socket.destroy())
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const response = await fetch(`${gateway.url}/v1/chat/completions`, {
    method: 'POST',
    body: JSON.stringify({ ...CHAT, stream: true })
  })
  await assert.rejects(response.text())
})

test('a compressed stream that ends without saying so is no clean end', async t => {
  const { gzipSync } = await import('node:zlib')
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream', 'content-encoding': 'gzip' })
    response.end(gzipSync(chunk('Hi')))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.closed
  assert.match(client.received, /"content":"Hi"[\s\S]*"code":"backend_failed"/)
  assert.doesNotMatch(client.received, /\r\n0\r\n/)
})

test('a compressed stream that breaks off says so in plain', async t => {
  const { createGzip } = await import('node:zlib')
  const backend = await fakeBackend(t, (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream', 'content-encoding': 'gzip' })
    const gzip = createGzip()
    gzip.on('data', data => response.write(data))
    gzip.write(chunk('Hi'))
    gzip.flush(() => setImmediate(() => raw.socket.destroy()))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.closed
  assert.match(client.received, /"content":"Hi"[\s\S]*"code":"backend_failed"/)
  assert.doesNotMatch(client.received, /\r\n0\r\n/)
})
