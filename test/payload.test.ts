import assert from 'node:assert/strict'
import { once } from 'node:events'
import { test } from 'node:test'
import { parseConfig } from '../src/config.ts'
import { anthropic } from '../src/dialects/anthropic.ts'
import { ollama } from '../src/dialects/ollama.ts'
import { openai } from '../src/dialects/openai.ts'
import { toPayload } from '../src/payload.ts'
import { sections } from '../src/server.ts'
import { outlineOf } from '../src/wire/json-scanner.ts'
import {
  CHAT,
  chunk,
  DONE,
  eventually,
  fakeBackend,
  post,
  type RawClient,
  rawClient,
  rawPost,
  responded,
  startGateway
} from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'
import { REDIS, uniqueName } from './servers.ts'

/** What the gateway reads from request bodies, and what no body can do to it. */

const ROUTES = ['/v1/chat/completions', '/v1/messages', '/v1/responses', '/api/chat']

/** The error text in any dialect. */
async function messageOf(response: Response): Promise<string> {
  const { error } = (await response.json()) as { error: string | { message: string } }
  return typeof error === 'string' ? error : error.message
}

const MEMBERS = Array.from({ length: 1001 }, (_, at) => `"a${at}":1`)
const HOSTILE: [string, string, RegExp][] = [
  ['deep arrays', `{"model":"m","x":${'['.repeat(1_000_000)}`, /more than 128 levels/],
  ['deep objects', `{"model":"m","x":${'{"a":'.repeat(200_000)}`, /more than 128 levels/],
  [
    'empty objects',
    `{"model":"m","x":[${'{},'.repeat(1_100_000)}{}]}`,
    /more than 1000000 objects/
  ],
  ['many names', `{"model":"m",${MEMBERS}}`, /more than 1000 members/]
]

test('a body that is nested too deep or has too many members is a 400 that says so', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  for (const [name, body, message] of HOSTILE) {
    for (const route of body.length > 1_100_000 ? ROUTES.slice(0, 1) : ROUTES) {
      const response = await post(gateway.url + route, body)
      assert.equal(response.status, 400, `${name} at ${route}`)
      assert.match(await messageOf(response), message)
    }
  }
  assert.equal(backend.requests.length, 0)
})

test('a bad body is rejected before its end has arrived', async t => {
  const gateway = await startGateway(t, { backends: [{ url: 'http://127.0.0.1:1' }] })
  const client = await rawClient(t, gateway.port)
  const head = rawPost('/v1/messages', '').replace('content-length: 0', 'content-length: 9000000')
  client.socket.write(`${head}{"model":"m","x":${'['.repeat(200)}`)
  assert.match(await client.until(/levels deep/), /^HTTP\/1.1 400 /)
})

test('12 MB of JSON in any shape pass through a gateway with a heap of 48 MB', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const dataDir = folder(t)
  const config = writeConfig(`${dataDir}/config.json`, {
    server: { listen: '127.0.0.1:0' },
    backends: [{ url: backend.url }]
  })
  const env = { NODE_OPTIONS: '--max-old-space-size=48', LLMPROXY_DATA_DIR: dataDir }
  const gateway = await start(t, [CLI, '--config', config], env)
  const mb = 1024 * 1024
  const shapes = {
    numbers: '1,'.repeat(6 * mb),
    arrays: '[[[[0,0,0,0,0,0,0,0,0,0]]]],'.repeat(200_000),
    strings: '"",'.repeat(4 * mb)
  }
  for (const [name, elements] of Object.entries(shapes)) {
    const body = `{"model":"m","messages":[${elements}0]}`
    const response = await post(`${gateway.url}/v1/chat/completions`, body)
    assert.equal(response.status, 200, `${name}: ${await response.text()}`)
    assert.equal(backend.requests.at(-1)!.body, body)
  }
  assert.equal(gateway.child.exitCode, null)
})

test('a large body of which a part changes arrives as it was, but for that part', async t => {
  const backend = await fakeBackend(t, (request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(chunk(String(request.body.length)) + DONE)
  })
  const models = [{ fast: 'm' }]
  const gateway = await startGateway(t, { backends: [{ url: backend.url, models }] })
  const content = 'ü "quoted" \\ '.repeat(50_000)
  const messages = [{ role: 'user', content }]
  const body = { messages, model: 'fast', stream: true, seed: 1 }
  for (const encoding of ['length', 'chunked'] as const) {
    const bytes = Buffer.from(JSON.stringify(body))
    const sent = encoding === 'length' ? bytes : new Blob([bytes]).stream()
    const response = await fetch(`${gateway.url}/v1/chat/completions`, {
      method: 'POST',
      body: sent,
      duplex: 'half'
    } as RequestInit)
    assert.equal(response.status, 200)
    await response.text()
    const { headers, body: received } = backend.requests.at(-1)!
    assert.equal(Number(headers['content-length']), Buffer.byteLength(received))
    assert.deepEqual(JSON.parse(received), {
      ...body,
      model: 'm',
      stream_options: { include_usage: true }
    })
  }
})

