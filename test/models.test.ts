import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { parseConfig } from '../src/config.ts'
import {
  answerChat,
  CHAT,
  closedPort,
  type FakeBackend,
  fakeBackend,
  post,
  startGateway
} from './helper.ts'

/** Which backend has which model: what callers are shown, and where their calls go. */

/** A backend with models; its list can be changed, and it says its name in every answer. */
async function lister(t: TestContext, name: string, models: string[] | undefined, tags = false) {
  const state = { models }
  const backend = await fakeBackend(
    t,
    ({ url }, response) => {
      response.setHeader('content-type', 'application/json')
      if (url === '/v1/models' && !tags && state.models !== undefined) {
        const data = state.models.map(id => ({ id, object: 'model', max_model_len: 4096 }))
        return void response.end(JSON.stringify({ object: 'list', data }))
      }
      if (url === '/api/tags' && tags) {
        return void response.end(JSON.stringify({ models: state.models!.map(name => ({ name })) }))
      }
      if (url === '/v1/models' || url === '/api/tags') return void response.writeHead(404).end('{}')
      response.end(JSON.stringify({ object: 'chat.completion', served_by: name }))
    },
    { listsModels: true }
  )
  return Object.assign(backend, { state })
}

const noHealthCheck = { health_check: { enabled: false } }

async function listed(gateway: { url: string; logged(o: object): Promise<object> }, key?: string) {
  const response = await fetch(`${gateway.url}/v1/models`, { headers: bearer(key) })
  const { data } = (await response.json()) as { data: { id: string }[] }
  return data.map(({ id }) => id)
}

function bearer(key: string | undefined): Record<string, string> {
  return key === undefined ? {} : { authorization: `Bearer ${key}` }
}

interface Answer {
  served_by: string
  error: { code: string; type: string }
}

async function ask(url: string, model: string, key?: string) {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...bearer(key) },
    body: JSON.stringify({ model, messages: [] })
  })
  return { status: response.status, body: (await response.json()) as Answer }
}

/** A gateway that has heard from all of these backends. */
async function gatewayWith(
  t: TestContext,
  backends: Record<string, FakeBackend | { url: string }>,
  config: Record<string, unknown> = {},
  more: Record<string, object> = {}
) {
  const gateway = await startGateway(t, {
    ...noHealthCheck,
    backends: Object.entries(backends).map(([name, { url }]) => ({ name, url, ...more[name] })),
    ...config
  })
  return gateway
}

test('a call goes to the backends that list its model, and the list shows them all', async t => {
  const a = await lister(t, 'a', ['qwen', 'shared'])
  const b = await lister(t, 'b', ['llama3:latest', 'shared'], true)
  const gateway = await gatewayWith(t, { a, b })
  await Promise.all(
    ['a', 'b'].map(backend => gateway.logged({ msg: 'backend lists models', backend }))
  )

  assert.deepEqual(await listed(gateway), ['qwen', 'shared', 'llama3:latest'])
  for (const [model, by] of [
    ['qwen', 'a'],
    ['llama3:latest', 'b'],
    ['llama3', 'b']
  ] as const) {
    for (let i = 0; i < 4; i++) assert.equal((await ask(gateway.url, model)).body.served_by, by)
  }
  const both = new Set<string>()
  for (let i = 0; i < 4; i++) both.add((await ask(gateway.url, 'shared')).body.served_by)
  assert.deepEqual([...both].sort(), ['a', 'b'])
})

test('one model is shown as its backend shows it', async t => {
  const a = await lister(t, 'a', ['org/qwen'])
  const gateway = await gatewayWith(t, { a })
  await gateway.logged({ msg: 'backend lists models' })
  const card = await (await fetch(`${gateway.url}/v1/models/org/qwen`)).json()
  assert.deepEqual(card, {
    id: 'org/qwen',
    object: 'model',
    created: 0,
    owned_by: 'llmproxy',
    max_model_len: 4096
  })
  const missing = await fetch(`${gateway.url}/v1/models/other`)
  assert.equal(missing.status, 404)
  assert.equal(((await missing.json()) as Answer).error.code, 'model_not_found')
})

test('a model that nobody has is a 404 that names no other, and costs nothing', async t => {
  const a = await lister(t, 'a', ['secret-model'])
  const gateway = await gatewayWith(
    t,
    { a },
    { rate_limit: { enabled: true, global: { requests_per_minute: 1 } } }
  )
  await gateway.logged({ msg: 'backend lists models' })
  const { status, body } = await ask(gateway.url, 'other')
  assert.equal(status, 404)
  assert.deepEqual(body, {
    error: {
      message: 'The model `other` does not exist or you do not have access to it.',
      type: 'invalid_request_error',
      param: null,
      code: 'model_not_found'
    }
  })
  assert.equal((await ask(gateway.url, 'secret-model')).status, 200)
  assert.ok(!a.requests.some(({ body }) => body.includes('other')))
})

