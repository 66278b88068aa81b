import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import {
  answerChat,
  CHAT,
  chunk,
  closedPort,
  fakeBackend,
  fullPort,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'

const RETRY = { enabled: true, initial_wait: '1ms', max_wait: '50ms' }
const REFUSED = '{"error":{"message":"try later","type":"overloaded"}}'

test('a refused connection goes to another backend without any configuration', async t => {
  const good = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ name: 'dead', url: `http://127.0.0.1:${await closedPort()}` }, { url: good.url }]
  })
  for (let call = 0; call < 4; call++) {
    assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
  }
  assert.equal(good.requests.length, 4)
  assert.ok((await gateway.metric('llmproxy_attempts_total', { result: 'connect_failure' })) >= 1)
})

test('a connection that breaks before any answer goes to another backend, if retry says so', async t => {
  const bad = await fakeBackend(t, (_request, _response, raw) => raw.socket.destroy())
  const good = await fakeBackend(t, answerChat)
  const backends = [{ url: bad.url }, { url: good.url }]
  const gateway = await startGateway(t, { backends, routing: { retry: RETRY } })
  for (let call = 0; call < 2; call++) {
    assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
  }
  assert.equal(bad.requests.length, 1)

  const strict = await startGateway(t, { backends })
  assert.equal((await post(`${strict.url}/v1/chat/completions`, CHAT)).status, 502)
  assert.equal(bad.requests.length, 2, 'a request that may have killed a backend kills no other')
})

test('a stream whose head came but no byte of it goes to another backend', async t => {
  const bad = await fakeBackend(t, (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.flushHeaders()
    setImmediate(() => raw.socket.destroy())
  })
  const good = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url, weight: 100 }, { url: good.url }],
    routing: { retry: RETRY }
  })
  const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  assert.match(await response.text(), /\[DONE\]/)
  assert.equal(bad.requests.length, 1)
  assert.equal((await gateway.logged({ msg: 'exchange' })).attempts, 2)
})

test('nobody listens: 502 in the dialect of the route', async t => {
  const gateway = await startGateway(t, {
    backends: [{ url: `http://127.0.0.1:${await closedPort()}` }]
  })
  const openai = await post(`${gateway.url}/v1/chat/completions`, CHAT)
  assert.equal(openai.status, 502)
  assert.equal((await openai.json()).error.code, 'backend_unreachable')
  const anthropic = await post(`${gateway.url}/v1/messages`, CHAT)
  assert.equal((await anthropic.json()).error.type, 'api_error')
  const ollama = await post(`${gateway.url}/api/chat`, CHAT)
  assert.equal(typeof (await ollama.json()).error, 'string')
})

for (const status of [500, 503, 429]) {
  test(`without retry a ${status} passes as it is`, async t => {
    const bad = await fakeBackend(t, (_request, response) => {
      response.writeHead(status, { 'content-type': 'application/json', 'retry-after': '7' })
      response.end(REFUSED)
    })
    const good = await fakeBackend(t, answerChat)
    const gateway = await startGateway(t, { backends: [{ url: bad.url }, { url: good.url }] })
    const response = await post(`${gateway.url}/v1/chat/completions`, CHAT)
    assert.equal(response.status, status)
    assert.equal(response.headers.get('retry-after'), '7')
    assert.equal(await response.text(), REFUSED)
  })

  test(`with retry a ${status} goes to another backend at once`, async t => {
    const bad = await fakeBackend(t, (_request, response) => {
      response.writeHead(status, { 'retry-after': '3600' })
      response.end(REFUSED)
    })
    const good = await fakeBackend(t, answerChat)
    const gateway = await startGateway(t, {
      backends: [{ url: bad.url }, { url: good.url }],
      routing: { retry: RETRY }
    })
    const response = await post(`${gateway.url}/v1/chat/completions`, CHAT)
    assert.equal(response.status, 200)
    await response.text()
    assert.equal((await gateway.logged({ msg: 'exchange' })).attempts, 2)
  })
}

