import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CHAT, fakeBackend, post, rawClient, rawPost, startGateway } from './helper.ts'

test('what concerns the caller or the connection does not reach the backend', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, api_key: 'backend-key', headers: { 'X-Tenant': 'a' } }],
    auth: { header_names: ['X-My-Key'] }
  })
  const held = [
    'Authorization: Bearer caller-key',
    'X-API-Key: caller-key',
    'api-key: caller-key',
    'X-My-Key: caller-key',
    'Cookie: session=1',
    'Origin: http://evil.example',
    'Referer: http://evil.example/x',
    'X-Forwarded-For: 1.2.3.4',
    'X-Forwarded-Host: evil.example',
    'Forwarded: for=1.2.3.4',
    'X-Real-IP: 1.2.3.4',
    'X-Conversation-Id: c',
    'X-data-parallel-rank: 1',
    'X-Vllm-Priority: 0',
    'endpoint-load-metrics-format: JSON',
    'traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01',
    'tracestate: a=b',
    'baggage: a=b',
    'X-LLMProxy-Trace: 1',
    'Keep-Alive: timeout=5',
    'TE: trailers',
    'Trailer: x',
    'Upgrade: websocket',
    'Proxy-Authorization: Basic eDp5',
    'Expect: 100-continue',
    'X-Hop: 1',
    'Connection: keep-alive, X-Hop',
    'X-Tenant: mine'
  ]
  const client = await rawClient(
    t,
    gateway.port,
    rawPost('/v1/embeddings', JSON.stringify(CHAT), [...held, 'X-Kept: yes', 'User-Agent: me'])
  )
  await client.until(/200 OK/)
  const { headers } = await backend.request()
  assert.equal(headers.authorization, 'Bearer backend-key')
  assert.equal(headers['x-tenant'], 'a')
  assert.equal(headers['x-kept'], 'yes')
  assert.equal(headers['user-agent'], 'me')
  assert.equal(headers.host, `127.0.0.1:${backend.port}`)
  assert.equal(headers['accept-encoding'], 'identity')
  assert.equal(headers['content-type'], 'application/json')
  assert.match(String(headers['x-request-id']), /^req_[0-9a-f]{32}$/)
  const expected = [
    'accept-encoding',
    'authorization',
    'connection',
    'content-length',
    'content-type',
    'host',
    'user-agent',
    'x-kept',
    'x-llmproxy-request-id',
    'x-request-id',
    'x-tenant'
  ]
  assert.deepEqual(Object.keys(headers).sort(), expected)
})

test('headers of the answer pass, those of its connection do not', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, [
      'content-type',
      'application/json',
      'x-request-id',
      'backend-1',
      'set-cookie',
      'a=1',
      'set-cookie',
      'b=2',
      'x-hop',
      '1',
      'connection',
      'keep-alive, x-hop',
      'keep-alive',
      'timeout=5',
      'x-llmproxy-request-id',
      'forged',
      'x-compute-time',
      '12'
    ])
    response.end('{}')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const response = await post(`${gateway.url}/v1/embeddings`, CHAT)
  assert.equal(response.headers.get('x-request-id'), 'backend-1')
  assert.match(response.headers.get('x-llmproxy-request-id')!, /^req_/)
  assert.deepEqual(response.headers.getSetCookie(), ['a=1', 'b=2'])
  assert.equal(response.headers.get('x-compute-time'), '12')
  assert.equal(response.headers.get('x-hop'), null)
})

test('one id, of the gateway’s making, everywhere', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const response = await post(`${gateway.url}/v1/embeddings`, CHAT, { 'x-request-id': 'mine' })
  const id = response.headers.get('x-llmproxy-request-id')
  assert.match(id!, /^req_[0-9a-f]{32}$/)
  assert.equal(response.headers.get('x-request-id'), id)
  const { headers } = await backend.request()
  assert.equal(headers['x-request-id'], id)
  assert.equal(headers['x-llmproxy-request-id'], id)
  assert.equal((await gateway.logged({ msg: 'exchange' })).requestId, id)
})

test('base URLs with a slash, a path or /v1 work, and routes without /v1', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const seen = async (base: string, path: string, method = 'POST') => {
    const gateway = await startGateway(t, { backends: [{ url: base }] })
    const body = method === 'POST' ? JSON.stringify(CHAT) : undefined
    await fetch(gateway.url + path, { method, ...(body === undefined ? {} : { body }) })
    return backend.requests.at(-1)!.url
  }
  const { url } = backend
  assert.equal(await seen(`${url}/`, '/v1/embeddings'), '/v1/embeddings')
  assert.equal(await seen(`${url}/v1`, '/v1/embeddings'), '/v1/embeddings')
  assert.equal(await seen(`${url}/v1/`, '/v1/embeddings'), '/v1/embeddings')
  assert.equal(await seen(`${url}/gpu/a/v1/`, '/v1/embeddings?x=1'), '/gpu/a/v1/embeddings?x=1')
  assert.equal(await seen(`${url}/v1`, '/tokenize'), '/tokenize')
  assert.equal(await seen(`${url}/v1`, '/api/chat'), '/api/chat')
  assert.equal(await seen(url, '/chat/completions'), '/v1/chat/completions')
  assert.equal(await seen(url, '/completions?a=b'), '/v1/completions?a=b')
  assert.equal(await seen(url, '/embeddings'), '/v1/embeddings')
  assert.equal(await seen(url, '/models', 'GET'), '/v1/models')
  assert.equal(await seen(url, '/models/org/model', 'GET'), '/v1/models/org/model')
  assert.equal(await seen(url, '/v1/models/org%2Fmodel', 'GET'), '/v1/models/org%2Fmodel')
})

test('every declared route reaches the backend', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const posts = [
    '/v1/chat/completions',
    '/v1/completions',
    '/v1/embeddings',
    '/v1/responses',
    '/v1/responses/r1/cancel',
    '/v1/responses/r1/later',
    '/v1/responses/compact',
    '/v1/messages',
    '/v1/messages/count_tokens',
    '/v1/rerank',
    '/v1/score',
    '/v1/audio/transcriptions',
    '/v1/audio/translations',
    '/v1/images/generations',
    '/tokenize',
    '/detokenize',
    '/api/chat',
    '/api/generate',
    '/api/embed',
    '/api/embeddings',
    '/api/show'
  ]
  const gets = [
    '/v1/models',
    '/v1/models/m',
    '/v1/responses/r1',
    '/v1/responses/r1/input_items',
    '/v1/responses/r1/input_items/deep',
    '/api/tags',
    '/api/ps',
    '/api/version'
  ]
  for (const path of posts) assert.equal((await post(gateway.url + path, CHAT)).status, 200, path)
  for (const path of gets) assert.equal((await fetch(gateway.url + path)).status, 200, path)
  assert.deepEqual(
    backend.requests.map(({ method, url }) => `${method} ${url}`),
    [...posts.map(path => `POST ${path}`), ...gets.map(path => `GET ${path}`)]
  )
  assert.equal((await fetch(`${gateway.url}/v1/models`, { method: 'HEAD' })).status, 200)
})
