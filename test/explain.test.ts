import assert from 'node:assert/strict'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { Decisions, type Explanation } from '../src/pool/decisions.ts'
import {
  answerChat,
  CHAT,
  closedPort,
  eventually,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/** Why a call went where it did: to the admin API, and to callers who may know. */

const TOKEN = 'admin-token'
const ADMIN = { enabled: true, token: TOKEN }
type Settings = Record<string, unknown>

/** A gateway in front of backends `a`, `b` ... with these settings and answers. */
async function open(
  t: TestContext,
  settings: Settings[],
  more: Settings = {},
  answer = answerChat
) {
  const backends = []
  for (const [at, each] of settings.entries()) {
    const { url } = await fakeBackend(t, answer)
    backends.push({ name: 'abc'[at], url, ...each })
  }
  const health_check = { enabled: false }
  const gateway = await startGateway(t, { backends, admin: ADMIN, health_check, ...more })
  const call = (body: Settings = {}, path = '/v1/chat/completions') =>
    post(gateway.url + path, { ...CHAT, ...body })
  /** Calls once, and asks why. */
  const why = async (body?: Settings) => explain(gateway.url, await idOf(call(body)))
  return { gateway, call, why }
}

async function idOf(answer: Response | Promise<Response>): Promise<string> {
  const response = await answer
  await response.text()
  return response.headers.get('x-llmproxy-request-id')!
}

function ask(url: string, path: string, method = 'GET') {
  return fetch(`${url}/admin${path}`, { method, headers: { 'x-admin-token': TOKEN } })
}

async function explain(url: string, id: string): Promise<Explanation> {
  const response = await ask(url, `/explain/${id}`)
  assert.equal(response.status, 200)
  return (await response.json()) as Explanation
}

/** Of one attempt: each backend with why it was passed over, or null. */
function reasons({ attempts }: Explanation, at = 0) {
  return attempts[at]!.candidates.map(({ backend, passed_over }) => [backend, passed_over])
}

function outcomes({ attempts }: Explanation) {
  return attempts.map(({ backend, outcome }) => [backend, outcome])
}

test('an explanation has the scores of those that were compared', async t => {
  const { why } = await open(t, [{ weight: 2 }, {}], { routing: { load_balance: 'least_wait' } })
  const { request_id, model, strategy, attempts } = await why()
  assert.match(request_id, /^req_/)
  assert.deepEqual([model, strategy, attempts.length], ['m', 'least_wait', 1])
  const { at, backend, outcome, queued_ms, score_unit, candidates } = attempts[0]!
  assert.ok(Math.abs(Date.parse(at) - Date.now()) < 10_000)
  assert.ok(['a', 'b'].includes(backend!))
  assert.deepEqual([outcome, queued_ms, score_unit], ['2xx', 0, 'wait_ms'])
  assert.deepEqual(
    candidates.map(({ score, ...each }) => [typeof score, each]),
    ['a', 'b'].map(name => [
      'number',
      { backend: name, model: 'm', cached_tokens: 0, passed_over: null, circuit: null }
    ])
  )
})

test('scores are those of the strategy, and the best of them is chosen', async t => {
  const scores = async (load_balance: string, settings: Settings[] = [{ weight: 4 }, {}]) => {
    const { why } = await open(t, settings, { routing: { load_balance } })
    const { attempts } = await why()
    const [{ backend, score_unit, candidates }] = attempts as [Explanation['attempts'][0]]
    return [backend, score_unit, ...candidates.map(each => each.score)]
  }
  assert.deepEqual(await scores('round_robin'), ['a', 'current_weight', 4, 1])
  assert.deepEqual(await scores('least_connections'), ['a', 'in_flight/weight', 0.25, 1])
  assert.deepEqual((await scores('random')).slice(1), ['weight', 4, 1])
  assert.deepEqual(await scores('prefix_affinity'), ['a', 'in_flight/weight', 0.25, 1])
  assert.deepEqual(await scores('least_wait', [{}]), ['a', null, null])
})

test('latency_based leaves out whom chance has not drawn', async t => {
  const { why } = await open(t, [{}, {}, {}], { routing: { load_balance: 'latency_based' } })
  const explanation = await why()
  const notDrawn = explanation.attempts[0]!.candidates.filter(each => each.score === null)
  assert.deepEqual(
    notDrawn.map(each => each.passed_over),
    ['not_drawn']
  )
  assert.equal(explanation.attempts[0]!.score_unit, 'ttft_ms')
})

test('who lacks the model, is unhealthy, drained, or of a higher tier is passed over', async t => {
  const dead = `http://127.0.0.1:${await closedPort()}`
  const { gateway, why } = await open(t, [{ url: dead }, { models: ['other'] }, {}], {
    health_check: { enabled: true, interval: '60s', timeout: '1s', unhealthy_threshold: 1 }
  })
  await gateway.logged({ msg: 'backend is unhealthy', backend: 'a' })
  assert.deepEqual(reasons(await why()), [
    ['a', 'unhealthy'],
    ['b', 'no_model'],
    ['c', null]
  ])

  const tiers = await open(t, [{ priority: 1 }, {}, {}])
  await ask(tiers.gateway.url, '/backends/b/drain', 'POST')
  assert.deepEqual(reasons(await tiers.why()), [
    ['b', 'drained'],
    ['a', 'higher_tier'],
    ['c', null]
  ])
})

test('a rule, models in the place of others, and models that are not known pass backends over', async t => {
  const rule = { fallback: [{ models: ['m'], primary: 'b', fallback: ['c'] }] }
  assert.deepEqual(reasons(await (await open(t, [{}, {}, {}], { routing: rule })).why()), [
    ['a', 'not_in_rule'],
    ['c', 'higher_tier'],
    ['b', null]
  ])

  const { why } = await open(t, [{ models: ['m'] }, { models: ['n'] }, {}], {
    routing: { model_fallbacks: { m: ['n'] } }
  })
  const { attempts } = await why()
  assert.deepEqual(
    attempts[0]!.candidates.map(each => [each.backend, each.model, each.passed_over]),
    [
      ['b', 'm', 'no_model'],
      ['c', 'm', 'not_known_to_have_it'],
      ['a', 'n', 'no_model'],
      ['c', 'n', 'not_known_to_have_it'],
      ['b', 'n', 'other_model'],
      ['a', 'm', null]
    ]
  )
})

test('each attempt is explained, with its outcome and whom the call has tried', async t => {
  const { why } = await open(
    t,
    [{}, {}],
    { routing: { retry: { enabled: true, max_retries: 1 } } },
    (_request, response) => response.writeHead(500).end('{}')
  )
  const explanation = await why()
  assert.deepEqual(outcomes(explanation), [
    ['a', '5xx'],
    ['b', '5xx']
  ])
  assert.deepEqual(reasons(explanation, 1), [
    ['a', 'tried'],
    ['b', null]
  ])
})

test('an open circuit is explained with why it is open', async t => {
  const { why, call } = await open(t, [{}, {}], {}, (request, response, raw) => {
    if (request.body.includes('"fail"')) {
      response.writeHead(503, { 'retry-after': '60' }).end('{}')
    } else answerChat(request, response, raw)
  })
  await (await call({ user: 'fail' })).text()
  const { attempts } = await why()
  assert.deepEqual(
    attempts[0]!.candidates.map(each => [each.backend, each.passed_over, each.circuit]),
    [
      ['a', 'circuit_open', 'retry_after'],
      ['b', null, null]
    ]
  )
})

test('who is full is passed over; when all are the call has waited, and may leave', async t => {
  const held: (() => void)[] = []
  const { gateway, call } = await open(
    t,
    [{ max_concurrent: 1 }],
    {},
    async (request, response, raw) => {
      if (request.body.includes('"hold"')) await new Promise<void>(resolve => held.push(resolve))
      await answerChat(request, response, raw)
    }
  )
  const waiting = async (count: number) => {
    while ((await gateway.metric('llmproxy_queue_waiting', { priority: 'interactive' })) !== count)
      await sleep(1)
  }
  const first = call({ user: 'hold' })
  await eventually(() => held.length > 0)
  const left = new AbortController()
  const leaving = post(`${gateway.url}/v1/chat/completions`, CHAT, {}, left.signal)
  await waiting(1)
  left.abort()
  await assert.rejects(leaving)
  await waiting(0)
  const { requestId } = await gateway.logged({ msg: 'exchange', outcome: 'client_gone' })
  const gone = await explain(gateway.url, String(requestId))
  assert.deepEqual(outcomes(gone), [[null, 'client_gone']])
  assert.deepEqual(reasons(gone), [['a', 'full']])

  const second = call()
  await waiting(1)
  held[0]!()
  await idOf(first)
  const explanation = await explain(gateway.url, await idOf(second))
  assert.deepEqual(outcomes(explanation), [
    [null, 'queued'],
    ['a', '2xx']
  ])
  assert.ok(explanation.attempts[0]!.queued_ms > 0)
  assert.deepEqual(reasons(explanation, 1), [['a', null]])
})

test('a call about a stored response goes to the backend that has it', async t => {
  const { gateway, call } = await open(t, [{}, {}], {}, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json' })
    response.end(JSON.stringify({ id: 'resp_1', object: 'response', model: 'm' }))
  })
  await idOf(call({ input: 'Hello' }, '/v1/responses'))
  const id = await idOf(call({ input: 'More', previous_response_id: 'resp_1' }, '/v1/responses'))
  assert.deepEqual(reasons(await explain(gateway.url, id)), [
    ['b', 'pinned_elsewhere'],
    ['a', null]
  ])
})