test('when all refuse, the last answer is passed on with its body, and all were tried', async t => {
  const answer =
    (status: number) => (_request: unknown, response: import('node:http').ServerResponse) => {
      response.writeHead(status, { 'content-type': 'application/json', 'x-from': String(status) })
      response.end(REFUSED)
    }
  const first = await fakeBackend(t, answer(500))
  const second = await fakeBackend(t, answer(502))
  const gateway = await startGateway(t, {
    backends: [{ url: first.url }, { url: second.url }],
    routing: { retry: { ...RETRY, max_retries: 3 } }
  })
  const response = await post(`${gateway.url}/v1/chat/completions`, CHAT)
  assert.ok(response.status === 500 || response.status === 502)
  assert.equal(response.headers.get('x-from'), String(response.status))
  assert.equal(await response.text(), REFUSED)
  assert.equal(first.requests.length + second.requests.length, 4)
  assert.equal((await gateway.logged({ msg: 'exchange' })).attempts, 4)
})

test('a refusal is passed on when the other backend cannot even be reached', async t => {
  const bad = await fakeBackend(t, (_request, response) => {
    response.writeHead(503, { 'content-type': 'application/json' })
    response.end(REFUSED)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url, weight: 9 }, { url: `http://127.0.0.1:${await closedPort()}` }],
    routing: { retry: { ...RETRY, max_retries: 1 } }
  })
  const response = await post(`${gateway.url}/v1/chat/completions`, CHAT)
  assert.equal(response.status, 503)
  assert.equal(await response.text(), REFUSED)
})

test('a short Retry-After is waited for, a long one is not', async t => {
  let calls = 0
  const busy = await fakeBackend(t, (request, response, raw) => {
    if (calls++ > 0) return answerChat(request, response, raw)
    response.writeHead(429, { 'retry-after': '0.02' })
    return response.end(REFUSED)
  })
  const patient = await startGateway(t, {
    backends: [{ url: busy.url }],
    routing: { retry: RETRY }
  })
  assert.equal((await post(`${patient.url}/v1/chat/completions`, CHAT)).status, 200)
  assert.equal(calls, 2)

  const full = await fakeBackend(t, (_request, response) => {
    response.writeHead(429, { 'retry-after': '3600' })
    response.end(REFUSED)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: full.url }],
    routing: { retry: RETRY }
  })
  const response = await post(`${gateway.url}/v1/chat/completions`, CHAT)
  assert.equal(response.status, 429)
  assert.equal(response.headers.get('retry-after'), '3600')
  assert.equal(await response.text(), REFUSED)
  assert.equal(full.requests.length, 1)
})

test('a timeout is tried again only when retry_on says so', async t => {
  const silent = await fakeBackend(t, () => {})
  const good = await fakeBackend(t, answerChat)
  const backends = [{ url: silent.url, timeout: '100ms' }, { url: good.url }]
  const strict = await startGateway(t, { backends, routing: { retry: RETRY } })
  assert.equal((await post(`${strict.url}/v1/chat/completions`, CHAT)).status, 504)
  const retrying = await startGateway(t, {
    backends,
    routing: { retry: { ...RETRY, retry_on: ['timeout'] } }
  })
  assert.equal((await post(`${retrying.url}/v1/chat/completions`, CHAT)).status, 200)
})

for (const header of ['x-stainless-timeout', 'x-request-timeout']) {
  test(`${header}: nobody is asked for longer than the client waits`, async t => {
    const silent = await fakeBackend(t, () => {})
    const other = await fakeBackend(t, answerChat)
    const gateway = await startGateway(t, {
      backends: [{ url: silent.url }, { url: other.url }],
      routing: { retry: { enabled: true, retry_on: ['timeout'] } }
    })
    const answer = await post(`${gateway.url}/v1/chat/completions`, CHAT, { [header]: '0.2' })
    assert.equal(answer.status, 504)
    const { error } = await answer.json()
    assert.equal(error.code, 'backend_timeout')
    assert.match(error.message, /within the time that the client has set/)
    await (await silent.request()).closed
    assert.equal(other.requests.length, 0)
    assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'timed_out')
    assert.equal(await gateway.metric('llmproxy_attempts_total', { result: 'cancelled' }), 1)
    assert.equal(await gateway.metric('llmproxy_attempts_total', { result: 'timeout' }), 0)
  })
}

