import assert from 'node:assert/strict'
import { createHmac } from 'node:crypto'
import { type TestContext, test } from 'node:test'
import {
  answerChat,
  CHAT,
  chunk,
  closedPort,
  DONE,
  eventually,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'

/** A receiver of usage events that answers each delivery with the next of these statuses. */
async function receiver(t: TestContext, answers: (number | [number, object])[] = []) {
  const server = await fakeBackend(t, (_request, response) => {
    const answer = answers.shift() ?? 200
    const [status, headers] = Array.isArray(answer) ? answer : [answer, {}]
    response.writeHead(status, headers as never)
    response.end()
  })
  return { ...server, event: async (index = 0) => JSON.parse((await server.request(index)).body) }
}

const reporting = (url: string, webhook: object = {}, more: object = {}) => ({
  usage: {
    enabled: true,
    reporters: [{ name: 'billing', type: 'webhook', webhook: { url, ...webhook }, ...more }]
  }
})

test('a record has the tokens that failed attempts have generated, and no cost of them', async t => {
  const failing = (status: number, usage: object | undefined) =>
    fakeBackend(t, (_request, response) => {
      response.writeHead(status, { 'content-type': 'application/json' })
      response.end(JSON.stringify({ error: { message: 'The engine has died' }, usage }))
    })
  const backends = [
    await failing(500, { prompt_tokens: 12, completion_tokens: 900, total_tokens: 912 }),
    await failing(503, { prompt_tokens: 12, completion_tokens: 100, total_tokens: 112 }),
    await failing(502, undefined),
    await fakeBackend(t, answerChat)
  ]
  const hook = await receiver(t)
  const { usage } = reporting(hook.url)
  const gateway = await startGateway(t, {
    backends: backends.map(({ url }, priority) => ({ url, priority })),
    routing: { retry: { enabled: true, max_retries: 3, initial_wait: '1ms' } },
    usage: { ...usage, prices: [{ model: 'm', input: 1_000_000, output: 1_000_000 }] }
  })
  assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
  const first = await hook.event()
  assert.deepEqual([first.failed_input_tokens, first.failed_output_tokens], [24, 1000])
  assert.deepEqual([first.attempts, first.total_tokens, first.cost], [4, 15, 15])

  // Errors that reach the client.
  for (const [at, [status, output]] of [[500, 900] as const, [503, 100] as const].entries()) {
    const alone = await startGateway(t, { backends: [{ url: backends[at]!.url }], usage })
    assert.equal((await post(`${alone.url}/v1/chat/completions`, CHAT)).status, status)
    const record = await hook.event(at + 1)
    assert.deepEqual([record.failed_input_tokens, record.failed_output_tokens], [12, output])
    assert.deepEqual([record.attempts, record.total_tokens], [1, 0])
  }
})

test('each call that reached a backend is reported, in the fields of the page and of the original', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    backends: [{ name: 'gpu', url: `${backend.url}/v1` }],
    auth: { enabled: true, keys: [{ key: 'sk-1', name: 'laptop', user_id: 'alice' }] },
    ...reporting(`${hook.url}/usage?a=b`, { headers: { 'X-Secret': 's' } })
  })
  const response = await post(
    `${gateway.url}/v1/chat/completions?secret=1`,
    { ...CHAT, stream: true },
    { authorization: 'Bearer sk-1' }
  )
  await response.text()
  const event = await hook.event()
  const { timestamp, id, latency_ms, duration_ms, ttft_ms, ...rest } = event
  assert.match(timestamp, /^\d{4}-\d\d-\d\dT[\d:.]+Z$/)
  assert.match(id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/)
  assert.equal(`req_${id.replaceAll('-', '')}`, rest.request_id)
  assert.ok(latency_ms === duration_ms && duration_ms >= ttft_ms && ttft_ms >= 0)
  const tokens = { prompt_tokens: 12, completion_tokens: 3, total_tokens: 15 }
  assert.deepEqual(rest, {
    request_id: response.headers.get('x-llmproxy-request-id'),
    user_id: 'alice',
    api_key_id: 'laptop',
    caller: 'laptop',
    requested_model: 'm',
    model: 'm',
    ...tokens,
    input_tokens: 12,
    output_tokens: 3,
    is_stream: true,
    stream: true,
    exactness: 'exact',
    endpoint: '/v1/chat/completions',
    method: 'POST',
    path: '/v1/chat/completions',
    backend: 'gpu',
    backend_url: backend.url,
    attempts: 1,
    outcome: 'ok',
    status_code: 200,
    usage: tokens
  })
  const [delivery] = hook.requests
  assert.equal(delivery!.url, '/usage?a=b')
  assert.equal(delivery!.headers['content-type'], 'application/json')
  assert.equal(delivery!.headers['x-secret'], 's')
  assert.doesNotMatch(delivery!.body, /sk-1|Hello/)
})

