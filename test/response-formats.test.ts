import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import {
  brotliCompressSync,
  createGzip,
  deflateRawSync,
  deflateSync,
  gzipSync,
  zstdCompressSync
} from 'node:zlib'
import { CHAT, chunk, DONE, fakeBackend, post, rawClient, rawPost, startGateway } from './helper.ts'

/** Responses whose content-type or content-encoding does not say what they are. */

const USAGE = { prompt_tokens: 12, completion_tokens: 3, total_tokens: 15 }
const LAST = { id: 'chatcmpl-1', object: 'chat.completion.chunk', model: 'm', choices: [] }
const USAGE_CHUNK = `data: ${JSON.stringify({ ...LAST, usage: USAGE })}\n\n`
const SSE = `${chunk('Hi')}${chunk(' you')}${USAGE_CHUNK}${DONE}`
const WHOLE = {
  object: 'chat.completion',
  model: 'm',
  choices: [{ index: 0, message: { content: 'Hi' }, finish_reason: 'stop' }],
  usage: USAGE
}
const JSON_TEXT = JSON.stringify(WHOLE)
const NDJSON = [
  { model: 'm', message: { content: 'Hi' }, done: false },
  { model: 'm', message: { content: '' }, done: true, prompt_eval_count: 12, eval_count: 3 }
]
  .map(line => `${JSON.stringify(line)}\n`)
  .join('')
/** What the client gets: the name it knows, and no usage that it has not asked for. */
const seen = (text: string) =>
  text.replace(USAGE_CHUNK, '').replaceAll('"model":"m"', '"model":"p"')

interface Reply {
  headers: Record<string, string | string[]>
  body: string | Buffer
}

/** A gateway whose backend sends what the test sets; the model `p` is its `m`. */
async function setUp(t: TestContext, heartbeat: string | 0 = 0) {
  const waiting: { reply: Reply; go: Promise<void> } = {
    reply: { headers: {}, body: '' },
    go: Promise.resolve()
  }
  const backend = await fakeBackend(t, async (_request, response) => {
    const { headers, body } = waiting.reply
    await waiting.go
    response.writeHead(200, headers as never)
    // The first byte alone shows nothing.
    response.write(body.slice(0, 1))
    await nextTurn()
    response.end(body.slice(1))
  })
  const gateway = await startGateway(t, {
    backends: [
      { url: backend.url, models: [{ p: 'm' }] },
      { name: 'other', url: backend.url, models: ['x'] }
    ],
    routing: { circuit_breaker: { consecutive_failures: 1 } },
    server: { heartbeat }
  })
  const ask = (path: string, stream: boolean, reply: Reply) => {
    waiting.reply = reply
    return post(gateway.url + path, { ...CHAT, model: 'p', stream })
  }
  const logged = async (response: Response) => {
    const requestId = response.headers.get('x-llmproxy-request-id')
    const line = await gateway.logged({ msg: 'exchange', requestId })
    return [line.promptTokens, line.completionTokens, line.exactness, line.outcome]
  }
  return { gateway, waiting, ask, logged }
}

const CHATS = '/v1/chat/completions'
const EXACT = [12, 3, 'exact', 'ok']
const TYPES: (string | string[] | undefined)[] = [
  undefined,
  '',
  'text/plain',
  'application/octet-stream',
  'text/event-stream charset=utf-8',
  ['text/event-stream', 'text/event-stream'],
  'application/json',
  'application/x-ndjson',
  'text/event-stream'
]
const typed = (type: string | string[] | undefined): Record<string, string | string[]> =>
  type === undefined ? {} : { 'content-type': type }

test('the format of a response is that of its body, whatever its content-type says', async t => {
  const { ask, logged } = await setUp(t)
  for (const [path, stream, body] of [
    [CHATS, true, SSE],
    [CHATS, true, `\ufeff\n${SSE}`],
    [CHATS, true, `: waiting\n\n${SSE}`],
    [CHATS, false, JSON_TEXT],
    [CHATS, false, ` \n${JSON_TEXT}`],
    [CHATS, true, JSON_TEXT],
    ['/api/chat', true, NDJSON]
  ] as const) {
    for (const type of TYPES) {
      const response = await ask(path, stream, { headers: typed(type), body })
      const what = `${body.slice(0, 40)} as ${type}`
      const bytes = Buffer.from(await response.arrayBuffer()).toString()
      assert.equal(bytes, seen(body), what)
      assert.deepEqual(await logged(response), EXACT, what)
    }
  }
})