test('a call that nobody can take, one that breaks off and one under way are explained', async t => {
  let breakOff = () => {}
  const { gateway, why } = await open(t, [{}], {}, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write('data: {}\n\n')
    breakOff = () => response.destroy()
  })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/data: /)
  const id = /x-llmproxy-request-id: (\S+)/.exec(client.received)![1]!
  assert.deepEqual(outcomes(await explain(gateway.url, id)), [['a', '2xx']])
  breakOff()
  await client.closed
  assert.deepEqual(outcomes(await explain(gateway.url, id)), [['a', 'broke_off']])

  await ask(gateway.url, '/backends/a/drain', 'POST')
  const nobody = await why()
  assert.deepEqual(outcomes(nobody), [[null, 'no_backend']])
  assert.deepEqual(reasons(nobody), [['a', 'drained']])
})

test('what is not known is a 404, and nobody is told without the token', async t => {
  const { gateway, call } = await open(t, [{}])
  assert.equal((await ask(gateway.url, '/explain/req_none')).status, 404)
  const id = await idOf(call())
  assert.equal((await fetch(`${gateway.url}/admin/explain/${id}`)).status, 401)
})

test('a thousand requests are remembered, fewer where there are many backends', () => {
  const decisions = new Decisions()
  const begin = (id: number, model = 'm') => decisions.begin(String(id), model, 'random')
  for (let id = 0; id < 1_500; id++) begin(id)
  assert.equal(decisions.find('499'), undefined)
  assert.equal(decisions.find('500')?.id, '500')
  assert.equal(decisions.find('1499')?.id, '1499')
  const large = begin(1_500, 'm'.repeat(10_000))
  assert.equal(large.model!.length, 200)
  const choice = { seen: new Array(49_999) } as never
  decisions.add(large, choice)
  assert.equal(decisions.find('501')?.id, '501', 'nothing was in the way')
  const next = begin(1_501)
  decisions.add(next, { seen: new Array(2) } as never)
  assert.equal(decisions.find('1500'), undefined, 'it made room')
  assert.equal(decisions.find('1501'), next)
  for (let count = 0; count < 100; count++) decisions.add(next, { seen: [] } as never)
  assert.equal(next.choices.length, 32)
})