test('Anthropic and Ollama clients get the same in their own words', async t => {
  const a = await lister(t, 'a', ['m'])
  const gateway = await gatewayWith(t, { a })
  await gateway.logged({ msg: 'backend lists models' })
  const post = async (path: string) => {
    const response = await fetch(gateway.url + path, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'other', max_tokens: 1, messages: [] })
    })
    assert.equal(response.status, 404)
    return ((await response.json()) as Answer).error
  }
  assert.equal((await post('/v1/messages')).type, 'not_found_error')
  assert.match(String(await post('/api/chat')), /`other` does not exist/)
})

test('a caller sees the models that are theirs', async t => {
  const a = await lister(t, 'a', ['qwen-1', 'qwen-2', 'llama'])
  const keys = [{ key: 'sk-q', models: ['qwen-*'] }, { key: 'sk-all' }]
  const gateway = await gatewayWith(t, { a }, { auth: { enabled: true, keys } })
  await gateway.logged({ msg: 'backend lists models' })
  assert.deepEqual(await listed(gateway, 'sk-q'), ['qwen-1', 'qwen-2'])
  assert.deepEqual(await listed(gateway, 'sk-all'), ['qwen-1', 'qwen-2', 'llama'])
  const one = (id: string) => fetch(`${gateway.url}/v1/models/${id}`, { headers: bearer('sk-q') })
  assert.equal((await one('llama')).status, 404)
  assert.equal((await one('qwen-1')).status, 200)
  // Whether there is such a model is not told either.
  assert.equal((await ask(gateway.url, 'llama', 'sk-q')).status, 403)
  assert.equal((await ask(gateway.url, 'nothing', 'sk-q')).status, 403)
})

test('a backend that gives no list takes every model', async t => {
  const a = await lister(t, 'a', ['qwen'])
  const b = await lister(t, 'b', undefined)
  const gateway = await gatewayWith(t, { a, b })
  await gateway.logged({ msg: 'backend lists models', backend: 'a' })
  assert.equal((await ask(gateway.url, 'other')).body.served_by, 'b')
  assert.deepEqual(await listed(gateway), ['qwen'])
})

test('what the configuration says decides over what a backend lists', async t => {
  const a = await lister(t, 'a', ['qwen-7b', 'llama'])
  const b = await lister(t, 'b', ['qwen-7b', 'llama'])
  const gateway = await gatewayWith(
    t,
    { a, b },
    {},
    {
      a: { models: ['qwen-*', 'extra'] },
      b: { models: ['llama'] }
    }
  )
  await gateway.logged({ msg: 'backend lists models', backend: 'a' })
  assert.deepEqual(await listed(gateway), ['qwen-7b', 'extra', 'llama'])
  for (const [model, by] of [
    ['qwen-7b', 'a'],
    ['qwen-new', 'a'],
    ['extra', 'a'],
    ['llama', 'b']
  ] as const) {
    assert.equal((await ask(gateway.url, model)).body.served_by, by)
  }
  assert.equal((await ask(gateway.url, 'other')).status, 404)
  // Nothing to learn from a backend whose models are all named.
  assert.equal(b.requests.filter(({ url }) => url === '/v1/models').length, 0)
})

test('a model that has come since is found at the first call for it', async t => {
  const a = await lister(t, 'a', ['old'])
  const gateway = await gatewayWith(t, { a }, { routing: { model_discovery: { interval: '1h' } } })
  await gateway.logged({ msg: 'backend lists models' })
  a.state.models = ['old', 'new']
  assert.equal((await ask(gateway.url, 'new')).status, 404, 'it was asked a moment ago')
  // Another question is due: the clock of the process is moved on.
  const now = performance.now.bind(performance)
  t.mock.method(performance, 'now', () => now() + 6_000)
  const [first, second] = await Promise.all([ask(gateway.url, 'new'), ask(gateway.url, 'new')])
  assert.deepEqual([first.status, second.status], [200, 200])
  assert.equal(a.requests.filter(({ url }) => url === '/v1/models').length, 2)
})

test('a backend that gives no list any more keeps the last one', async t => {
  const a = await lister(t, 'a', ['qwen'])
  const gone = { url: `http://127.0.0.1:${await closedPort()}` }
  const gateway = await gatewayWith(
    t,
    { a, gone },
    { routing: { model_discovery: { interval: '20ms' } } },
    { gone: { models: ['gone-model'] } }
  )
  await gateway.logged({ msg: 'backend lists models', backend: 'a' })
  a.state.models = undefined
  await a.request(a.requests.length + 3)
  assert.deepEqual(await listed(gateway), ['qwen', 'gone-model'])
  const gone404 = await ask(gateway.url, 'gone-model')
  assert.equal(gone404.body.error.code, 'backend_unreachable')
})

test('a list that is no list is not believed', async t => {
  for (const text of [
    '{"data":[{"name":"x"}]}',
    '{"data":"x"}',
    'oops',
    '[]',
    'null',
    '{"data":[null]}'
  ]) {
    const backend = await fakeBackend(
      t,
      ({ url }, response) => {
        if (url === '/api/tags') return void response.writeHead(404).end()
        response.end(url === '/v1/models' ? text : '{}')
      },
      { listsModels: true }
    )
    const gateway = await gatewayWith(t, { backend })
    await gateway.logged({ msg: 'backend lists no models' })
    assert.equal((await ask(gateway.url, 'anything')).status, 200, text)
  }
})

