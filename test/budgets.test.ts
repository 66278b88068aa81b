import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { createClient } from '@redis/client'
import { parseConfig } from '../src/config.ts'
import { FORMS } from '../src/dialects/prompt.ts'
import { MemoryStore } from '../src/limits/memory.ts'
import {
  CHAT,
  chunk,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  type TestGateway
} from './helper.ts'
import { folder } from './process.ts'
import { door, REDIS, uniqueName } from './servers.ts'

/** Budgets of tokens and money, on real sockets. */

const PROMPT = 10

/** Answers with as many tokens as `max_tokens` says, one in each event, and says so in the end. */
function answering(t: TestContext, { pause = 0 } = {}) {
  return fakeBackend(t, async (request, response) => {
    const { max_tokens: length = 5, stream } = JSON.parse(request.body)
    const usage = {
      prompt_tokens: PROMPT,
      completion_tokens: length,
      total_tokens: PROMPT + length
    }
    if (!stream) {
      response.writeHead(200, { 'content-type': 'application/json' })
      return void response.end(JSON.stringify({ choices: [], usage }))
    }
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    for (let at = 0; at < length && !response.destroyed; at++) {
      response.write(chunk(' x'))
      if (pause > 0) await new Promise(resolve => setTimeout(resolve, pause))
    }
    response.end(`data: ${JSON.stringify({ choices: [], usage })}\n\ndata: [DONE]\n\n`)
  })
}

const keys = (own: object = {}) => [
  { key: 'a', name: 'alice', user_id: 'u1', ...own },
  { key: 'b', name: 'bob', user_id: 'u1' }
]

async function start(t: TestContext, rate_limit: object, more: object = {}) {
  const backend = await answering(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: keys(), skip_paths: ['/health', '/metrics'] },
    rate_limit: { enabled: true, ...rate_limit },
    ...more
  })
  return { backend, gateway, call: caller(gateway) }
}

function caller(gateway: TestGateway) {
  return (key: string, body: object = {}, path = '/v1/chat/completions') =>
    post(gateway.url + path, { ...CHAT, ...body }, { authorization: `Bearer ${key}` })
}

test('tokens a minute: with headers, and a refusal that says when', async t => {
  const { call } = await start(t, { per_key: { tokens_per_minute: 200 } })
  const first = await call('a', { max_tokens: 50 })
  assert.equal(first.headers.get('x-ratelimit-limit-tokens'), '200')
  assert.ok(Number(first.headers.get('x-ratelimit-remaining-tokens')) < 150)
  assert.match(first.headers.get('x-ratelimit-reset-tokens')!, /s$/)
  await first.text()
  assert.equal((await call('a', { max_tokens: 100 })).status, 200)
  const refused = await call('a', { max_tokens: 100 })
  assert.equal(refused.status, 429)
  assert.ok(Number(refused.headers.get('retry-after')) > 50)
  assert.equal(refused.headers.get('x-ratelimit-remaining-tokens'), '0')
  const { error } = await refused.json()
  assert.equal(error.code, 'rate_limit_exceeded')
  assert.match(error.message, /This API key is limited to 200 tokens a minute/)
  assert.equal((await call('b')).status, 200)
})

test('on /v1/messages the headers and the error are Anthropic’s', async t => {
  const { call } = await start(t, {
    per_key: { tokens_per_minute: 100, requests_per_minute: 2 }
  })
  const first = await call('a', { max_tokens: 50 }, '/v1/messages')
  assert.equal(first.headers.get('anthropic-ratelimit-requests-limit'), '2')
  assert.equal(first.headers.get('anthropic-ratelimit-requests-remaining'), '1')
  assert.equal(first.headers.get('anthropic-ratelimit-tokens-limit'), '100')
  const reset = first.headers.get('anthropic-ratelimit-requests-reset')!
  assert.ok(Math.abs(Date.parse(reset) - Date.now() - 60_000) < 5_000, reset)
  assert.equal(first.headers.get('x-ratelimit-limit-requests'), null)
  await call('a', { max_tokens: 1 }, '/v1/messages')
  const refused = await call('a', { max_tokens: 1 }, '/v1/messages')
  assert.equal(refused.status, 429)
  assert.equal(refused.headers.get('anthropic-ratelimit-requests-remaining'), '0')
  assert.equal((await refused.json()).error.type, 'rate_limit_error')
})

test('a call that fits is not refused because its max_tokens is large', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json' })
    response.end('{"usage":{"prompt_tokens":10,"completion_tokens":20,"total_tokens":30}}')
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, per_key: { tokens_per_minute: 500 } }
  })
  for (let at = 0; at < 14; at++) {
    const answer = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, max_tokens: 4096 })
    assert.equal(answer.status, 200, `call ${at}`)
    await answer.text()
  }
})

test('a prompt that is larger than a minute, whatever its tokenizer, is refused for good', async t => {
  const { call } = await start(t, { per_key: { tokens_per_minute: 100 } })
  const messages = [{ role: 'user', content: 'many words '.repeat(2000) }]
  const refused = await call('a', { messages })
  assert.equal(refused.status, 429)
  assert.equal(refused.headers.get('x-should-retry'), 'false')
  assert.match((await refused.json()).error.message, /This request alone is larger/)
})

