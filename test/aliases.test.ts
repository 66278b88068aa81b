import assert from 'node:assert/strict'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { gzipSync } from 'node:zlib'
import { parseConfig } from '../src/config.ts'
import { Renamed } from '../src/pool/renamed.ts'
import { type Answerer, closedPort, fakeBackend, post, startGateway } from './helper.ts'
import { folder } from './process.ts'
import {
  cuts,
  llamacppChat,
  messages,
  nativeChat,
  nativeGenerate,
  ollamaChat,
  responses,
  type Say,
  speaks,
  vllmChat,
  vllmCompletions,
  vllmEmbeddings
} from './wire.ts'

/** Models that callers call otherwise than backends do, and models that take the place of others. */

const PUBLIC = 'gpt-4o "mini"'

const ROUTES: [string, Say][] = [
  ['/v1/chat/completions', vllmChat],
  ['/v1/chat/completions', llamacppChat],
  ['/v1/chat/completions', ollamaChat],
  ['/v1/completions', vllmCompletions],
  ['/v1/embeddings', vllmEmbeddings([[1, 2]])],
  ['/v1/messages', messages()],
  ['/v1/responses', responses],
  ['/api/chat', nativeChat],
  ['/api/generate', nativeGenerate]
]

for (const [route, say] of ROUTES) {
  test(`${route} (${say.name}): the backend gets its name, the caller reads theirs`, async t => {
    const asked = { messages: [], prompt: 'm', input: 'the "model": "m"', max_tokens: 9 }
    let answer: Answerer = () => {}
    const backend = await fakeBackend(t, (...of) => answer(...of))
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url, models: ['m', { [PUBLIC]: 'm' }] }]
    })
    const text = async (body: object) => {
      const response = await post(gateway.url + route, body)
      return (await response.text()).replaceAll(/("created_at":)"[^"]*"/g, '$1""')
    }
    for (const cut of cuts) {
      answer = speaks(say, cut)
      for (const more of [{ stream: false }, { stream: true }, { stream: true, tools: [{}] }]) {
        const theirs = await text({ model: 'm', ...asked, ...more })
        const renamed = await text({ model: PUBLIC, ...asked, ...more })
        assert.ok(theirs.includes('"model":"m"'))
        const name = `"model":${JSON.stringify(PUBLIC)}`
        assert.equal(renamed, theirs.replaceAll('"model":"m"', name))
        const [before, after] = backend.requests.slice(-2).map(({ body }) => body)
        assert.equal(after, before)
      }
    }
  })
}

test('a whole answer has one name, whatever its pieces are', () => {
  const bytes = Buffer.from('{"model":"old","response":{"model":"other"}}')
  for (let at = 0; at <= bytes.length; at++) {
    const renamed = new Renamed(undefined, 'json', 'new')
    const parts = [bytes.subarray(0, at), bytes.subarray(at)].map(each => renamed.pass(each))
    assert.equal(parts.join(''), '{"model":"new","response":{"model":"other"}}', `split at ${at}`)
  }
})

test('only the name of the answer itself is changed, wherever the chunks are cut', () => {
  const input = { model: 'm', message: { model: 'm' } }
  const event = (data: object) => `event: x\r\ndata: ${JSON.stringify(data)}\r\n\r\n`
  const stream = (model: string) =>
    [
      ': {"model":"m"}\n\n',
      event({ model, choices: [{ model: 'm', delta: { content: '{"model":"m"}\\' } }] }),
      event({ type: 'message_start', message: { content: [input], model, input } }),
      'data: [DONE]\n\n',
      event({ response: { tools: [input], model }, message: 'model', model }),
      event({ model: null, message: [{ model: 'm' }], x: 'model' }),
      'data: {"model" :\t"m\n\ndata:{"model":"m"}\n\n'.replace(
        'data:{"model":"m"}',
        `data:{"model":"${model}"}`
      )
    ].join('')
  const cr = (model: string) =>
    `event: x\rdata: {"model":"${model}","x":\rdata:  {"model":"m"},\rdata: "y":"{"}\r\rdata:{"model":"${model}"}\r\r`
  const old = stream('m') + cr('m')
  const expected = (stream('new') + cr('new')).replace('"model" :\t"m\n', '"model" :\t"new"\n')
  for (let cut = 0; cut < old.length; cut++) {
    const renamed = new Renamed(undefined, 'sse', 'new')
    const parts = [old.slice(0, cut), old.slice(cut)].map(part => renamed.pass(Buffer.from(part)))
    assert.equal(parts.join(''), expected, `cut at ${cut}`)
  }
  const renamed = new Renamed(undefined, 'sse', 'new')
  const parts = Array.from(Buffer.from(old), byte => renamed.pass(Buffer.from([byte])))
  assert.equal(Buffer.concat(parts.map(part => part ?? Buffer.alloc(0))).toString(), expected)
})

