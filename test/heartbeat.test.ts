import assert from 'node:assert/strict'
import { Transform } from 'node:stream'
import { describe, type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import Anthropic from '@anthropic-ai/sdk'
import Fastify from 'fastify'
import OpenAI from 'openai'
import gatewayPlugin from '../src/app.ts'
import { Answer } from '../src/pool/answer.ts'
import {
  type Answerer,
  answerChat,
  CHAT,
  chunk,
  closedPort,
  DONE,
  fakeBackend,
  post,
  type RawClient,
  rawClient,
  rawPost,
  startGateway,
  writable
} from './helper.ts'
import { messages, responses, type Say, speaks, TEXT, vllmChat, vllmCompletions } from './wire.ts'

/** What the client of a stream hears while its call waits, and how the answer goes on from there. */

const HEARTBEAT = { server: { heartbeat: '10ms' } }
const STREAM = { ...CHAT, stream: true }
const BEAT = /:\n\n/

/** A backend that answers when it is told. */
async function lateBackend(t: TestContext, answer: Answerer) {
  const { promise, resolve: go } = Promise.withResolvers<void>()
  const backend = await fakeBackend(t, async (...call) => {
    await promise
    await answer(...call)
  })
  return Object.assign(backend, { go })
}

/** What a client has read, without the framing of its chunks. */
function bodyOf({ received }: RawClient): string {
  const framed = received.slice(received.indexOf('\r\n\r\n') + 2)
  const bytes = framed.replaceAll(/\r\n[0-9a-f]+\r\n/g, '').replace(/\r\n$/, '')
  return Buffer.from(bytes, 'latin1').toString()
}

const withoutBeats = (text: string) => text.replace(/(^|\n\n)(:[^\n]*\n\n)+/g, '$1')

function ask(t: TestContext, port: number, path: string, body: object, headers: string[] = []) {
  return rawClient(t, port, rawPost(path, JSON.stringify(body), headers))
}

const ROUTES: [string, Say, string][] = [
  ['/v1/chat/completions', vllmChat, 'data: [DONE]'],
  ['/v1/completions', vllmCompletions, 'data: [DONE]'],
  ['/v1/responses', responses, 'event: response.completed'],
  ['/v1/messages', messages(), 'event: message_stop']
]

for (const [path, say, last] of ROUTES) {
  test(`${path}: a stream that waits hears comments, and gets the same answer as one that does not`, async t => {
    const body = {
      model: 'public',
      messages: [],
      prompt: 'p',
      input: 'i',
      max_tokens: 9,
      stream: true
    }
    const backends = (url: string) => [{ url, models: [{ public: 'm' }] }]
    const prompt = await fakeBackend(t, speaks(say))
    const quick = await startGateway(t, { backends: backends(prompt.url) })
    const expected = await (await post(quick.url + path, body)).text()
    const { completionTokens } = await quick.logged({ msg: 'exchange' })

    const late = await lateBackend(t, speaks(say))
    const gateway = await startGateway(t, { backends: backends(late.url), ...HEARTBEAT })
    const client = await ask(t, gateway.port, path, body)
    await client.until(/:\n\n[\s\S]*:\n\n/)
    late.go()
    await client.until(/\r\n0\r\n\r\n$/)
    const stable = (text: string) => text.replaceAll(/("created_at":)"[^"]*"/g, '$1""')
    assert.equal(stable(withoutBeats(bodyOf(client))), stable(expected))
    assert.ok(expected.includes(last) && expected.includes('"public"'))
    const line = await gateway.logged({ msg: 'exchange' })
    assert.equal(line.status, 200)
    assert.equal(line.outcome, 'ok')
    assert.equal(line.completionTokens, completionTokens)
    assert.equal(line.exactness, 'exact')
    assert.equal(await gateway.metric('llmproxy_heartbeat_streams_total', { path }), 1)
  })
}

test('the head says what that of an answer would', async t => {
  const late = await lateBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ name: 'gpu', url: late.url }],
    auth: { enabled: true, keys: [{ key: 'sk-1', trace: true }] },
    rate_limit: { enabled: true, per_key: { requests_per_minute: 9 } },
    server: { heartbeat: '10ms', cors: { enabled: true, allowed_origins: ['*'] } }
  })
  const headers = ['origin: http://page', 'authorization: Bearer sk-1', 'x-llmproxy-trace: 1']
  const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM, headers)
  await client.until(BEAT)
  late.go()
  await client.until(/\[DONE\]/)
  const { requestId } = await gateway.logged({ msg: 'exchange' })
  assert.match(client.received, /^HTTP\/1.1 200 OK\r\n/)
  for (const header of [
    'content-type: text/event-stream; charset=utf-8',
    'cache-control: no-cache',
    'x-accel-buffering: no',
    'access-control-allow-origin: *',
    'x-ratelimit-limit-requests: 9',
    'x-llmproxy-trace: round_robin: gpu under way | gpu alone',
    `x-llmproxy-request-id: ${requestId}`,
    `x-request-id: ${requestId}`
  ]) {
    assert.ok(client.received.toLowerCase().includes(`\r\n${header}\r\n`), header)
  }
})