test('a client that waits for longer than a timer can is waited with, also for a backend without a limit', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, { backends: [{ url: backend.url, timeout: 0 }] })
  const months = { 'x-request-timeout': '9999999' }
  const answer = await post(`${gateway.url}/v1/chat/completions`, CHAT, months)
  assert.equal(answer.status, 200)
})

test('nothing is tried again once the client has had a byte', async t => {
  const bad = await fakeBackend(t, (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'), () => raw.socket.destroy())
  })
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url }, { name: 'b', url: bad.url }],
    routing: { retry: RETRY }
  })
  const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  await assert.rejects(response.text())
  assert.equal(bad.requests.length, 1)
})

test('an upload that was refused before it began goes to another backend', async t => {
  const good = await fakeBackend(t, (_request, response) => response.end('{"text":"hello"}'))
  const gateway = await startGateway(t, {
    backends: [{ url: `http://127.0.0.1:${await closedPort()}`, weight: 9 }, { url: good.url }]
  })
  const form = new FormData()
  form.set('model', 'whisper')
  form.set('file', new Blob(['x'.repeat(100_000)]), 'a.wav')
  const response = await fetch(`${gateway.url}/v1/audio/transcriptions`, {
    method: 'POST',
    body: form
  })
  assert.equal(response.status, 200)
  assert.equal(await response.text(), '{"text":"hello"}')
  assert.ok(good.requests[0]!.body.includes('x'.repeat(100_000)))
})

test('a backend that takes no stream_options is asked without, and remembered', async t => {
  const strict = await fakeBackend(t, (request, response) => {
    if (!JSON.parse(request.body).stream_options) {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      return response.end(`${chunk('Hi')}${chunk('!')}data: [DONE]\n\n`)
    }
    response.writeHead(400, { 'content-type': 'application/json' })
    return response.end('{"error":{"message":"Unrecognized request argument: stream_options"}}')
  })
  const gateway = await startGateway(t, { backends: [{ url: strict.url }] })
  for (let call = 0; call < 2; call++) {
    const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
    assert.equal(await response.text(), `${chunk('Hi')}${chunk('!')}data: [DONE]\n\n`)
  }
  assert.equal(strict.requests.length, 3)
  const line = await gateway.logged({ msg: 'exchange' })
  assert.equal(line.completionTokens, 2)
  assert.equal(line.exactness, 'estimated')
  assert.equal(line.attempts, 1)
})

test('any other 400 to a question for usage is the client’s', async t => {
  const body = '{"error":{"message":"context length exceeded"}}'
  const strict = await fakeBackend(t, (_request, response) => {
    response.writeHead(400, { 'content-type': 'application/json' })
    response.end(body)
  })
  const gateway = await startGateway(t, { backends: [{ url: strict.url }] })
  const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  assert.equal(response.status, 400)
  assert.equal(await response.text(), body)
  assert.equal(strict.requests.length, 1)
})