for (const storage of ['memory', 'redis'] as const) {
  test(`an estimate alone refuses nothing for good: it waits until nothing else counts, ${storage}`, async t => {
    const caches = [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
    const { call } = await start(
      t,
      {
        per_key: { tokens_per_minute: 100 },
        ...(storage === 'redis' ? { storage, redis_prefix: uniqueName('budgets') } : {})
      },
      storage === 'redis' ? { storage: { caches } } : {}
    )
    // About 400 tokens, says the estimate.
    const messages = [{ role: 'user', content: 'many words '.repeat(200) }]
    assert.equal((await call('b', { messages })).status, 200)
    assert.equal((await call('a', { max_tokens: 10 })).status, 200)
    const refused = await call('a', { messages })
    assert.equal(refused.status, 429)
    assert.ok(Number(refused.headers.get('retry-after')) <= 60)
    assert.equal(refused.headers.get('x-should-retry'), null)
  })
}

test('a prompt that is only estimated above a quota is let through while the quota is untouched', async t => {
  const { call } = await start(t, { per_key: { total_quota: 60 } })
  const messages = [{ role: 'user', content: 'word '.repeat(60) }]
  assert.equal((await call('a', { messages, max_tokens: 100 })).status, 429)
  await (await call('a', { messages, max_tokens: 1 })).text()
  const refused = await call('a', { messages, max_tokens: 1 })
  assert.equal((await refused.json()).error.code, 'insufficient_quota')
  assert.equal((await call('b', { messages, max_tokens: 1 })).status, 200)
})

test('a quota of a key holds without rate_limit, and tells that waiting does not help', async t => {
  const backend = await answering(t)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    auth: {
      enabled: true,
      keys: keys({ total_quota: 100, quota_reset_period: 'monthly' })
    }
  })
  const call = caller(gateway)
  await (await call('a', { max_tokens: 50 })).text()
  await (await call('a', { max_tokens: 25 })).text()
  const refused = await call('a', { max_tokens: 25 })
  assert.equal(refused.status, 429)
  assert.equal(refused.headers.get('x-should-retry'), 'false')
  const { error } = await refused.json()
  assert.equal(error.code, 'insufficient_quota')
  assert.match(
    error.message,
    /^This API key has too little left of its quota\. 5 are left, and this request may need \d\d: set a lower max_tokens, or send a shorter prompt\. It is renewed at \d{4}-/
  )
  assert.equal((await call('b')).status, 200)
})

test('a quota of money', async t => {
  const { call } = await start(
    t,
    { per_user: { total_quota: 0.001, quota_unit: 'cost', quota_reset_period: 'daily' } },
    { usage: { prices: [{ model: '*', input: 0, output: 10 }] } }
  )
  await (await call('a', { max_tokens: 60 })).text()
  const refused = await call('b', { max_tokens: 60 })
  assert.equal(refused.status, 429)
  assert.match(
    (await refused.json()).error.message,
    /This user has too little left of its quota\. 0\.0004 are left, and this request may need 0\.0006:/
  )
  assert.equal((await call('b', { max_tokens: 40 })).status, 200)
})

for (const storage of ['memory', 'redis'] as const) {
  const skip = storage === 'redis' && REDIS.skip
  test(`${storage}: a burst does not overrun a quota, of a model that nothing is known of`, {
    skip
  }, async t => {
    const settings = {
      storage,
      redis_prefix: uniqueName('burst'),
      per_user: { total_quota: 0.05, quota_unit: 'cost' }
    }
    const caches = [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
    const { call } = await start(t, settings, {
      usage: { prices: [{ model: '*', input: 0, output: 10 }] },
      storage: { caches }
    })
    const responses = await Promise.all(
      Array.from({ length: 20 }, () => call('a', { max_tokens: 1000 }))
    )
    const statuses = responses.map(({ status }) => status)
    assert.equal(statuses.filter(status => status === 200).length, 5)
    const refused = responses.find(({ status }) => status === 429)!
    assert.match(
      (await refused.json()).error.message,
      /Running requests have reserved what is left|has (used up|too little left of) its quota/
    )
    assert.equal((await call('a', { max_tokens: 10 })).status, 429)
  })
}

for (const storage of ['memory', 'redis'] as const) {
  const skip = storage === 'redis' && REDIS.skip
  test(`${storage}: a small quota that reserves what is typical passes beside a shared one that reserves the most`, {
    skip
  }, async t => {
    const release = Promise.withResolvers<void>()
    const backend = await fakeBackend(t, async (_request, response) => {
      await release.promise
      const usage = { prompt_tokens: PROMPT, completion_tokens: 5, total_tokens: PROMPT + 5 }
      response.writeHead(200, { 'content-type': 'application/json' })
      response.end(JSON.stringify({ choices: [], usage }))
    })
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      auth: { enabled: true, keys: keys() },
      storage: {
        caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
      },
      rate_limit: {
        enabled: true,
        storage,
        redis_prefix: uniqueName('reserve'),
        global: { total_quota: 10_000 },
        per_key: { total_quota: 1_000, reserve: 'typical' }
      }
    })
    const large = () => caller(gateway)('a', { max_tokens: 3000 })
    const running = [large(), large(), large()]
    const first = await Promise.race([backend.request(2), ...running])
    assert.ok(!('status' in first), 'rejected')
    const refused = await large()
    assert.equal(refused.status, 429)
    assert.match((await refused.json()).error.message, /quota of this server.*may need 30\d\d:/)
    release.resolve()
    for (const each of running) assert.equal((await each).status, 200)
  })
}