test('who waits in the queue hears where', async t => {
  const late = await lateBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: late.url, max_concurrent: 1 }],
    ...HEARTBEAT
  })
  const clients: RawClient[] = []
  const heard = [/:\n\n/, /: position 1 in the queue\n\n/, /: position 2 in the queue\n\n/]
  for (const comment of heard) {
    const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM)
    await client.until(comment)
    clients.push(client)
  }
  late.go()
  for (const client of clients) await client.until(/\[DONE\]/)
})

test('whole answers, Ollama’s own streams and routes that do not stream are waited for in silence', async t => {
  const late = await lateBackend(t, (_request, response) => void response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: late.url }], ...HEARTBEAT })
  const off = await startGateway(t, { backends: [{ url: late.url }], server: { heartbeat: 0 } })
  const calls: [number, string, object][] = [
    [gateway.port, '/v1/chat/completions', CHAT],
    [gateway.port, '/v1/embeddings', STREAM],
    [gateway.port, '/api/chat', STREAM],
    [off.port, '/v1/chat/completions', STREAM]
  ]
  const clients = await Promise.all(calls.map(([port, path, body]) => ask(t, port, path, body)))
  await late.request(3)
  await sleep(50)
  for (const { received } of clients) assert.equal(received, '')
  late.go()
  for (const client of clients) await client.until(/^HTTP\/1.1 200 /)
})

for (const cut of [1, 7, 1_000]) {
  test(`a response in lines of JSON is one in events after a heartbeat, in pieces of ${cut} bytes`, async t => {
    const said = (content: string) => JSON.stringify({ message: { content }, done: false })
    const last = JSON.stringify({ done: true, prompt_eval_count: 12, eval_count: 3 })
    const lines = [said('Hi'), said(' you'), last]
    const late = await lateBackend(t, async (_request, response) => {
      response.setHeader('content-type', 'application/x-ndjson')
      const text = lines.map(line => `${line}\r\n`).join('')
      for (let at = 0; at < text.length; at += cut) {
        await new Promise(resolve => response.write(text.slice(at, at + cut), resolve))
      }
      response.end()
    })
    const gateway = await startGateway(t, { backends: [{ url: late.url }], ...HEARTBEAT })
    const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM)
    await client.until(BEAT)
    late.go()
    await client.until(/\r\n0\r\n\r\n$/)
    const expected = lines.map(line => `data: ${line}\n\n`).join('')
    assert.equal(withoutBeats(bodyOf(client)), expected)
    const { outcome, promptTokens, completionTokens } = await gateway.logged({ msg: 'exchange' })
    assert.deepEqual([outcome, promptTokens, completionTokens], ['ok', 12, 3])
  })
}

const MESSAGE = 'This model holds 4096 tokens at most.'
const status =
  (code: number, body: object | string): Answerer =>
  (_request, response) => {
    response.writeHead(code, { 'content-type': 'application/json' })
    response.end(typeof body === 'string' ? body : JSON.stringify(body))
  }