test('request bodies together are bounded, and one that ends makes room', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    server: { max_body_size: '64KB', overload: { request_bodies: '64KB' } }
  })
  const slow = await rawClient(t, gateway.port)
  const head = rawPost('/v1/embeddings', '').replace('content-length: 0', 'content-length: 60000')
  slow.socket.write(`${head}{"input":"${'x'.repeat(50_000)}`)
  await eventually(async () => (await gateway.metric('llmproxy_request_body_bytes')) >= 50_000)
  const body = { model: 'm', input: 'x'.repeat(20_000) }
  for (const [route, text] of [
    ['/v1/embeddings', /"code":"overloaded"/],
    ['/v1/messages', /"type":"overloaded_error"/],
    ['/api/embed', /"error":"The gateway holds/]
  ] as const) {
    const refused = await post(gateway.url + route, body)
    assert.equal(refused.status, 503)
    assert.equal(refused.headers.get('retry-after'), '1')
    assert.match(await refused.text(), text)
  }
  slow.socket.destroy()
  await eventually(async () => (await gateway.metric('llmproxy_request_body_bytes')) === 0)
  assert.equal((await post(`${gateway.url}/v1/embeddings`, body)).status, 200)
  assert.equal(await gateway.metric('llmproxy_request_body_bytes'), 0)
})

test('slow uploads of one caller, or of a client without a key, leave memory to the others', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const keys = ['a', 'b', 'c'].map(key => ({ key, name: key }))
  const skip_paths = ['/health', '/metrics']
  for (const auth of [{ enabled: true, keys, skip_paths }, {}]) {
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      server: {
        max_body_size: '64KB',
        trust_proxy: true,
        overload: { request_bodies: '256KB' }
      },
      auth
    })
    const begin = async (path: string, key: string, bytes: number) => {
      const client = await rawClient(t, gateway.port)
      const head = rawPost(path, '', [`authorization: Bearer ${key}`])
      client.socket.write(
        `${head.replace('content-length: 0', 'content-length: 60000')}{"input":"${'x'.repeat(bytes)}`
      )
      return client
    }
    const held = () => gateway.metric('llmproxy_request_body_bytes')
    // Nobody reads what no route wants.
    for (const path of ['/health/x', '/none', '/v1/none']) {
      const client = await begin(path, '', 50_000)
      await client.until(/^HTTP\/1.1 40[14] /)
    }
    assert.equal(await held(), 0)
    const slow: RawClient[] = []
    for (let count = 1; count <= 2; count++) {
      slow.push(await begin('/v1/embeddings', 'a', 50_000))
      await eventually(async () => (await held()) >= count * 50_000)
    }
    const third = await begin('/v1/embeddings', 'a', 50_000)
    await third.until(/"code":"overloaded"/)
    // Another key, or another address where there are none, has its share.
    const headers = { authorization: 'Bearer b', 'x-forwarded-for': '203.0.113.9' }
    const body = { model: 'm', input: 'x'.repeat(50_000) }
    assert.equal((await post(`${gateway.url}/v1/embeddings`, body, headers)).status, 200)
    for (const { socket } of slow) socket.destroy()
    await gateway.fastify.close()
  }
})

test('bodies that wait in the queue or are sent stay counted until a backend responds', async t => {
  let respond = () => {}
  const backend = await fakeBackend(t, async (_request, response) => {
    await new Promise<void>(resolve => {
      respond = resolve
    })
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hello'))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await backend.request()
  assert.equal(await gateway.metric('llmproxy_request_body_bytes'), body.length)
  respond()
  await client.until(/Hello/)
  assert.equal(await gateway.metric('llmproxy_request_body_bytes'), 0)
})

test('a gateway whose heap is full rejects new requests, and only those', async t => {
  let finish = () => {}
  const backend = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hello'))
    await new Promise<void>(resolve => {
      finish = resolve
    })
    response.end(DONE)
  })
  const config = { backends: [{ url: backend.url }] }
  const gateway = await startGateway(t, config)
  const reload = (heap_used: number) => {
    const changed = { ...config, server: { overload: { heap_used } } }
    return gateway.control.reload(sections(parseConfig(JSON.stringify(changed), 'c', {})))
  }
  const body = { ...CHAT, stream: true }
  const client = await rawClient(
    t,
    gateway.port,
    rawPost('/v1/chat/completions', JSON.stringify(body))
  )
  await client.until(/Hello/)
  await reload(0.000001)
  await gateway.logged({ msg: 'overloaded: new requests are rejected' })
  const refused = await post(`${gateway.url}/v1/messages`, body)
  assert.equal(refused.status, 503)
  assert.equal(refused.headers.get('retry-after'), '1')
  assert.equal(((await refused.json()) as { type: string }).type, 'error')
  assert.equal((await fetch(`${gateway.url}/health`)).status, 200)
  finish()
  await client.until(/\[DONE\]/)
  await reload(0)
  await gateway.logged({ msg: 'new requests are accepted again' })
})