test('a caller who makes a backend repeat stream_options changes nothing for others', async t => {
  const backend = await fakeBackend(t, (request, response, raw) => {
    const body = JSON.parse(request.body)
    if (Array.isArray(body.messages)) return answerChat(request, response, raw)
    response.writeHead(400, { 'content-type': 'application/json' })
    return response.end(JSON.stringify({ error: { message: `invalid: ${request.body}` } }))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const chat = `${gateway.url}/v1/chat/completions`
  const odd = await post(chat, { messages: 'oops', stream: true })
  assert.equal(odd.status, 400)
  assert.doesNotMatch(await odd.text(), /include_usage/, 'it was asked again without')
  await (await post(chat, { ...CHAT, stream: true })).text()
  assert.equal((await gateway.logged({ msg: 'exchange', status: 200 })).exactness, 'exact')
})

test('a 400 too long to be kept is passed on, and not tried elsewhere', async t => {
  const text = JSON.stringify({ error: { message: 'x'.repeat(200_000) } })
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(400, { 'content-type': 'application/json' })
    response.end(text)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }, { name: 'b', url: backend.url }]
  })
  const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  assert.equal(response.status, 400)
  assert.equal(await response.text(), text)
  assert.equal(backend.requests.length, 1)
})

test('an idle connection that the backend closes as it is used again is replaced', async t => {
  const served = new WeakSet<object>()
  const backend = await fakeBackend(t, (_request, response, raw) => {
    if (served.has(raw.socket)) return raw.socket.destroy()
    served.add(raw.socket)
    return response.end('{}')
  })
  // Its connections would be among those that are used again.
  const routing = { model_discovery: { enabled: false } }
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], routing })
  for (let call = 0; call < 4; call++) {
    assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 200)
  }
  assert.equal((await gateway.logged({ msg: 'exchange' })).attempts, 1)
  assert.equal(await gateway.metric('llmproxy_attempts_total', { result: '2xx' }), 4)
  assert.equal(await gateway.metric('llmproxy_attempts_total', { result: 'connect_failure' }), 2)
})

test('a request that the backend drops after a while is not sent again, with retry off', async t => {
  const backend = await fakeBackend(t, (_request, response, raw) => {
    if (backend.requests.length > 1) return setTimeout(() => raw.socket.destroy(), 300)
    return response.end('{}')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 200)
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 502)
  assert.equal(backend.requests.length, 2)
})

test('a Retry-After is remembered while other backends are tried', async t => {
  const busy = await fakeBackend(t, (_request, response) => {
    response.writeHead(429, { 'retry-after': '60' })
    response.end(REFUSED)
  })
  const broken = await fakeBackend(t, (_request, response) => {
    response.writeHead(500)
    response.end(REFUSED)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: busy.url, weight: 9 }, { url: broken.url }],
    routing: { retry: { ...RETRY, max_retries: 4 } }
  })
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 500)
  assert.equal(busy.requests.length, 1)
  assert.equal(broken.requests.length, 4)
})

test('an attempt is counted once, whatever became of it', async t => {
  const bad = await fakeBackend(t, (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.flushHeaders()
    setImmediate(() => raw.socket.destroy())
  })
  const gateway = await startGateway(t, { backends: [{ url: bad.url }] })
  assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 502)
  assert.equal(await gateway.metric('llmproxy_attempts_total', { result: '2xx' }), 0)
  assert.equal(await gateway.metric('llmproxy_attempts_total', { result: 'connect_failure' }), 1)
})

test('an error answer that never ends does not hold the client up', async t => {
  const hung = await fakeBackend(t, (_request, response) => {
    response.writeHead(503)
    response.write('{"error":')
  })
  const gateway = await startGateway(t, {
    backends: [{ url: hung.url, weight: 9 }, { url: `http://127.0.0.1:${await closedPort()}` }],
    routing: { retry: { ...RETRY, max_retries: 1 } }
  })
  const response = await post(`${gateway.url}/v1/embeddings`, CHAT)
  assert.equal(response.status, 502)
})

test('waits grow by the multiplier, up to max_wait', async t => {
  const times: number[] = []
  const bad = await fakeBackend(t, (_request, response) => {
    times.push(performance.now())
    response.writeHead(503)
    response.end(REFUSED)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url }],
    routing: {
      retry: {
        enabled: true,
        max_retries: 3,
        initial_wait: '20ms',
        multiplier: 10,
        max_wait: '300ms'
      }
    }
  })
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 503)
  const waits = times.slice(1).map((time, at) => time - times[at]!)
  assert.equal(waits.length, 3)
  assert.ok(waits[0]! >= 15 && waits[1]! >= 190 && waits[2]! >= 290, String(waits))
})