const refused = { error: { message: MESSAGE, type: 'BadRequestError', code: 400 } }
const page: Answerer = (_request, response) => {
  response.writeHead(200, { 'content-type': 'text/html' }).end('<html>')
}
const compressed: Answerer = (_request, response) => {
  const headers = { 'content-type': 'text/event-stream', 'content-encoding': 'compress' }
  response.writeHead(200, headers).end('\x1f\x9d\x90')
}

const ERRORS: [string, string, Answerer, RegExp, object][] = [
  [
    'a 400',
    '/v1/chat/completions',
    status(400, refused),
    /^data: \{"error":\{"message":"This model holds 4096 tokens at most\.","type":"invalid_request_error","param":null,"code":"invalid_request"\}\}\n\n$/,
    { outcome: 'rejected', error: 'invalid_request' }
  ],
  [
    'a 429',
    '/v1/responses',
    status(429, { object: 'error', message: MESSAGE }),
    /^event: error\ndata: \{"type":"error","sequence_number":0,"code":"rate_limit_exceeded","message":"This model .*\}\n\nevent: response.failed\ndata: .*"response":\{"id":"resp_.*"error":\{"code":"rate_limit_exceeded","message":"This model .*\n\n$/,
    { outcome: 'rejected', error: 'rate_limit_exceeded' }
  ],
  [
    'a 503',
    '/v1/messages',
    status(503, { error: MESSAGE }),
    /^event: error\ndata: \{"type":"error","error":\{"type":"overloaded_error","message":"This model .*\}\n\n$/,
    { outcome: 'backend_failed', error: 'backend_failed' }
  ],
  [
    'an error without a message',
    '/v1/completions',
    status(502, '<html>'),
    /"message":"The backend answered with status 502\."/,
    { outcome: 'backend_failed', error: 'backend_failed' }
  ],
  [
    'an error that does not end',
    '/v1/completions',
    (_request, response) => void response.writeHead(404).write('{'),
    /"message":"The backend answered with status 404\."/,
    { outcome: 'rejected', error: 'invalid_request' }
  ],
  [
    'an answer that is no stream',
    '/v1/chat/completions',
    page,
    /"message":"The backend did not answer with a stream of events\."/,
    { outcome: 'backend_failed', error: 'backend_failed' }
  ],
  [
    'an answer in a coding that nobody knows',
    '/v1/chat/completions',
    compressed,
    /"message":"The response of the backend cannot be decoded: its content-encoding is wrong\."/,
    { outcome: 'backend_failed', error: 'backend_failed' }
  ],
  [
    'no answer at all',
    '/v1/chat/completions',
    (_request, _response, raw) => void raw.socket.destroy(),
    /"code":"backend_failed"/,
    { outcome: 'backend_failed', error: 'backend_failed' }
  ]
]

describe('what cannot be an answer any more', { concurrency: true }, () => {
  for (const [what, path, answer, event, logged] of ERRORS) {
    test(`${path}: ${what} is an error event, and no success`, async t => {
      const late = await lateBackend(t, answer)
      const gateway = await startGateway(t, { backends: [{ url: late.url }], ...HEARTBEAT })
      const client = await ask(t, gateway.port, path, STREAM)
      await client.until(BEAT)
      late.go()
      if (path === '/v1/responses') await client.until(/\r\n0\r\n\r\n$/)
      else await client.closed
      assert.match(withoutBeats(bodyOf(client)), event)
      const line = await gateway.logged({ msg: 'exchange' })
      assert.deepEqual(
        { status: line.status, ...logged },
        { status: 200, outcome: line.outcome, error: line.error }
      )
      assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
    })
  }
})

test('a stream that breaks after its answer has begun says so as any other', async t => {
  const late = await lateBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(`${chunk('Hi')}data: {"cho`, () => response.socket?.destroy())
  })
  const gateway = await startGateway(t, { backends: [{ url: late.url }], ...HEARTBEAT })
  const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM)
  await client.until(BEAT)
  late.go()
  await client.closed
  assert.match(bodyOf(client), /"Hi"[\s\S]*\n\ndata: \{"error":\{.*"code":"backend_failed"\}\}\n\n/)
  assert.ok(!client.received.includes('\r\n0\r\n'))
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'backend_failed')
})