test('a gateway whose event loop is late rejects new requests until it has caught up', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    server: { overload: { event_loop_delay: '100ms' } }
  })
  for (let time = 1; time <= 2; time++) {
    const until = performance.now() + 700
    while (performance.now() < until);
    // The gateway's own timer, which is late, comes before this one.
    await new Promise(resolve => setTimeout(resolve, 0))
  }
  await gateway.logged({ msg: 'overloaded: new requests are rejected' })
  await gateway.logged({ msg: 'new requests are accepted again' })
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 200)
})

/** A gateway over a backend that serves these models; undefined: it does not list them. */
async function serving(
  t: Parameters<typeof fakeBackend>[0],
  models: string[] | undefined,
  config: object = {}
) {
  const backend = await fakeBackend(
    t,
    ({ url }, response) => {
      if (url !== '/v1/models') return void response.end('{}')
      if (models === undefined) return void response.writeHead(404).end()
      response.end(JSON.stringify({ data: models.map(id => ({ id })) }))
    },
    { listsModels: true }
  )
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...config })
  return { gateway, sent: () => backend.requests.filter(({ method }) => method === 'POST') }
}

const UNNAMED = ['{}', '{"model":null}', '{"model":"","x":1}', '{ "input" : "x" }']
const SPENDING = [
  ...ROUTES,
  '/v1/completions',
  '/chat/completions',
  '/v1/embeddings',
  '/api/generate'
]

test('previous_response_id is no way around the model, on any route', async t => {
  const { gateway, sent } = await serving(t, ['one', 'two'])
  for (const route of SPENDING) {
    const response = await post(gateway.url + route, { previous_response_id: 'resp_x' })
    assert.equal(response.status, 400, route)
  }
  for (const wrong of [{ previous_response_id: ['x'] }, { conversation: 'conv_x' }]) {
    const response = await post(`${gateway.url}/v1/responses`, { model: 'one', ...wrong })
    assert.equal(response.status, 400)
  }
  assert.equal(sent().length, 0)
})

test('a request without a model gets the only one there is, and its limits', async t => {
  const limits = { enabled: true, models: { one: { requests_per_minute: SPENDING.length * 4 } } }
  const { gateway, sent } = await serving(t, ['one'], {
    auth: {
      enabled: true,
      keys: [
        { key: 'k', models: ['one'] },
        { key: 'x', models: ['two'] }
      ]
    },
    rate_limit: limits
  })
  for (const route of SPENDING) {
    for (const body of UNNAMED) {
      const refused = await post(gateway.url + route, body, { 'x-api-key': 'x' })
      assert.equal(refused.status, 403, `${body} at ${route}`)
      const response = await post(gateway.url + route, body, { 'x-api-key': 'k' })
      assert.equal(response.status, 200, `${body} at ${route}`)
      const received = JSON.parse(sent().at(-1)!.body)
      assert.deepEqual(
        { ...received, stream_options: 0 },
        { ...JSON.parse(body), model: 'one', stream_options: 0 }
      )
    }
  }
  const refused = await post(`${gateway.url}/v1/embeddings`, {}, { 'x-api-key': 'k' })
  assert.equal(refused.status, 429)
})

test('an image without a model is one of the only model, with its price and its limits', async t => {
  const rate_limit = { enabled: true, models: { one: { requests_per_minute: 1 } } }
  const { gateway, sent } = await serving(t, ['one'], { rate_limit })
  const path = `${gateway.url}/v1/images/generations`
  assert.equal((await post(path, { prompt: 'x' })).status, 200)
  assert.deepEqual(JSON.parse(sent()[0]!.body), { prompt: 'x', model: 'one' })
  assert.equal((await post(path, { prompt: 'x' })).status, 429)
  // A backend that does not tell its models may have one that needs no name.
  const unknown = await serving(t, undefined)
  assert.equal((await post(`${unknown.gateway.url}/v1/images/generations`, {})).status, 200)
})

