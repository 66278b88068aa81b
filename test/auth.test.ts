import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { type TestContext, test } from 'node:test'
import { isNetwork, matchesModel, parseStatus, parseTime } from '../src/keys/key.ts'
import { CHAT, closedPort, fakeBackend, post, rawClient, startGateway } from './helper.ts'

async function start(t: TestContext, auth: object, more: object = {}) {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], auth, ...more })
  const call = (
    headers: Record<string, string> = {},
    path = '/v1/embeddings',
    body: object = CHAT
  ) => post(gateway.url + path, body, headers)
  const bearer = async (key: string, body: object = CHAT) => {
    const response = await call({ authorization: `Bearer ${key}` }, '/v1/embeddings', body)
    const text = await response.text()
    return { status: response.status, code: JSON.parse(text).error?.code, text }
  }
  return { backend, gateway, call, bearer }
}

test('a key in any of the headers, whatever their case', async t => {
  const { call, gateway } = await start(t, { enabled: true, keys: ['sk-1'] })
  for (const headers of [
    { authorization: 'Bearer sk-1' },
    { Authorization: 'bearer sk-1' },
    { 'X-API-Key': 'sk-1' },
    { 'x-api-key': 'sk-1' },
    { 'api-key': 'sk-1' },
    { authorization: 'Basic eDp5', 'x-api-key': 'sk-1' }
  ]) {
    assert.equal((await call(headers as never)).status, 200, JSON.stringify(headers))
  }
  const client = await rawClient(t, gateway.port)
  client.socket.write('GET /v1/models HTTP/1.1\r\nhost: g\r\nAPI-KEY: sk-1\r\n\r\n')
  await client.until(/ 200 OK/)
})

test('configured header names replace the usual ones', async t => {
  const { call } = await start(t, { enabled: true, keys: ['sk-1'], header_names: ['X-Team-KEY'] })
  assert.equal((await call({ 'x-team-key': 'sk-1' })).status, 200)
  assert.equal((await call({ authorization: 'Bearer sk-1' })).status, 401)
})

test('no key and a wrong key are a 401 in the dialect of the route, before the body is read', async t => {
  const { call, gateway, backend } = await start(t, { enabled: true, keys: ['sk-1'] })
  const none = await call()
  assert.equal(none.status, 401)
  assert.equal(none.headers.get('www-authenticate'), 'Bearer')
  assert.deepEqual((await none.json()).error, {
    message: 'An API key is required: send it as "Authorization: Bearer KEY".',
    type: 'authentication_error',
    param: null,
    code: 'missing_api_key'
  })
  const wrong = await call({ authorization: 'Bearer sk-2' })
  assert.equal(wrong.status, 401)
  assert.equal((await wrong.json()).error.code, 'invalid_api_key')
  const anthropic = await call({ 'x-api-key': 'sk-2' }, '/v1/messages')
  assert.equal(anthropic.status, 401)
  const body = await anthropic.json()
  assert.equal(body.type, 'error')
  assert.equal(body.error.type, 'authentication_error')
  assert.equal(body.request_id, anthropic.headers.get('x-llmproxy-request-id'))
  const client = await rawClient(t, gateway.port)
  client.socket.write('POST /v1/embeddings HTTP/1.1\r\nhost: g\r\ncontent-length: 60000000\r\n\r\n')
  assert.match(await client.until(/\}\}/), / 401 /)
  assert.equal(backend.requests.length, 0)
  assert.doesNotMatch(JSON.stringify(gateway.lines), /sk-/)
})

test('auth off: any key is accepted, and not forwarded', async t => {
  const { call, backend } = await start(t, {})
  assert.equal((await call({ authorization: 'Bearer whatever' })).status, 200)
  assert.equal(backend.requests[0]!.headers.authorization, undefined)
})

test('enabled with a store in memory it starts, warns and admits nobody', async t => {
  const { bearer, gateway } = await start(t, { enabled: true, db_path: ':memory:' })
  assert.equal((await bearer('sk-1')).status, 401)
  assert.ok(gateway.lines.some(line => /nobody will be admitted/.test(String(line.msg))))
})

