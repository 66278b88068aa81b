import assert from 'node:assert/strict'
import { test } from 'node:test'
import { failureIn } from '../src/dialects/failure.ts'
import { CHAT, DONE, fakeBackend, post, rawClient, rawPost, startGateway } from './helper.ts'

/** What a backend says inside a response with status 200: a failure, or nothing of the kind. */

const data = (value: unknown) => `data: ${JSON.stringify(value)}\n\n`
const typed = (value: { type: string; [name: string]: unknown }) =>
  `event: ${value.type}\n${data(value)}`
const chat = (delta: object, more: object = {}, finish_reason: string | null = null) =>
  data({ id: 'c', choices: [{ index: 0, delta, finish_reason }], ...more })
const line = (value: object) => `${JSON.stringify(value)}\n`
const json = JSON.stringify

const TYPES = { sse: 'text/event-stream', ndjson: 'application/x-ndjson', json: 'application/json' }
const USAGE = { prompt_tokens: 12, completion_tokens: 7, total_tokens: 19 }
const SPENT = { input_tokens: 12, output_tokens: 7, total_tokens: 19 }
const ERROR = { message: 'engine died', type: 'InternalServerError', code: 500 }
const CALLERS = { message: 'too long', type: 'BadRequestError', code: 400 }

interface Case {
  name: string
  path: string
  framing: keyof typeof TYPES
  body: string
  /** `broken`: the circuit of the backend opens; `failed`: it does not. */
  is: 'broken' | 'failed' | 'ok'
  /** What was spent, in and out, where the backend states it or the text tells. */
  tokens?: [number, number] | 'counted' | 'none'
}