for (const models of [['one', 'two'], undefined, []]) {
  test(`a request without a model is a 400 where the backend lists ${models ?? 'none'}`, async t => {
    const { gateway, sent } = await serving(t, models)
    for (const route of SPENDING) {
      for (const body of UNNAMED) {
        const response = await post(gateway.url + route, body)
        assert.equal(response.status, 400, `${body} at ${route}`)
        assert.match(await messageOf(response), /^model: the field is missing/)
      }
    }
    assert.equal(sent().length, 0)
  })
}

const VARIANTS = [
  '"Model":"dear"',
  '"MODEL":"dear"',
  '"mode\\u006c":"dear"',
  '"model":"dear"',
  '"\\u017ftream":true',
  '"Stream":true',
  '"messages":[],"Messages":[]',
  '"PROMPT":"x"',
  '"Max_Tokens":1',
  '"max_to\u212aens":1',
  '"max_tokens":1,"max_tokens":2',
  '"Max_Completion_Tokens":1',
  '"N_Predict":1',
  '"N":2',
  '"Stream_Options":{}',
  '"stream_options":{"Include_Usage":true}',
  '"options":{"num_predict":1,"Num_Predict":2}',
  '"Previous_Response_Id":"x"',
  '"Background":true',
  '"Parameters":{}',
  '"parameters":{"Adapter_Id":"x"}'
]

test('a field that parsers read in different ways is a 400, whoever sends it', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  for (const variant of VARIANTS) {
    for (const route of ROUTES) {
      const response = await post(gateway.url + route, `{"model":"m",${variant}}`)
      assert.equal(response.status, 400, `${variant} at ${route}`)
      assert.match(await messageOf(response), /unknown field; use|must not be repeated/)
    }
  }
  assert.equal(backend.requests.length, 0)
  const other = '{"model":"m","metadata":{"Model":"x"},"Metadata":1,"metadata":2}'
  assert.equal((await post(`${gateway.url}/v1/embeddings`, other)).status, 200)
})

function payload(text: string, dialect = openai, limitedBy: string[] = []) {
  const bytes = Buffer.from(text)
  const endpoint = { method: 'POST', url: '/', dialect, body: 'json', limitedBy } as const
  return toPayload(bytes, outlineOf(bytes), endpoint)
}

const CHAT_LIMITS = ['max_tokens', 'max_completion_tokens']

test('a limit of tokens counts where its API has it, the largest of several, for all sequences', () => {
  const cases: [string, number | undefined, string[]?][] = [
    ['{"max_tokens":5}', 5],
    ['{"max_tokens":1,"max_completion_tokens":2000}', 2000],
    ['{"max_output_tokens":7,"max_tokens":1}', 7],
    ['{"max_tokens":1,"n_predict":9}', 9],
    ['{"max_tokens":1,"n_predict":-1}', undefined],
    ['{"max_tokens":"8"}', undefined],
    ['{"max_tokens":true}', undefined],
    [`{"max_tokens":1,"max_completion_tokens":"${' '.repeat(70_000)}2000"}`, undefined],
    ['{"max_tokens":[1]}', undefined],
    ['{"max_tokens":null}', undefined],
    ['{"max_tokens":0}', undefined],
    ['{"max_output_tokens":1}', undefined],
    ['{"n_predict":1}', undefined],
    ['{"max_new_tokens":1}', undefined],
    ['{"options":{"num_predict":1}}', undefined],
    ['{"max_completion_tokens":1}', undefined, ['max_tokens']],
    ['{"max_tokens":1}', undefined, ['num_predict']],
    ['{"options":{"num_predict":6}}', 6, ['num_predict']],
    ['{"options":{"num_predict":-2},"max_tokens":3}', undefined, ['num_predict']],
    ['{"max_tokens":5,"n":3}', 15],
    ['{"max_tokens":5,"n_cmpl":8}', 40],
    ['{"max_tokens":5,"n":2,"best_of":4}', 20],
    ['{"max_tokens":5,"prompt":["a","b"],"n":2}', 20],
    ['{"max_tokens":5,"prompt":[[1,2],[3]]}', 10],
    ['{"max_tokens":5,"prompt":[1,2,3]}', 5],
    ['{"max_tokens":5,"prompt_embeds":"AA=="}', 5],
    ['{"max_tokens":5,"prompt_embeds":["a","b","c","d","e","f","g","h"]}', 40],
    ['{"max_tokens":5,"prompt":["a","b"],"prompt_embeds":["a"],"n":2}', 30],
    ['{"max_tokens":5,"prompt":null,"prompt_embeds":["a","b"]}', 10],
    ['{"max_tokens":5,"n":null,"best_of":null}', 5]
  ]
  for (const [text, tokens, limitedBy = CHAT_LIMITS] of cases) {
    assert.equal(payload(text, openai, limitedBy).maxTokens, tokens, text)
  }
})