test('skip_paths are whole segments', async t => {
  const { gateway } = await start(t, {
    enabled: true,
    keys: ['sk-1'],
    skip_paths: ['/health', '/v1/mod']
  })
  const status = async (path: string) => (await fetch(gateway.url + path)).status
  assert.equal(await status('/health'), 200)
  assert.equal(await status('/health/ready'), 200)
  assert.equal(await status('/health?ready'), 200)
  assert.equal(await status('/v1/models'), 401)
  assert.equal(await status('/metrics'), 401, 'not in the list')
  assert.equal(await status('/healthy'), 401)
  assert.equal(await status('/health/../v1/models'), 401)
})

test('a path in skip_paths covers the other names of its routes', async t => {
  const { gateway } = await start(t, {
    enabled: true,
    keys: ['sk-1'],
    skip_paths: ['/health', '/v1/models']
  })
  const status = async (path: string) => (await fetch(gateway.url + path)).status
  const open = ['/health', '/healthz', '/livez', '/health/ready', '/readyz', '/readyz/', '/models']
  for (const path of open) assert.equal(await status(path), 200, path)
  for (const path of ['/metrics', '/livez/x', '/v1/healthz']) {
    assert.equal(await status(path), 401, path)
  }
})

test('a skipped alias does not open what is below the name it stands for', async t => {
  const { gateway } = await start(t, { enabled: true, keys: ['sk-1'], skip_paths: ['/livez'] })
  const status = async (path: string) => (await fetch(gateway.url + path)).status
  assert.equal(await status('/livez'), 200)
  for (const path of ['/health', '/health/ready', '/readyz']) {
    assert.equal(await status(path), 401, path)
  }
})

test('a key may be given as its hash or from the environment, and is kept as a hash only', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const hash = createHash('sha256').update('sk-hashed').digest('hex')
  const gateway = await startGateway(
    t,
    {
      backends: [{ url: backend.url }],
      auth: { enabled: true, keys: [`sha256:${hash}`, '${LLM_KEY}'] }
    },
    { LLM_KEY: 'sk-env' }
  )
  const status = async (key: string) =>
    (await post(`${gateway.url}/v1/embeddings`, CHAT, { authorization: `Bearer ${key}` })).status
  assert.equal(await status('sk-hashed'), 200)
  assert.equal(await status('sk-env'), 200)
  assert.equal(await status(hash), 401)
  assert.equal(await status(`sha256:${hash}`), 401)
})

const DAY = 86_400_000
const KEYS = {
  active: { status: 'active' },
  enabled: { status: 'enabled' },
  zero: { status: 0 },
  off: { status: 'disabled' },
  one: { status: 1 },
  quota: { status: 'quota_exceeded' },
  two: { status: 2 },
  old: { status: 'expired' },
  'iso-past': { expires_at: '2020-01-01T00:00:00Z' },
  'unix-past': { expires_at: 1577836800 },
  'iso-future': { expires_at: new Date(Date.now() + DAY).toISOString() },
  'unix-future': { expires_at: Math.floor(Date.now() / 1000) + 86400 },
  'not-yet': { starts_at: new Date(Date.now() + DAY).toISOString() },
  'local-net': { allowed_ips: ['127.0.0.0/8', '10.0.0.1'] },
  'other-net': { allowed_ips: ['10.0.0.0/8'] },
  'any-net': { allowed_ips: [], denied_ips: [], models: [] },
  banned: { denied_ips: ['127.0.0.1'] },
  'banned-within': { allowed_ips: ['127.0.0.0/8'], denied_ips: ['127.0.0.1/32'] }
}
const EXPECTED: Record<keyof typeof KEYS, [number, string | undefined]> = {
  active: [200, undefined],
  enabled: [200, undefined],
  zero: [200, undefined],
  off: [403, 'key_disabled'],
  one: [403, 'key_disabled'],
  quota: [429, 'insufficient_quota'],
  two: [429, 'insufficient_quota'],
  old: [403, 'key_expired'],
  'iso-past': [403, 'key_expired'],
  'unix-past': [403, 'key_expired'],
  'iso-future': [200, undefined],
  'unix-future': [200, undefined],
  'not-yet': [403, 'key_not_started'],
  'local-net': [200, undefined],
  'other-net': [403, 'ip_not_allowed'],
  'any-net': [200, undefined],
  banned: [403, 'ip_not_allowed'],
  'banned-within': [403, 'ip_not_allowed']
}