test('what is no answer in any format passes as it is', async t => {
  const { ask } = await setUp(t)
  for (const body of ['<html>"model":"m"</html>', 'plain text', 'd']) {
    const response = await ask(CHATS, true, { headers: typed('text/html'), body })
    assert.equal(await response.text(), body)
  }
})

const gzip = (text: string | Buffer) => gzipSync(text)
const CODINGS: [string | string[], (text: string) => string | Buffer][] = [
  ['identity', text => text],
  ['none', text => text],
  ['utf-8', text => text],
  ['', text => text],
  ['whatever', text => text],
  ['GZIP', gzip],
  ['x-gzip', gzip],
  ['gzip, gzip', text => gzip(gzip(text))],
  [['gzip', 'gzip'], text => gzip(gzip(text))],
  ['deflate, gzip', text => gzip(deflateSync(text))],
  ['utf-8, gzip', gzip],
  ['deflate', text => deflateSync(text)],
  ['br', text => brotliCompressSync(text)],
  ['zstd', text => zstdCompressSync(text)]
]

test('codings are undone, and what only looks like one is none', async t => {
  const { ask, logged } = await setUp(t)
  for (const [coding, encode] of CODINGS) {
    for (const [type, stream, body] of [
      ['text/event-stream', true, SSE],
      ['text/plain', true, SSE],
      ['application/json', false, JSON_TEXT]
    ] as const) {
      const headers = { 'content-type': type, 'content-encoding': coding }
      const response = await ask(CHATS, stream, { headers, body: encode(body) })
      const what = `${type} in ${coding}`
      assert.equal(await response.text(), seen(body), what)
      assert.ok(['identity', null].includes(response.headers.get('content-encoding')), what)
      assert.deepEqual(await logged(response), EXACT, what)
    }
  }
})

const BROKEN: [string, string, Buffer | string][] = [
  ['plain bytes', 'gzip', JSON_TEXT],
  ['plain bytes', 'zstd', JSON_TEXT],
  ['raw deflate', 'deflate', deflateRawSync(JSON_TEXT)],
  ['another coding', 'gzip', brotliCompressSync(JSON_TEXT)],
  ['cut bytes', 'gzip', gzip(JSON_TEXT).subarray(0, -10)],
  ['cut bytes', 'br', brotliCompressSync(JSON_TEXT).subarray(0, -3)],
  ['trailing bytes', 'gzip', Buffer.concat([gzip(JSON_TEXT), Buffer.from('more')])],
  ['trailing bytes', 'deflate', Buffer.concat([deflateSync(JSON_TEXT), Buffer.from('more')])],
  [
    'trailing bytes',
    'deflate, zstd',
    Buffer.concat([zstdCompressSync(deflateSync(JSON_TEXT)), Buffer.from('more')])
  ],
  ['one coding of two', 'gzip, gzip', gzip(JSON_TEXT)],
  ['a coding that nobody knows', 'compress', Buffer.from([0x1f, 0x9d, 0x90, 1, 2])],
  ['too many codings', 'gzip, gzip, gzip, gzip', gzip(gzip(gzip(gzip(JSON_TEXT))))]
]

for (const [what, coding, body] of BROKEN) {
  test(`${what} called ${coding} are a failure of the backend`, async t => {
    const { ask, gateway, logged } = await setUp(t)
    const headers = { 'content-type': 'application/json', 'content-encoding': coding }
    const response = await ask(CHATS, false, { headers, body })
    const { error } = (await response.json()) as { error: { code: string } }
    assert.deepEqual([response.status, error.code], [502, 'backend_failed'])
    assert.deepEqual(await logged(response), [undefined, undefined, undefined, 'backend_failed'])
    assert.equal(await gateway.metric('llmproxy_backend_ejections_total'), 1)
    assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
  })
}

