import assert from 'node:assert/strict'
import { once } from 'node:events'
import { connect } from 'node:net'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect as connectTls } from 'node:tls'
import { CHAT, fakeBackend, post, rawClient, rawPost, startGateway } from './helper.ts'

/** A gateway over a backend that must never be reached. */
async function unreached(t: TestContext, config: object = {}) {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...config })
  t.after(() => assert.equal(backend.requests.length, 0, 'no backend may be reached'))
  return gateway
}

const BODIES: [string, string][] = [
  ['nothing', ''],
  ['an array', '[]'],
  ['null', 'null'],
  ['text', '"hello"'],
  ['half an object', '{"model": "m"'],
  ['two objects', '{"model":"m"}{"model":"n"}'],
  ['an object and more', '{"model":"m"} x'],
  ['two byte order marks', '\ufeff\ufeff{"model":"m"}'],
  ['a single quote', "{'model':'m'}"],
  ['a number as model', '{"model": 1}'],
  ['a book as model', `{"model": "${'m'.repeat(1001)}"}`],
  ['text as stream', '{"stream": "true"}'],
  ['deep nesting', '['.repeat(100_000)]
]

test('a body that is not exactly one JSON object is a 400 in the dialect of the route', async t => {
  const gateway = await unreached(t)
  for (const [name, body] of BODIES) {
    for (const path of ['/v1/chat/completions', '/v1/messages', '/api/chat', '/v1/responses']) {
      const response = await post(gateway.url + path, body)
      assert.equal(response.status, 400, `${name} at ${path}`)
      const { error, type } = await response.json()
      if (path === '/v1/messages') {
        assert.equal(type, 'error')
        assert.equal(error.type, 'invalid_request_error')
      } else if (path === '/api/chat') assert.equal(typeof error, 'string')
      else assert.deepEqual(Object.keys(error), ['message', 'type', 'param', 'code'])
    }
  }
  const invalid = Buffer.concat([Buffer.from('{"model":"'), Buffer.of(0xff), Buffer.from('"}')])
  const response = await fetch(`${gateway.url}/v1/embeddings`, { method: 'POST', body: invalid })
  assert.equal(response.status, 400)
})

test('what is wrong with a body is said without repeating it', async t => {
  const gateway = await unreached(t)
  const response = await post(`${gateway.url}/v1/embeddings`, '{"password": hunter2}')
  const text = await response.text()
  assert.match(text, /byte 14 must be a value/)
  assert.doesNotMatch(text, /hunter2|password/)
  await gateway.logged({ msg: 'exchange' })
  assert.doesNotMatch(JSON.stringify(gateway.lines), /hunter2/)
})

test('a body in an unknown content coding is a 415', async t => {
  const gateway = await unreached(t)
  const response = await post(`${gateway.url}/v1/embeddings`, CHAT, { 'content-encoding': 'lzma' })
  assert.equal(response.status, 415)
  assert.match(await response.text(), /gzip, deflate, br, zstd or identity/)
})

test('identity is no encoding, and an empty content-type is none', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  for (const header of ['content-encoding: identity', 'content-type:']) {
    const body = JSON.stringify(CHAT)
    const text = rawPost('/v1/embeddings', body, [header])
    const plain = header === 'content-type:' ? text.replace(/content-type: .*\r\n/i, '') : text
    const client = await rawClient(t, gateway.port, plain)
    assert.match(await client.until(/\{\}/), /^HTTP\/1.1 200 /)
  }
})

test('a body over max_body_size is a 413 before it has been sent', async t => {
  const gateway = await unreached(t, { server: { max_body_size: '1KB' } })
  for (const path of ['/v1/chat/completions', '/v1/audio/transcriptions']) {
    const head = rawPost(path, '').replace('content-length: 0', 'content-length: 1000000000')
    const client = await rawClient(t, gateway.port, head)
    assert.match(await client.until(/\}\}/), /^HTTP\/1.1 413 [\s\S]*"code":"body_too_large"/)
  }
  const client = await rawClient(t, gateway.port)
  client.socket.write(
    `POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n800\r\n${' '.repeat(2048)}\r\n`
  )
  assert.match(await client.until(/\}\}/), /^HTTP\/1.1 413 /)
})

