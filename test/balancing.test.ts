import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  answerChat,
  CHAT,
  chunk,
  DONE,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'

test('weights hold over real calls', async t => {
  const a = await fakeBackend(t, (_request, response) => response.end('{}'))
  const b = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: a.url, weight: 3 }, { url: b.url }] })
  for (let call = 0; call < 8; call++) await post(`${gateway.url}/v1/embeddings`, CHAT)
  assert.deepEqual([a.requests.length, b.requests.length], [6, 2])
})

test('least_connections counts a stream until its body ends', async t => {
  const hold = (_request: unknown, response: import('node:http').ServerResponse) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
  }
  const a = await fakeBackend(t, hold)
  const b = await fakeBackend(t, hold)
  const gateway = await startGateway(t, {
    backends: [{ url: a.url }, { url: b.url }],
    routing: { load_balance: 'least_connections' }
  })
  const text = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }))
  for (let stream = 0; stream < 6; stream++) {
    const client = await rawClient(t, gateway.port, text)
    await client.until(/Hi/)
  }
  assert.deepEqual([a.requests.length, b.requests.length], [3, 3])
})

test('least_connections gives a backend that fails fast no more than its share', async t => {
  const bad = await fakeBackend(t, (_request, response) => {
    response.writeHead(500)
    response.end()
  })
  const good = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url }, { url: good.url }],
    routing: { load_balance: 'least_connections' }
  })
  for (let call = 0; call < 20; call++) await post(`${gateway.url}/v1/embeddings`, CHAT)
  assert.ok(bad.requests.length <= 10)
})

test('latency_based over real calls shuns the backend that fails', async t => {
  const bad = await fakeBackend(t, (_request, response) => {
    response.writeHead(500)
    response.end()
  })
  const good = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url }, { url: good.url }],
    routing: { load_balance: 'latency_based' }
  })
  for (let call = 0; call < 20; call++) await post(`${gateway.url}/v1/embeddings`, CHAT)
  assert.ok(bad.requests.length <= 2, String(bad.requests.length))
})

test('calls about a stored response go to the backend that made it, for its caller only', async t => {
  const answer = (name: string) =>
    ((request, response) => {
      const isStream = request.body !== '' && JSON.parse(request.body).stream === true
      if (!isStream) {
        response.writeHead(200, { 'content-type': 'application/json' })
        return response.end(JSON.stringify({ id: `resp_${name}`, output: [{ id: 'msg_1' }] }))
      }
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      const created = { type: 'response.created', response: { id: `resp_${name}_stream` } }
      const completed = { type: 'response.completed', response: { id: `resp_${name}_stream` } }
      response.write(`event: response.created\ndata: ${JSON.stringify(created)}\n\n`)
      return response.end(`event: response.completed\ndata: ${JSON.stringify(completed)}\n\n`)
    }) satisfies import('./helper.ts').Answerer
  const a = await fakeBackend(t, answer('a'))
  const b = await fakeBackend(t, answer('b'))
  const gateway = await startGateway(t, {
    backends: [{ url: a.url }, { url: b.url }],
    auth: { enabled: true, keys: ['one', 'two'] }
  })
  const key = { authorization: 'Bearer one' }
  for (const stream of [false, true]) {
    const first = await post(`${gateway.url}/v1/responses`, { ...CHAT, stream }, key)
    const id = /resp_(a|b)(_stream)?/.exec(await first.text())![0]
    const own = id.startsWith('resp_a') ? a : b
    const before = own.requests.length
    for (let call = 0; call < 3; call++) {
      const got = await fetch(`${gateway.url}/v1/responses/${id}`, { headers: key })
      assert.equal(got.status, 200)
    }
    await post(`${gateway.url}/v1/responses/${id}/cancel`, '', key)
    await post(`${gateway.url}/v1/responses`, { ...CHAT, previous_response_id: id }, key)
    await post(`${gateway.url}/v1/responses/${id}/later`, {}, key)
    await fetch(`${gateway.url}/v1/responses/${id}`, { method: 'DELETE', headers: key })
    assert.equal(own.requests.length, before + 7)
    const stranger = { authorization: 'Bearer two' }
    const refused = await fetch(`${gateway.url}/v1/responses/${id}`, { headers: stranger })
    assert.equal(refused.status, 404)
  }
  assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
})