test('what a request without max_tokens reserves: the context of its model, or what is configured', async t => {
  const cases: [object, object, number, RegExp][] = [
    [{ max_model_len: 2000 }, {}, 1990, /may need 2000:/],
    [{ meta: { n_ctx: 300 } }, {}, 250, /may need 300:/],
    [{}, {}, 4000, /may need 41\d\d:/],
    [{ max_model_len: 2000 }, { assumed_max_tokens: 50 }, 45, /may need \d\d:/]
  ]
  for (const [card, options, total_quota, message] of cases) {
    const backend = await fakeBackend(
      t,
      ({ url }, response) => {
        const usage = { prompt_tokens: PROMPT, completion_tokens: 5, total_tokens: PROMPT + 5 }
        const data = [{ id: 'm', ...card }]
        response.writeHead(200, { 'content-type': 'application/json' })
        response.end(JSON.stringify(url === '/v1/models' ? { data } : { choices: [], usage }))
      },
      { listsModels: true }
    )
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      rate_limit: { enabled: true, per_key: { total_quota }, ...options }
    })
    await gateway.logged({ msg: 'backend lists models' })
    const url = `${gateway.url}/v1/chat/completions`
    const refused = await post(url, CHAT)
    assert.equal(refused.status, 429)
    assert.match((await refused.json()).error.message, message)
    // What the model cannot write is not reserved.
    const allowed = await post(url, { ...CHAT, max_tokens: 20 })
    assert.equal(allowed.status, 200, JSON.stringify(card))
  }
})

test('a quota reserves the most, tokens a minute what is usual, also in one set of limits', async t => {
  const arrived: (() => void)[] = []
  const backend = await fakeBackend(t, async (_request, response) => {
    await new Promise<void>(resolve => {
      if (arrived.push(resolve) === 3) for (const each of arrived) each()
    })
    const usage = { prompt_tokens: PROMPT, completion_tokens: 5, total_tokens: PROMPT + 5 }
    response.writeHead(200, { 'content-type': 'application/json' })
    response.end(JSON.stringify({ choices: [], usage }))
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, per_key: { tokens_per_minute: 1000, total_quota: 10_000 } }
  })
  const large = () => post(`${gateway.url}/v1/chat/completions`, { ...CHAT, max_tokens: 3000 })
  const statuses = (await Promise.all([large(), large(), large()])).map(({ status }) => status)
  assert.deepEqual(statuses, [200, 200, 200])
})

/** About 2,500 tokens. */
const LONG = 'some words of a text '.repeat(500)

/** Fields that reach the model, with a long text, on each kind of endpoint. */
const LONG_PROMPTS: [path: string, ...fields: object[]][] = [
  [
    '/v1/chat/completions',
    { messages: [{ role: 'user', content: LONG }] },
    { chat_template_kwargs: { date_string: LONG } },
    { chat_template: LONG },
    { documents: [{ text: LONG }] },
    { functions: [{ name: LONG }] },
    { response_format: { type: 'json_schema', json_schema: { description: LONG } } },
    { guideline: LONG },
    { tool_prompt: LONG }
  ],
  ['/v1/completions', { prompt: LONG }, { prompt: 'x', suffix: LONG }, { prompt_embeds: 'AAAA' }],
  [
    '/v1/responses',
    { input: 'x', instructions: LONG },
    { text: { format: { type: 'json_schema', schema: { description: LONG } } } },
    { previous_input_messages: [{ role: 'user', content: LONG }] },
    { chat_template_kwargs: { date_string: LONG } }
  ],
  [
    '/v1/messages',
    { system: LONG },
    { output_config: { format: { schema: { description: LONG } } } },
    { chat_template_kwargs: { date_string: LONG } }
  ],
  [
    '/api/generate',
    { prompt: 'x', system: LONG },
    { prompt: 'x', template: LONG },
    { prompt: 'x', template: '{{range 9999}}{{ .Prompt }}{{end}}' },
    { prompt: 'x', context: Array.from({ length: 2500 }, (_, at) => at) }
  ],
  ['/api/chat', { tools: [{ type: 'function', function: { name: LONG } }] }],
  ['/v1/embeddings', { input: 'x', content: LONG }, { messages: [{ content: LONG }] }],
  [
    '/v1/rerank',
    { query: 'x', documents: [LONG] },
    { query: LONG.slice(0, 1_050), documents: Array(10).fill('x') },
    { query: [{ text: LONG.slice(0, 1_050) }], documents: Array(10).fill('x') },
    { query: 'x', documents: ['x'], instruction: LONG },
    { query: 'x', documents: Array(10).fill('x'), instruct: LONG.slice(0, 1_050) }
  ],
  [
    '/v1/score',
    { text_1: LONG, text_2: 'x' },
    { text_1: [LONG.slice(0, 1_050)], text_2: Array(10).fill('x') },
    { data_1: LONG, data_2: 'x' },
    { queries: 'x', items: [LONG] }
  ]
]