test('heartbeats are no beginning: another backend is tried, also after a wait', async t => {
  const bad = await lateBackend(t, status(503, refused))
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url }],
    routing: { retry: { enabled: true, max_retries: 1, initial_wait: '60ms' } },
    ...HEARTBEAT
  })
  const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM)
  await client.until(BEAT)
  const before = bodyOf(client).length
  bad.go()
  await gateway.logged({ msg: 'attempt failed' })
  await client.closed
  const beats = bodyOf(client).slice(before).match(/:\n\n/g) ?? []
  assert.ok(beats.length >= 2, 'it goes on between attempts')
  assert.equal(bad.requests.length, 2)
  assert.match(client.received, /"message":"This model holds/)

  const good = await fakeBackend(t, answerChat)
  const slow = await lateBackend(t, status(500, refused))
  const two = await startGateway(t, {
    backends: [{ url: slow.url }, { url: good.url, priority: 1 }],
    ...HEARTBEAT
  })
  const other = await ask(t, two.port, '/v1/chat/completions', STREAM)
  await other.until(BEAT)
  slow.go()
  await other.until(/\[DONE\]/)
  assert.equal((await two.logged({ msg: 'exchange' })).attempts, 2)
})

test('a stream that is only an error is the client’s when nobody does better', async t => {
  const event = 'data: {"error":{"message":"engine died","code":500}}\n\n'
  const bad = await lateBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' }).end(event)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url }, { url: `http://127.0.0.1:${await closedPort()}`, priority: 1 }],
    ...HEARTBEAT
  })
  const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM)
  await client.until(BEAT)
  bad.go()
  await client.until(/\r\n0\r\n\r\n$/)
  assert.equal(withoutBeats(bodyOf(client)), event)
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'backend_failed')
})

test('the time limits hold, of the configuration and of the client', async t => {
  const silent = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, {
    backends: [{ url: silent.url }],
    routing: { timeout: '80ms' },
    ...HEARTBEAT
  })
  for (const headers of [[], ['x-request-timeout: 0.05']]) {
    const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM, headers)
    await client.closed
    assert.match(client.received, /:\n\n[\s\S]*"code":"backend_timeout"/)
    const requestId = /req_[0-9a-f]+/.exec(client.received)![0]
    assert.equal((await gateway.logged({ msg: 'exchange', requestId })).outcome, 'timed_out')
  }
})

test('a client that leaves stops the backend at once', async t => {
  const silent = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, { backends: [{ url: silent.url }], ...HEARTBEAT })
  const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM)
  await client.until(BEAT)
  const { closed } = await silent.request()
  client.socket.destroy()
  await closed
  const line = await gateway.logged({ msg: 'exchange' })
  assert.equal(line.outcome, 'client_gone')
  assert.ok(Number(line.promptTokens) > 0, 'the backend has had the prompt')
  assert.equal(await gateway.metric('llmproxy_attempts_total', { result: 'cancelled' }), 1)
  assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
})

test('a client that has not taken what was said hears no more', async () => {
  const answer = Answer.awaited()
  for (const _ of ['before anybody listens', 'while it does not read']) {
    for (let beat = 0; beat < 3; beat++) answer.say(':\n\n')
    assert.equal(String(answer.read()), ':\n\n')
    assert.equal(answer.read(), null)
  }
})

test('a client that takes nothing makes the backend wait', async t => {
  const piece = chunk('x'.repeat(16_000))
  const full = Promise.withResolvers<number>()
  let sent = 0
  const late = await lateBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    while (sent < 100_000_000 && !response.destroyed) {
      sent += piece.length
      if (response.write(piece)) continue
      const stalled = setTimeout(() => full.resolve(sent), 300)
      await writable(response)
      clearTimeout(stalled)
    }
  })
  const gateway = await startGateway(t, {
    backends: [{ url: late.url }],
    server: { heartbeat: '10ms' }
  })
  const client = await rawClient(t, gateway.port)
  client.socket.removeAllListeners('data').pause()
  client.socket.write(rawPost('/v1/chat/completions', JSON.stringify(STREAM)))
  await late.request()
  await sleep(30)
  late.go()
  assert.ok((await full.promise) < 20_000_000)
  let received = 0
  client.socket.on('data', data => {
    received += data.length
    if (received > sent) client.socket.destroy()
  })
  client.socket.resume()
  await client.closed
})

