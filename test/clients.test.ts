import assert from 'node:assert/strict'
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { type TestContext, test } from 'node:test'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import Anthropic from '@anthropic-ai/sdk'
import { APICallError, generateText, jsonSchema, streamText } from 'ai'
import { Ollama } from 'ollama'
import OpenAI, { toFile } from 'openai'
import { type Answerer, fakeBackend, startGateway, type TestGateway } from './helper.ts'
import {
  CALLS,
  COMPLETION_TOKENS,
  type Cut,
  cuts,
  dies,
  json,
  llamacppChat,
  llamacppCompletions,
  MESSAGES_USAGE,
  messages,
  nativeChat,
  nativeGenerate,
  ollamaChat,
  ollamaCompletions,
  PIECES,
  PROMPT_TOKENS,
  REASONING,
  responses,
  type Say,
  speaks,
  stalls,
  TEXT,
  vllmChat,
  vllmCompletions,
  vllmEmbeddings
} from './wire.ts'

/** The client packages people use, against a gateway in front of servers of every kind. */

const KEY = 'sk-right'
const AUTH = { auth: { enabled: true, keys: [KEY] } }
const BROKE_OFF = /The backend broke off in the middle of its answer\./
const METERED = {
  promptTokens: PROMPT_TOKENS,
  completionTokens: COMPLETION_TOKENS,
  exactness: 'exact'
}

async function serve(t: TestContext, answer: Answerer, config: Record<string, unknown> = {}) {
  const backend = await fakeBackend(t, answer)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...config })
  return { backend, gateway }
}

const openai = (gateway: TestGateway, options: { apiKey?: string; maxRetries?: number } = {}) =>
  new OpenAI({ apiKey: KEY, baseURL: `${gateway.url}/v1`, maxRetries: 0, ...options })
const anthropic = (gateway: TestGateway, options: { apiKey?: string } = {}) =>
  new Anthropic({ apiKey: KEY, baseURL: gateway.url, maxRetries: 0, ...options })
const ollama = (gateway: TestGateway, key = KEY) =>
  new Ollama({ host: gateway.url, headers: { authorization: `Bearer ${key}` } })
const aiModel = (gateway: TestGateway, options: { includeUsage?: boolean; apiKey?: string } = {}) =>
  createOpenAICompatible({ name: 'test', apiKey: KEY, baseURL: `${gateway.url}/v1`, ...options })(
    'm'
  )

/** The members of a log line that say what a call has cost. */
async function metered(gateway: TestGateway, route: string, members: object = {}) {
  const line = await gateway.logged({ msg: 'exchange', route, ...members })
  const { promptTokens, completionTokens, exactness } = line
  return { promptTokens, completionTokens, exactness }
}

async function assertBroken(gateway: TestGateway, route: string): Promise<void> {
  const line = await gateway.logged({ msg: 'exchange', route })
  assert.equal(line.outcome, 'backend_failed')
  assert.equal(line.error, 'backend_failed')
}

/** All of a stream: what it yielded, and the error it ended with. */
async function drain<T>(
  stream: AsyncIterable<T>
): Promise<{ seen: T[]; error: Error | undefined }> {
  const seen: T[] = []
  try {
    for await (const each of stream) seen.push(each)
  } catch (error) {
    return { seen, error: error as Error }
  }
  return { seen, error: undefined }
}

const USER = [{ role: 'user' as const, content: 'Grüezi' }]
const CHAT = { model: 'm', messages: USER }
const SCHEMAS = CALLS.map(({ name, input }) => {
  const properties = Object.fromEntries(Object.keys(input).map(key => [key, { type: 'string' }]))
  return { name, description: name, schema: { type: 'object' as const, properties } }
})
const TOOLS = SCHEMAS.map(({ name, description, schema }) => ({
  type: 'function' as const,
  function: { name, description, parameters: schema }
}))

const CHATS: Record<string, Say> = {
  vLLM: vllmChat,
  'llama.cpp': llamacppChat,
  'Ollama /v1': ollamaChat
}

// --- openai ---

const CHAT_ROUTE = '/v1/chat/completions'

const assembled = (message: OpenAI.ChatCompletionMessage) =>
  message.tool_calls?.map(call => {
    assert.equal(call.type, 'function')
    return { id: call.id, name: call.function.name, text: call.function.arguments }
  })
const EXPECTED = CALLS.map(({ id, name, text }) => ({ id, name, text }))