test('a key that may see traces gets one with its answer when it asks; nobody else does', async t => {
  const backends = await Promise.all([
    fakeBackend(t, (_request, response) => response.writeHead(500).end('{}')),
    fakeBackend(t, answerChat)
  ])
  const gateway = await startGateway(t, {
    backends: backends.map(({ url }, at) => ({ name: ['kühl', 'b'][at], url })),
    routing: { retry: { enabled: true }, load_balance: 'least_connections' },
    auth: { enabled: true, keys: [{ key: 'sk-a', trace: true }, 'sk-b'] }
  })
  const trace = async (key: string, value?: string, body: Settings = {}) => {
    const headers = {
      'x-api-key': key,
      ...(value === undefined ? {} : { 'x-llmproxy-trace': value })
    }
    const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, ...body }, headers)
    await response.text()
    return response.headers.get('x-llmproxy-trace')
  }
  assert.equal(
    await trace('sk-a', '1'),
    'least_connections: k?hl 5xx -> b 2xx | k?hl in_flight/weight=1; b in_flight/weight=1 | k?hl tried; b alone'
  )
  assert.match((await trace('sk-a', '1', { stream: true }))!, /^least_connections: b 2xx \| /)
  assert.equal(await trace('sk-a'), null)
  assert.equal(await trace('sk-a', '0'), null)
  assert.equal(await trace('sk-b', '1'), null)
  for (const { headers } of backends.flatMap(each => each.requests)) {
    assert.equal(headers['x-llmproxy-trace'], undefined)
  }
})