test('a server that closes ends who waits with an event', async t => {
  const silent = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, {
    backends: [{ url: silent.url }],
    server: { heartbeat: '10ms', drain_timeout: '1ms' }
  })
  const client = await ask(t, gateway.port, '/v1/chat/completions', STREAM)
  await client.until(BEAT)
  await Promise.all([gateway.fastify.close(), client.closed])
  assert.match(client.received, /"code":"shutting_down"/)
})

test('an onSend hook of the embedding server sees all of it', async t => {
  const late = await lateBackend(t, answerChat)
  const fastify = Fastify()
  t.after(() => fastify.close())
  fastify.addHook('onSend', async (_request, reply, payload) => {
    reply.header('x-embedder', 'yes')
    await sleep(20)
    const upper = new Transform({
      transform: (data, _encoding, done) => done(null, String(data).toUpperCase())
    })
    return (payload as NodeJS.ReadableStream).pipe(upper)
  })
  await fastify.register(gatewayPlugin, {
    backends: [{ url: late.url }],
    proxy: { heartbeat: '10ms' }
  })
  await fastify.listen({ port: 0, host: '127.0.0.1' })
  const { port } = fastify.server.address() as { port: number }
  const client = await ask(t, port, '/v1/chat/completions', STREAM)
  await client.until(BEAT)
  late.go()
  await client.until(/\r\n0\r\n\r\n$/)
  assert.match(client.received, /x-embedder: yes/)
  const words = ['Hi', ' there', '!'].map(word => chunk(word)).join('')
  assert.equal(withoutBeats(bodyOf(client)), (words + DONE).toUpperCase())
})

test('the SDKs read over the comments, and throw what comes as an event', async t => {
  const slow =
    (say: Say): Answerer =>
    async (...call) => {
      await sleep(50)
      await speaks(say)(...call)
    }
  let say: Say = vllmChat
  const backend = await fakeBackend(t, (...call) => slow(say)(...call))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...HEARTBEAT })
  const options = { apiKey: 'sk', maxRetries: 0 }
  const openai = new OpenAI({ ...options, baseURL: `${gateway.url}/v1` })
  const anthropic = new Anthropic({ ...options, baseURL: gateway.url })
  const chat = { model: 'm', messages: [{ role: 'user' as const, content: 'Hello' }] }

  const completion = await openai.chat.completions.stream(chat).finalChatCompletion()
  assert.equal(completion.choices[0]!.message.content, TEXT)
  say = messages()
  const { content } = await anthropic.messages.stream({ ...chat, max_tokens: 9 }).finalMessage()
  assert.ok(JSON.stringify(content).includes(TEXT))
  say = responses
  const response = await openai.responses.stream({ model: 'm', input: 'Hello' }).finalResponse()
  assert.equal(response.output_text, TEXT)
  const path = { path: '/v1/messages' }
  assert.equal(await gateway.metric('llmproxy_heartbeat_streams_total', path), 1)

  const error = { message: MESSAGE, type: 'error' }
  say = () => ({
    status: 400,
    headers: { 'content-type': 'application/json' },
    events: [JSON.stringify({ type: 'error', error })]
  })
  const thrown = { message: new RegExp(MESSAGE) }
  await assert.rejects(openai.chat.completions.stream(chat).done(), thrown)
  const events = await openai.responses.create({ model: 'm', input: 'Hello', stream: true })
  await assert.rejects(events[Symbol.asyncIterator]().next(), thrown)
  await assert.rejects(anthropic.messages.stream({ ...chat, max_tokens: 9 }).done(), thrown)
})