for (const [server, chat] of Object.entries(CHATS)) {
  test(`openai: chat of ${server}, whole`, async t => {
    const { gateway, backend } = await serve(t, speaks(chat), AUTH)
    const { data, response, request_id } = await openai(gateway)
      .chat.completions.create(CHAT)
      .withResponse()
    assert.equal(data.choices[0]!.message.content, TEXT)
    assert.equal(data.choices[0]!.finish_reason, 'stop')
    assert.equal(data.usage!.completion_tokens, COMPLETION_TOKENS)
    const line = await gateway.logged({ msg: 'exchange' })
    assert.equal(request_id, line.requestId)
    assert.equal(response.headers.get('x-llmproxy-request-id'), line.requestId)
    assert.deepEqual(await metered(gateway, CHAT_ROUTE), METERED)
    assert.equal(backend.requests[0]!.headers.authorization, undefined)
  })

  test(`openai: tool calls of ${server}, whole`, async t => {
    const { gateway } = await serve(t, speaks(chat))
    const { choices } = await openai(gateway).chat.completions.create({ ...CHAT, tools: TOOLS })
    assert.deepEqual(assembled(choices[0]!.message), EXPECTED)
    assert.equal(choices[0]!.finish_reason, 'tool_calls')
    assert.deepEqual(await metered(gateway, CHAT_ROUTE), METERED)
  })

  for (const cut of cuts) {
    test(`openai: chat of ${server}, streamed ${cut}`, async t => {
      const { gateway } = await serve(t, speaks(chat, cut))
      const stream = await openai(gateway).chat.completions.create({ ...CHAT, stream: true })
      const { seen, error } = await drain(stream)
      assert.equal(error, undefined)
      assert.equal(seen.map(chunk => chunk.choices[0]!.delta.content ?? '').join(''), TEXT)
      assert.equal(seen.at(-1)!.choices[0]!.finish_reason, 'stop')
      assert.ok(seen.every(chunk => chunk.usage === undefined && chunk.choices.length === 1))
      assert.deepEqual(await metered(gateway, CHAT_ROUTE), METERED)
    })

    test(`openai: chat of ${server} with usage, streamed ${cut}`, async t => {
      const { gateway } = await serve(t, speaks(chat, cut))
      const stream = await openai(gateway).chat.completions.create({
        ...CHAT,
        stream: true,
        stream_options: { include_usage: true }
      })
      const { seen } = await drain(stream)
      const last = seen.pop()!
      assert.deepEqual(last.choices, [])
      assert.equal(last.usage!.prompt_tokens, PROMPT_TOKENS)
      assert.equal(last.usage!.completion_tokens, COMPLETION_TOKENS)
      assert.equal(seen.map(chunk => chunk.choices[0]!.delta.content ?? '').join(''), TEXT)
      assert.ok(seen.every(chunk => chunk.usage === undefined))
      assert.deepEqual(await metered(gateway, CHAT_ROUTE), METERED)
    })

    test(`openai: the stream helper with ${server}, ${cut}`, async t => {
      const { gateway } = await serve(t, speaks(chat, cut))
      const client = openai(gateway)
      const stream_options = { include_usage: true }
      const said = await client.chat.completions
        .stream({ ...CHAT, stream_options })
        .finalChatCompletion()
      assert.equal(said.choices[0]!.message.content, TEXT)
      assert.equal(said.usage!.completion_tokens, COMPLETION_TOKENS)
      const called = await client.chat.completions
        .stream({ ...CHAT, tools: TOOLS })
        .finalChatCompletion()
      assert.deepEqual(assembled(called.choices[0]!.message), EXPECTED)
      assert.equal(called.choices[0]!.finish_reason, 'tool_calls')
      assert.equal(called.usage, undefined)
    })
  }
}

const COMPLETIONS: [string, Say, Cut][] = [
  ['vLLM', vllmCompletions, 'event by event'],
  ['llama.cpp', llamacppCompletions, 'all at once'],
  ['Ollama', ollamaCompletions, 'byte by byte']
]
for (const [server, completions, cut] of COMPLETIONS) {
  test(`openai: completions of ${server}`, async t => {
    const { gateway } = await serve(t, speaks(completions, cut))
    const client = openai(gateway)
    const body = { model: 'm', prompt: 'Grüezi' }
    const whole = await client.completions.create(body)
    assert.equal(whole.choices[0]!.text, TEXT)
    assert.deepEqual(await metered(gateway, '/v1/completions', { stream: false }), METERED)
    const { seen } = await drain(await client.completions.create({ ...body, stream: true }))
    assert.equal(seen.map(chunk => chunk.choices[0]!.text).join(''), TEXT)
    assert.deepEqual(await metered(gateway, '/v1/completions', { stream: true }), METERED)
  })
}