test('a reload changes which models a backend has, and keeps what others have said', async t => {
  const a = await lister(t, 'a', ['qwen'])
  const b = await lister(t, 'b', ['llama'])
  const config = (more: object, routing = {}) => ({
    backends: [
      { name: 'a', url: a.url, ...more },
      { name: 'b', url: b.url }
    ],
    routing
  })
  const gateway = await startGateway(t, config({}))
  for (const backend of ['a', 'b']) await gateway.logged({ msg: 'backend lists models', backend })
  const reload = (changed: object) =>
    gateway.control.reload(parseConfig(JSON.stringify(changed), 'test.yaml', {}))

  await reload(config({ models: ['other'] }))
  assert.deepEqual(await listed(gateway), ['other', 'llama'])
  assert.equal((await ask(gateway.url, 'qwen')).status, 404)
  assert.equal((await ask(gateway.url, 'other')).body.served_by, 'a')

  await reload(config({}, { model_discovery: { enabled: false } }))
  const servedBy = new Set<string>()
  for (let i = 0; i < 2; i++) servedBy.add((await ask(gateway.url, 'anything')).body.served_by)
  assert.equal(servedBy.size, 2, 'nothing is known, so both take it')
})

test('nobody is asked again because another backend has come', async t => {
  const a = await lister(t, 'a', ['qwen'])
  const b = await lister(t, 'b', ['llama'])
  const gateway = await gatewayWith(t, { a })
  await gateway.logged({ msg: 'backend lists models', backend: 'a' })
  const both = Object.entries({ a, b }).map(([name, { url }]) => ({ name, url }))
  await gateway.control.reload(
    parseConfig(JSON.stringify({ ...noHealthCheck, backends: both }), 'test.yaml', {})
  )
  await gateway.logged({ msg: 'backend lists models', backend: 'b' })
  assert.deepEqual(await listed(gateway), ['qwen', 'llama'])
  assert.equal(a.requests.filter(({ url }) => url === '/v1/models').length, 1)
})

test('a backend of which nothing is known gets no call that another is known to serve', async t => {
  const a = await lister(t, 'a', ['qwen'])
  const b = await lister(t, 'b', undefined)
  const gateway = await gatewayWith(t, { a, b })
  await gateway.logged({ msg: 'backend lists models', backend: 'a' })
  for (let i = 0; i < 4; i++) assert.equal((await ask(gateway.url, 'qwen')).body.served_by, 'a')
})

test('while nothing is known a caller who is held to some models sees those, and no other', async t => {
  const a = await lister(t, 'a', ['secret', 'mine'])
  const keys = [{ key: 'sk-held', models: ['mine', 'team-*'] }, { key: 'sk-all' }]
  const gateway = await gatewayWith(
    t,
    { a },
    {
      auth: { enabled: true, keys },
      routing: { model_discovery: { enabled: false } }
    }
  )
  assert.deepEqual(await listed(gateway, 'sk-held'), ['mine'])
  assert.deepEqual(await listed(gateway, 'sk-all'), ['secret', 'mine'])
  const headers = bearer('sk-held')
  assert.equal((await fetch(`${gateway.url}/v1/models/secret`, { headers })).status, 404)
})

test('patterns alone are no list: the question is passed on', async t => {
  const a = await lister(t, 'a', ['m1'])
  const gateway = await gatewayWith(
    t,
    { a },
    { routing: { model_discovery: { enabled: false } } },
    { a: { models: ['*'] } }
  )
  assert.deepEqual(await listed(gateway), ['m1'])
})

test('the list of models counts as a request, and has an id', async t => {
  const a = await lister(t, 'a', ['m'])
  const limit = { enabled: true, global: { requests_per_minute: 1 } }
  const gateway = await gatewayWith(t, { a }, { rate_limit: limit })
  await gateway.logged({ msg: 'backend lists models' })
  const first = await fetch(`${gateway.url}/v1/models`)
  assert.match(first.headers.get('x-request-id')!, /^req_/)
  assert.deepEqual([first.status, (await fetch(`${gateway.url}/v1/models`)).status], [200, 429])
})

test('a model that nobody lists is a 404 also while a backend cannot be asked', async t => {
  const good = await fakeBackend(
    t,
    (request, response, raw) =>
      request.method === 'GET'
        ? response.end(JSON.stringify({ data: [{ id: 'm' }] }))
        : answerChat(request, response, raw),
    { listsModels: true }
  )
  const gateway = await startGateway(t, {
    backends: [{ url: good.url }, { name: 'dead', url: `http://127.0.0.1:${await closedPort()}` }]
  })
  await gateway.logged({ msg: 'backend lists models' })
  const call = async (model: string) => {
    const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model })
    return [response.status, (await response.json()).error?.code]
  }
  assert.deepEqual(await call('typo'), [404, 'model_not_found'])
  assert.deepEqual(await call('m'), [200, undefined])
})