test('status, times and addresses of a key', async t => {
  const keys = Object.entries(KEYS).map(([key, rest]) => ({ key, ...rest }))
  const { bearer } = await start(t, {
    enabled: true,
    pipeline: [{ type: 'static', static: { keys } }]
  })
  for (const [key, [status, code]] of Object.entries(EXPECTED)) {
    const got = await bearer(key)
    assert.deepEqual([got.status, got.code], [status, code], key)
  }
})

test('X-Forwarded-For counts only behind a trusted proxy', async t => {
  const auth = { enabled: true, keys: [{ key: 'k', allowed_ips: ['203.0.113.7'] }] }
  const headers = { authorization: 'Bearer k', 'x-forwarded-for': '203.0.113.7' }
  const open = await start(t, auth)
  assert.equal((await open.call(headers)).status, 403)
  const behind = await start(t, auth, { server: { trust_proxy: ['127.0.0.1'] } })
  assert.equal((await behind.call(headers)).status, 200)
  const elsewhere = await start(t, auth, { server: { trust_proxy: ['10.0.0.0/8'] } })
  assert.equal((await elsewhere.call(headers)).status, 403)
})

test('models of a key', async t => {
  const { bearer, call, backend } = await start(t, {
    enabled: true,
    keys: [{ key: 'k', models: ['qwen-*', 'llama'] }]
  })
  assert.equal((await bearer('k', { model: 'qwen-coder' })).status, 200)
  assert.equal((await bearer('k', { model: 'llama' })).status, 200)
  assert.equal((await bearer('k', { model: 'llama-2' })).code, 'model_not_allowed')
  assert.equal((await bearer('k', { input: 'x' })).code, 'model_required')
  const key = { authorization: 'Bearer k' }
  const count = backend.requests.length
  for (const body of [
    '{"model":"llama","model":"secret"}',
    '{"model":"llama","Model":"secret"}',
    '{"model":"llama","\\u006dodel":"secret"}'
  ]) {
    const response = await call(key, '/v1/embeddings', body as never)
    assert.equal(response.status, 400, body)
  }
  const upload = await call(key, '/v1/audio/transcriptions')
  assert.equal(upload.status, 403)
  assert.equal(backend.requests.length, count)
})

test('status_codes change what a status answers', async t => {
  const { bearer } = await start(t, {
    enabled: true,
    keys: [
      { key: 'off', status: 'disabled' },
      { key: 'old', status: 'expired' }
    ],
    status_codes: {
      disabled: { http_code: 402, message: 'Please pay.' },
      expired: { allow: true },
      not_found: { http_code: 404 }
    }
  })
  const off = await bearer('off')
  assert.equal(off.status, 402)
  assert.match(off.text, /Please pay\./)
  assert.equal((await bearer('old')).status, 200)
  const unknown = await bearer('x')
  assert.equal(unknown.status, 404)
  assert.match(unknown.text, /not valid/)
})