test('openai: embeddings, as base64 and as numbers', async t => {
  const vectors = [
    [0.5, -0.25, 1],
    [-1, 0, 0.125]
  ]
  const { gateway } = await serve(t, speaks(vllmEmbeddings(vectors)))
  const client = openai(gateway)
  const body = { model: 'm', input: ['Grüezi', 'Adieu'] }
  const packed = await client.embeddings.create(body)
  assert.deepEqual(
    packed.data.map(({ embedding }) => [...embedding]),
    vectors
  )
  const plain = await client.embeddings.create({ ...body, encoding_format: 'float' })
  assert.deepEqual(
    plain.data.map(({ embedding }) => embedding),
    vectors
  )
  assert.deepEqual(await metered(gateway, '/v1/embeddings'), { ...METERED, completionTokens: 0 })
})

const FUNCTIONS = SCHEMAS.map(({ name, description, schema }) => ({
  type: 'function' as const,
  name,
  description,
  parameters: schema,
  strict: false
}))

test('openai: a response, whole', async t => {
  const { gateway } = await serve(t, speaks(responses))
  const body = { model: 'm', input: 'Grüezi', tools: FUNCTIONS }
  const response = await openai(gateway).responses.create(body)
  assert.equal(response.output_text, TEXT)
  assert.deepEqual(calledIn(response), EXPECTED)
  assert.deepEqual(await metered(gateway, '/v1/responses'), METERED)
})

for (const cut of cuts) {
  test(`openai: a response, streamed ${cut}`, async t => {
    const { gateway } = await serve(t, speaks(responses, cut))
    const client = openai(gateway)
    const body = { model: 'm', input: 'Grüezi', tools: FUNCTIONS }
    const { seen } = await drain(await client.responses.create({ ...body, stream: true }))
    const deltas = seen.filter(event => event.type === 'response.output_text.delta')
    assert.deepEqual(
      deltas.map(({ delta }) => delta),
      PIECES
    )
    assert.deepEqual(
      seen.map(event => event.sequence_number),
      seen.map((_event, at) => at)
    )
    assert.equal(seen.at(-1)!.type, 'response.completed')
    assert.deepEqual(await metered(gateway, '/v1/responses'), METERED)

    const response = await client.responses.stream(body).finalResponse()
    assert.equal(response.output_text, TEXT)
    assert.deepEqual(calledIn(response), EXPECTED)
    assert.equal(response.usage!.output_tokens, COMPLETION_TOKENS)
  })
}

function calledIn({ output }: { output: OpenAI.Responses.ResponseOutputItem[] }) {
  return output
    .filter(item => item.type === 'function_call')
    .map(item => ({ id: item.call_id, name: item.name, text: item.arguments }))
}

test('openai: models, and one of them with a slash in its id', async t => {
  const card = { id: 'org/model', object: 'model', created: 1, owned_by: 'vllm' }
  const { backend, gateway } = await serve(
    t,
    speaks((_ask, { url }) => json(url === '/v1/models' ? { object: 'list', data: [card] } : card))
  )
  const client = openai(gateway)
  const { seen } = await drain(await client.models.list())
  assert.deepEqual(seen, [card])
  assert.equal((await client.models.retrieve('org/model')).id, 'org/model')
  assert.equal(backend.requests[1]!.url, '/v1/models/org%2Fmodel')
})

test('openai: a transcription, whose upload arrives byte for byte', async t => {
  const uploads: { type: string; body: Buffer }[] = []
  const server = createServer(async (request, response) => {
    const chunks: Buffer[] = []
    for await (const chunk of request) chunks.push(chunk)
    uploads.push({ type: request.headers['content-type']!, body: Buffer.concat(chunks) })
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify({ text: TEXT, usage: { type: 'duration', seconds: 3 } }))
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => server.close().closeAllConnections())
  const { port } = server.address() as AddressInfo
  const gateway = await startGateway(t, {
    backends: [{ url: `http://127.0.0.1:${port}`, models: ['m'] }]
  })

  const audio = Buffer.from(Array.from({ length: 300_000 }, (_, at) => (at * 7 + (at >> 8)) % 256))
  const file = await toFile(audio, 'Grüße.wav', { type: 'audio/wav' })
  const transcription = await openai(gateway).audio.transcriptions.create({ model: 'm', file })
  assert.equal(transcription.text, TEXT)
  const [{ type, body }] = uploads as [{ type: string; body: Buffer<ArrayBuffer> }]
  const form = await new Response(body, { headers: { 'content-type': type } }).formData()
  const sent = form.get('file') as File
  assert.equal(form.get('model'), 'm')
  assert.equal(sent.name, 'Grüße.wav')
  assert.ok(Buffer.from(await sent.arrayBuffer()).equals(audio))
})

