import assert from 'node:assert/strict'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { Billed, MAX_BILLED } from '../src/metering/billed.ts'
import { fakeBackend, post, rawClient, rawPost, startGateway } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/** Responses that are made in the background: their tokens are billed once, to whoever had them made. */

const USAGE = {
  input_tokens: 30,
  input_tokens_details: { cached_tokens: 10 },
  output_tokens: 1000,
  total_tokens: 1030
}
const json = JSON.stringify
const typed = (value: { type: string; [name: string]: unknown }) =>
  `event: ${value.type}\ndata: ${json(value)}\n\n`
const response = (status: string, more: object = {}) => ({
  id: 'resp_1',
  object: 'response',
  background: true,
  model: 'm',
  status,
  error: null,
  usage: null,
  output: [],
  ...more
})
const DONE = response('completed', { usage: USAGE })
const EVENTS = [
  typed({ type: 'response.created', response: response('queued') }),
  ...['One', ' two', ' three'].map(delta => typed({ type: 'response.output_text.delta', delta })),
  typed({ type: 'response.completed', response: DONE })
]

/** A backend with one stored response, which is as the test says, and the records of its gateway. */
async function setUp(t: TestContext, more: object = {}) {
  const state = { shown: response('queued') as object, events: [...EVENTS], hasEnd: true }
  const backend = await fakeBackend(t, (request, reply) => {
    const isStream = request.url.includes('stream=true') || request.body.includes('"stream":true')
    if (isStream) {
      reply.writeHead(200, { 'content-type': 'text/event-stream' })
      reply.write(state.events.join(''))
      return state.hasEnd ? reply.end() : undefined
    }
    reply.writeHead(200, { 'content-type': 'application/json' })
    return reply.end(json(state.shown))
  })
  const hook = await fakeBackend(t, (_request, reply) => reply.end())
  const config = {
    backends: [{ name: 'gpu', url: backend.url, models: [{ public: 'm' }] }],
    auth: { enabled: true, keys: [{ key: 'sk-1', name: 'ann' }], skip_paths: ['/metrics'] },
    usage: {
      enabled: true,
      reporters: [{ name: 'hook', type: 'webhook', webhook: { url: hook.url } }]
    },
    ...more
  }
  let next = 0
  const record = async () => JSON.parse((await hook.request(next++)).body)
  return { state, backend, config, hook, record }
}

const KEY = { authorization: 'Bearer sk-1' }
const BODY = { model: 'public', input: 'Count to three.', background: true }
const spent = (record: Record<string, unknown>) => [
  record.input_tokens,
  record.output_tokens,
  record.exactness
]
const NOTHING = [0, 0, null]

test('a response made in the background is billed when its result is first delivered, and once', async t => {
  const { state, config, record } = await setUp(t)
  const gateway = await startGateway(t, config)
  const url = `${gateway.url}/v1/responses`
  const read = async (path = '') => (await fetch(`${url}/resp_1${path}`, { headers: KEY })).text()

  await (await post(url, BODY, KEY)).text()
  const made = await record()
  assert.deepEqual([...spent(made), made.outcome], [...NOTHING, 'ok'])
  state.shown = response('in_progress')
  await read()
  assert.deepEqual(spent(await record()), NOTHING)

  state.shown = DONE
  assert.match(await read(), /"model":"public"/)
  const billed = await record()
  assert.deepEqual(spent(billed), [30, 1000, 'exact'])
  const { api_key_id, model, requested_model, cached_tokens, endpoint } = billed
  assert.deepEqual(
    [api_key_id, model, requested_model, cached_tokens, endpoint],
    ['ann', 'm', 'public', 10, '/v1/responses/:id']
  )

  await read()
  await read('?stream=true')
  await (await fetch(`${url}/resp_1/cancel`, { method: 'POST', headers: KEY })).text()
  for (let again = 0; again < 3; again++) assert.deepEqual(spent(await record()), NOTHING)
})

test('of many that read it at the same time one is billed', async t => {
  const { state, config, record } = await setUp(t)
  const gateway = await startGateway(t, config)
  const url = `${gateway.url}/v1/responses`
  await (await post(url, BODY, KEY)).text()
  await record()
  state.shown = DONE
  const paths = Array.from({ length: 10 }, (_, at) => (at % 2 === 0 ? '' : '?stream=true'))
  const reads = paths.map(path => fetch(`${url}/resp_1${path}`, { headers: KEY }))
  for (const each of await Promise.all(reads)) await each.text()
  let output = 0
  for (const _ of paths) output += (await record()).output_tokens
  assert.equal(output, 1000)
})

test('what is not a background response is billed when it is made, and not when it is read', async t => {
  const { state, config, record } = await setUp(t)
  const gateway = await startGateway(t, config)
  const url = `${gateway.url}/v1/responses`
  state.shown = DONE
  await (await post(url, { ...BODY, background: false }, KEY)).text()
  assert.deepEqual(spent(await record()), [30, 1000, 'exact'])
  await (await post(url, { ...BODY, stream: true }, KEY)).text()
  assert.deepEqual(spent(await record()), [30, 1000, 'exact'])
  await (await fetch(`${url}/resp_1`, { headers: KEY })).text()
  assert.deepEqual(spent(await record()), NOTHING)
})