test('a stored key may see traces as long as it says so', async t => {
  const { url } = await fakeBackend(t, answerChat)
  const config = { backends: [{ name: 'a', url }], auth: { enabled: true }, admin: ADMIN }
  const gateway = await startGateway(t, config, {}, folder(t))
  const headers = { 'x-admin-token': TOKEN }
  const made = await post(`${gateway.url}/admin/keys`, { trace: true }, headers)
  const { id, key } = (await made.json()) as { id: string; key: string }
  const trace = async () => {
    const asking = { 'x-api-key': key, 'x-llmproxy-trace': '1' }
    const response = await post(`${gateway.url}/v1/chat/completions`, CHAT, asking)
    await response.text()
    return response.headers.get('x-llmproxy-trace')
  }
  assert.equal(await trace(), 'round_robin: a 2xx | a alone')
  const body = JSON.stringify({ trace: null })
  await fetch(`${gateway.url}/admin/keys/${id}`, { method: 'PATCH', headers, body })
  assert.equal(await trace(), null)
})

test("an error of the gateway's own has the trace as well, and a long one is cut", async t => {
  const dead = `http://127.0.0.1:${await closedPort()}`
  const names = Array.from({ length: 40 }, (_, at) => `backend-with-a-long-name-${at}`)
  const gateway = await startGateway(t, {
    backends: names.map(name => ({ name, url: dead })),
    health_check: { enabled: false },
    auth: { enabled: true, keys: [{ key: 'sk-a', trace: true }] }
  })
  const headers = { 'x-api-key': 'sk-a', 'x-llmproxy-trace': '1' }
  const response = await post(`${gateway.url}/v1/chat/completions`, CHAT, headers)
  assert.ok(response.status >= 500)
  const line = response.headers.get('x-llmproxy-trace')!
  assert.equal(line.length, 1_024)
  assert.match(line, /^round_robin: backend-with-a-long-name-0 connect_failure -> .* \.\.\.$/)
})

test('each worker explains the calls of all', async t => {
  const { url } = await fakeBackend(t, answerChat)
  const file = join(folder(t), 'config.yaml')
  writeConfig(file, {
    server: { listen: '127.0.0.1:0', workers: 2 },
    backends: [{ name: 'a', url }],
    admin: ADMIN
  })
  const gateway = await start(t, [CLI, '--config', file])
  const headers = { connection: 'close', 'x-admin-token': TOKEN }
  const ids = []
  for (let count = 0; count < 3; count++) {
    ids.push(await idOf(post(`${gateway.url}/v1/chat/completions`, CHAT, { connection: 'close' })))
  }
  const status = async (id: string) => {
    const response = await fetch(`${gateway.url}/admin/explain/${id}`, { headers })
    const { request_id } = (await response.json()) as Partial<Explanation>
    return [response.status, request_id]
  }
  for (const id of [...ids, ...ids]) assert.deepEqual(await status(id), [200, id])
  assert.deepEqual(await status('req_none'), [404, undefined])
})