test('openai: a wrong key', async t => {
  const { gateway, backend } = await serve(t, speaks(vllmChat), AUTH)
  const call = openai(gateway, { apiKey: 'sk-wrong' }).chat.completions.create(CHAT)
  const error = await failure(call, OpenAI.AuthenticationError)
  assert.match(error.message, /^401 .*API key/)
  assert.equal(error.code, 'invalid_api_key')
  assert.equal(error.type, 'authentication_error')
  const line = await gateway.logged({ msg: 'exchange', status: 401 })
  assert.equal(error.requestID, line.requestId)
  assert.equal(backend.requests.length, 0)
})

test("openai: a backend's own error", async t => {
  const message = 'The model `x` does not exist.'
  const error = { message, type: 'NotFoundError', param: 'model', code: 404 }
  const { gateway } = await serve(
    t,
    speaks(() => json({ error }, 404))
  )
  const call = openai(gateway).chat.completions.create({ ...CHAT, stream: true })
  const thrown = await failure(call, OpenAI.NotFoundError)
  assert.equal(thrown.message, `404 ${message}`)
  assert.equal(thrown.type, 'NotFoundError')
  const line = await gateway.logged({ msg: 'exchange', status: 404 })
  assert.equal(thrown.requestID, line.requestId)
})

test('openai: over the limit, and no retry', async t => {
  const rate_limit = { enabled: true, per_key: { requests_per_minute: 1 } }
  const { gateway, backend } = await serve(t, speaks(vllmChat), { rate_limit })
  const client = openai(gateway)
  await client.chat.completions.create(CHAT)
  const error = await failure(client.chat.completions.create(CHAT), OpenAI.RateLimitError)
  assert.match(error.message, /^429 .* 1 request a minute/)
  assert.equal(error.code, 'rate_limit_exceeded')
  const seconds = Number(error.headers.get('retry-after'))
  assert.ok(seconds > 0 && seconds <= 60, `retry-after: ${seconds}`)
  assert.equal(backend.requests.length, 1)
})

test("openai: over the limit, and the client's own retry has room", async t => {
  const rate_limit = { enabled: true, per_key: { requests_per_second: 5, burst_size: 1 } }
  const { gateway, backend } = await serve(t, speaks(vllmChat), { rate_limit })
  const client = openai(gateway, { maxRetries: 3 })
  const answers = await Promise.all([
    client.chat.completions.create(CHAT),
    client.chat.completions.create(CHAT)
  ])
  for (const { choices } of answers) assert.equal(choices[0]!.message.content, TEXT)
  await gateway.logged({ msg: 'exchange', status: 429 })
  assert.equal(backend.requests.length, 2)
  assert.notEqual(backend.requests[1]!.headers['x-stainless-retry-count'], '0')
})

test('openai: a backend that is down is asked as often as the client wants', async t => {
  const { gateway, backend } = await serve(
    t,
    speaks(() => {
      const error = { message: 'Loading model', type: 'unavailable_error', code: 503 }
      const answer = json({ error }, 503)
      return { ...answer, headers: { ...answer.headers, 'retry-after-ms': '1' } }
    })
  )
  const call = openai(gateway, { maxRetries: 2 }).chat.completions.create(CHAT)
  const error = await failure(call, OpenAI.InternalServerError)
  assert.equal(error.message, '503 Loading model')
  const counts = backend.requests.map(({ headers }) => headers['x-stainless-retry-count'])
  assert.deepEqual(counts, ['0', '1', '2'])
})

test('openai: whoever leaves a stream frees the backend', async t => {
  const { gateway, backend } = await serve(t, stalls(vllmChat, 3))
  const stream = await openai(gateway).chat.completions.create({ ...CHAT, stream: true })
  for await (const chunk of stream) if (chunk.choices[0]!.delta.content) break
  await backend.requests[0]!.closed
  await assertGone(gateway)
})

test('openai: whoever gives up a whole answer frees the backend', async t => {
  const { gateway, backend } = await serve(t, () => {})
  const abort = new AbortController()
  const call = openai(gateway).chat.completions.create(CHAT, { signal: abort.signal })
  const failed = failure(call, OpenAI.APIUserAbortError)
  const seen = await backend.request()
  abort.abort()
  await failed
  await seen.closed
  await assertGone(gateway)
})

for (const [server, chat] of Object.entries(CHATS)) {
  test(`openai: the chat of ${server} dies`, async t => {
    const { gateway } = await serve(t, dies(chat, 5))
    const client = openai(gateway)
    const stream = await client.chat.completions.create({ ...CHAT, stream: true })
    const { seen, error } = await drain(stream)
    assert.ok(seen.length > 0)
    assert.ok(error instanceof OpenAI.APIError)
    assert.match(error.message, BROKE_OFF)
    assert.equal(error.code, 'backend_failed')
    await assertBroken(gateway, CHAT_ROUTE)
    assert.equal((await metered(gateway, CHAT_ROUTE)).exactness, 'counted')
    const final = client.chat.completions.stream(CHAT).finalChatCompletion()
    assert.match((await failure(final, OpenAI.APIError)).message, BROKE_OFF)
  })
}