for (const [path, ...all] of LONG_PROMPTS) {
  test(`a burst overruns no quota, whichever field has the prompt, at ${path}`, async t => {
    const usage = { prompt_tokens: 2500, completion_tokens: 13, total_tokens: 2513 }
    const said = JSON.stringify({ usage, prompt_eval_count: 2500, eval_count: 13, done: true })
    const backend = await fakeBackend(t, async (_request, response) => {
      await new Promise(resolve => setTimeout(resolve, 50))
      response.setHeader('content-type', 'application/json')
      response.end(said)
    })
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      auth: {
        enabled: true,
        keys: all.map((_, at) => ({ key: `k${at}`, name: `k${at}`, total_quota: 3000 }))
      }
    })
    for (const [at, fields] of all.entries()) {
      const messages = [{ role: 'user', content: 'x' }]
      const limits = { max_tokens: 13, max_output_tokens: 13, options: { num_predict: 13 } }
      const body = { model: 'm', stream: false, messages, ...limits, ...fields }
      const headers = { authorization: `Bearer k${at}` }
      const burst = Array.from({ length: 20 }, async () => {
        const response = await post(gateway.url + path, body, headers)
        await response.text()
        return response.status
      })
      const passed = (await Promise.all(burst)).filter(status => status === 200)
      assert.equal(passed.length, 1, `${path} ${JSON.stringify(fields).slice(0, 100)}`)
    }
  })
}

test('a field of a prompt in another case, or twice, is a 400 at each endpoint', async t => {
  const backend = await answering(t)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  for (const form of FORMS) {
    for (const name of [...form.fields, ...(form.optional ?? [])]) {
      const other = name.charAt(0).toUpperCase() + name.slice(1)
      for (const body of [`"${other}":["x"]`, `"${name}":"x","${name}":"y"`]) {
        for (const [path] of LONG_PROMPTS) {
          const response = await post(gateway.url + path, `{"model":"m",${body}}`)
          assert.equal(response.status, 400, `${path} ${body}`)
        }
      }
    }
  }
  assert.equal(backend.requests.length, 0)
})

/** Sends requests simultaneously, each with a form or JSON; returns the statuses. */
function burst(url: string, key: string, path: string, count: number): Promise<number[]> {
  const requests = Array.from({ length: count }, async () => {
    const headers = { authorization: `Bearer ${key}` }
    const form = new FormData()
    form.set('model', 'dear')
    form.set('file', new Blob(['x']), 'x.wav')
    const response = path.includes('audio')
      ? await fetch(url + path, { method: 'POST', headers, body: form })
      : await post(url + path, { model: 'dear', input: 'x', messages: [] }, headers)
    await response.text()
    return response.status
  })
  return Promise.all(requests)
}

const FORM_ROUTES = ['/v1/audio/transcriptions', '/v1/audio/translations']
const UNESTIMATED = [...FORM_ROUTES, '/v1/images/generations']
const FREE = [
  ...['/tokenize', '/detokenize', '/api/show'],
  ...['/v1/messages/count_tokens', '/v1/responses/input_tokens']
]

async function startUnestimated(t: TestContext, auth: object, more: object) {
  const usage = { input_tokens: 2490, output_tokens: 13, total_tokens: 2503 }
  const backend = await fakeBackend(t, async (_request, response) => {
    await new Promise(resolve => setTimeout(resolve, 50))
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify({ text: 'x', usage }))
  })
  return startGateway(t, { backends: [{ url: backend.url }], auth, ...more })
}

test('limits of all models apply where the gateway does not read the model', async t => {
  const auth = { enabled: true, keys: keys() }
  for (const limits of [
    { models: { 'other*': {}, '*': { requests_per_minute: 5 } } },
    { per_model: { requests_per_minute: 5 } }
  ]) {
    const rate_limit = { enabled: true, ...limits }
    for (const path of FORM_ROUTES) {
      const gateway = await startUnestimated(t, auth, { rate_limit })
      const statuses = await burst(gateway.url, 'a', path, 8)
      assert.equal(statuses.filter(status => status === 200).length, 5, path)
      // All such requests share one account.
      assert.deepEqual(await burst(gateway.url, 'b', FORM_ROUTES[0]!, 1), [429])
      const listing = await fetch(`${gateway.url}/v1/models`, { headers: { 'x-api-key': 'a' } })
      assert.equal(listing.status, 200)
    }
  }
})

