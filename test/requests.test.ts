import assert from 'node:assert/strict'
import { once } from 'node:events'
import { request } from 'node:http'
import { connect } from 'node:net'
import { test } from 'node:test'
import { brotliCompressSync, deflateSync, gzipSync, zstdCompressSync } from 'node:zlib'
import { parseConfig } from '../src/config.ts'
import { answerChat, CHAT, fakeBackend, post, rawClient, startGateway } from './helper.ts'

/** Requests as clients and proxies really send them: compressed, refused early, in absolute form, with odd paths. */

const BODY = JSON.stringify(CHAT)
const PATH = '/v1/chat/completions'
const KEYS = { auth: { keys: ['sk-test'] } }

const CODINGS: [string, (body: Buffer) => Buffer][] = [
  ['gzip', gzipSync],
  ['x-gzip', gzipSync],
  ['GZIP', gzipSync],
  ['deflate', deflateSync],
  ['br', brotliCompressSync],
  ['zstd', zstdCompressSync],
  ['gzip, zstd', body => zstdCompressSync(gzipSync(body))],
  ['identity', body => body],
  ['Identity', body => body],
  ['', body => body]
]

for (const [coding, encode] of CODINGS) {
  test(`a body with content-encoding "${coding}" reaches the backend plain`, async t => {
    const backend = await fakeBackend(t, answerChat)
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    const large = JSON.stringify({ ...CHAT, user: 'x'.repeat(300_000) })
    for (const body of [BODY, large]) {
      const sent = encode(Buffer.from(body))
      const head = `POST ${PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-encoding: ${coding}\r\ncontent-length: ${sent.length}\r\n\r\n`
      const client = connect(gateway.port, '127.0.0.1')
      client.write(head)
      client.write(sent)
      const [answer] = await once(client, 'data')
      assert.match(String(answer), /^HTTP\/1.1 200/)
      client.destroy()
      const seen = backend.requests.at(-1)!
      assert.equal(JSON.parse(seen.body).user, JSON.parse(body).user)
      assert.equal(seen.headers['content-encoding'], undefined)
      assert.equal(Number(seen.headers['content-length']), Buffer.byteLength(seen.body))
    }
  })
}

test('a compressed body is bounded by its decoded size', async t => {
  const gateway = await startGateway(t, {
    server: { max_body_size: '1MB' },
    backends: [{ url: 'http://127.0.0.1:1' }]
  })
  const bomb = gzipSync(Buffer.from(`{"model":"m","x":"${'0'.repeat(50_000_000)}"}`))
  assert.ok(bomb.length < 100_000)
  const response = await fetch(gateway.url + PATH, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'content-encoding': 'gzip' },
    body: bomb
  })
  assert.equal(response.status, 413)
})

test('a body that is not what its content-encoding says is a 400 that says so', async t => {
  const gateway = await startGateway(t, { backends: [{ url: 'http://127.0.0.1:1' }] })
  const cut = gzipSync(Buffer.from(BODY)).subarray(0, 30)
  for (const body of [Buffer.from(BODY), cut]) {
    const response = await fetch(gateway.url + PATH, {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'content-encoding': 'gzip' },
      body
    })
    assert.equal(response.status, 400)
    assert.match(await response.text(), /content-encoding: the body is not coded like that/)
  }
})

test('a byte order mark before the body is left out', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const response = await post(gateway.url + PATH, `\ufeff${BODY}` as never)
  assert.equal(response.status, 200)
  assert.equal(backend.requests[0]!.body, BODY)
})

/** Sends a whole large body and reads the response, as SDKs do. */
function upload(port: number, path: string, size: number, headers = {}): Promise<number> {
  return new Promise((resolve, reject) => {
    const sent = request(
      { port, path, method: 'POST', headers: { 'content-type': 'application/json', ...headers } },
      response => response.resume().on('end', () => resolve(response.statusCode!))
    )
    sent.on('error', reject)
    // In one write: the response comes while most of it has not been sent.
    sent.end(`{"model":"m","x":"${'x'.repeat(size)}"}`)
  })
}

for (const size of [400_000, 3_000_000, 12_000_000]) {
  test(`a rejected body of ${size} bytes does not hide its response`, async t => {
    const gateway = await startGateway(t, {
      ...KEYS,
      server: { max_body_size: '2MB' },
      rate_limit: { per_key: { requests_per_minute: 1 } },
      backends: [{ url: 'http://127.0.0.1:1' }]
    })
    const key = { authorization: 'Bearer sk-test' }
    const length = size + 20
    for (let round = 0; round < 3; round++) {
      assert.equal(await upload(gateway.port, PATH, size), 401)
      assert.equal(await upload(gateway.port, '/v1/audio/transcriptions', size), 401)
      assert.equal(await upload(gateway.port, '/nothing', size), 401)
      assert.equal(await upload(gateway.port, PATH, size, { 'content-length': length }), 401)
      if (size > 2_000_000) assert.equal(await upload(gateway.port, PATH, size, key), 413)
      else await upload(gateway.port, PATH, size, key)
      if (size < 2_000_000 && round > 0) {
        assert.equal(await upload(gateway.port, PATH, size, key), 429)
      }
    }
  })
}

test('a rejected upload without an end is closed', async t => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  const gateway = await startGateway(t, { ...KEYS, backends: [{ url: 'http://127.0.0.1:1' }] })
  const head = `POST ${PATH} HTTP/1.1\r\nhost: a\r\ncontent-length: 9000000\r\n\r\n`
  const client = connect(gateway.port, '127.0.0.1')
  client.write(head)
  const [answer] = await once(client, 'data')
  assert.match(String(answer), /^HTTP\/1.1 401[\s\S]*connection: close/i)
  client.resume()
  await once(client, 'end')
  client.on('error', () => {})
  const closed = once(client, 'close')
  t.mock.timers.tick(5_000)
  await closed
})