test('the request body only when it is asked for', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url, { include_request_body: true, method: 'PUT' })
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  const event = await hook.event()
  assert.deepEqual(event.request_body, CHAT)
  assert.equal(event.is_stream, false)
  assert.equal(event.user_id, null)
  assert.equal(hook.requests[0]!.method, 'PUT')
})

test('a large request body is left out of its record, which says so', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url, { include_request_body: true })
  })
  const body = JSON.stringify({ ...CHAT, user: 'é'.repeat(128 * 1024) })
  await (await post(`${gateway.url}/v1/chat/completions`, body)).text()
  const event = await hook.event()
  assert.equal(event.request_body, undefined)
  assert.equal(event.request_body_omitted, Buffer.byteLength(body))
  assert.ok(hook.requests[0]!.body.length < 2_000)
})

test('a stream that was cut, a failed call and a refused one', async t => {
  const backend = await fakeBackend(t, (request, response, raw) => {
    if (request.url === '/v1/embeddings') return raw.socket.destroy()
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    return response.write(chunk('Hi') + chunk(' you'))
  })
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url)
  })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/you/)
  client.socket.destroy()
  const cut = await hook.event()
  assert.equal(cut.outcome, 'client_gone')
  assert.equal(cut.completion_tokens, 2)
  assert.ok(cut.prompt_tokens > 0)
  assert.equal(cut.exactness, 'counted')

  await post(`${gateway.url}/v1/embeddings`, 'not json')
  await post(`${gateway.url}/v1/embeddings`, CHAT)
  const failed = await hook.event(1)
  assert.equal(failed.endpoint, '/v1/embeddings')
  assert.deepEqual([failed.outcome, failed.status_code], ['backend_failed', 502])
  assert.equal(failed.usage, undefined)
  assert.equal(failed.total_tokens, 0)
  assert.equal(hook.requests.length, 2, 'what reached no backend is not reported')
})

test('a client that leaves while it waits has cost its prompt; one whose backend is away has not', async t => {
  const backend = await fakeBackend(t, () => {})
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url)
  })
  for (const [index, stream] of [true, false].entries()) {
    const body = JSON.stringify({ ...CHAT, stream })
    const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
    await backend.request(index)
    client.socket.destroy()
    const event = await hook.event(index)
    assert.deepEqual([event.outcome, event.exactness], ['client_gone', 'counted'])
    assert.ok(event.prompt_tokens > 0)
    assert.deepEqual([event.completion_tokens, event.total_tokens], [0, event.prompt_tokens])
  }
  const away = await startGateway(t, {
    backends: [{ url: `http://127.0.0.1:${await closedPort()}` }],
    ...reporting(hook.url)
  })
  await (await post(`${away.url}/v1/chat/completions`, CHAT)).text()
  const { outcome, exactness, total_tokens } = await hook.event(2)
  assert.deepEqual([outcome, exactness, total_tokens], ['backend_failed', null, 0])
})

test('a body that turns out too large on its way: one record, and an outcome that a record may have', async t => {
  const backend = await fakeBackend(t, () => {})
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    server: { max_body_size: '64KB' },
    backends: [{ url: backend.url }],
    ...reporting(hook.url)
  })
  const body = new ReadableStream({
    async pull(controller) {
      await new Promise(resolve => setTimeout(resolve, 5))
      controller.enqueue(Buffer.alloc(20_000))
    }
  })
  const response = await fetch(`${gateway.url}/v1/audio/transcriptions`, {
    method: 'POST',
    body,
    duplex: 'half',
    headers: { 'content-type': 'multipart/form-data; boundary=x' }
  } as never)
  assert.equal(response.status, 413)
  const event = await hook.event()
  assert.deepEqual([event.outcome, event.status_code, event.attempts], ['client_gone', 413, 1])
})