for (const path of [...UNESTIMATED, ...FREE]) {
  test(`a burst whose tokens cannot be estimated overruns no quota: ${path}`, async t => {
    const isFree = FREE.includes(path)
    const auth = {
      enabled: true,
      keys: [
        { key: 'tokens', name: 't', total_quota: 3000 },
        { key: 'money', name: 'm', total_quota: 0.03, quota_unit: 'cost' },
        { key: 'minute', name: 'r', limits: { tokens_per_minute: 3000 } },
        { key: 'large', name: 'l', total_quota: 9000 }
      ]
    }
    const usage = { prices: [{ model: '*', input: 10, output: 10 }], unpriced: 'refuse' }
    const gateway = await startUnestimated(t, auth, { usage })
    for (const [key, least] of [
      ['tokens', 1],
      ['money', 1],
      ['minute', 1],
      ['large', 2]
    ] as const) {
      const passed = (await burst(gateway.url, key, path, 20)).filter(status => status === 200)
      assert.equal(passed.length, isFree ? 20 : least, key)
    }
    // What was reserved is settled: 3,994 of 9,000 tokens are left, and a request needs 4,096.
    const [status] = await burst(gateway.url, 'large', path, 1)
    assert.equal(status, isFree ? 200 : 429)
  })
}

test('rate_limit.assumed_max_tokens is what a request reserves whose tokens cannot be estimated', async t => {
  const auth = { enabled: true, keys: [{ key: 'a', total_quota: 9000 }] }
  const rate_limit = { assumed_max_tokens: 3000 }
  const gateway = await startUnestimated(t, auth, { rate_limit })
  const path = '/v1/images/generations'
  const statuses = await burst(gateway.url, 'a', path, 20)
  assert.equal(statuses.filter(status => status === 200).length, 3)
})

test('usage.unpriced: refuse applies to each route whose backend may report usage', async t => {
  const auth = { enabled: true, keys: [{ key: 'a', total_quota: 1, quota_unit: 'cost' }] }
  const price = (model: string) => ({ model, input: 1, output: 1 })
  const refused = await startUnestimated(t, auth, {
    usage: { prices: [price('other')], unpriced: 'refuse' }
  })
  for (const path of UNESTIMATED) {
    assert.deepEqual(await burst(refused.url, 'a', path, 1), [403], path)
  }
  for (const path of FREE) assert.deepEqual(await burst(refused.url, 'a', path, 1), [200], path)
  // A form has the price of "*" alone.
  const named = await startUnestimated(t, auth, {
    usage: { prices: [price('dear')], unpriced: 'refuse' }
  })
  for (const path of UNESTIMATED) {
    const status = FORM_ROUTES.includes(path) ? 403 : 200
    assert.deepEqual(await burst(named.url, 'a', path, 1), [status], path)
  }
  const all = await startUnestimated(t, auth, {
    usage: { prices: [price('*')], unpriced: 'refuse' }
  })
  for (const path of UNESTIMATED) assert.deepEqual(await burst(all.url, 'a', path, 1), [200], path)
})

test('auth.status_codes.quota_exceeded is the status of a quota that is used up', async t => {
  const { call } = await start(
    t,
    {},
    {
      auth: {
        enabled: true,
        keys: keys({ total_quota: 10 }),
        status_codes: { quota_exceeded: { http_code: 402 } }
      }
    }
  )
  for (const path of ['/v1/chat/completions', '/v1/messages', '/api/chat', '/v1/responses']) {
    const refused = await call('a', { max_tokens: 50 }, path)
    assert.equal(refused.status, 402, path)
    assert.equal(refused.headers.get('x-should-retry'), 'false')
  }
})

test('usage.unpriced: refuse rejects what a quota of money would not notice', async t => {
  const prices = [{ model: 'dear', input: 0, output: 10 }]
  for (const unpriced of ['allow', 'refuse']) {
    const { call } = await start(
      t,
      { per_user: { total_quota: 1, quota_unit: 'cost' } },
      { usage: { prices, unpriced } }
    )
    const response = await call('a')
    assert.equal(response.status, unpriced === 'allow' ? 200 : 403)
    if (unpriced === 'refuse') {
      assert.equal((await response.json()).error.code, 'model_not_priced')
    }
    assert.equal((await call('a', { model: 'dear', max_tokens: 5 })).status, 200)
  }
})

test('a quota of money reserves the price of the dearest backend and model that may serve a request', async t => {
  const backend = await answering(t)
  const backends = [
    { url: 'http://127.0.0.1:1', models: ['cheap'] },
    { url: backend.url, models: ['dear'] }
  ]
  const usage = {
    prices: [
      { model: 'cheap', input: 0, output: 1 },
      { model: 'dear', input: 0, output: 10 }
    ]
  }
  const auth = { keys: [{ key: 'a', name: 'a', total_quota: 0.025, quota_unit: 'cost' }] }
  const routing = { model_fallbacks: { cheap: ['dear'] } }
  const gateway = await startGateway(t, { backends, usage, auth, routing })
  const headers = { authorization: 'Bearer a' }
  const body = { ...CHAT, model: 'cheap', max_tokens: 1_000 }
  const responses = await Promise.all(
    Array.from({ length: 20 }, () => post(`${gateway.url}/v1/chat/completions`, body, headers))
  )
  assert.equal(responses.filter(({ status }) => status === 200).length, 2)
})