test('openai: Ollama fails and just ends its stream', async t => {
  const { gateway } = await serve(
    t,
    speaks(ask => ({ ...ollamaChat(ask), events: ollamaChat(ask).events.slice(0, 4) }))
  )
  const stream = await openai(gateway).chat.completions.create({ ...CHAT, stream: true })
  const { error } = await drain(stream)
  assert.ok(error instanceof OpenAI.APIError)
  assert.match(error.message, BROKE_OFF)
  await assertBroken(gateway, CHAT_ROUTE)
})

test('openai: vLLM reports an error in the middle of its stream', async t => {
  const error = { message: 'CUDA went', type: 'InternalServerError', param: null, code: 500 }
  const { gateway } = await serve(
    t,
    speaks(ask => {
      const { headers, events } = vllmChat(ask)
      const report = `data: ${JSON.stringify({ error })}\n\n`
      return { headers, events: [...events.slice(0, 4), report, events.at(-1)!] }
    })
  )
  const stream = await openai(gateway).chat.completions.create({ ...CHAT, stream: true })
  const drained = await drain(stream)
  assert.equal(drained.seen.length, 4)
  assert.ok(drained.error instanceof OpenAI.APIError)
  assert.deepEqual(drained.error.error, error)
})

test('openai: a response dies', async t => {
  const { gateway } = await serve(t, dies(responses, 7))
  const client = openai(gateway)
  const body = { model: 'm', input: 'Grüezi' }
  const { seen, error } = await drain(await client.responses.create({ ...body, stream: true }))
  // LangChain and OpenAI's agents have the error from here; they ignore the events of failures.
  assert.ok(error instanceof OpenAI.APIError)
  assert.match(error.message, BROKE_OFF)
  assert.equal(error.code, 'backend_failed')
  assert.equal(seen.at(-1)!.type, 'response.output_text.delta')
  await assertBroken(gateway, '/v1/responses')
  await assert.rejects(client.responses.stream(body).finalResponse())
})

// --- @anthropic-ai/sdk ---

const MESSAGES_ROUTE = '/v1/messages'
const MESSAGE = { ...CHAT, max_tokens: 100 }
const ANTHROPIC_TOOLS = SCHEMAS.map(({ schema, ...more }) => ({ ...more, input_schema: schema }))

const used = ({ content }: Anthropic.Message) =>
  content
    .filter(block => block.type === 'tool_use')
    .map(({ id, name, input }) => ({ id, name, input }))
const USED = CALLS.map(({ id, name, input }) => ({ id, name, input }))

test('anthropic: a message, whole', async t => {
  const { gateway, backend } = await serve(t, speaks(messages()), AUTH)
  const client = anthropic(gateway)
  const message = await client.messages.create(MESSAGE)
  assert.deepEqual(message.content, [{ type: 'text', text: TEXT }])
  assert.equal(message.stop_reason, 'end_turn')
  assert.deepEqual(await metered(gateway, MESSAGES_ROUTE), METERED)
  const { headers } = backend.requests[0]!
  assert.match(String(headers['anthropic-version']), /^\d{4}-\d\d-\d\d$/)
  assert.equal(headers['x-api-key'], undefined)

  const called = await client.messages.create({ ...MESSAGE, tools: ANTHROPIC_TOOLS })
  assert.deepEqual(used(called), USED)
  assert.equal(called.stop_reason, 'tool_use')
})

for (const server of Object.keys(MESSAGES_USAGE) as (keyof typeof MESSAGES_USAGE)[]) {
  for (const cut of cuts) {
    test(`anthropic: a message of ${server}, streamed ${cut}`, async t => {
      const { gateway } = await serve(t, speaks(messages(server), cut))
      const client = anthropic(gateway)
      const { seen, error } = await drain(
        await client.messages.create({ ...MESSAGE, stream: true })
      )
      assert.equal(error, undefined)
      const texts = seen.map(event =>
        event.type === 'content_block_delta' && event.delta.type === 'text_delta'
          ? event.delta.text
          : ''
      )
      assert.equal(texts.join(''), TEXT)
      assert.equal(seen.at(-1)!.type, 'message_stop')
      assert.deepEqual(await metered(gateway, MESSAGES_ROUTE), METERED)

      const final = await client.messages
        .stream({ ...MESSAGE, tools: ANTHROPIC_TOOLS })
        .finalMessage()
      assert.deepEqual(final.content[0], { type: 'text', text: TEXT })
      assert.deepEqual(used(final), USED)
      assert.equal(final.stop_reason, 'tool_use')
      assert.equal(final.usage.output_tokens, COMPLETION_TOKENS)
    })
  }
}

