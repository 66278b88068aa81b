import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { pino } from 'pino'
import type { UsageEvent } from '../src/reporters/reporter.ts'
import { Webhook } from '../src/reporters/webhook.ts'
import {
  answerChat,
  CHAT,
  chunk,
  closedPort,
  DONE,
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

const reporting = (url: string, more: object = {}) => ({
  usage: {
    enabled: true,
    reporters: [{ name: 'billing', type: 'webhook', webhook: { url, ...more } }]
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
  const { timestamp, latency_ms, ...rest } = event
  assert.match(timestamp, /^\d{4}-\d\d-\d\dT[\d:.]+Z$/)
  assert.ok(latency_ms >= 0)
  const tokens = { prompt_tokens: 12, completion_tokens: 3, total_tokens: 15 }
  assert.deepEqual(rest, {
    request_id: response.headers.get('x-llmproxy-request-id'),
    user_id: 'alice',
    api_key_id: 'laptop',
    model: 'm',
    ...tokens,
    is_stream: true,
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
  await until(async () => (await gateway.metric('llmproxy_webhook_queue')) === 0)
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

test('after retry deliveries more an event is given up, loudly', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await receiver(t, [500, 500, 500])
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(hook.url, { retry: 1 })
  })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  const line = await gateway.logged({ msg: 'a usage event could not be delivered' })
  assert.equal(line.failure, 'status 500')
  assert.equal(hook.requests.length, 2)
  assert.equal(await gateway.metric('llmproxy_webhook_failure_total'), 1)
})

test('a silent receiver holds up no answer, and its deliveries time out', async t => {
  const backend = await fakeBackend(t, answerChat)
  const silent = await fakeBackend(t, () => {})
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...reporting(silent.url, { timeout: '50ms', retry: 0 })
  })
  for (let call = 0; call < 20; call++) {
    await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  }
  await until(async () => (await gateway.metric('llmproxy_webhook_failure_total')) === 20)
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
        { name: 'dead', type: 'webhook', webhook: { url: dead, retry: 0 } },
        { name: 'off', type: 'webhook', enabled: false, webhook: { url: hook.url } },
        { name: 'good', type: 'webhook', webhook: { url: hook.url } }
      ]
    }
  })
  await (await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })).text()
  assert.equal((await hook.event()).exactness, 'counted')
  const line = await gateway.logged({ msg: 'a usage event could not be delivered' })
  assert.deepEqual([line.reporter, line.failure], ['dead', 'ECONNREFUSED'])
  assert.equal(hook.requests.length, 1)
})

async function until(condition: () => Promise<boolean>): Promise<void> {
  while (!(await condition())) await new Promise(resolve => setImmediate(resolve))
}

test('a call is reported to whom it would have been when it began', async t => {
  const responses: import('node:http').ServerResponse[] = []
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    responses.push(response)
  })
  const [before, after] = [await receiver(t), await receiver(t)]
  const config = (url: string) => ({ backends: [{ url: backend.url }], ...reporting(url) })
  const gateway = await startGateway(t, config(before.url))
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/Hi/)
  const { parseConfig } = await import('../src/config.ts')
  await gateway.control.reload(parseConfig(JSON.stringify(config(after.url)), 'test', {}) as never)
  responses[0]!.end(DONE)
  assert.equal((await before.event()).completion_tokens, 1)
  const next = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await next.until(/Hi/)
  responses[1]!.end(DONE)
  assert.equal((await after.event()).completion_tokens, 1)
  assert.equal(before.requests.length, 1)
})

test('the queue of a dead receiver is bounded, and what does not fit is counted', async t => {
  const silent = await fakeBackend(t, () => {})
  const results: string[] = []
  const options = {
    url: silent.url,
    method: 'POST',
    timeout: 60_000,
    retry: 0,
    headers: {},
    batch: { max_events: 1, max_wait: 1_000 }
  } as const
  const webhook = new Webhook(
    'dead',
    { ...options, include_request_body: false },
    result => results.push(result),
    pino({ level: 'silent' })
  )
  const event = { request_id: 'x' } as UsageEvent
  for (let count = 0; count < 12_000; count++) webhook.report(event, undefined)
  assert.ok(webhook.pending <= 10_008, String(webhook.pending))
  const refused = results.length
  assert.ok(refused >= 1_992 && results.every(result => result === 'failed'))
  await webhook.close(AbortSignal.abort())
  assert.equal(results.length, 12_000)
})