test('routing.enabled: false switches retries off', async t => {
  const bad = await fakeBackend(t, (_request, response) => {
    response.writeHead(503)
    response.end(REFUSED)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url }],
    routing: { enabled: false, retry: RETRY }
  })
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 503)
  assert.equal(bad.requests.length, 1)
})

for (const where of ['routing', 'backend']) {
  test(`connect_timeout of the ${where} is obeyed`, async t => {
    const full = `http://127.0.0.1:${await fullPort(t)}`
    const good = await fakeBackend(t, answerChat)
    const gateway = await startGateway(t, {
      backends: [
        { url: full, weight: 9, ...(where === 'backend' ? { connect_timeout: '100ms' } : {}) },
        { url: good.url }
      ],
      routing: { connect_timeout: where === 'routing' ? '100ms' : '60s' }
    })
    assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
    const line = await gateway.logged({ msg: 'attempt failed' })
    assert.equal(line.reason, 'UND_ERR_CONNECT_TIMEOUT')
  })
}

const FIRST_EVENTS: [string, string, 'passes' | 'fails over'][] = [
  ['sse', 'data: {"error":{"message":"engine dead","code":500}}\n\n', 'fails over'],
  ['sse', ': waiting\n\ndata: {"error":"busy","error_type":"overloaded"}\n\n', 'fails over'],
  [
    'sse',
    'event: error\r\ndata: {"type":"error","error":{"type":"api_error"}}\r\n\r\n',
    'fails over'
  ],
  [
    'sse',
    'error: {"code":503,"message":"Loading model","type":"unavailable_error"}\n\n',
    'fails over'
  ],
  [
    'sse',
    'data: {"object":"error","message":"The queue is full","code":503,"error":null}\n\n',
    'fails over'
  ],
  ['ndjson', '{"error":"model runner has stopped"}\n', 'fails over'],
  [
    'sse',
    'data: {"error":{"message":"too long","type":"BadRequestError","code":400}}\n\n',
    'passes'
  ],
  ['sse', 'data: {"error":{"type":"invalid_request_error"}}\n\n', 'passes'],
  ['sse', 'data: {"choices":[{"delta":{"content":"\\"error\\""}}],"error":null}\n\n', 'passes'],
  ['sse', `data: {"choices":[]}\n\ndata: {"error":{"code":500}}\n\n`, 'passes'],
  [
    'sse',
    'data: {"type":"response.failed","response":{"error":{"code":"server_error"}}}\n\n',
    'fails over'
  ],
  ['sse', 'data: {"error":{"code":"context_length_exceeded","type":null}}\n\n', 'passes'],
  ['sse', 'data: {"error":"","x":1}\n\n', 'passes'],
  ['sse', 'data: {"error":{},"x":1}\n\n', 'passes'],
  ['sse', 'data: {"choices":[],"x":1,"error":{"code":500}}\n\n', 'fails over'],
  ['ndjson', '{"error":"m does not support tools"}\n', 'passes']
]

