import assert from 'node:assert/strict'
import { join } from 'node:path'
import { test } from 'node:test'
import { StoredResponses } from '../src/routes/stored-responses.ts'
import { UnreadResponses } from '../src/routes/unread-responses.ts'
import { eventually, post, rawClient, rawPost, startGateway } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'
import {
  BODY,
  DONE,
  EVENTS,
  json,
  KEY,
  leaveUnread,
  NOTHING,
  passTime,
  response,
  rowOf,
  setUp,
  spent,
  USAGE
} from './stored.ts'

/** Responses that are made in the background: their tokens are billed once, to whoever had them made. */

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
    rate_limit: { enabled: true, per_key: { max_concurrent: 1 } },
    ...config
  })
  const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dir })
  const url = `${gateway.url}/v1/responses`
  await (await post(url, BODY, KEY)).text()
  assert.deepEqual(spent(await record()), NOTHING)
  // Both workers know once a call that was made after it has been through the primary, too.
  await (await fetch(`${gateway.url}/metrics`)).text()
  const again = async () => (await post(url, BODY, { ...KEY, connection: 'close' })).status
  assert.equal(await again(), 429, 'it has the slot')
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
  // The worker that made it hears of the end from the one that has billed it.
  await eventually(async () => (await again()) === 200)
})

test('a response that no caller reads is billed to the key that made it, also after a restart', async t => {
  const { state, record, dataDir, again, backend } = await leaveUnread(t)
  state.shown = response('in_progress')
  passTime(dataDir)
  const second = await again()
  await backend.request(1)
  await second.fastify.close()
  assert.equal(rowOf(dataDir).billed, null)

  state.shown = DONE
  passTime(dataDir)
  const third = await again()
  const billed = await record()
  assert.deepEqual(spent(billed), [30, 1000, 'exact'])
  const { api_key_id, model, requested_model, endpoint } = billed
  assert.deepEqual(
    [api_key_id, model, requested_model, endpoint],
    ['ann', 'm', 'public', '/v1/responses/:id']
  )
  await (await fetch(`${third.url}/v1/responses/resp_1`, { headers: KEY })).text()
  assert.deepEqual(spent(await record()), NOTHING, 'what the caller reads is billed already')
  const { unbilled, due } = rowOf(dataDir)
  assert.deepEqual([unbilled, due], [null, null])
  assert.equal(backend.requests[1]!.headers['x-llmproxy-settlement'], undefined)
})

for (const [what, age, status] of [
  ['its backend has lost', 0, 404],
  ['its backend does not show', 0, 405],
  ['cannot be read at its backend', 0, 501],
  ['is not complete after a day', 25 * 3_600_000, 200],
  ['cannot be had after a day', 25 * 3_600_000, 500]
] as const) {
  test(`an unread response that ${what} costs its prompt, and what a later read shows`, async t => {
    const { state, record, dataDir, again, backend } = await leaveUnread(t)
    state.status = status
    passTime(dataDir, age)
    const gateway = await again()
    const lost = await record()
    assert.deepEqual([lost.output_tokens, lost.exactness], [0, 'at_least'])
    assert.ok(lost.input_tokens > 0)
    assert.deepEqual([lost.api_key_id, lost.backend], ['ann', 'gpu'])
    assert.equal(rowOf(dataDir).due, null)
    const asked = backend.requests.length

    state.status = 200
    state.shown = DONE
    await (await fetch(`${gateway.url}/v1/responses/resp_1`, { headers: KEY })).text()
    const read = await record()
    assert.deepEqual([read.output_tokens, read.exactness], [1000, 'exact'])
    assert.equal(read.input_tokens, Math.max(0, 30 - lost.input_tokens))
    assert.equal(backend.requests.length, asked + 1)
  })
}

test('the quota of a key counts an unread response, also when it is used up', async t => {
  const rate_limit = {
    enabled: true,
    per_key: { total_quota: 500, reserve: 'typical', requests_per_minute: 1 }
  }
  const { state, record, dataDir, again } = await leaveUnread(t, { rate_limit })
  state.shown = DONE
  passTime(dataDir)
  const gateway = await again()
  assert.deepEqual(spent(await record()), [30, 1000, 'exact'])
  const refused = await post(`${gateway.url}/v1/responses`, BODY, KEY)
  assert.match(await refused.text(), /quota/)
})