const CHATS = '/v1/chat/completions'
const CASES: Case[] = [
  // OpenAI, streamed.
  {
    name: 'an error object (vLLM)',
    path: CHATS,
    framing: 'sse',
    body: chat({ content: 'Hi' }) + data({ error: ERROR }) + DONE,
    is: 'broken',
    tokens: 'counted'
  },
  {
    name: 'an error object as the only event',
    path: CHATS,
    framing: 'sse',
    body: data({ error: ERROR }),
    is: 'broken',
    tokens: 'none'
  },
  {
    name: 'an error of the older form, without a member error (vLLM)',
    path: CHATS,
    framing: 'sse',
    body: chat({ content: 'Hi' }) + data({ object: 'error', ...ERROR }) + DONE,
    is: 'broken',
    tokens: 'counted'
  },
  {
    name: 'an overload as a string (TGI)',
    path: CHATS,
    framing: 'sse',
    body: data({ error: 'Model is overloaded', error_type: 'overloaded' }) + DONE,
    is: 'failed',
    tokens: 'none'
  },
  {
    name: 'a fault of the request (TGI)',
    path: CHATS,
    framing: 'sse',
    body: data({ error: { message: 'Input validation error', http_status_code: 422 } }) + DONE,
    is: 'failed',
    tokens: 'none'
  },
  {
    name: 'finish_reason: error, with usage',
    path: CHATS,
    framing: 'sse',
    body:
      chat({ content: 'Hi' }) +
      chat({}, {}, 'error') +
      data({ id: 'c', choices: [], usage: USAGE }) +
      DONE,
    is: 'broken',
    tokens: [12, 7]
  },
  {
    name: 'finish_reason: abort, without usage',
    path: '/v1/completions',
    framing: 'sse',
    body:
      data({ choices: [{ index: 0, text: 'Hi', finish_reason: null }] }) +
      data({ choices: [{ index: 0, text: '', finish_reason: 'abort' }] }) +
      DONE,
    is: 'broken',
    tokens: 'counted'
  },
  {
    name: 'an error beside the text',
    path: CHATS,
    framing: 'sse',
    body: chat({ content: 'Hi' }, { error: { code: 502, message: 'lost' } }, 'error') + DONE,
    is: 'broken',
    tokens: 'counted'
  },
  {
    name: 'an error with usage, which is no usage chunk',
    path: CHATS,
    framing: 'sse',
    body: chat({ content: 'Hi' }) + data({ error: ERROR, usage: USAGE }) + DONE,
    is: 'broken',
    tokens: [12, 7]
  },
  ...[null, '', {}, 'none', 'None', { code: 0, message: '' }, { message: null }, 0, false, []].map(
    (error): Case => ({
      name: `error: ${json(error)} in each chunk`,
      path: CHATS,
      framing: 'sse',
      body:
        chat({ content: 'Hi' }, { error }) +
        chat({}, { error }, 'stop') +
        data({ id: 'c', choices: [], error, usage: USAGE, x: 1 }) +
        DONE,
      is: 'ok',
      tokens: [12, 7]
    })
  ),
  {
    name: 'a tool call that speaks of errors',
    path: CHATS,
    framing: 'sse',
    body:
      chat({ tool_calls: [{ index: 0, function: { arguments: json({ error: ERROR }) } }] }) +
      chat({ content: '{"error":{"code":500}}' }) +
      chat({}, {}, 'tool_calls') +
      DONE,
    is: 'ok'
  },
  // OpenAI, whole.
  {
    name: 'an error object',
    path: CHATS,
    framing: 'json',
    body: json({ error: ERROR }),
    is: 'broken',
    tokens: 'none'
  },
  {
    name: 'an error that is a string',
    path: '/v1/completions',
    framing: 'json',
    body: json({ error: 'CUDA out of memory' }),
    is: 'broken',
    tokens: 'none'
  },
  {
    name: 'an error of the older form',
    path: '/v1/embeddings',
    framing: 'json',
    body: json({ object: 'error', ...ERROR }),
    is: 'broken',
    tokens: 'none'
  },
  {
    name: 'a fault of the request',
    path: '/v1/embeddings',
    framing: 'json',
    body: json({ error: CALLERS }),
    is: 'failed',
    tokens: 'none'
  },
  {
    name: 'finish_reason: error of one choice',
    path: CHATS,
    framing: 'json',
    body: json({
      choices: [
        { message: { content: 'Hi' }, finish_reason: 'stop' },
        { message: { content: '' }, finish_reason: 'error' }
      ],
      usage: USAGE
    }),
    is: 'broken',
    tokens: [12, 7]
  },
  {
    name: 'error: null beside a choice',
    path: CHATS,
    framing: 'json',
    body: json({ error: null, choices: [{ message: { content: 'Hi' } }], usage: USAGE }),
    is: 'ok',
    tokens: [12, 7]
  },
  {
    name: 'a string error beside a choice',
    path: CHATS,
    framing: 'json',
    body: json({ choices: [{ message: { content: 'Hi' } }], error: 'no', usage: USAGE }),
    is: 'ok',
    tokens: [12, 7]
  },
  // Responses.
  {
    name: 'response.failed, with usage',
    path: '/v1/responses',
    framing: 'sse',
    body:
      typed({ type: 'response.created', response: { id: 'r', error: null, usage: null } }) +
      typed({ type: 'response.output_text.delta', delta: 'Hi' }) +
      typed({
        type: 'response.failed',
        response: {
          id: 'r',
          status: 'failed',
          error: { code: 'server_error', message: 'engine died' },
          usage: SPENT
        }
      }),
    is: 'broken',
    tokens: [12, 7]
  },
  {
    name: 'an event of type error',
    path: '/v1/responses',
    framing: 'sse',
    body:
      typed({ type: 'response.output_text.delta', delta: 'Hi' }) +
      typed({ type: 'error', code: 'server_error', message: 'engine died', param: null }),
    is: 'broken',
    tokens: 'counted'
  },
  {
    name: 'status: failed, with usage',
    path: '/v1/responses',
    framing: 'json',
    body: json({
      id: 'r',
      object: 'response',
      status: 'failed',
      error: { code: 'server_error', message: 'engine died' },
      usage: SPENT
    }),
    is: 'broken',
    tokens: [12, 7]
  },
  {
    name: 'an item that failed in a response that did not',
    path: '/v1/responses',
    framing: 'json',
    body: json({
      id: 'r',
      status: 'completed',
      error: null,
      output: [{ type: 'mcp_call', status: 'failed', error: 'no such tool' }],
      usage: SPENT
    }),
    is: 'ok',
    tokens: [12, 7]
  },
  {
    name: 'response.incomplete',
    path: '/v1/responses',
    framing: 'sse',
    body:
      typed({ type: 'response.output_text.delta', delta: 'Hi' }) +
      typed({ type: 'response.incomplete', response: { error: null, usage: SPENT } }),
    is: 'ok',
    tokens: [12, 7]
  },
  // Anthropic.
  {
    name: 'an event of type error',
    path: '/v1/messages',
    framing: 'sse',
    body:
      typed({ type: 'message_start', message: { usage: { input_tokens: 12, output_tokens: 1 } } }) +
      typed({ type: 'content_block_delta', delta: { type: 'text_delta', text: 'Hi' } }) +
      typed({ type: 'content_block_delta', delta: { type: 'text_delta', text: ' you' } }) +
      typed({ type: 'error', error: { type: 'api_error', message: 'engine died' } }),
    is: 'broken',
    tokens: [12, 2]
  },
  {
    name: 'an overload',
    path: '/v1/messages',
    framing: 'sse',
    body: typed({ type: 'error', error: { type: 'overloaded_error', message: 'Overloaded' } }),
    is: 'failed',
    tokens: 'none'
  },
  {
    name: 'an error without a member error (llama.cpp)',
    path: '/v1/messages',
    framing: 'sse',
    body:
      typed({ type: 'content_block_delta', delta: { type: 'text_delta', text: 'Hi' } }) +
      `event: error\n${data({ code: 500, message: 'engine died', type: 'server_error' })}`,
    is: 'broken',
    tokens: 'counted'
  },
  {
    name: 'a whole error',
    path: '/v1/messages',
    framing: 'json',
    body: json({ type: 'error', error: { type: 'api_error', message: 'engine died' } }),
    is: 'broken',
    tokens: 'none'
  },
  {
    name: 'a whole message that calls a tool with an error',
    path: '/v1/messages',
    framing: 'json',
    body: json({
      type: 'message',
      content: [{ type: 'tool_use', name: 'report', input: { error: ERROR, status: 'failed' } }],
      usage: { input_tokens: 12, output_tokens: 7 }
    }),
    is: 'ok',
    tokens: [12, 7]
  },
  // Ollama.
  {
    name: 'an error as its last line',
    path: '/api/chat',
    framing: 'ndjson',
    body:
      line({ message: { content: 'Hi' }, done: false }) + line({ error: 'runner has terminated' }),
    is: 'broken',
    tokens: 'counted'
  },
  {
    name: 'an error as the one object',
    path: '/api/generate',
    framing: 'json',
    body: json({ error: 'runner has terminated' }),
    is: 'broken',
    tokens: 'none'
  },
  {
    name: 'a tool call with a finish reason, and empty errors',
    path: '/api/chat',
    framing: 'ndjson',
    body:
      line({
        error: '',
        message: {
          content: '',
          tool_calls: [{ function: { name: 'f', arguments: { finish_reason: 'error' } } }]
        },
        done: false
      }) + line({ done: true, error: '', prompt_eval_count: 12, eval_count: 7 }),
    is: 'ok',
    tokens: [12, 7]
  }
]