for (const [framing, beginning, what] of FIRST_EVENTS) {
  test(`a stream that begins ${JSON.stringify(beginning.slice(0, 60))} ${what}`, async t => {
    const type = framing === 'sse' ? 'text/event-stream' : 'application/x-ndjson'
    const end = framing === 'sse' ? 'data: [DONE]\n\n' : '{"done":true}\n'
    const liar = await fakeBackend(t, async (_request, response) => {
      response.writeHead(200, { 'content-type': type })
      // In two parts, so that neither shows the event.
      const cut = beginning.indexOf('"')
      response.write(beginning.slice(0, cut))
      await nextTurn()
      response.end(beginning.slice(cut))
    })
    const good = await fakeBackend(t, (_request, response) => {
      response.writeHead(200, { 'content-type': type }).end(end)
    })
    const gateway = await startGateway(t, {
      backends: [
        { name: 'liar', url: liar.url },
        { name: 'good', url: good.url, priority: 1 }
      ],
      routing: { circuit_breaker: { consecutive_failures: 1 } }
    })
    const path = framing === 'sse' ? '/v1/embeddings' : '/api/chat'
    const response = await post(gateway.url + path, { model: 'm', stream: true })
    assert.equal(response.status, 200)
    assert.equal(await response.text(), what === 'passes' ? beginning : end)
    assert.equal(good.requests.length, what === 'passes' ? 0 : 1)
    const ejected = await gateway.metric('llmproxy_backend_ejections_total', { backend: 'liar' })
    // A failure later in the stream passes as well, but the backend has failed.
    const isBroken = what === 'fails over' || beginning.includes('"code":500')
    assert.equal(ejected, isBroken && !beginning.includes('overloaded') ? 1 : 0)
  })
}

test('a stream that begins with an error is the client’s when nobody does better', async t => {
  const event = 'data: {"error":{"message":"engine dead","code":500}}\n\n'
  const liar = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' }).end(event)
  })
  const gateway = await startGateway(t, {
    backends: [
      { name: 'liar', url: liar.url },
      { name: 'dead', url: `http://127.0.0.1:${await closedPort()}`, priority: 1 }
    ]
  })
  const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  assert.equal(response.status, 200)
  assert.equal(await response.text(), event)
  const { outcome } = await gateway.logged({ msg: 'exchange' })
  assert.equal(outcome, 'backend_failed')
})

test('an answer may take only so long, however busily it comes', async t => {
  const backend = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    while (!response.destroyed) {
      response.write(chunk('and '))
      await nextTurn()
    }
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, total_timeout: '80ms' }]
  })
  const client = await rawClient(t, gateway.port)
  const body = JSON.stringify({ ...CHAT, stream: true })
  client.socket.write(rawPost('/v1/chat/completions', body))
  await client.closed
  assert.match(client.received, /"code":"backend_timeout"[^\n]*\n\n$|longer than it may/)
  assert.doesNotMatch(client.received, /\[DONE\]|\r\n0\r\n/)
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'timed_out')
})

test('a connection is waited for as long as its model allows', async t => {
  const full = `http://127.0.0.1:${await fullPort(t)}`
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [
      { url: full, priority: 0, connect_timeout: '1h' },
      { url: backend.url, priority: 1 }
    ],
    routing: {
      model_timeouts: { hasty: { connect_timeout: '30ms' } },
      circuit_breaker: { enabled: false }
    }
  })
  assert.equal((await post(`${gateway.url}/v1/embeddings`, { model: 'hasty' })).status, 200)
  const { reason } = await gateway.logged({ msg: 'attempt failed' })
  assert.match(String(reason), /UND_ERR_CONNECT_TIMEOUT/)
  const slow = new AbortController()
  const other = post(`${gateway.url}/v1/embeddings`, { model: 'patient' }, {}, slow.signal)
  assert.equal((await post(`${gateway.url}/v1/embeddings`, { model: 'hasty' })).status, 200)
  assert.equal(backend.requests.length, 2)
  slow.abort()
  await assert.rejects(other)
})

test('some models are waited for otherwise than others', async t => {
  const backend = await fakeBackend(t, ({ body }, response) => {
    if (JSON.parse(body).model === 'dead') return
    response.end('{}')
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, timeout: '20s' }],
    routing: { model_timeouts: { 'de*': { timeout: '30ms' }, '*': { total_timeout: '10s' } } }
  })
  assert.equal((await post(`${gateway.url}/v1/embeddings`, { model: 'fine' })).status, 200)
  const response = await post(`${gateway.url}/v1/embeddings`, { model: 'dead' })
  assert.equal(response.status, 504)
})