test('an upload that grows over max_body_size is a 413', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    server: { max_body_size: '1KB' }
  })
  const client = await rawClient(t, gateway.port)
  client.socket.write(
    `POST /v1/audio/transcriptions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n800\r\n${' '.repeat(2048)}\r\n`
  )
  assert.match(await client.until(/\}\}/), /^HTTP\/1.1 413 [\s\S]*"code":"body_too_large"/)
  assert.equal(backend.requests.length, 0)
})

const ODD_REQUESTS: [string, string][] = [
  [
    'two different lengths',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}'
  ],
  [
    'two equal lengths',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\n{}'
  ],
  [
    'a list of lengths',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ncontent-length: 2, 2\r\n\r\n{}'
  ],
  ['a negative length', 'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ncontent-length: -2\r\n\r\n{}'],
  [
    'a length and chunks',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n'
  ],
  [
    'an unknown coding',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ntransfer-encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n'
  ],
  [
    'chunks that are not last',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked, identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n'
  ],
  [
    'a folded header',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\nx-a: b\r\n c\r\ncontent-length: 2\r\n\r\n{}'
  ],
  [
    'a space before the colon',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ncontent-length : 2\r\n\r\n{}'
  ],
  ['a bare line feed', 'POST /v1/embeddings HTTP/1.1\nhost: g\ncontent-length: 2\n\n{}'],
  ['no host', 'POST /v1/embeddings HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}'],
  [
    'a null byte',
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\nx-a: b\0c\r\ncontent-length: 2\r\n\r\n{}'
  ],
  ['no HTTP at all', 'hello\r\n\r\n']
]

for (const [name, text] of ODD_REQUESTS) {
  test(`a request with ${name} is a 400`, async t => {
    const gateway = await unreached(t)
    const client = await rawClient(t, gateway.port, text)
    await client.until(/^HTTP\/1.1 400 /)
  })
}

const ODD_PATHS = [
  '//v1/models',
  '/v1//models',
  '/v1/../v1/models',
  '/v1/models/..',
  '/v1/models/../../pause',
  '/v1/models/%2e%2e/pause',
  '/v1/models/%2E./pause',
  '/v1/models/..%2fpause',
  '/v1/models/x%2f..%2f..%2fpause',
  '/v1/models/%252e%252e/pause',
  '/v1/models/..\\pause',
  '/v1/models/%5c..%5cpause',
  '/v1/models/x%00',
  '/v1/./models',
  'http://backend:8000//v1/models',
  'http://backend:8000/pause',
  '*',
  '/v1/models%3fx'
]

test('tricks with paths are a 400 or a 404', async t => {
  const gateway = await unreached(t)
  for (const path of ODD_PATHS) {
    const client = await rawClient(t, gateway.port, `GET ${path} HTTP/1.1\r\nhost: g\r\n\r\n`)
    assert.match(await client.until(/\}\}|400/), /^HTTP\/1.1 40[04] /, path)
    client.socket.destroy()
  }
  const client = await rawClient(t, gateway.port, 'CONNECT backend:80 HTTP/1.1\r\nhost: g\r\n\r\n')
  await client.closed
  assert.doesNotMatch(client.received, / 200 /)
})

const CONTROL = [
  'GET /',
  'POST /pause',
  'POST /collective_rpc',
  'POST /v1/load_lora_adapter',
  'POST /invocations',
  'POST /api/pull',
  'POST /api/push',
  'DELETE /api/delete',
  'POST /api/create',
  'POST /api/copy',
  'POST /flush_cache',
  'POST /abort_request',
  'GET /props',
  'GET /slots',
  'GET /server_info',
  'GET /v1/chat/completions',
  'PUT /v1/models',
  'DELETE /v1/models/m',
  'TRACE /v1/models',
  'POST /inference/v1/generate',
  'GET /v1/responses'
]