test('a response is billed before its caller deletes it', async t => {
  const { state, config, record, backend } = await setUp(t)
  const gateway = await startGateway(t, config)
  const url = `${gateway.url}/v1/responses`
  await (await post(url, BODY, KEY)).text()
  await record()
  state.shown = DONE
  await (await fetch(`${url}/resp_1`, { method: 'DELETE', headers: KEY })).text()
  assert.deepEqual(spent(await record()), [30, 1000, 'exact'])
  assert.deepEqual(spent(await record()), NOTHING)
  assert.deepEqual(
    backend.requests.map(({ method }) => method),
    ['POST', 'GET', 'DELETE']
  )
})

test('what is billed of a stream that was cut is known after a restart', async t => {
  const dataDir = folder(t)
  const { state, config, record } = await setUp(t)
  const first = await startGateway(t, config, {}, dataDir)
  state.events = EVENTS.slice(0, -1)
  state.hasEnd = false
  const body = json({ ...BODY, stream: true })
  const client = await rawClient(t, first.port, rawPost('/v1/responses', body, ['x-api-key: sk-1']))
  await client.until(/ three/)
  client.socket.destroy()
  const cut = await record()
  assert.equal(cut.output_tokens, 3)
  await first.fastify.close()

  const second = await startGateway(t, config, {}, dataDir)
  state.shown = DONE
  await (await fetch(`${second.url}/v1/responses/resp_1`, { headers: KEY })).text()
  const rest = await record()
  assert.deepEqual([rest.output_tokens, rest.exactness], [997, 'exact'])
  assert.equal(rest.input_tokens, Math.max(0, 30 - cut.input_tokens))
})

const OWNER = { caller: undefined, address: undefined }
const stored = (id: string, unbilled?: number) => ({
  id,
  backend: 'b',
  model: 'm',
  caller: 'a',
  unbilled
})

test('several processes bill each token once', async t => {
  const file = join(folder(t), 'responses.db')
  const processes = [1, 2, 3].map(
    () => new StoredResponses(file, { warn: assert.fail, error: assert.fail })
  )
  processes[0]!.add(stored('resp_1', 5), OWNER)
  await processes[0]!.bill(stored('resp_1'), undefined, 'open')
  const amounts = Array.from({ length: 30 }, (_, at) => at + 1)
  const due = await Promise.all(
    amounts.map(amount =>
      processes[amount % 3]!.bill(
        stored('resp_1'),
        { promptTokens: 5, completionTokens: amount, totalTokens: 5 + amount, exactness: 'exact' },
        'open'
      )
    )
  )
  assert.equal(
    due.reduce((sum, part) => sum + (part?.totalTokens ?? 0), 0),
    35
  )
  for (const each of processes) await each.close()
})

test('unread responses of one caller are bounded: the oldest are settled first', async t => {
  const responses = new StoredResponses(
    join(folder(t), 'r.db'),
    { warn: assert.fail, error: assert.fail },
    { maxOfCaller: 50 }
  )
  for (let count = 1; count <= 100; count++) responses.add(stored(`resp_${count}`, 5), OWNER)
  const { unread, next } = await responses.claim(1_000)
  assert.deepEqual(
    unread.map(({ response, isLast }) => [response.id, isLast]),
    Array.from({ length: 50 }, (_, at) => [`resp_${at + 1}`, true])
  )
  assert.ok(next! > Date.now())
  await responses.close()
})

test('only so many unread responses are settled simultaneously', async t => {
  const responses = new StoredResponses(
    join(folder(t), 'r.db'),
    { warn: assert.fail, error: assert.fail },
    { maxOfCaller: 50 }
  )
  for (let count = 1; count <= 100; count++) responses.add(stored(`resp_${count}`, 5), OWNER)
  let running = 0
  let most = 0
  let settled = 0
  const all = Promise.withResolvers<void>()
  const unread = new UnreadResponses(
    responses,
    async () => {
      most = Math.max(most, ++running)
      await new Promise(setImmediate)
      running--
      if (++settled === 50) all.resolve()
      if (settled % 3 === 0) throw new Error('failed')
    },
    { pace: 1 }
  )
  unread.wakeAt(0)
  await all.promise
  assert.ok(most <= 8, String(most))
  unread.stop()
  await responses.close()
})