const WEBHOOK: [string, number, unknown, number, string | undefined][] = [
  ['all well', 200, { user_id: 'alice' }, 200, undefined],
  ['an empty object', 200, {}, 200, undefined],
  ['code 0', 200, { code: 0, message: 'ok', user_id: 'alice', balance: 5 }, 200, undefined],
  ['code 1', 200, { code: 1, message: 'No such user.' }, 403, 'key_refused'],
  ['401', 401, { message: 'no' }, 401, 'invalid_api_key'],
  ['403', 403, { user_id: 'alice' }, 403, 'key_disabled'],
  ['404', 404, {}, 401, 'invalid_api_key'],
  ['429', 429, {}, 429, 'insufficient_quota'],
  ['500', 500, { user_id: 'alice' }, 503, 'auth_unavailable'],
  ['not JSON', 200, 'hello', 503, 'auth_unavailable'],
  ['an array', 200, [], 503, 'auth_unavailable'],
  ['disabled as text', 200, { status: 'disabled' }, 403, 'key_disabled'],
  ['disabled as number', 200, { status: 1 }, 403, 'key_disabled'],
  ['an odd status', 200, { status: 'whatever' }, 403, 'key_refused'],
  ['an ISO time', 200, { expires_at: '2099-01-01T00:00:00Z' }, 200, undefined],
  ['a past time', 200, { expires_at: 1577836800 }, 403, 'key_expired'],
  ['a year as a time', 200, { expires_at: 2099 }, 403, 'key_refused'],
  ['an odd time', 200, { expires_at: 'soon' }, 403, 'key_refused'],
  ['a time in words', 200, { expires_at: 'expires 2099' }, 403, 'key_refused'],
  ['milliseconds', 200, { expires_at: 4070908800000 }, 200, undefined],
  ['past milliseconds', 200, { expires_at: '1577836800000' }, 403, 'key_expired'],
  ['no balance', 200, { balance: 0 }, 429, 'insufficient_quota'],
  ['quota left', 200, { total_quota: 10, used_quota: 9 }, 200, undefined],
  ['quota used', 200, { total_quota: 10, used_quota: 10 }, 429, 'insufficient_quota'],
  ['an unreadable quota', 200, { total_quota: 'much', used_quota: 0 }, 403, 'key_refused'],
  ['another address', 200, { allowed_ips: ['10.0.0.0/8'] }, 403, 'ip_not_allowed'],
  ['one address as text', 200, { allowed_ips: '10.0.0.1' }, 403, 'ip_not_allowed'],
  ['an unreadable address', 200, { allowed_ips: ['10.0.0.0/99'] }, 403, 'ip_not_allowed'],
  ['an empty address', 200, { allowed_ips: [''] }, 403, 'ip_not_allowed'],
  ['an unreadable denied address', 200, { denied_ips: ['10.0.0.1:80'] }, 403, 'key_refused'],
  ['an empty denied address', 200, { denied_ips: '10.0.0.1,' }, 200, undefined],
  ['no addresses', 200, { allowed_ips: [], denied_ips: [] }, 200, undefined],
  ['other models', 200, { models: ['x'] }, 403, 'model_not_allowed'],
  ['models that are no texts', 200, { models: [null] }, 403, 'model_not_allowed'],
  ['no models', 200, { models: [] }, 200, undefined]
]

test('the webhook decides by its status and what it says', async t => {
  let answer: [number, unknown] = [200, {}]
  const hook = await fakeBackend(t, (_request, response) => {
    response.writeHead(answer[0], { 'content-type': 'application/json' })
    response.end(typeof answer[1] === 'string' ? answer[1] : JSON.stringify(answer[1]))
  })
  const { bearer, gateway } = await start(t, {
    enabled: true,
    pipeline: [
      { type: 'webhook', webhook: { url: `${hook.url}/check?a=b`, headers: { 'x-secret': 's' } } }
    ]
  })
  for (const [name, status, body, expected, code] of WEBHOOK) {
    answer = [status, body]
    const got = await bearer(`sk-1-${name.replaceAll(' ', '-')}`)
    assert.deepEqual([got.status, got.code], [expected, code], name)
  }
  const unreadable = gateway.lines.filter(({ msg }) => msg === 'a member of a key is unreadable')
  assert.deepEqual(
    unreadable.map(({ member }) => member),
    ['expires_at', 'expires_at', 'expires_at', 'total_quota', 'denied_ips']
  )
  const [request] = hook.requests
  assert.equal(request!.method, 'POST')
  assert.equal(request!.url, '/check?a=b')
  assert.equal(request!.headers['x-secret'], 's')
  const sent = JSON.parse(request!.body)
  assert.equal(sent.api_key, 'sk-1-all-well')
  assert.ok(Math.abs(sent.timestamp - Date.now() / 1000) < 60)
  assert.doesNotMatch(JSON.stringify(gateway.lines), /sk-1/)
})

test('a webhook that is down or silent is a 503', async t => {
  const silent = await fakeBackend(t, () => {})
  for (const url of [`http://127.0.0.1:${await closedPort()}`, silent.url]) {
    const { bearer } = await start(t, {
      enabled: true,
      pipeline: [{ type: 'webhook', webhook: { url, timeout: '50ms' } }]
    })
    assert.deepEqual((await bearer('sk-1')).code, 'auth_unavailable')
  }
})

