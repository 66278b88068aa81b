import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { openai } from '../src/dialects/openai.ts'
import { Meter } from '../src/metering/meter.ts'
import { Answer, NOBODY_SENDS } from '../src/pool/answer.ts'
import {
  answerChat,
  CHAT,
  chunk,
  DONE,
  events,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  USAGE,
  USAGE_CHUNK
} from './helper.ts'
import {
  COMPLETION_TOKENS,
  llamacppChat,
  llamacppCompletions,
  messages,
  nativeChat,
  nativeGenerate,
  ollamaChat,
  PROMPT_TOKENS,
  responses,
  type Say,
  vllmChat,
  vllmCompletions
} from './wire.ts'

/** Ends of event streams as servers write them, through the whole gateway. */

const STREAM = { ...CHAT, stream: true }
const CHAT_PATH = '/v1/chat/completions'

const ENDS: [string, string, Say][] = [
  ['vLLM, chat', CHAT_PATH, vllmChat],
  ['llama.cpp, chat', CHAT_PATH, llamacppChat],
  ['Ollama, chat', CHAT_PATH, ollamaChat],
  ['vLLM, completions', '/v1/completions', vllmCompletions],
  ['llama.cpp, completions', '/v1/completions', llamacppCompletions],
  ['vLLM, messages', '/v1/messages', messages('vllm')],
  ['vLLM, responses', '/v1/responses', responses],
  ['Ollama, native chat', '/api/chat', nativeChat],
  ['Ollama, native generate', '/api/generate', nativeGenerate]
]

/** What the body of a stream loses at its end: the blank line, and the line end too. */
const CUT: [string, RegExp][] = [
  ['blank line', /(?<=\n)\n$|\n$/],
  ['line ends', /\n+$/]
]

for (const [name, path, say] of ENDS) {
  for (const [what, lost] of CUT) {
    for (const isAlias of [false, true]) {
      test(`a last event without its ${what} is complete: ${name}${isAlias ? ', renamed' : ''}`, async t => {
        const backend = await fakeBackend(t, (request, response) => {
          const { headers, events } = say(JSON.parse(request.body), request)
          response.writeHead(200, headers)
          response.end(events.join('').replace(lost, ''))
        })
        const models = isAlias ? [{ alias: 'm' }] : ['m']
        const gateway = await startGateway(t, {
          backends: [{ url: backend.url, ...(isAlias ? { models } : {}) }]
        })
        const input = path === '/v1/responses' ? { input: 'Hello' } : {}
        const prompt =
          /completions|generate/.test(path) && path !== CHAT_PATH ? { prompt: 'Hi' } : {}
        const model = isAlias ? 'alias' : 'm'
        const body = { ...STREAM, model, ...input, ...prompt, max_tokens: 100 }
        const ended = say(body, { body: JSON.stringify(body) } as never)
        // More than open a circuit.
        for (let at = 0; at < 6; at++) {
          const text = await (await post(gateway.url + path, body)).text()
          assert.ok(!/"error":\{|event: error/.test(text), text)
          const [last] = ended.events.at(-1)!.replace(lost, '').split('\n').slice(-1)
          assert.ok(isAlias || text.endsWith(last!), text)
        }
        const lines = gateway.lines.filter(({ msg }) => msg === 'exchange')
        assert.equal(lines.length, 6)
        for (const line of lines) {
          const { outcome, promptTokens, completionTokens, exactness, attempts } = line
          assert.deepEqual(
            [outcome, promptTokens, completionTokens, exactness, attempts],
            ['ok', PROMPT_TOKENS, COMPLETION_TOKENS, 'exact', 1]
          )
        }
      })
    }
  }
}

test('a stream with a usage chunk and no finish reason is complete', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(chunk('Hi') + USAGE_CHUNK)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const text = await (await post(gateway.url + CHAT_PATH, STREAM)).text()
  assert.equal(text, chunk('Hi'))
  const { outcome, exactness } = await gateway.logged({ msg: 'exchange' })
  assert.deepEqual([outcome, exactness], ['ok', 'exact'])
})