async function check(
  t: import('node:test').TestContext,
  { path, framing, body, is, tokens }: Case,
  hasHeartbeat: boolean
): Promise<void> {
  const { promise, resolve: go } = Promise.withResolvers<void>()
  if (!hasHeartbeat) go()
  const backend = await fakeBackend(t, async (_request, response) => {
    await promise
    response.writeHead(200, { 'content-type': TYPES[framing] })
    response.end(body)
  })
  const gateway = await startGateway(t, {
    // The circuit of an only backend stays closed.
    backends: [
      { url: backend.url, models: ['m'] },
      { name: 'other', url: backend.url, models: ['x'] }
    ],
    routing: { circuit_breaker: { consecutive_failures: 1 } },
    server: { heartbeat: hasHeartbeat ? '5ms' : 0 }
  })
  const stream = framing !== 'json'
  const request = { ...CHAT, input: 'Hello', stream, stream_options: { include_usage: true } }
  if (hasHeartbeat) {
    const client = await rawClient(t, gateway.port, rawPost(path, json(request)))
    await client.until(/:\n\n/)
    go()
    await client.until(/\r\n0\r\n\r\n$/)
  } else {
    const response = await post(gateway.url + path, request)
    assert.equal(response.status, 200)
    assert.equal(await response.text(), body)
  }
  const logged = await gateway.logged({ msg: 'exchange' })
  assert.equal(logged.outcome, is === 'ok' ? 'ok' : 'backend_failed')
  const { promptTokens, completionTokens, exactness } = logged
  if (tokens === 'none') assert.deepEqual([promptTokens, completionTokens], [undefined, undefined])
  else if (tokens === 'counted') {
    assert.equal(exactness, 'counted')
    assert.ok(Number(promptTokens) > 0)
    assert.equal(completionTokens, 1)
  } else if (tokens !== undefined) assert.deepEqual([promptTokens, completionTokens], tokens)
  const ejections = await gateway.metric('llmproxy_backend_ejections_total')
  assert.equal(ejections, is === 'broken' ? 1 : 0)
}