test('a stored response has the name that it was asked for by, whenever it is read', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.setHeader('content-type', 'application/json')
    response.end(
      JSON.stringify({ id: 'resp_1', object: 'response', model: 'm', status: 'completed' })
    )
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, models: [{ fast: 'm' }] }]
  })
  const made = await post(`${gateway.url}/v1/responses`, { model: 'fast', input: 'x' })
  assert.equal((await made.json()).model, 'fast')
  const read = await fetch(`${gateway.url}/v1/responses/resp_1`)
  assert.equal((await read.json()).model, 'fast')
})

test('an answer that is compressed all the same has the name, too', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json', 'content-encoding': 'gzip' })
    response.end(gzipSync('{"object":"chat.completion","model":"m","choices":[]}'))
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, models: [{ 'fast-*': 'm' }] }]
  })
  const response = await post(`${gateway.url}/v1/chat/completions`, { model: 'fast-1' })
  assert.equal(await response.text(), '{"object":"chat.completion","model":"fast-1","choices":[]}')
})

test('an alias is listed with what the backend says of its model, and nothing of its own name', async t => {
  const backend = await fakeBackend(
    t,
    (_request, response) => {
      response.setHeader('content-type', 'application/json')
      response.end(
        JSON.stringify({ data: [{ id: 'm', root: '/models/m', created: 7, max_model_len: 4096 }] })
      )
    },
    { listsModels: true }
  )
  const gateway = await startGateway(t, {
    backends: [{ name: 'gpu', url: backend.url, models: ['zzz*', { fast: 'm', 'any-*': 'm' }] }]
  })
  await gateway.logged({ msg: 'backend lists models' })
  const { data } = (await (await fetch(`${gateway.url}/v1/models`)).json()) as { data: object[] }
  assert.deepEqual(data, [
    { id: 'fast', object: 'model', created: 7, owned_by: 'llmproxy', max_model_len: 4096 }
  ])
  const { status } = await post(`${gateway.url}/v1/chat/completions`, { model: 'm' })
  assert.equal(status, 404)
})

test('the bill names both models, and has the price of the backend’s', async t => {
  const backend = await fakeBackend(t, speaks(vllmChat))
  const hook = await fakeBackend(t, (_request, response) => response.end())
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, models: [{ fast: 'm' }] }],
    usage: {
      enabled: true,
      prices: [
        { model: 'm', input: 1, output: 2 },
        { model: 'fast', input: 1000, output: 2000 }
      ],
      reporters: [
        { name: 'a', type: 'webhook', filter: { models: ['fast'] }, webhook: { url: hook.url } }
      ]
    }
  })
  await (await post(`${gateway.url}/v1/chat/completions`, { model: 'fast' })).text()
  const record = JSON.parse((await hook.request()).body)
  const { requested_model, model, cost, prompt_tokens, completion_tokens } = record
  assert.deepEqual([requested_model, model], ['fast', 'm'])
  assert.equal(cost, (prompt_tokens + 2 * completion_tokens) / 1e6)
})