test('anthropic: count_tokens', async t => {
  const { gateway, backend } = await serve(
    t,
    speaks(() => json({ input_tokens: PROMPT_TOKENS }))
  )
  const counted = await anthropic(gateway).messages.countTokens(CHAT)
  assert.equal(counted.input_tokens, PROMPT_TOKENS)
  assert.equal(backend.requests[0]!.url, '/v1/messages/count_tokens')
  // Counting spends nothing.
  const line = await gateway.logged({ msg: 'exchange', route: '/v1/messages/count_tokens' })
  assert.equal(line.promptTokens, undefined)
})

test('anthropic: a wrong key', async t => {
  const { gateway } = await serve(t, speaks(messages()), AUTH)
  const call = anthropic(gateway, { apiKey: 'sk-wrong' }).messages.create(MESSAGE)
  const error = await failure(call, Anthropic.AuthenticationError)
  const body = error.error as Anthropic.ErrorResponse
  assert.equal(body.type, 'error')
  assert.equal(body.error.type, 'authentication_error')
  assert.match(body.error.message, /API key/)
  const line = await gateway.logged({ msg: 'exchange', status: 401 })
  assert.equal(body.request_id, line.requestId)
})

test('anthropic: the id of a request stands where the client looks for it', async t => {
  const { gateway } = await serve(t, speaks(messages()), AUTH)
  const { _request_id } = await anthropic(gateway).messages.create(MESSAGE)
  const answered = await gateway.logged({ msg: 'exchange', status: 200 })
  assert.equal(_request_id, answered.requestId)
  const call = anthropic(gateway, { apiKey: 'sk-wrong' }).messages.create(MESSAGE)
  const { requestID } = await failure(call, Anthropic.AuthenticationError)
  const refused = await gateway.logged({ msg: 'exchange', status: 401 })
  assert.equal(requestID, refused.requestId)
})

test('anthropic: the backend dies', async t => {
  const { gateway } = await serve(t, dies(messages(), 4))
  const client = anthropic(gateway)
  const { seen, error } = await drain(await client.messages.create({ ...MESSAGE, stream: true }))
  assert.ok(error instanceof Anthropic.APIError)
  assert.equal(error.type, 'api_error')
  assert.match(error.message, BROKE_OFF)
  assert.deepEqual(
    seen.map(({ type }) => type),
    ['message_start', 'content_block_start', 'content_block_delta', 'content_block_delta']
  )
  await assertBroken(gateway, MESSAGES_ROUTE)
  const final = client.messages.stream(MESSAGE).finalMessage()
  assert.match((await failure(final, Anthropic.APIError)).message, BROKE_OFF)
})

test('anthropic: what a dead backend has said is counted', async t => {
  const { gateway } = await serve(t, dies(messages(), 4))
  await drain(await anthropic(gateway).messages.create({ ...MESSAGE, stream: true }))
  // message_start has told the prompt; two pieces of text have passed.
  assert.deepEqual(await metered(gateway, MESSAGES_ROUTE), {
    promptTokens: PROMPT_TOKENS,
    completionTokens: 2,
    exactness: 'counted'
  })
})

test('anthropic: whoever leaves a stream frees the backend', async t => {
  const { gateway, backend } = await serve(t, stalls(messages(), 4))
  const stream = await anthropic(gateway).messages.create({ ...MESSAGE, stream: true })
  for await (const event of stream) if (event.type === 'content_block_delta') break
  await backend.requests[0]!.closed
  await assertGone(gateway)
})

// --- ollama ---

const NATIVE_USED = CALLS.map(({ name, input }) => ({ function: { name, arguments: input } }))

test('ollama: chat, whole', async t => {
  const { gateway } = await serve(t, speaks(nativeChat), AUTH)
  const client = ollama(gateway)
  const { message, done, eval_count } = await client.chat(CHAT)
  assert.equal(message.content, TEXT)
  assert.equal(done, true)
  assert.equal(eval_count, COMPLETION_TOKENS)
  assert.deepEqual(await metered(gateway, '/api/chat'), METERED)
  const called = await client.chat({ ...CHAT, tools: TOOLS })
  assert.deepEqual(called.message.tool_calls, NATIVE_USED)
})