test('max_completion_tokens limits what is reserved and billed only where the engine reads it', async t => {
  for (const [owner, passing] of [
    ['library', 1],
    ['vllm', 20]
  ] as const) {
    const usage = { prompt_tokens: 20, completion_tokens: 422, total_tokens: 442 }
    const backend = await fakeBackend(
      t,
      ({ url }, response) => {
        response.writeHead(200, { 'content-type': 'application/json' })
        if (url === '/v1/models') {
          return void response.end(JSON.stringify({ data: [{ id: 'm', owned_by: owner }] }))
        }
        // As Ollama does: the limit is ignored, and most of the text is not shown.
        const choices = [{ index: 0, message: { content: 'Yes.' }, finish_reason: 'stop' }]
        response.end(JSON.stringify({ choices, usage: owner === 'vllm' ? undefined : usage }))
      },
      { listsModels: true }
    )
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      auth: { keys: [{ key: 'a', name: 'a', total_quota: 3_000 }] }
    })
    const headers = { authorization: 'Bearer a' }
    await gateway.logged({ msg: 'backend lists models' })
    const body = { ...CHAT, max_completion_tokens: 1 }
    const ask = () => post(`${gateway.url}/v1/chat/completions`, body, headers)
    const responses = await Promise.all(Array.from({ length: 20 }, ask))
    assert.equal(responses.filter(({ status }) => status === 200).length, passing, owner)
    if (owner === 'vllm') continue
    const line = await gateway.logged({ msg: 'exchange', completionTokens: 422 })
    assert.equal(line.exactness, 'exact')
  }
})

test('usage.unpriced: refuse looks at each backend that may serve a request', async t => {
  const backend = await answering(t)
  const gateway = await startGateway(t, {
    backends: ['up-a', 'up-b'].map(upstream => ({
      url: backend.url,
      name: upstream,
      models: [{ m: upstream }]
    })),
    usage: { unpriced: 'refuse', prices: [{ model: 'up-a', input: 0, output: 1 }] },
    auth: { keys: [{ key: 'a', name: 'a', total_quota: 1, quota_unit: 'cost' }] }
  })
  for (let count = 0; count < 3; count++) {
    const headers = { authorization: 'Bearer a' }
    const { status } = await post(`${gateway.url}/v1/chat/completions`, CHAT, headers)
    assert.equal(status, 403)
  }
})

test('a quota of money does not count a model without a price, and the log says so', async t => {
  const { gateway, call } = await start(
    t,
    { per_user: { total_quota: 0.001, quota_unit: 'cost' } },
    { usage: { prices: [{ model: 'dear', input: 0, output: 10 }] } }
  )
  await (await call('a', { max_tokens: 60 })).text()
  const msg = 'a quota of money does not count these calls'
  assert.equal((await gateway.logged({ msg })).reason, 'no price of m')
})

test('users and models have limits of their own', async t => {
  const { call } = await start(t, {
    users: { u1: { requests_per_minute: 3 } },
    per_model: { requests_per_minute: 2 },
    models: { 'small-*': { requests_per_minute: 100 } }
  })
  const status = async (key: string, model: string) => (await call(key, { model })).status
  assert.equal(await status('a', 'large'), 200)
  assert.equal(await status('b', 'large'), 200)
  const refused = await call('b', { model: 'large' })
  assert.match((await refused.json()).error.message, /This model is limited to 2/)
  assert.equal(await status('a', 'small-1'), 200)
  const user = await call('b', { model: 'small-1' })
  assert.match((await user.json()).error.message, /This user is limited to 3/)
})

test('a user with an odd name is held to limits as all others are', async t => {
  const { call } = await start(
    t,
    { per_user: { requests_per_minute: 1 } },
    { auth: { enabled: true, keys: keys({ user_id: 'constructor' }) } }
  )
  assert.equal((await call('a')).status, 200)
  assert.equal((await call('a')).status, 429)
})

test('shadow refuses nothing, and counts what it would have refused', async t => {
  const { call, gateway } = await start(t, { mode: 'shadow', per_key: { requests_per_minute: 1 } })
  for (let at = 0; at < 3; at++) assert.equal((await call('a')).status, 200)
  await gateway.logged({ msg: 'a limit would have refused this', limit: 'requests_per_minute' })
  const labels = { scope: 'per_key', limit: 'requests_per_minute', mode: 'shadow' }
  assert.equal(await gateway.metric('llmproxy_limit_refusals_total', labels), 2)
})

async function stream(t: TestContext, gateway: TestGateway, max_tokens: number) {
  const body = JSON.stringify({ ...CHAT, stream: true, max_tokens })
  const text = rawPost('/v1/chat/completions', body).replace(
    '\r\n',
    '\r\nauthorization: Bearer a\r\n'
  )
  return rawClient(t, gateway.port, text)
}