test('numbers that no request needs are rejected, with the name of the field', () => {
  for (const text of [
    '{"max_tokens":1e999}',
    '{"max_tokens":100000001}',
    '{"n_predict":1e300}',
    '{"options":{"num_predict":1e999}}',
    '{"n":1e999}',
    '{"n":100001}',
    '{"best_of":1e9}',
    `{"n":5.${'0'.repeat(100)}}`
  ]) {
    const field = /"(\w+)":[\d.]/.exec(text)![1]!
    assert.throws(() => payload(text), new RegExp(`^GatewayError: ${field}: must`), text)
  }
})

test('a number of sequences that is no number is rejected: vLLM reads "1e2" as 100', () => {
  for (const field of ['n', 'n_cmpl', 'best_of']) {
    const others = ['"100"', '"1e2"', `"${' '.repeat(70_000)}100"`, 'true', '[100]', '{"a":1}']
    for (const value of others) {
      const expected = new RegExp(`^GatewayError: ${field}: must be a number`)
      assert.throws(() => payload(`{"${field}":${value}}`), expected, value.slice(0, 20))
    }
  }
})

test('Ollama’s older name of the model counts where there is no other', () => {
  assert.equal(payload('{"name":"m"}', ollama).model, 'm')
  assert.equal(payload('{"name":"m","model":"n"}', ollama).model, 'n')
  for (const dialect of [openai, anthropic])
    assert.equal(payload('{"name":"m"}', dialect).model, undefined)
})

for (const storage of ['memory', 'redis'] as const) {
  const skip = storage === 'redis' && REDIS.skip
  test(`${storage}: an upload has a slot before its body is read`, { skip }, async t => {
    const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
    const caches = [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      rate_limit: {
        enabled: true,
        storage,
        redis_prefix: uniqueName('uploads'),
        per_key: { max_concurrent: 2 }
      },
      storage: { caches }
    })
    const head = (length: number) =>
      rawPost('/v1/embeddings', '').replace('content-length: 0', `content-length: ${length}`)
    const burst = await Promise.all(Array.from({ length: 20 }, () => rawClient(t, gateway.port)))
    for (const { socket } of burst) socket.write(`${head(1_000_000)}{"model":"m"`)
    const refused = await responded(burst, 18)
    const slow = burst.filter(each => !refused.includes(each))
    assert.equal(slow.length, 2)
    await eventually(async () => (await gateway.metric('llmproxy_request_body_bytes')) >= 2 * 12)
    for (const length of [10, 1_000_000]) {
      const late = await rawClient(t, gateway.port, head(length))
      assert.match(await late.until(/\}\}/), /^HTTP\/1.1 429 [\s\S]*2 requests at the same time/)
    }
    slow[0]!.socket.destroy()
    await eventually(async () => (await gateway.metric('llmproxy_request_body_bytes')) <= 12)
    assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 200)
    slow[1]!.socket.destroy()
  })
}

test('a large upload that a limit in Redis rejects is not read', { skip: REDIS.skip }, async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const caches = [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    rate_limit: {
      enabled: true,
      storage: 'redis',
      redis_prefix: uniqueName('uploads'),
      per_key: { requests_per_minute: 1 }
    },
    storage: { caches }
  })
  assert.equal((await post(`${gateway.url}/v1/embeddings`, CHAT)).status, 200)
  const head = rawPost('/v1/embeddings', '').replace('content-length: 0', 'content-length: 1000000')
  const client = await rawClient(t, gateway.port, head)
  assert.match(await client.until(/\}\}/), /^HTTP\/1.1 429 /)
})

test('a client that leaves during its upload holds nothing', async t => {
  const gateway = await startGateway(t, { backends: [{ url: 'http://127.0.0.1:1' }] })
  const client = await rawClient(t, gateway.port)
  client.socket.write(`${rawPost('/v1/embeddings', '').replace('length: 0', 'length: 9')}{"a":`)
  await eventually(async () => (await gateway.metric('llmproxy_request_body_bytes')) > 0)
  client.socket.destroy()
  await once(client.socket, 'close')
  const line = await gateway.logged({ msg: 'exchange', route: '/v1/embeddings' })
  assert.equal(line.status, 499)
  assert.equal(await gateway.metric('llmproxy_request_body_bytes'), 0)
})