for (const cut of cuts) {
  test(`ollama: chat, streamed ${cut}`, async t => {
    const { gateway } = await serve(t, speaks(nativeChat, cut))
    const client = ollama(gateway)
    const { seen, error } = await drain(await client.chat({ ...CHAT, stream: true }))
    assert.equal(error, undefined)
    assert.equal(seen.map(({ message }) => message.content).join(''), TEXT)
    assert.equal(seen.at(-1)!.prompt_eval_count, PROMPT_TOKENS)
    assert.deepEqual(await metered(gateway, '/api/chat'), METERED)
    const called = await drain(await client.chat({ ...CHAT, tools: TOOLS, stream: true }))
    assert.deepEqual(
      called.seen.flatMap(({ message }) => message.tool_calls ?? []),
      NATIVE_USED
    )
  })

  test(`ollama: generate, streamed ${cut}`, async t => {
    const { gateway } = await serve(t, speaks(nativeGenerate, cut))
    const body = { model: 'm', prompt: 'Grüezi' }
    const { seen } = await drain(await ollama(gateway).generate({ ...body, stream: true }))
    assert.equal(seen.map(({ response }) => response).join(''), TEXT)
    assert.deepEqual(seen.at(-1)!.context, [1, 2, 3])
    assert.deepEqual(await metered(gateway, '/api/generate'), METERED)
  })
}

test('ollama: generate, whole', async t => {
  const { gateway } = await serve(t, speaks(nativeGenerate))
  const { response } = await ollama(gateway).generate({ model: 'm', prompt: 'Grüezi' })
  assert.equal(response, TEXT)
  assert.deepEqual(await metered(gateway, '/api/generate'), METERED)
})

test('ollama: embed, list and show', async t => {
  const embeddings = [[0.5, -0.25]]
  const details = { parent_model: '', format: 'gguf', family: 'llama', families: ['llama'] }
  const more = { parameter_size: '8B', quantization_level: 'Q4_0' }
  const answers: Record<string, object> = {
    '/api/embed': { model: 'm', embeddings, total_duration: 1, prompt_eval_count: PROMPT_TOKENS },
    '/api/tags': {
      models: [{ name: 'm', model: 'm', size: 1, digest: 'd', details: { ...details, ...more } }]
    },
    '/api/show': { license: 'MIT', details, model_info: { 'llama.context_length': 8192 } }
  }
  const { gateway } = await serve(
    t,
    speaks((_ask, { url }) => json(answers[url]))
  )
  const client = ollama(gateway)
  const embedded = await client.embed({ model: 'm', input: 'Grüezi' })
  assert.deepEqual(embedded.embeddings, embeddings)
  const spent = { ...METERED, completionTokens: 0 }
  assert.deepEqual(await metered(gateway, '/api/embed'), spent)
  assert.deepEqual((await client.list()).models[0]!.details, { ...details, ...more })
  const { model_info } = await client.show({ model: 'm' })
  assert.deepEqual(model_info, { 'llama.context_length': 8192 })
})

test('ollama: a wrong key, and an error of the backend', async t => {
  const { gateway } = await serve(
    t,
    speaks(() => json({ error: "model 'x' not found" }, 404)),
    AUTH
  )
  const refused = await failure(ollama(gateway, 'sk-wrong').chat(CHAT), Error)
  assert.equal((refused as { status_code?: number }).status_code, 401)
  assert.match(refused.message, /API key/)
  const unknown = await failure(ollama(gateway).chat({ ...CHAT, stream: true }), Error)
  assert.equal(unknown.message, "model 'x' not found")
})

test('ollama: the backend dies', async t => {
  const { gateway } = await serve(t, dies(nativeChat, 3))
  const { seen, error } = await drain(await ollama(gateway).chat({ ...CHAT, stream: true }))
  assert.equal(seen.map(({ message }) => message.content).join(''), PIECES.slice(0, 3).join(''))
  assert.match(error!.message, BROKE_OFF)
  await assertBroken(gateway, '/api/chat')
})

test('ollama: the backend reports an error in the middle of its stream', async t => {
  const { gateway } = await serve(
    t,
    speaks(ask => {
      const { headers, events } = nativeChat(ask)
      return { headers, events: [...events.slice(0, 3), '{"error":"the runner went"}\n'] }
    })
  )
  const { seen, error } = await drain(await ollama(gateway).chat({ ...CHAT, stream: true }))
  assert.equal(seen.length, 3)
  assert.equal(error!.message, 'the runner went')
})

test('ollama: whoever leaves a stream frees the backend', async t => {
  const { gateway, backend } = await serve(t, stalls(nativeChat, 2))
  const stream = await ollama(gateway).chat({ ...CHAT, stream: true })
  let text = ''
  await assert.rejects(
    async () => {
      for await (const { message } of stream) {
        text += message.content
        if (message.content === PIECES[1]) stream.abort()
      }
    },
    { name: 'AbortError' }
  )
  assert.equal(text, PIECES.slice(0, 2).join(''))
  await backend.requests[0]!.closed
  await assertGone(gateway)
})

// --- ai with @ai-sdk/openai-compatible ---