test('a rejection that a retry cannot fix says so', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    ...KEYS,
    backends: [{ url: backend.url, models: ['m'] }]
  })
  const key = { authorization: 'Bearer sk-test' }
  const cases: [number, Promise<Response>][] = [
    [400, post(gateway.url + PATH, '{' as never, key)],
    [401, post(gateway.url + PATH, CHAT)],
    [401, post(`${gateway.url}/v1/messages`, CHAT)],
    [401, post(`${gateway.url}/api/chat`, CHAT)],
    [404, post(gateway.url + PATH, { ...CHAT, model: 'none' }, key)],
    [404, post(`${gateway.url}/v1/nothing`, CHAT, key)]
  ]
  for (const [status, sent] of cases) {
    const response = await sent
    assert.equal(response.status, status)
    assert.equal(response.headers.get('x-should-retry'), 'false')
  }
})

test('a WebSocket is a 426 where clients fall back to a POST', async t => {
  const gateway = await startGateway(t, { ...KEYS, backends: [{ url: 'http://127.0.0.1:1' }] })
  for (const [path, status] of [
    ['/v1/responses', 426],
    ['/v1/responses?x=1', 426],
    ['/responses', 426],
    ['/v1/realtime', 404]
  ] as const) {
    const upgrade = `GET ${path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer sk-test\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n`
    const client = await rawClient(t, gateway.port, upgrade)
    await client.until(new RegExp(`^HTTP/1.1 ${status} `))
  }
})

test('two Host headers are a 400, and a target in absolute form is one of this server', async t => {
  const gateway = await startGateway(t, { backends: [{ url: 'http://127.0.0.1:1' }] })
  const two = await rawClient(t, gateway.port, 'GET /health HTTP/1.1\r\nhost: a\r\nHost: b\r\n\r\n')
  await two.until(/^HTTP\/1.1 400 [\s\S]*more than one Host/)
  for (const target of ['http://a/health', 'HTTP://a:80/health?x=1', 'https://a/health/']) {
    const text = `GET ${target} HTTP/1.1\r\nhost: a\r\n\r\n`
    const client = await rawClient(t, gateway.port, text)
    await client.until(/^HTTP\/1.1 200 /)
  }
  const odd = await rawClient(
    t,
    gateway.port,
    'GET http://a/v1/../health HTTP/1.1\r\nhost: a\r\n\r\n'
  )
  await odd.until(/^HTTP\/1.1 400 /)
})

test('a slash at the end of a path changes nothing, and probes have their usual names', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    ...KEYS,
    backends: [{ url: backend.url, models: ['m'] }]
  })
  const key = { authorization: 'Bearer sk-test' }
  for (const path of ['/health', '/health/ready', '/healthz', '/livez', '/readyz']) {
    assert.equal((await fetch(gateway.url + path)).status, 200, path)
    assert.equal((await fetch(`${gateway.url}${path}/`)).status, 200, path)
  }
  const list = await fetch(`${gateway.url}/v1/models/`, { headers: key })
  const { data } = (await list.json()) as { data: { id: string }[] }
  assert.deepEqual(
    data.map(({ id }) => id),
    ['m']
  )
  assert.equal((await post(`${gateway.url}${PATH}/`, CHAT, key)).status, 200)
  assert.equal(backend.requests.at(-1)!.url, PATH)
})

test('an explicit timeout is more than the default of another one', () => {
  const timeouts = (server: string) => {
    const config = `server: ${server}\nbackends: [{ url: "http://127.0.0.1:1" }]`
    const { header_timeout, read_timeout } = parseConfig(config, 'test.yaml', {}).server
    return [header_timeout, read_timeout]
  }
  assert.deepEqual(timeouts('{ read_timeout: 2s }'), [2_000, 2_000])
  assert.deepEqual(timeouts('{ header_timeout: 10m }'), [600_000, 600_000])
  assert.deepEqual(timeouts('{ read_timeout: 1m }'), [10_000, 60_000])
  assert.throws(() => timeouts('{ read_timeout: 2s, header_timeout: 3s }'), /read_timeout/)
})

test('browsers may send and read what SDKs do', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    server: { cors: { enabled: true, allowed_origins: ['https://ui.example'] } },
    backends: [{ url: backend.url }]
  })
  const wanted = 'x-stainless-os, anthropic-version, anthropic-dangerous-direct-browser-access'
  const preflight = await fetch(gateway.url + PATH, {
    method: 'OPTIONS',
    headers: {
      origin: 'https://ui.example',
      'access-control-request-method': 'POST',
      'access-control-request-headers': wanted
    }
  })
  assert.equal(preflight.status, 204)
  assert.equal(preflight.headers.get('access-control-allow-headers'), wanted)
  const response = await post(gateway.url + PATH, CHAT, { origin: 'https://ui.example' })
  const exposed = response.headers.get('access-control-expose-headers')!.split(', ')
  for (const name of ['retry-after', 'x-request-id', 'request-id', 'x-should-retry']) {
    assert.ok(exposed.includes(name), name)
  }
  assert.ok(exposed.includes('x-ratelimit-remaining-requests'))
  assert.ok(exposed.includes('anthropic-ratelimit-tokens-reset'))
})