test('a quota in money counts what the backend’s model costs, whatever it is called', async t => {
  const backend = await fakeBackend(t, speaks(vllmChat))
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, models: ['m', { fast: 'm' }] }],
    auth: {
      enabled: true,
      keys: [{ key: 'sk-1', total_quota: 0.00005, quota_unit: 'cost' }]
    },
    rate_limit: { enabled: true },
    routing: { model_fallbacks: { old: ['m'] } },
    usage: {
      enabled: true,
      prices: [
        { model: 'fast-*', input: 9, output: 9 },
        { model: 'm', input: 1, output: 1 },
        { model: '*', input: 0, output: 0 }
      ],
      reporters: [{ name: 'f', type: 'file', file: { path: join(folder(t), 'u.jsonl') } }]
    }
  })
  const statuses: number[] = []
  for (const model of ['fast', 'old', 'fast']) {
    const response = await post(
      `${gateway.url}/v1/chat/completions`,
      { model, messages: [], max_tokens: 1 },
      { authorization: 'Bearer sk-1' }
    )
    statuses.push(response.status)
    await response.text()
  }
  assert.deepEqual(statuses, [200, 200, 429])
})

/** A backend that says its name, or the status it is told. */
async function named(t: TestContext, name: string) {
  const state = { status: 200 }
  const backend = await fakeBackend(t, ({ body }, response) => {
    response.writeHead(state.status, { 'content-type': 'application/json' })
    response.end(JSON.stringify({ by: name, model: JSON.parse(body).model }))
  })
  return Object.assign(backend, { state })
}

async function ask(url: string, model: string, key?: string) {
  const headers: Record<string, string> =
    key === undefined ? {} : { authorization: `Bearer ${key}` }
  const response = await post(`${url}/v1/chat/completions`, { model }, headers)
  const body = (await response.json()) as { by?: string; model?: string; error?: { code: string } }
  return { status: response.status, ...body }
}

test('a rule sends some models to one backend, and to others in order when it fails', async t => {
  const [a, b, c] = [await named(t, 'a'), await named(t, 'b'), await named(t, 'c')]
  const gateway = await startGateway(t, {
    backends: [
      { name: 'a', url: `${a.url}/v1` },
      { name: 'b', url: b.url },
      { name: 'c', url: c.url }
    ],
    routing: {
      fallback: [
        { models: ['big*'], primary: 'c', fallback: [a.url] },
        { models: ['small'], primary: 'b' }
      ]
    }
  })
  for (let i = 0; i < 4; i++) assert.equal((await ask(gateway.url, 'big-1')).by, 'c')
  for (let i = 0; i < 4; i++) assert.equal((await ask(gateway.url, 'small')).by, 'b')
  const others = new Set<unknown>()
  for (let i = 0; i < 3; i++) others.add((await ask(gateway.url, 'other')).by)
  assert.equal(others.size, 3)

  c.state.status = 503
  assert.equal((await ask(gateway.url, 'big-1')).by, 'a')
  a.state.status = 500
  const { status, by } = await ask(gateway.url, 'big-1')
  assert.deepEqual([status, by], [500, 'a'])
  b.state.status = 429
  assert.deepEqual((await ask(gateway.url, 'small')).status, 429)
})

test('another model takes the place of one that nobody can serve, under its own name', async t => {
  const [a, b] = [await named(t, 'a'), await named(t, 'b')]
  const gateway = await startGateway(t, {
    backends: [
      { name: 'a', url: a.url, models: ['large'] },
      { name: 'b', url: b.url, models: [{ medium: 'm' }, 'small'] }
    ],
    routing: { model_fallbacks: { large: ['medium', 'small'], retired: ['small'] } },
    auth: {
      enabled: true,
      keys: [
        { key: 'sk-all' },
        { key: 'sk-some', models: ['large', 'small'] },
        { key: 'sk-one', models: ['large'] },
        { key: 'sk-none', models: ['retired'] }
      ]
    }
  })
  assert.equal((await ask(gateway.url, 'large', 'sk-all')).by, 'a')
  assert.deepEqual(await ask(gateway.url, 'retired', 'sk-all'), {
    status: 200,
    by: 'b',
    model: 'small'
  })
  a.state.status = 500
  const instead = await ask(gateway.url, 'large', 'sk-all')
  assert.deepEqual(instead, { status: 200, by: 'b', model: 'medium' })
  assert.equal(JSON.parse(b.requests.at(-1)!.body).model, 'm')
  // Who may not use them gets none of them.
  assert.equal((await ask(gateway.url, 'large', 'sk-some')).model, 'small')
  assert.equal((await ask(gateway.url, 'large', 'sk-one')).status, 500)
  assert.equal((await ask(gateway.url, 'retired', 'sk-none')).status, 404)

  // The backend has failed with one model, and not with another.
  b.state.status = 500
  const { length } = b.requests
  assert.equal((await ask(gateway.url, 'large', 'sk-all')).status, 500)
  const models = b.requests.slice(length).map(({ body }) => JSON.parse(body).model)
  assert.deepEqual(models, ['m', 'small'])
})