test('a delivery that fails is made again, and each event is delivered once', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t, [500, [429, { 'retry-after': '0' }], 302, 200])
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url)
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  const bodies = await Promise.all(
    [0, 1, 2, 3].map(async index => (await hook.request(index)).body)
  )
  assert.equal(new Set(bodies).size, 1)
  await eventually(async () => (await gateway.metric('llmproxy_webhook_queue')) === 0)
  assert.equal(await gateway.metric('llmproxy_webhook_success_total'), 1)
  assert.equal(await gateway.metric('llmproxy_webhook_failure_total'), 0)
})

test('Retry-After of the receiver is waited for', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t, [[503, { 'retry-after': '1' }], 200])
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url)
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  await hook.request(0)
  const start = performance.now()
  await hook.request(1)
  assert.ok(performance.now() - start > 900)
})

test('an event that is older than max_age is given up, loudly', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t, [500, 500, 500])
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url, {}, { max_age: '50ms' })
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  const line = await gateway.logged({ msg: 'usage records given up' })
  assert.deepEqual([line.reporter, line.reason, line.records], ['billing', 'status 500', 1])
  assert.equal(await gateway.metric('llmproxy_webhook_failure_total'), 1)
})

test('a silent receiver holds up no answer, and its deliveries time out', async t => {
  const backend = await fakeBackend(t, answerChat)
  const silent = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(silent.url, { timeout: '50ms' }, { max_age: '10ms' })
  })
  for (let call = 0; call < 20; call++) {
    await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  }
  await eventually(async () => (await gateway.metric('llmproxy_webhook_failure_total')) === 20)
})

test('what is pending when the gateway stops is still delivered', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t, [500, 500, 200])
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url)
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  await gateway.fastify.close()
  assert.equal(hook.requests.length, 3)
})

test('events come in batches where that is asked for: full ones at once, others in time', async t => {
  const batches: { request_id: string }[][] = []
  const sink = await fakeBackend(t, (request, response) => {
    batches.push(JSON.parse(request.body))
    response.end()
  })
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    usage: {
      enabled: true,
      reporters: [
        {
          type: 'webhook',
          webhook: { url: sink.url, batch: { max_events: 3, max_wait: '200ms' } }
        }
      ]
    }
  })
  for (let call = 0; call < 4; call++) await post(`${gateway.url}/v1/chat/completions`, CHAT)
  await sink.request(1)
  assert.deepEqual(
    batches.map(batch => batch.length),
    [3, 1]
  )
  assert.equal(new Set(batches.flat().map(event => event.request_id)).size, 4)
  await post(`${gateway.url}/v1/chat/completions`, CHAT)
  await gateway.fastify.close()
  assert.equal(batches.length, 3, 'the last one does not wait when the gateway stops')
})

test('several reporters, one of them dead', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(chunk('Hi') + DONE)
  })
  const hook = await receiver(t)
  const dead = `http://127.0.0.1:${await closedPort()}`
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    usage: {
      enabled: true,
      reporters: [
        { name: 'dead', type: 'webhook', max_age: '1ms', webhook: { url: dead } },
        { name: 'off', type: 'webhook', enabled: false, webhook: { url: hook.url } },
        { name: 'good', type: 'webhook', webhook: { url: hook.url } }
      ]
    }
  })
  await (await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })).text()
  assert.equal((await hook.event()).exactness, 'estimated')
  const line = await gateway.logged({ msg: 'usage cannot be reported; it will be tried again' })
  assert.deepEqual([line.reporter, line.reason], ['dead', 'ECONNREFUSED'])
  assert.equal(hook.requests.length, 1)
})

test('another configuration: what ends from then on is reported to its reporters', async t => {
  const backend = await fakeBackend(t, answerChat)
  const [before, after] = [await receiver(t), await receiver(t)]
  const config = (url: string) => ({ backends: [{ url: backend.url }], ...reporting(url) })
  const gateway = await startGateway(t, config(before.url))
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  await before.request(0)
  const { parseConfig } = await import('../src/config.ts')
  await gateway.control.reload(parseConfig(JSON.stringify(config(after.url)), 'test', {}) as never)
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  await after.request(0)
  assert.equal(before.requests.length, 1)
  await gateway.fastify.close()
})