for (const [on_exhausted, storage] of [
  ['stop', 'memory'],
  ['finish', 'memory'],
  ['stop', 'redis'],
  ['finish', 'redis']
] as const) {
  const skip = storage === 'redis' && REDIS.skip
  test(`${storage}: a stream that would go beyond its quota: ${on_exhausted}`, {
    skip
  }, async t => {
    const backend = await answering(t, { pause: 4 })
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      auth: {
        enabled: true,
        skip_paths: ['/metrics'],
        keys: keys({ total_quota: 200, limits: { reserve: 'typical' } })
      },
      storage: {
        caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
      },
      rate_limit: {
        enabled: true,
        on_exhausted,
        storage,
        redis_prefix: uniqueName('budget'),
        global: { total_quota: 10_000, reserve: 'max' }
      }
    })
    const client = await stream(t, gateway, 600)
    const end = on_exhausted === 'stop' ? /insufficient_quota/ : /\[DONE\]/
    const text = await client.until(end)
    const passed = text.split('" x"').length - 1
    const line = await gateway.logged({ msg: 'exchange' })
    if (on_exhausted === 'finish') {
      assert.equal(passed, 600)
      assert.equal(line.outcome, 'ok')
    } else {
      assert.ok(passed > 120 && passed < 200 + 256, String(passed))
      assert.doesNotMatch(text, /\[DONE\]/)
      assert.equal(line.outcome, 'rejected')
      assert.equal(line.error, 'insufficient_quota')
      assert.equal(await gateway.metric('llmproxy_limit_stopped_total'), 1)
      await (await backend.request()).closed
    }
    assert.equal((await caller(gateway)('a')).status, 429)
    assert.equal((await caller(gateway)('b')).status, 200)
  })
}

test('a stream is still watched when another one ends while more is reserved for it', async t => {
  const backend = await answering(t, { pause: 2 })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: keys({ total_quota: 800, limits: { reserve: 'typical' } }) },
    rate_limit: { enabled: true, on_exhausted: 'stop' }
  })
  const { extend } = MemoryStore.prototype
  let isOver = false
  t.mock.method(
    MemoryStore.prototype,
    'extend',
    async function (this: MemoryStore, ...args: Parameters<typeof extend>) {
      if (!isOver) {
        isOver = true
        await (await stream(t, gateway, 1)).until(/\[DONE\]/)
        await gateway.logged({ msg: 'exchange' })
      }
      return extend.apply(this, args)
    }
  )
  const text = await (await stream(t, gateway, 3000)).until(/insufficient_quota|\[DONE\]/)
  assert.match(text, /insufficient_quota/)
})

test('a backend that says it spent without end does not confuse the limits', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json' })
    response.end('{"usage":{"prompt_tokens":10,"completion_tokens":1e999,"total_tokens":1e999}}')
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: keys({ total_quota: 800, limits: { reserve: 'typical' } }) },
    rate_limit: { enabled: true }
  })
  assert.equal((await caller(gateway)('a')).status, 200)
  assert.equal((await caller(gateway)('a')).status, 200)
})

test('shadow refuses nothing, not even without its Redis', { skip: REDIS.skip }, async t => {
  const way = await door(t, REDIS)
  const { call } = await start(
    t,
    {
      mode: 'shadow',
      storage: 'redis',
      on_store_error: 'deny',
      redis_prefix: uniqueName('shadow'),
      per_key: { requests_per_minute: 1 }
    },
    { storage: { caches: [{ name: 'default', driver: 'redis', addr: `127.0.0.1:${way.port}` }] } }
  )
  way.set('shut')
  for (let at = 0; at < 3; at++) assert.equal((await call('a')).status, 200)
})

for (const [signal, workers] of [
  ['SIGTERM', 1],
  ['SIGKILL', 1],
  ['SIGKILL', 2]
] as const) {
  test(`what was spent of a quota outlives ${signal} with ${workers} worker(s)`, {
    skip: workers === 1 && process.env.LONG !== '1' && 'LONG=1: two workers show the same'
  }, async t => {
    const dir = folder(t)
    const backend = await answering(t)
    const config = {
      server: { listen: '127.0.0.1:0', workers },
      backends: [{ url: backend.url }],
      auth: { enabled: true, keys: keys({ total_quota: 150 }) }
    }
    const { CLI, start: startProcess, writeConfig } = await import('./process.ts')
    const file = writeConfig(`${dir}/config.json`, config)
    const begin = () => startProcess(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dir })
    const first = await begin()
    const call = (url: string, max_tokens: number) =>
      post(`${url}/v1/chat/completions`, { ...CHAT, max_tokens }, { authorization: 'Bearer a' })
    await (await call(first.url, 100)).text()
    first.child.kill(signal)
    await first.exit
    const second = await begin()
    assert.equal((await call(second.url, 50)).status, 429)
    assert.equal((await call(second.url, 5)).status, 200)
  })
}

test('the end of a response waits until its quota is written, and so does its record', async t => {
  const backend = await answering(t)
  const hook = await fakeBackend(t, (_request, response) => void response.end())
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: keys({ total_quota: 800, limits: { reserve: 'typical' } }) },
    usage: { enabled: true, reporters: [{ type: 'webhook', webhook: { url: hook.url } }] }
  })
  const written = Promise.withResolvers<void>()
  const booked = Promise.withResolvers<void>()
  const { book } = MemoryStore.prototype
  t.mock.method(
    MemoryStore.prototype,
    'book',
    async function (this: MemoryStore, ...args: Parameters<typeof book>) {
      await book.apply(this, args)
      booked.resolve()
      await written.promise
    }
  )
  const client = await stream(t, gateway, 3)
  await client.until(/ x/)
  await booked.promise
  // Whatever is ready has been sent by then.
  await (await fetch(`${gateway.url}/health`)).text()
  assert.doesNotMatch(client.received, /\[DONE\]/)
  assert.equal(hook.requests.length, 0)
  assert.equal(gateway.fastify.usage?.pending ?? 0, 0)
  written.resolve()
  await client.until(/\[DONE\]/)
  assert.equal(JSON.parse((await hook.request()).body).total_tokens, 13)
})