test('backends with a higher priority number get calls when those with a lower one fail', async t => {
  const [a, b] = [await named(t, 'a'), await named(t, 'b')]
  const gateway = await startGateway(t, {
    backends: [
      { name: 'dead', url: `http://127.0.0.1:${await closedPort()}`, priority: 0 },
      { name: 'b', url: b.url, priority: 2 },
      { name: 'a', url: a.url, priority: 1 }
    ],
    routing: { circuit_breaker: { consecutive_failures: 2 } }
  })
  for (let i = 0; i < 3; i++) assert.equal((await ask(gateway.url, 'm')).by, 'a')
  assert.equal(await gateway.metric('llmproxy_backend_ejections_total', { backend: 'dead' }), 1)
  a.state.status = 502
  for (let i = 0; i < 5; i++) assert.equal((await ask(gateway.url, 'm')).by, 'b')
})

test('a tier that fails costs no retry: every call gets its answer from the next one', async t => {
  const [a, b, c] = [await named(t, 'a'), await named(t, 'b'), await named(t, 'c')]
  const gateway = await startGateway(t, {
    backends: [
      { name: 'a', url: a.url },
      { name: 'b', url: b.url },
      { name: 'c', url: c.url, priority: 1 }
    ]
  })
  for (const status of [429, 500]) {
    a.state.status = b.state.status = status
    const answers = await Promise.all(Array.from({ length: 60 }, () => ask(gateway.url, 'm')))
    assert.ok(answers.every(({ by }) => by === 'c'))
  }
  // Both of the first tier are broken, and are left alone.
  const { length } = a.requests
  for (let i = 0; i < 5; i++) assert.equal((await ask(gateway.url, 'm')).by, 'c')
  assert.equal(a.requests.length, length)
})

test('whoever a rule names is asked, whether it lists its models or not', async t => {
  const a = await named(t, 'a')
  const c = await named(t, 'c')
  const gateway = await startGateway(t, {
    backends: [
      { name: 'c', url: c.url, models: ['m'] },
      { name: 'a', url: a.url }
    ],
    routing: { fallback: [{ primary: 'a', fallback: ['c'] }] }
  })
  for (let i = 0; i < 3; i++) assert.equal((await ask(gateway.url, 'm')).by, 'a')
})

test('what is wrong with models and rules is said', () => {
  const parse = (backend: string, routing: string) =>
    parseConfig(
      `backends:\n  - {name: a, url: 'http://a', ${backend}}\nrouting: ${routing}\n`,
      'x.yaml',
      {}
    )
  assert.throws(() => parse('models: [x, 5]', '{}'), /models\[1\]: must be a model, or a mapping/)
  assert.throws(() => parse('models: [{}]', '{}'), /models\[0\]: must be a model, or a mapping/)
  assert.throws(() => parse('models: [{a: 5}]', '{}'), /models\[0\]/)
  assert.throws(() => parse('priority: -1', '{}'), /priority: must be .*0/)
  assert.throws(
    () => parse('', '{fallback: [{primary: a}, {models: [m], primary: a, fallback: [b]}]}'),
    /routing\.fallback\[1\]\.fallback\[0\]: must be the name or the URL of one of the backends/
  )
  assert.throws(() => parse('', '{model_fallbacks: {a: b}}'), /model_fallbacks/)
})