test('the same configuration once more does not make deliveries anew that are under way', async t => {
  const backend = await fakeBackend(t, answerChat)
  const answered = Promise.withResolvers<void>()
  const hook = await fakeBackend(t, async (_request, response) => {
    await answered.promise
    response.end()
  })
  const config = { backends: [{ url: backend.url }], ...reporting(hook.url) }
  const gateway = await startGateway(t, config)
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  await hook.request(0)
  const { parseConfig } = await import('../src/config.ts')
  await gateway.control.reload(parseConfig(JSON.stringify(config), 'test', {}) as never)
  answered.resolve()
  await eventually(async () => (await gateway.metric('llmproxy_webhook_success_total')) === 1)
  assert.equal(hook.requests.length, 1)
})

test('a body that is asked for too late is left out', async t => {
  const going = Promise.withResolvers<void>()
  const backend = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    await going.promise
    response.end(DONE)
  })
  const hook = await receiver(t)
  const config = (webhook: object) => ({
    backends: [{ url: backend.url }],
    ...reporting(hook.url, webhook)
  })
  const gateway = await startGateway(t, config({}))
  const answer = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  const { parseConfig } = await import('../src/config.ts')
  const changed = JSON.stringify(config({ include_request_body: true }))
  await gateway.control.reload(parseConfig(changed, 'test', {}) as never)
  going.resolve()
  await answer.text()
  assert.equal((await hook.event()).request_body, undefined)
})

test('tags come from headers, and a price makes a cost', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    usage: {
      ...reporting(hook.url).usage,
      tags: { team: 'X-Team', project: 'X-Project' },
      prices: [{ model: 'm*', input: 2, output: 10, currency: 'EUR' }]
    }
  })
  const headers = { 'x-team': 'search' }
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT, headers)).text()
  const event = await hook.event()
  assert.deepEqual(event.tags, { team: 'search' })
  assert.deepEqual([event.cost, event.currency], [(12 * 2 + 3 * 10) / 1e6, 'EUR'])
})

test('each reporter gets the records that its filter lets through', async t => {
  const backend = await fakeBackend(t, answerChat)
  const [all, some] = [await receiver(t), await receiver(t)]
  const reporter = (name: string, url: string, filter: object) => ({
    name,
    type: 'webhook',
    filter,
    webhook: { url, concurrency: 1 }
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    auth: {
      enabled: true,
      keys: [
        { key: 'sk-1', name: 'a' },
        { key: 'sk-2', name: 'b' }
      ]
    },
    usage: {
      enabled: true,
      reporters: [
        reporter('all', all.url, {}),
        reporter('some', some.url, { models: ['gpt*'], callers: ['b'], outcomes: ['ok'] })
      ]
    }
  })
  const calls = [
    ['sk-1', 'gpt-x'],
    ['sk-2', 'm'],
    ['sk-2', 'gpt-x']
  ] as const
  for (const [key, model] of calls) {
    const headers = { authorization: `Bearer ${key}` }
    await (await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model }, headers)).text()
  }
  await all.request(2)
  const event = await some.event()
  assert.deepEqual([event.caller, event.model], ['b', 'gpt-x'])
  assert.equal(some.requests.length, 1)
})

test('deliveries are signed as Standard Webhooks has it', async t => {
  const key = Buffer.from('a key of some thirty bytes or so')
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url, { secret: `whsec_${key.toString('base64')}` })
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  const { headers, body } = await hook.request(0)
  const { 'webhook-id': id, 'webhook-timestamp': timestamp, 'webhook-signature': given } = headers
  assert.equal(id, JSON.parse(body).id)
  assert.ok(Math.abs(Number(timestamp) - Date.now() / 1000) < 60)
  const expected = createHmac('sha256', key).update(`${id}.${timestamp}.${body}`).digest('base64')
  assert.equal(given, `v1,${expected}`)
})

test('a record that alone is refused does not hold up those behind it', async t => {
  const backend = await fakeBackend(t, answerChat)
  const seen: string[] = []
  const hook = await fakeBackend(t, (request, response) => {
    const { model } = JSON.parse(request.body)
    seen.push(model)
    response.writeHead(model === 'poison' ? 422 : 200).end()
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url)
  })
  for (const model of ['poison', 'a', 'b']) {
    await (await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model })).text()
  }
  await hook.request(2)
  assert.deepEqual(seen.toSorted(), ['a', 'b', 'poison'])
  await gateway.logged({ msg: 'usage records were refused; they will be tried again' })
})