test('first_match: the first source that knows the key decides', async t => {
  const down = `http://127.0.0.1:${await closedPort()}`
  const { bearer } = await start(t, {
    enabled: true,
    pipeline: [
      { type: 'static', static: { keys: [{ key: 'a' }, { key: 'b', status: 'disabled' }] } },
      { type: 'static', enabled: false, static: { keys: [{ key: 'd' }] } },
      { type: 'webhook', webhook: { url: down } },
      { type: 'static', static: { keys: [{ key: 'b' }, { key: 'c' }] } }
    ]
  })
  assert.equal((await bearer('a')).status, 200)
  assert.equal((await bearer('b')).code, 'key_disabled')
  assert.equal((await bearer('c')).status, 200, 'a source that is down does not stop the next')
  assert.equal((await bearer('d')).status, 503, 'the source that is down might know it')
})

test('all: every source must admit', async t => {
  const hook = await fakeBackend(t, (request, response) => {
    response.writeHead(JSON.parse(request.body).api_key === 'b' ? 401 : 200)
    response.end('{"user_id":"alice","models":["m","n"]}')
  })
  const { bearer } = await start(t, {
    enabled: true,
    mode: 'all',
    pipeline: [
      {
        type: 'static',
        static: {
          keys: [{ key: 'a', models: ['m*'] }, { key: 'b' }, { key: 'c', status: 'disabled' }]
        }
      },
      { type: 'webhook', webhook: { url: hook.url } }
    ]
  })
  assert.equal((await bearer('a')).status, 200)
  assert.equal((await bearer('a', { model: 'n' })).code, 'model_not_allowed', 'both must allow it')
  assert.equal((await bearer('a', { model: 'mx' })).code, 'model_not_allowed')
  assert.equal((await bearer('b')).status, 401)
  assert.equal((await bearer('c')).code, 'key_disabled')
  assert.equal((await bearer('d')).status, 401)
})

test('statuses, times, networks and patterns are read as documented', () => {
  assert.equal(parseStatus('Active'), 'active')
  assert.equal(parseStatus('3'), 'expired')
  assert.equal(parseStatus(42), undefined)
  assert.equal(parseStatus(null), undefined)
  assert.equal(parseTime('1767225600'), 1767225600000)
  assert.equal(parseTime('2026-01-01T00:00:00Z'), 1767225600000)
  assert.equal(parseTime(1767225600000), 1767225600000)
  assert.equal(parseTime('2026-01-01'), 1767225600000)
  assert.equal(parseTime('2026-01-01 00:00'), 1767225600000, 'UTC wherever the gateway runs')
  assert.equal(parseTime('2026-01-01T02:00:00.5+0200'), 1767225600500)
  for (const odd of [
    'soon',
    'expires 2030',
    '12/31/2026',
    '2026-02-31',
    '2026-02-31T00:00:00Z',
    '2026-1-1',
    '2026-13-01',
    '2026-01-01T25:00:00Z',
    '2026',
    2026,
    -1,
    1e18,
    true,
    ['2026-01-01']
  ]) {
    assert.ok(Number.isNaN(parseTime(odd)), String(odd))
  }
  assert.ok(isNetwork('2001:db8::/32') && isNetwork('::1') && isNetwork('10.0.0.0/8'))
  assert.ok(!isNetwork('10.0.0.0/33') && !isNetwork('10.0.0') && !isNetwork('10.0.0.0/8/8'))
  assert.ok(
    matchesModel(['*'], 'x') && matchesModel(['a*b*c'], 'a1b2c') && matchesModel(['a*'], 'a')
  )
  assert.ok(
    !matchesModel(['a*a'], 'a') && !matchesModel([], 'x') && !matchesModel(['a*b*c'], 'acb')
  )
})

test('a webhook that repeats the key does not bring it into the log', async t => {
  const hook = await fakeBackend(t, (request, response) => {
    response.end(JSON.parse(request.body).api_key)
  })
  const { bearer, gateway } = await start(t, {
    enabled: true,
    pipeline: [{ type: 'webhook', webhook: { url: hook.url } }]
  })
  assert.equal((await bearer('sk-topsecret')).code, 'auth_unavailable')
  await gateway.logged({ msg: 'a key source is down', reason: 'no JSON object' })
  assert.doesNotMatch(JSON.stringify(gateway.lines), /topsecret/)
})

test('all: a source that is down admits nobody', async t => {
  const { bearer } = await start(t, {
    enabled: true,
    mode: 'all',
    keys: ['a'],
    pipeline: [{ type: 'webhook', webhook: { url: `http://127.0.0.1:${await closedPort()}` } }]
  })
  assert.equal((await bearer('a')).code, 'auth_unavailable')
})