test('everything that is not declared is a 404 in JSON', async t => {
  const gateway = await unreached(t)
  for (const line of CONTROL) {
    const text = `${line} HTTP/1.1\r\nhost: g\r\ncontent-length: 0\r\n\r\n`
    const client = await rawClient(t, gateway.port, text)
    const received = await client.until(/\}\}?$/)
    assert.match(received, /^HTTP\/1.1 404 /, line)
    assert.match(received, /content-type: application\/json/)
    assert.match(received, /x-llmproxy-request-id: req_/)
    client.socket.destroy()
  }
})

test('a client that is slow with its head or its body is cut', async t => {
  const gateway = await unreached(t, {
    server: { header_timeout: '100ms', read_timeout: '300ms' }
  })
  const head = await rawClient(t, gateway.port, 'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\n')
  const body = await rawClient(t, gateway.port, rawPost('/v1/embeddings', '{"a":1}').slice(0, -3))
  await Promise.all([head.closed, body.closed])
  assert.match(head.received, /^HTTP\/1.1 408 /)
  assert.match(body.received, /^HTTP\/1.1 408 /)
})

test('headers over max_header_bytes are a 431', async t => {
  const gateway = await unreached(t, { server: { max_header_bytes: '8KB' } })
  const client = await rawClient(t, gateway.port)
  client.socket.write(`GET /v1/models HTTP/1.1\r\nhost: g\r\nx-a: ${'x'.repeat(10_000)}\r\n\r\n`)
  assert.match(await client.until(/\}\}/), /^HTTP\/1.1 431 [\s\S]*headers_too_large/)
})

test('a connection that sends nothing does no harm', async t => {
  const gateway = await unreached(t)
  const socket = connect(gateway.port, '127.0.0.1')
  await once(socket, 'connect')
  socket.resetAndDestroy()
  assert.equal((await fetch(`${gateway.url}/health`)).status, 200)
})

test('an upload that stops half way gives its slot back, also to a client that never closes', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    server: { header_timeout: '100ms', read_timeout: '200ms' },
    rate_limit: { enabled: true, per_key: { max_concurrent: 1 } }
  })
  for (const path of ['/v1/audio/transcriptions', '/v1/embeddings']) {
    const socket = connect({ port: gateway.port, host: '127.0.0.1', allowHalfOpen: true })
    t.after(() => socket.destroy())
    socket.write(rawPost(path, '{"a":1}').slice(0, -3))
    const [data] = await once(socket, 'data')
    assert.match(String(data), / 408 /)
    const line = await gateway.logged({ msg: 'exchange', route: path })
    assert.notEqual(line.outcome, 'ok')
  }
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 200)
  assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
})

test('garbage behind a request is not answered into the middle of its answer', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write('data: {"choices":[]}\n\n')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/choices/)
  client.socket.write('garbage\r\n\r\n')
  await client.closed
  assert.doesNotMatch(client.received, / 400 /)
  await (await backend.request()).closed
})

test('a path that cannot be decoded is a 400 that repeats nothing of it', async t => {
  const gateway = await unreached(t)
  const response = await fetch(`${gateway.url}/v1/models/%zz?key=secret`)
  assert.equal(response.status, 400)
  const text = await response.text()
  assert.equal(JSON.parse(text).error.code, 'invalid_path')
  assert.doesNotMatch(text + JSON.stringify(gateway.lines), /secret|%zz/)
})

test('a stranger’s endless body is not read', async t => {
  const gateway = await unreached(t, { auth: { enabled: true, keys: ['a'] } })
  const client = await rawClient(t, gateway.port)
  client.socket.write(
    'POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n'
  )
  assert.match(await client.until(/\}\}/), / 401 [\s\S]*connection: close/i)
  await client.closed
})