/** Usage of each API whose prompt of 100 tokens read 20 from a cache and wrote 30 to it. */
const CACHE_WRITES: [string, boolean, string][] = [
  [
    '/v1/messages',
    false,
    '{"type":"message","content":[{"type":"text","text":"Hi"}],"usage":{"input_tokens":50,"cache_read_input_tokens":20,"cache_creation_input_tokens":30,"cache_creation":{"ephemeral_5m_input_tokens":30,"ephemeral_1h_input_tokens":0},"output_tokens":10}}'
  ],
  [
    '/v1/messages',
    true,
    'data: {"type":"message_start","message":{"usage":{"input_tokens":50,"cache_read_input_tokens":20,"cache_creation_input_tokens":30,"output_tokens":1}}}\n\ndata: {"type":"message_delta","usage":{"output_tokens":10}}\n\ndata: {"type":"message_stop"}\n\n'
  ],
  [
    '/v1/chat/completions',
    false,
    '{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":100,"completion_tokens":10,"prompt_tokens_details":{"cached_tokens":20,"cache_write_tokens":30}}}'
  ],
  [
    '/v1/chat/completions',
    true,
    `${chunk('Hi')}data: {"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":10,"prompt_tokens_details":{"cached_tokens":20,"cache_write_tokens":30}}}\n\n${DONE}`
  ],
  [
    '/v1/responses',
    false,
    '{"status":"completed","usage":{"input_tokens":100,"output_tokens":10,"input_tokens_details":{"cached_tokens":20,"cache_write_tokens":30}}}'
  ]
]

test('tokens that a cache was written with have a field and a price of their own, for every API', async t => {
  let body = ''
  const backend = await fakeBackend(t, (_request, response) => {
    const type = body.startsWith('data:') ? 'text/event-stream' : 'application/json'
    response.writeHead(200, { 'content-type': type }).end(body)
  })
  const hook = await receiver(t)
  const million = 1_000_000
  const prices = [
    { model: 'm', input: million, cached: 0.1 * million, cache_write: 3 * million, output: 0 },
    { model: '*', input: million, cached: 0.1 * million, output: 0 }
  ]
  const { usage } = reporting(hook.url, {})
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    usage: { ...usage, prices }
  })
  const models = ['m', 'other']
  let index = 0
  for (const [path, stream, text] of CACHE_WRITES) {
    body = text
    for (const model of models) {
      await (await post(gateway.url + path, { ...CHAT, model, stream })).text()
      const { input_tokens, cached_tokens, cache_write_tokens, exactness, cost } = await hook.event(
        index++
      )
      assert.deepEqual(
        [input_tokens, cached_tokens, cache_write_tokens, exactness, cost],
        [100, 20, 30, 'exact', model === 'm' ? 50 + 2 + 90 : 80 + 2],
        `${path}, ${model}`
      )
    }
  }
  const metric = (type: string) => gateway.metric('llmproxy_usage_tokens_total', { type })
  assert.deepEqual(
    [await metric('prompt'), await metric('cached'), await metric('cache_write')],
    [100 * index, 20 * index, 30 * index]
  )
})

test('a quota of money counts what a cache was written with', async t => {
  const body = CACHE_WRITES[0]![2]
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json' }).end(body)
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    rate_limit: {
      enabled: true,
      per_key: { total_quota: 100, quota_unit: 'cost' }
    },
    usage: {
      enabled: true,
      prices: [{ model: '*', input: 0, cached: 0, cache_write: 4_000_000, output: 0 }],
      reporters: [{ type: 'builtin', builtin: {} }]
    }
  })
  const ask = async () => (await post(`${gateway.url}/v1/messages`, CHAT)).status
  assert.equal(await ask(), 200)
  await gateway.logged({ msg: 'exchange' })
  assert.equal(await ask(), 429)
})

test('an odd count of cache writes makes no call cheaper than nothing', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json' })
    response.end(
      '{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":8,"cache_write_tokens":64}}}'
    )
  })
  const hook = await receiver(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url)
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  const { cached_tokens, cache_write_tokens } = await hook.event()
  assert.deepEqual([cached_tokens, cache_write_tokens], [8, 2])
})

test('reporters work without usage.enabled', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t)
  const { usage } = reporting(hook.url)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    usage: { reporters: usage.reporters }
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  assert.equal((await hook.event()).total_tokens, 15)
})