test('another backend is asked where a coding is broken', async t => {
  const liar = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json', 'content-encoding': 'gzip' })
    response.end(JSON_TEXT)
  })
  const good = await fakeBackend(t, (_request, response) => response.end(JSON_TEXT))
  const gateway = await startGateway(t, {
    backends: [{ url: liar.url }, { url: good.url, priority: 1 }]
  })
  const response = await post(gateway.url + CHATS, CHAT)
  assert.equal(await response.text(), JSON_TEXT)
})

test('a compressed stream that is cut ends with an error event, and the backend has failed', async t => {
  const whole = gzipSync(chunk('Hi') + chunk(' you') + DONE)
  const ends = { cut: '', 'goes on with garbage': 'garbage', 'goes on with another': whole }
  for (const [what, end] of Object.entries(ends)) {
    const { promise, resolve: go } = Promise.withResolvers<void>()
    const backend = await fakeBackend(t, async (_request, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream', 'content-encoding': 'gzip' })
      const gzip = createGzip()
      gzip.on('data', data => response.write(data))
      gzip.write(chunk('Hi') + chunk(' you'))
      gzip.flush()
      await promise
      response.end(end)
    })
    const gateway = await startGateway(t, {
      backends: [
        { url: backend.url, models: ['m'] },
        { name: 'other', url: backend.url, models: ['x'] }
      ],
      routing: { circuit_breaker: { consecutive_failures: 1 } }
    })
    const body = JSON.stringify({ ...CHAT, stream: true })
    const client = await rawClient(t, gateway.port, rawPost(CHATS, body))
    await client.until(/ you/)
    go()
    await client.closed
    assert.match(client.received, / you"[\s\S]*"code":"backend_failed"/, what)
    assert.doesNotMatch(client.received, /\r\n0\r\n/, what)
    const line = await gateway.logged({ msg: 'exchange' })
    const { promptTokens, completionTokens, exactness, outcome } = line
    assert.ok(Number(promptTokens) > 0)
    assert.deepEqual([completionTokens, exactness, outcome], [2, 'counted', 'backend_failed'], what)
    assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0, what)
    assert.equal(await gateway.metric('llmproxy_backend_ejections_total'), 1, what)
  }
})

const AFTER: [string, Reply, string][] = [
  ...TYPES.map((type): [string, Reply, string] => [
    `events as ${type}`,
    { headers: typed(type), body: SSE },
    seen(SSE)
  ]),
  [
    'events in gzip',
    {
      headers: { 'content-type': 'text/event-stream', 'content-encoding': 'gzip' },
      body: gzip(SSE)
    },
    seen(SSE)
  ],
  [
    'one JSON object',
    { headers: typed('application/json'), body: JSON_TEXT },
    `data: ${seen(JSON_TEXT)}\n\n`
  ],
  [
    'one JSON object of many lines, in br',
    {
      headers: { 'content-encoding': 'br' },
      body: brotliCompressSync(JSON.stringify(WHOLE, null, 1).replaceAll('\n', '\r\n'))
    },
    `data: ${JSON.stringify(WHOLE, null, 1).replaceAll('\n', '').replace('"model": "m"', '"model": "p"')}\n\n`
  ]
]

test('after a heartbeat a response survives in any format and coding', async t => {
  const { gateway, waiting } = await setUp(t, '5ms')
  for (const [what, reply, expected] of AFTER) {
    const { promise, resolve } = Promise.withResolvers<void>()
    Object.assign(waiting, { reply, go: promise })
    const body = JSON.stringify({ ...CHAT, model: 'p', stream: true })
    const client = await rawClient(t, gateway.port, rawPost(CHATS, body))
    await client.until(/:\n\n/)
    resolve()
    const received = await client.until(/\r\n0\r\n\r\n$/)
    client.socket.destroy()
    const framed = received.slice(received.indexOf('\r\n\r\n') + 2)
    const text = framed.replaceAll(/\r\n[0-9a-f]+\r\n/g, '').replaceAll(/^(:\n\n)+|\r\n$/g, '')
    assert.equal(text, expected, what)
    const requestId = /req_[0-9a-f]+/.exec(received)![0]
    const line = await gateway.logged({ msg: 'exchange', requestId })
    const { promptTokens, completionTokens, exactness, outcome } = line
    assert.deepEqual([promptTokens, completionTokens, exactness, outcome], EXACT, what)
  }
})