test('a name for Redis that is not used may change without a loss', async t => {
  const backend = await answering(t)
  const config = (redis_prefix: string) => ({
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: keys() },
    rate_limit: { enabled: true, redis_prefix, per_key: { requests_per_minute: 1 } }
  })
  const gateway = await startGateway(t, config('one'))
  assert.equal((await caller(gateway)('a')).status, 200)
  await gateway.control.reload(parseConfig(JSON.stringify(config('two')), 'config.yaml', {}))
  assert.equal((await caller(gateway)('a')).status, 429)
})

test('what still runs when Redis is left is no reason for an alarm', {
  skip: REDIS.skip
}, async t => {
  const backend = await answering(t, { pause: 2 })
  const config = (storage: string) => ({
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: keys(), skip_paths: ['/metrics'] },
    storage: {
      caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
    },
    rate_limit: {
      enabled: true,
      storage,
      redis_prefix: uniqueName('left'),
      per_key: { max_concurrent: 1 }
    }
  })
  const gateway = await startGateway(t, config('redis'))
  const client = await stream(t, gateway, 300)
  await client.until(/ x/)
  await gateway.control.reload(parseConfig(JSON.stringify(config('memory')), 'config.yaml', {}))
  await client.until(/\[DONE\]/)
  await gateway.logged({ msg: 'exchange' })
  assert.ok(!gateway.lines.some(({ msg }) => msg === 'limits: Redis is away'))
})

test('a damaged key in Redis concerns its caller alone', { skip: REDIS.skip }, async t => {
  const prefix = uniqueName('damaged')
  const { call, gateway } = await start(
    t,
    {
      storage: 'redis',
      on_store_error: 'deny',
      redis_prefix: prefix,
      per_key: { max_concurrent: 3 }
    },
    {
      storage: {
        caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
      }
    }
  )
  const client = await createClient({ url: REDIS.url }).connect()
  t.after(() => client.close())
  assert.equal((await call('a')).status, 200)
  const names = await client.keys(`${prefix}:*`)
  const own = names.find(name => /:[0-9a-f]{32}$/.test(name))!
  await client.del(own)
  await client.lPush(own, 'x')
  const statuses = await Promise.all(['a', 'b', 'a', 'b', 'a'].map(key => call(key)))
  assert.deepEqual(
    statuses.map(({ status }) => status),
    [503, 200, 503, 200, 503]
  )
  const { reason } = await gateway.logged({ msg: 'limits: a key in Redis is damaged' })
  assert.match(String(reason), /^WRONGTYPE/)
  const said = gateway.lines.filter(({ msg }) => /^limits: /.test(String(msg)))
  assert.equal(said.length, 1)
  assert.equal(await gateway.metric('llmproxy_limit_store_errors_total'), 3)
})

test('a reload changes limits, and what was counted stays counted', async t => {
  const { call, gateway } = await start(t, { per_key: { requests_per_minute: 2 } })
  await call('a')
  await call('a')
  assert.equal((await call('a')).status, 429)
  const { parseConfig } = await import('../src/config.ts')
  const {
    server: _,
    log: __,
    ...changed
  } = parseConfig(
    JSON.stringify({
      backends: [{ url: 'http://127.0.0.1:1' }],
      auth: { enabled: true, keys: keys() },
      rate_limit: { enabled: true, per_key: { requests_per_minute: 3 } }
    }),
    'x',
    {}
  )
  await gateway.control.reload(changed)
  assert.equal((await call('a')).status, 502)
  assert.equal((await call('a')).status, 429)
})

for (const on_store_error of ['local', 'allow', 'deny'] as const) {
  test(`Redis goes away: ${on_store_error}; and comes back`, { skip: REDIS.skip }, async t => {
    const way = await door(t, REDIS)
    const { call, gateway } = await start(
      t,
      {
        storage: 'redis',
        on_store_error,
        redis_prefix: uniqueName('away'),
        per_key: { requests_per_minute: 3 }
      },
      { storage: { caches: [{ name: 'default', driver: 'redis', addr: `127.0.0.1:${way.port}` }] } }
    )
    assert.equal((await call('a')).status, 200)
    way.set('shut')
    const statuses = []
    for (let at = 0; at < 4; at++) statuses.push((await call('a')).status)
    const expected = {
      local: [200, 200, 429, 429],
      allow: [200, 200, 200, 200],
      deny: [503, 503, 503, 503]
    }
    assert.deepEqual(statuses, expected[on_store_error])
    assert.ok((await gateway.metric('llmproxy_limit_store_errors_total')) > 0)
    if (on_store_error === 'deny') {
      assert.equal((await (await call('a')).json()).error.code, 'limits_unavailable')
    }
    way.set('open')
    await gateway.logged({ msg: 'limits: Redis is back' })
    const after = { local: 429, allow: 429, deny: 200 }
    assert.equal((await call('a')).status, after[on_store_error])
  })
}