test('smooth weights are honoured with streams in flight too', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(chunk('Hi') + DONE)
  })
  const gateway = await startGateway(t, {
    backends: [
      { name: 'a', url: backend.url, weight: 2 },
      { name: 'b', url: backend.url }
    ]
  })
  for (let call = 0; call < 6; call++) {
    await (await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })).text()
  }
  assert.equal(await gateway.metric('llmproxy_requests_total', { backend: 'a' }), 4)
  assert.equal(await gateway.metric('llmproxy_requests_total', { backend: 'b' }), 2)
})

test('a stored response is asked of its backend alone, even when that refuses', async t => {
  let isBusy = false
  const holder = await fakeBackend(t, (_request, response) => {
    response.writeHead(isBusy ? 503 : 200, { 'content-type': 'application/json' })
    response.end(isBusy ? '{"error":"busy"}' : '{"id":"resp_1","usage":{"total_tokens":34}}')
  })
  const other = await fakeBackend(t, (_request, response) => {
    response.writeHead(404)
    response.end('{"error":"no such response"}')
  })
  const gateway = await startGateway(t, {
    backends: [{ url: holder.url }, { url: other.url }],
    routing: { retry: { enabled: true, initial_wait: '1ms', max_retries: 2 } }
  })
  await (await post(`${gateway.url}/v1/responses`, CHAT)).text()
  isBusy = true
  const got = await fetch(`${gateway.url}/v1/responses/resp_1`)
  assert.equal(got.status, 503)
  assert.equal(other.requests.length, 0)
  isBusy = false
  await (await post(`${gateway.url}/v1/responses/resp_1/cancel`, '')).text()
  assert.equal(await gateway.metric('llmproxy_usage_tokens_total', { type: 'prompt' }), 34)
})

test('a response can be cancelled while it streams', async t => {
  const made: import('node:http').ServerResponse[] = []
  const backends = await Promise.all(
    ['a', 'b'].map(name =>
      fakeBackend(t, (request, response) => {
        if (request.url.endsWith('/cancel')) return response.end(`{"cancelled_by":"${name}"}`)
        response.writeHead(200, { 'content-type': 'text/event-stream' })
        made.push(response)
        const created = { type: 'response.created', response: { id: `resp_${name}` } }
        return response.write(`event: response.created\ndata: ${JSON.stringify(created)}\n\n`)
      })
    )
  )
  const gateway = await startGateway(t, { backends: backends.map(({ url }) => ({ url })) })
  const text = rawPost('/v1/responses', JSON.stringify({ ...CHAT, stream: true }))
  const client = await rawClient(t, gateway.port, text)
  await client.until(/resp_a/)
  for (let call = 0; call < 3; call++) {
    const cancelled = await post(`${gateway.url}/v1/responses/resp_a/cancel`, '')
    assert.equal(await cancelled.text(), '{"cancelled_by":"a"}')
  }
})

test('latency_based is not drawn to a backend that refuses fast', async t => {
  const picky = await fakeBackend(t, (_request, response) => {
    response.writeHead(401)
    response.end('{}')
  })
  const good = await fakeBackend(t, (_request, response) => {
    setTimeout(() => response.end('{}'), 20)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: picky.url }, { url: good.url }],
    routing: { load_balance: 'latency_based' }
  })
  for (let call = 0; call < 20; call++) await post(`${gateway.url}/v1/embeddings`, CHAT)
  assert.ok(picky.requests.length <= 2, String(picky.requests.length))
})

test('max_idle_conns of the original’s reference file only warns', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, { backends: [{ url: backend.url, max_idle_conns: 100 }] })
  assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
  assert.ok(gateway.lines.some(({ msg }) => /max_idle_conns has no effect/.test(String(msg))))
})

test('latency_based compares streams with streams, not with whole answers', async t => {
  const backend = (delay: number) =>
    fakeBackend(t, async (request, response) => {
      const isStream = request.body.includes('"stream":true')
      await sleep(isStream ? delay : 600)
      if (!isStream) return response.end('{}')
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      return response.end(chunk('Hi') + DONE)
    })
  const [fast, slow] = [await backend(0), await backend(200)]
  const gateway = await startGateway(t, {
    backends: [{ url: fast.url }, { url: slow.url }],
    routing: { load_balance: 'latency_based' }
  })
  const ask = async (path: string, stream: boolean) =>
    (await post(`${gateway.url}${path}`, { ...CHAT, stream })).text()
  for (let call = 0; call < 4; call++) await ask('/v1/chat/completions', true)
  await Promise.all(Array.from({ length: 4 }, () => ask('/v1/embeddings', false)))
  const before = fast.requests.length
  for (let call = 0; call < 10; call++) await ask('/v1/chat/completions', true)
  assert.ok(fast.requests.length - before >= 9)
})