test('what a usage chunk tells beside usage goes on, in a chunk with a choice', async t => {
  const timings = { prompt_ms: 12.5, predicted_ms: 90.25 }
  const finish = chunk('', {}).replace('"finish_reason":null', '"finish_reason":"stop"')
  const usage = (more: object) =>
    `data: ${JSON.stringify({ id: 'chatcmpl-1', choices: [], usage: USAGE, ...more })}\n\n`
  const backend = await fakeBackend(t, (request, response) => {
    const more = request.body.includes('plain') ? {} : { timings, citations: ['a "b"'] }
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(chunk('Hi') + finish + usage(more) + DONE)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const ask = async (more: object) =>
    events(await (await post(gateway.url + CHAT_PATH, { ...STREAM, ...more })).text()) as never[]

  const [first, last, end] = await ask({})
  assert.deepEqual(first, events(chunk('Hi'))[0])
  assert.deepEqual(last, { ...(events(finish)[0] as object), timings, citations: ['a "b"'] })
  assert.equal(end, '[DONE]')
  assert.deepEqual(await ask({ user: 'plain' }), events(chunk('Hi') + finish + DONE))
  const asked = await ask({ stream_options: { include_usage: true } })
  assert.deepEqual(
    asked,
    events(chunk('Hi') + finish + usage({ timings, citations: ['a "b"'] }) + DONE)
  )
  for (const line of gateway.lines.filter(({ msg }) => msg === 'exchange')) {
    assert.equal(line.exactness, 'exact')
  }
})

test('what follows the end of a stream is kept up to a bound', () => {
  const meter = new Meter({ framing: 'sse', dialect: openai, takeOut: false })
  assert.equal(meter.pass(Buffer.from(DONE)), undefined)
  for (let at = 0; at < 1_000; at++) {
    assert.equal(meter.pass(Buffer.alloc(at < 3 ? 10 : 64 * 1024, 'x')), undefined)
  }
  assert.equal(String(meter.release()), DONE + 'x'.repeat(30))
})

/** A backend that sends its head, and the rest of its response when it is told to. */
async function waitingBackend(t: TestContext, head: string, rest: string) {
  let go = () => {}
  let seen = () => {}
  const asked = new Promise<void>(resolve => {
    seen = resolve
  })
  const backend = await fakeBackend(t, (_request, response) => {
    seen()
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.flushHeaders()
    if (head !== '') response.write(head)
    go = () => response.end(rest)
  })
  return { url: backend.url, asked, go: () => go() }
}

test('the head of a stream does not wait for its first event, and the time of the client ends with it', async t => {
  for (const [headers, routing] of [
    [['x-stainless-timeout: 0.2'], {}],
    [[], { hold_first_event: '50ms' }]
  ] as const) {
    const backend = await waitingBackend(t, '', chunk('Hi') + USAGE_CHUNK + DONE)
    const gateway = await startGateway(t, { backends: [{ url: backend.url }], routing })
    const text = rawPost(CHAT_PATH, JSON.stringify(STREAM), [...headers])
    const startedAt = performance.now()
    const client = await rawClient(t, gateway.port, text)
    await client.until(/^HTTP\/1.1 200 /)
    // Half of its time, and not the second that the head may wait otherwise.
    assert.ok(performance.now() - startedAt < 900)
    await sleep(250)
    backend.go()
    await client.until(/\[DONE\]/)
    assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'ok')
  }
})

test('an error within the time that a head is held is made good by another backend', async t => {
  const bad = await waitingBackend(t, '', 'data: {"error":{"message":"no","code":503}}\n\n')
  const good = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: bad.url }, { url: good.url, priority: 1 }],
    routing: { retry: { enabled: true }, hold_first_event: '1m' }
  })
  const response = post(gateway.url + CHAT_PATH, STREAM)
  await bad.asked
  bad.go()
  assert.match(await (await response).text(), /\[DONE\]/)
})

test('a stream that falls silent between two events gets comments, and none within an event', async t => {
  const cut = chunk(' there')
  for (const [path, aliases] of [
    [CHAT_PATH, ['m']],
    [CHAT_PATH, [{ m: 'own' }]]
  ] as const) {
    const half = await waitingBackend(t, chunk('Hi') + cut.slice(0, 20), cut.slice(20) + DONE)
    const whole = await waitingBackend(t, chunk('Hi'), cut + DONE)
    for (const [backend, isWhole] of [
      [half, false],
      [whole, true]
    ] as const) {
      const gateway = await startGateway(t, {
        server: { heartbeat: '40ms' },
        backends: [{ url: backend.url, models: aliases }]
      })
      const client = await rawClient(t, gateway.port, rawPost(path, JSON.stringify(STREAM)))
      await client.until(/Hi/)
      if (isWhole) await client.until(/Hi[\s\S]*\n:\n\n[\s\S]*\n:\n\n/)
      else await sleep(150)
      const silent = client.received.length
      backend.go()
      await client.until(/\[DONE\]/)
      if (!isWhole) assert.doesNotMatch(client.received.slice(0, silent), /Hi[\s\S]*\n:\n/)
      const [, body] = client.received.split('\r\n\r\n', 2)
      assert.ok(body)
      assert.match(client.received.replace(/\r\n[0-9a-f]+\r\n/g, ''), / there/)
      assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'ok')
    }
  }
})

test('a stream that is over already gets no comments', t => {
  t.mock.timers.enable({ apis: ['setInterval'] })
  const answer = new Answer(NOBODY_SENDS)
  answer.tap = new Meter({ framing: 'sse', dialect: openai, takeOut: false })
  const said = t.mock.method(answer, 'say')
  answer.beat(100)
  t.mock.timers.tick(150)
  assert.equal(said.mock.callCount(), 1)
  const over = new Answer(NOBODY_SENDS)
  over.tap = answer.tap
  const saidOver = t.mock.method(over, 'say')
  over.end()
  over.beat(100)
  t.mock.timers.tick(150)
  assert.equal(saidOver.mock.callCount(), 0)
  answer.destroy()
})

test('the finish reason goes on where a stream breaks behind it', async t => {
  const finish = chunk('.').replace('"finish_reason":null', '"finish_reason":"stop"')
  const backend = await fakeBackend(t, (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi') + finish, () => raw.socket.destroy())
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const response = await post(gateway.url + CHAT_PATH, STREAM)
  let text = ''
  await assert.rejects(async () => {
    for await (const part of response.body!.pipeThrough(new TextDecoderStream())) text += part
  })
  assert.ok(text.startsWith(chunk('Hi') + finish), text)
})

test('an event named error is a failure, whatever its data is', async t => {
  const start = `event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","role":"assistant","content":[],"usage":{"input_tokens":3,"output_tokens":1}}}\n\n`
  const delta = `event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}\n\n`
  const failure = 'event: error\ndata: {"message":"the engine died","code":500}\n\n'
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(start + delta + failure)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = { ...STREAM, max_tokens: 10 }
  const text = await (await post(`${gateway.url}/v1/messages`, body)).text()
  assert.equal(text, start + delta + failure)
  const { outcome } = await gateway.logged({ msg: 'exchange' })
  assert.equal(outcome, 'backend_failed')
})