for (const each of CASES) {
  const how = each.framing === 'json' ? 'whole' : 'streamed'
  test(`${each.path}, ${how}, ${each.is}: ${each.name}`, t => check(t, each, false))
}

const STREAMED = CASES.filter(({ framing, is }) => framing === 'sse' && is === 'broken')
for (const each of STREAMED.filter(({ name }) => !name.startsWith('an error '))) {
  test(`${each.path}, after a heartbeat, ${each.is}: ${each.name}`, t => check(t, each, true))
}

test('a whole error after a heartbeat is an error event of its API', async t => {
  const error = json({ type: 'error', error: { type: 'api_error', message: 'engine died' } })
  const { promise, resolve: go } = Promise.withResolvers<void>()
  const backend = await fakeBackend(t, async (_request, response) => {
    await promise
    response.writeHead(200, { 'content-type': TYPES.json }).end(error)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    server: { heartbeat: '5ms' }
  })
  const request = json({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/messages', request))
  await client.until(/:\n\n/)
  go()
  const received = await client.until(/\r\n0\r\n\r\n$/)
  assert.ok(
    received.replaceAll(/\r\n[0-9a-f]+\r\n/g, '').includes(`event: error\ndata: ${error}\n\n`)
  )
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'backend_failed')
})

test('the kind of an error decides before the words of its message', () => {
  const report = (error: object, more: object = {}) => ({
    error: JSON.stringify(error),
    type: undefined,
    object: undefined,
    status: undefined,
    message: undefined,
    code: undefined,
    errorType: undefined,
    finishReasons: undefined,
    hasChoices: false,
    delta: false,
    isErrorEvent: false,
    ...more
  })
  const cases: [object, string][] = [
    [{ message: 'CUDA error: invalid device ordinal', type: 'InternalServerError' }, '5xx'],
    [{ message: 'KV cache capacity exceeded', type: 'server_error' }, '5xx'],
    [{ message: 'model not found on disk', type: 'server_error' }, '5xx'],
    [{ message: 'max_tokens must be positive', type: 'BadRequestError' }, '4xx'],
    [{ message: 'max_tokens must be positive' }, '4xx'],
    [{ message: 'the engine died' }, '5xx'],
    [{ message: 'slow down', type: 'overloaded_error' }, '429']
  ]
  for (const [error, kind] of cases) assert.equal(failureIn(report(error)), kind)
  const generation = report(
    {},
    { error: '"CUDA error: invalid argument"', errorType: 'generation' }
  )
  assert.equal(failureIn(generation), '5xx')
  const beside = { error: '"out of memory"', hasChoices: true }
  assert.equal(failureIn(report({}, beside)), '5xx')
  assert.equal(failureIn(report({}, { ...beside, error: '"none"' })), undefined)
})