const AI_TOOLS = Object.fromEntries(
  SCHEMAS.map(({ name, description, schema }) => [
    name,
    { description, inputSchema: jsonSchema(schema) }
  ])
)
const PROMPT = { prompt: 'Grüezi', maxRetries: 0 }

const aiCalls = (calls: { toolCallId: string; toolName: string; input: unknown }[]) =>
  calls.map(({ toolCallId, toolName, input }) => ({ id: toolCallId, name: toolName, input }))

for (const [server, chat] of Object.entries(CHATS)) {
  test(`ai: generateText with ${server}`, async t => {
    const { gateway } = await serve(t, speaks(chat))
    const model = aiModel(gateway)
    const { text, reasoningText, usage, finishReason } = await generateText({ model, ...PROMPT })
    assert.equal(text, TEXT)
    assert.equal(reasoningText, REASONING)
    assert.equal(finishReason, 'stop')
    assert.equal(usage.inputTokens, PROMPT_TOKENS)
    assert.deepEqual(await metered(gateway, CHAT_ROUTE), METERED)
    const called = await generateText({ model, ...PROMPT, tools: AI_TOOLS })
    assert.deepEqual(aiCalls(called.toolCalls), USED)
    assert.equal(called.finishReason, 'tool-calls')
  })

  for (const cut of cuts) {
    test(`ai: streamText with ${server}, ${cut}`, async t => {
      const { gateway } = await serve(t, speaks(chat, cut))
      const result = streamText({ model: aiModel(gateway, { includeUsage: true }), ...PROMPT })
      const { seen, error } = await drain(result.textStream)
      assert.equal(error, undefined)
      assert.equal(seen.join(''), TEXT)
      const { inputTokens, outputTokens } = await result.usage
      assert.deepEqual([inputTokens, outputTokens], [PROMPT_TOKENS, COMPLETION_TOKENS])
      assert.equal(await result.reasoningText, REASONING)
      assert.equal(await result.finishReason, 'stop')
      assert.deepEqual(await metered(gateway, CHAT_ROUTE), METERED)
    })

    test(`ai: tool calls with ${server} and without usage, ${cut}`, async t => {
      const { gateway } = await serve(t, speaks(chat, cut))
      const result = streamText({ model: aiModel(gateway), ...PROMPT, tools: AI_TOOLS })
      assert.deepEqual(aiCalls(await result.toolCalls), USED)
      assert.equal(await result.finishReason, 'tool-calls')
      assert.equal((await result.usage).outputTokens, undefined)
      assert.deepEqual(await metered(gateway, CHAT_ROUTE), METERED)
    })
  }

  test(`ai: ${server} dies`, async t => {
    const { gateway } = await serve(t, dies(chat, 5))
    const result = streamText({ model: aiModel(gateway), ...PROMPT, onError() {} })
    const { seen, error } = await drain(result.fullStream)
    assert.ok(error !== undefined)
    assert.ok(seen.some(({ type }) => type === 'text-delta'))
    const part = seen.find(({ type }) => type === 'error') as { error: unknown } | undefined
    assert.match((part?.error as Error).message, BROKE_OFF)
    await assert.rejects(Promise.resolve(result.text))
    await assertBroken(gateway, CHAT_ROUTE)
  })
}

test('ai: a wrong key', async t => {
  const { gateway } = await serve(t, speaks(vllmChat), AUTH)
  const model = aiModel(gateway, { apiKey: 'sk-wrong' })
  const error = await failure(generateText({ model, ...PROMPT }), APICallError)
  assert.equal(error.statusCode, 401)
  assert.match(error.message, /API key/)
})

test('ai: whoever leaves a stream frees the backend', async t => {
  const { gateway, backend } = await serve(t, stalls(vllmChat, 4))
  const abort = new AbortController()
  const abortSignal = abort.signal
  const result = streamText({ model: aiModel(gateway), ...PROMPT, abortSignal, onError() {} })
  await drain(
    (async function* () {
      for await (const text of result.textStream) {
        yield text
        abort.abort()
      }
    })()
  )
  await backend.requests[0]!.closed
  await assertGone(gateway)
})

/** What a call failed with, which must be an error of this class. */
async function failure<T extends Error>(
  call: PromiseLike<unknown>,
  // biome-ignore lint/suspicious/noExplicitAny: the clients' classes take arguments of all kinds
  type: new (...args: any[]) => T
): Promise<T> {
  let thrown: unknown
  try {
    await call
  } catch (error) {
    thrown = error
  }
  assert.ok(thrown instanceof type, `no ${type.name}: ${thrown}`)
  return thrown
}

async function assertGone(gateway: TestGateway): Promise<void> {
  const line = await gateway.logged({ msg: 'exchange' })
  assert.equal(line.outcome, 'client_gone')
}