test('each token of a stream that is cut and read again is billed once', async t => {
  const { state, config, record } = await setUp(t)
  const gateway = await startGateway(t, config)
  state.events = EVENTS.slice(0, -1)
  state.hasEnd = false
  const client = await rawClient(
    t,
    gateway.port,
    rawPost('/v1/responses', json({ ...BODY, stream: true }), ['x-api-key: sk-1'])
  )
  await client.until(/ three/)
  client.socket.destroy()
  const cut = await record()
  assert.deepEqual([cut.output_tokens, cut.exactness], [3, 'counted'])
  assert.ok(cut.input_tokens > 0)

  const url = `${gateway.url}/v1/responses/resp_1`
  const abort = new AbortController()
  const read = await fetch(`${url}?stream=true`, { headers: KEY, signal: abort.signal })
  let seen = ''
  for await (const piece of read.body!.pipeThrough(new TextDecoderStream())) {
    seen += piece
    if (seen.includes(' three')) break
  }
  abort.abort()
  assert.deepEqual(spent(await record()), NOTHING, 'the same text again')

  state.events = EVENTS.slice(2)
  state.hasEnd = true
  await (await fetch(`${url}?stream=true&starting_after=1`, { headers: KEY })).text()
  const rest = await record()
  assert.deepEqual([rest.output_tokens, rest.exactness], [997, 'exact'])
  assert.equal(rest.input_tokens, Math.max(0, 30 - cut.input_tokens))
})

for (const [what, shown, expected] of [
  [
    'one that has failed',
    response('failed', { usage: USAGE, error: { code: 'server_error', message: 'died' } }),
    [30, 1000, 'exact', 'backend_failed']
  ],
  ['one that was cancelled', response('cancelled', { usage: USAGE }), [30, 1000, 'exact', 'ok']],
  ['one that is incomplete', response('incomplete', { usage: USAGE }), [30, 1000, 'exact', 'ok']]
] as const) {
  test(`${what} costs what it says, once`, async t => {
    const { state, config, record } = await setUp(t)
    const gateway = await startGateway(t, config)
    const url = `${gateway.url}/v1/responses`
    await (await post(url, BODY, KEY)).text()
    await record()
    state.shown = shown
    await (await fetch(`${url}/resp_1`, { headers: KEY })).text()
    const billed = await record()
    assert.deepEqual([...spent(billed), billed.outcome], expected)
    for (let again = 0; again < 6; again++) {
      const { status } = await fetch(`${url}/resp_1`, { headers: KEY })
      assert.equal(status, 200)
      const { input_tokens, output_tokens, outcome } = await record()
      assert.deepEqual([input_tokens, output_tokens, outcome], [0, 0, 'ok'])
    }
  })
}

test('a result without usage is estimated, with the prompt of its request', async t => {
  const { state, config, record } = await setUp(t)
  const gateway = await startGateway(t, config)
  const url = `${gateway.url}/v1/responses`
  await (await post(url, BODY, KEY)).text()
  await record()
  const content = [{ type: 'output_text', text: 'One two three four five six seven eight.' }]
  state.shown = response('completed', { output: [{ type: 'message', content }] })
  await (await fetch(`${url}/resp_1`, { headers: KEY })).text()
  const { input_tokens, output_tokens, exactness } = await record()
  assert.equal(exactness, 'estimated')
  assert.ok(input_tokens > 10 && input_tokens < 60, String(input_tokens))
  assert.ok(output_tokens > 5 && output_tokens < 15, String(output_tokens))
})

for (const [what, rate_limit] of [
  ['a key', { per_key: { total_quota: 500, reserve: 'typical' } }],
  ['a model', { per_model: { total_quota: 500, reserve: 'typical', requests_per_minute: 3 } }]
] as const) {
  test(`the quota of ${what} counts the result, and reads are no requests to the model`, async t => {
    const { state, config } = await setUp(t, { rate_limit: { enabled: true, ...rate_limit } })
    const gateway = await startGateway(t, config)
    const url = `${gateway.url}/v1/responses`
    assert.equal((await post(url, BODY, KEY)).status, 200)
    for (let polls = 0; polls < 5; polls++) {
      assert.equal((await fetch(`${url}/resp_1`, { headers: KEY })).status, 200)
    }
    state.shown = DONE
    const last = await fetch(`${url}/resp_1`, { headers: KEY })
    await last.text()
    const requestId = last.headers.get('x-llmproxy-request-id')
    await gateway.logged({ msg: 'exchange', requestId })
    assert.equal((await post(url, BODY, KEY)).status, 429)
  })
}

test('several workers bill a response once', async t => {
  const { state, config, record } = await setUp(t)
  const dir = folder(t)
  const file = writeConfig(join(dir, 'config.yaml'), {
    server: { listen: '127.0.0.1:0', workers: 2 },
    ...config
  })
  const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dir })
  const url = `${gateway.url}/v1/responses`
  await (await post(url, BODY, KEY)).text()
  assert.deepEqual(spent(await record()), NOTHING)
  // Both workers know once a call that was made after it has been through the primary, too.
  await (await fetch(`${gateway.url}/metrics`)).text()
  state.shown = DONE
  const count = 12
  const reads = Array.from({ length: count }, (_, at) =>
    fetch(`${url}/resp_1${at % 2 === 0 ? '' : '?stream=true'}`, {
      headers: { ...KEY, connection: 'close' }
    })
  )
  for (const each of await Promise.all(reads)) assert.match(await each.text(), /1030/)
  let output = 0
  for (let at = 0; at < count; at++) output += (await record()).output_tokens
  assert.equal(output, 1000)
})

test('only so many stored responses are remembered', () => {
  const billed = new Billed()
  const usage = {
    promptTokens: 1,
    completionTokens: 1,
    totalTokens: 2,
    exactness: 'exact'
  } as const
  for (let id = 0; id < MAX_BILLED + 5; id++) billed.raise(String(id), usage)
  assert.equal(billed.size, MAX_BILLED)
})