test('what no hook sees is answered in JSON too, with an id, a log line and a count', async t => {
  const gateway = await unreached(t, { server: { max_header_bytes: '8KB' } })
  const body = JSON.stringify(CHAT)
  const cases = [
    { text: 'GET /v1/models/%zz HTTP/1.1\r\nhost: g\r\n\r\n', status: 400 },
    { text: rawPost('/v1/embeddings', body).replace('host: gateway\r\n', ''), status: 400 },
    { text: rawPost('/v1/embeddings', body, ['expect: something']), status: 417 },
    { text: rawPost('/v1/embeddings', body, [`x-large: ${'x'.repeat(9000)}`]), status: 431 },
    { text: 'NONSENSE\r\n\r\n', status: 400 }
  ]
  for (const { text, status } of cases) {
    const client = await rawClient(t, gateway.port, text)
    await client.until(/\}\}/)
    assert.match(client.received, new RegExp(`^HTTP/1.1 ${status} `))
    const id = /^x-llmproxy-request-id: (req_[0-9a-f]{32})\r$/im.exec(client.received)![1]
    assert.match(client.received, new RegExp(`^x-request-id: ${id}\r$`, 'im'))
    const line = await gateway.logged({ requestId: id })
    assert.deepEqual([line.status, line.outcome], [status, 'rejected'])
  }
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text()
  assert.match(metrics, /llmproxy_exchanges_total\{outcome="rejected"\} 5\n/)
})

/** A chat call whose place in a row the backend can see. */
const numbered = (at: number) =>
  rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, user: `caller ${at}.` }))
const row = (count: number) => Array.from({ length: count }, (_, at) => numbered(at)).join('')
const placeOf = (body: string) => Number(/caller (\d+)\./.exec(body)![1])

/** A backend that answers with the place in the row, and the most requests that it had at once. */
async function counting(t: TestContext) {
  const seen = { most: 0 }
  let running = 0
  const backend = await fakeBackend(t, async (request, response) => {
    seen.most = Math.max(seen.most, ++running)
    await sleep(5)
    running--
    response.writeHead(200, { 'content-type': 'application/json' })
    response.end(JSON.stringify({ choices: [], id: `place ${placeOf(request.body)}.` }))
  })
  return { backend, seen }
}

for (const scheme of ['http', 'https'] as const) {
  test(`pipelined requests are served one after another, in order (${scheme})`, async t => {
    const { backend, seen } = await counting(t)
    const path = (name: string) => new URL(`./tls/${name}`, import.meta.url).pathname
    const tls = { enabled: true, cert_file: path('first.crt'), key_file: path('first.key') }
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      ...(scheme === 'https' ? { server: { tls } } : {})
    })
    const { port } = gateway
    const socket =
      scheme === 'https' ? connectTls({ port, rejectUnauthorized: false }) : connect(port)
    t.after(() => socket.destroy())
    let received = ''
    const whole = new Promise<void>(resolve => {
      socket.on('data', data => {
        received += data
        if (/place 16\./.test(received)) resolve()
      })
    })
    socket.write(row(17))
    await whole
    const places = [...received.matchAll(/place (\d+)\./g)].map(([, at]) => Number(at))
    assert.deepEqual(places, [...Array(17).keys()])
    assert.equal(seen.most, 1)
    assert.equal(backend.requests.length, 17)
  })
}

test('a connection on which thousands of requests wait is closed', async t => {
  const backend = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const { exchanges } = gateway.control
  const begin = t.mock.method(exchanges, 'begin')
  const client = await rawClient(t, gateway.port, row(5_000))
  await client.closed
  assert.equal(begin.mock.callCount(), 1)
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'client_gone')
  const line = await gateway.logged({ level: 40 })
  assert.match(String(line.msg), /more than 16 requests/)
  assert.equal(
    await gateway.metric('llmproxy_connections_refused_total', { reason: 'pipelining' }),
    1
  )
})

test('nothing is left of pipelined requests whose client disconnects', async t => {
  const backend = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const client = await rawClient(t, gateway.port, row(3))
  await backend.request()
  client.socket.destroy()
  await gateway.logged({ msg: 'exchange' })
  assert.equal(gateway.control.exchanges.open.length, 0)
  assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
  assert.equal(backend.requests.length, 1)
})
