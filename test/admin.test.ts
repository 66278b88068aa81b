import assert from 'node:assert/strict'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { Validator } from '@seriousme/openapi-schema-validator'
import Fastify from 'fastify'
import fp from 'fastify-plugin'
import gatewayPlugin from '../src/app.ts'
import { parseConfig } from '../src/config.ts'
import { KeyStore } from '../src/keys/key-store.ts'
import { sections } from '../src/server.ts'
import {
  answerChat,
  CHAT,
  chunk,
  closedPort,
  eventually,
  type FakeBackend,
  fakeBackend,
  post,
  startGateway
} from './helper.ts'
import { CLI, folder, SOON, start, writeConfig } from './process.ts'

/** The admin API on real sockets. */

const TOKEN = 'admin-token'
const BASE = {
  backends: [{ url: 'demo://' }],
  auth: { enabled: true },
  admin: { enabled: true, token: TOKEN }
}

function asker(url: string) {
  return async (method: string, path: string, body?: unknown, headers = {}) => {
    const response = await fetch(url + path, {
      method,
      headers: { 'x-admin-token': TOKEN, connection: 'close', ...headers },
      ...(body === undefined ? {} : { body: JSON.stringify(body) })
    })
    return { status: response.status, headers: response.headers, body: await response.json() }
  }
}

async function open(t: TestContext, config: object = {}, dataDir = folder(t)) {
  const gateway = await startGateway(t, { ...BASE, ...config }, {}, dataDir)
  const call = async (key: string) => {
    const response = await post(`${gateway.url}/v1/chat/completions`, CHAT, { 'x-api-key': key })
    await response.text()
    return response.status
  }
  return { ...gateway, dataDir, ask: asker(gateway.url), call }
}

test('a key is made, used, changed, rotated, revoked and deleted: at once, with a line for each', async t => {
  const { ask, call, lines } = await open(t)
  const made = await ask('POST', '/admin/keys', {
    name: 'alice',
    user_id: 'u1',
    models: ['m'],
    limits: { max_concurrent: 2 }
  })
  assert.equal(made.status, 201)
  assert.equal(made.headers.get('cache-control'), 'no-store')
  const { id, key } = made.body
  assert.match(key, /^sk-[\w-]{43}$/)
  assert.equal(await call(key), 200)

  const path = `/admin/keys/${id}`
  const { body: shown } = await ask('GET', path)
  assert.equal(shown.key, `${key.slice(0, 7)}...${key.slice(-4)}`)
  assert.deepEqual((await ask('GET', '/admin/keys?user_id=u1&limit=5')).body, {
    keys: [shown],
    total: 1
  })
  const { body: changed } = await ask('PATCH', path, {
    status: 'disabled',
    models: null,
    limits: { max_concurrent: null, requests_per_minute: 5 }
  })
  assert.deepEqual(
    [changed.status, changed.models, changed.limits],
    ['disabled', undefined, { requests_per_minute: 5 }]
  )
  assert.equal(await call(key), 403)
  await ask('PATCH', path, { status: 'active' })
  const { body: rotated } = await ask('POST', `${path}/rotate`, { grace: '1h' })
  assert.deepEqual([await call(key), await call(rotated.key)], [200, 200])
  await ask('POST', `${path}/rotate`)
  assert.equal(await call(rotated.key), 401)
  assert.equal((await ask('POST', `${path}/revoke`)).body.status, 'revoked')
  assert.equal(await call(key), 403)
  assert.equal((await ask('POST', `${path}/rotate`)).body.error.code, 'conflict')
  assert.deepEqual((await ask('DELETE', path)).body, { id, deleted: true })
  assert.equal(await call(key), 401)
  assert.equal((await ask('DELETE', path)).status, 404)

  const audit = lines.filter(({ msg }) => msg === 'admin')
  assert.deepEqual(
    audit.map(({ action }) => action).join(' '),
    'create update update rotate rotate revoke delete'
  )
  assert.ok(audit.every(line => line.keyId === id && line.by === '127.0.0.1'))
  const log = JSON.stringify(lines)
  for (const secret of [key, rotated.key, TOKEN]) assert.ok(!log.includes(secret))
})

test('a key that its owner has already is not shown, and is taken once', async t => {
  const { ask, call } = await open(t)
  const made = await ask('POST', '/admin/keys', { key: 'sk-a-key-of-somebody-else' })
  assert.equal(made.body.key, 'sk-a-ke...else')
  assert.equal(await call('sk-a-key-of-somebody-else'), 200)
  const again = await ask('POST', '/admin/keys', { key: 'sk-a-key-of-somebody-else' })
  assert.deepEqual([again.status, again.body.error.code], [409, 'conflict'])
})

test('an error names the member and what was expected; nothing of a body or a key is repeated', async t => {
  const { ask, url, lines } = await open(t)
  for (const [method, path, body, param, message] of [
    ['POST', '/keys', { limits: { rpm: 1 } }, 'limits.rpm', /^limits\.rpm: is not known/],
    ['POST', '/keys', { expires_at: 'soon' }, 'expires_at', /must be a time such as/],
    ['POST', '/keys', { key: 'sk secret' }, 'key', /^key: must be a key without spaces[^(]*$/],
    ['POST', '/keys', [], null, /^body must be a mapping/],
    ['PATCH', '/keys/key_x', { status: 'odd' }, 'status', /must be one of active, disabled/],
    ['PATCH', '/keys/key_x', undefined, null, /^body must be a mapping/],
    ['POST', '/keys/key_x/rotate', { grace: 'x' }, 'grace', /must be a duration/],
    ['GET', '/keys?limit=0', undefined, 'limit', /must be an integer from 1 to 1000/],
    ['GET', '/keys?page=1', undefined, 'page', /is not known/],
    ['GET', '/usage?group_by=hour', undefined, 'group_by', /must be key, user/],
    ['GET', '/usage?group_by=day&since=2026-02-31', undefined, 'since', /a day such as/],
    ['GET', '/usage', undefined, 'group_by', /is missing/]
  ] as const) {
    const { status, body: answer } = await ask(method, `/admin${path}`, body)
    assert.deepEqual([status, answer.error.param], [400, param], path)
    assert.match(answer.error.message, message)
    assert.equal(answer.error.code, 'invalid_request')
  }
  const broken = await post(`${url}/admin/keys`, '{"key": "sk-secret', { 'x-admin-token': TOKEN })
  assert.equal((await broken.json()).error.code, 'invalid_json')
  for (const [method, path] of [
    ['GET', '/keys/key_none'],
    ['PATCH', '/keys/key_none'],
    ['POST', '/keys/key_none/revoke'],
    ['POST', '/keys/key_none/rotate'],
    ['GET', '/nothing'],
    ['PUT', '/keys']
  ] as const) {
    const { status, body } = await ask(method, `/admin${path}`, method === 'PATCH' ? {} : undefined)
    assert.deepEqual([status, body.error.code], [404, 'not_found'], path)
  }
  assert.ok(!JSON.stringify(lines).includes('secret'))
})

test('who has no token, or a wrong one, learns nothing; ten wrong ones lock an address, but not out', async t => {
  const { url, lines } = await open(t)
  const status = async (headers: Record<string, string>, path = '/admin/keys') => {
    const response = await fetch(url + path, { headers })
    await response.text()
    return response.status
  }
  assert.equal(await status({}), 401)
  assert.equal(await status({}, '/admin/nothing'), 401)
  assert.equal(await status({ authorization: `Bearer ${TOKEN}` }), 200)
  for (let count = 0; count < 10; count++) {
    assert.equal(await status({ 'x-admin-token': `wrong-${count}` }), 403)
  }
  assert.equal(await status({ 'x-admin-token': 'wrong-10' }), 429)
  assert.equal(await status({}), 429)
  assert.equal(await status({ 'x-admin-token': TOKEN }), 200)
  const wrong = lines.filter(({ action }) => action === 'refused')
  assert.equal(wrong.length, 10)
  assert.ok(!JSON.stringify(lines).includes('wrong-'))
  const { now } = performance
  t.mock.method(performance, 'now', () => now.call(performance) + 60_000)
  assert.equal(await status({ 'x-admin-token': 'wrong-11' }), 403)
})

test('no input is taken that the gateway cannot keep, and none makes it fail', async t => {
  const { ask, url } = await open(t)
  const key = 'sk-somebody'
  const starts_at = '2026-01-01T00:00:00Z'
  const { body: made } = await ask('POST', '/admin/keys', { key, total_quota: 5 })
  /** The status of a body as text, and its message. */
  const send = async (path: string, text: string, method = 'POST') => {
    const headers = { 'x-admin-token': TOKEN, connection: 'close' }
    const response = await fetch(`${url}/admin/keys${path}`, { method, headers, body: text })
    const { error } = (await response.json()) as { error: { message: string } | string }
    return [response.status, typeof error === 'object' ? error.message : error] as const
  }
  const deep = (depth: number) => '['.repeat(depth) + ']'.repeat(depth)
  const own = `"key": "${key}"`
  const synced = (members: string) =>
    `{"mode": "incremental", "keys": [{"key": "sk-other", "starts_at": "${starts_at}", ${members}}]}`
  const large = 'x'.repeat(20_000)
  const finite = /total_quota: must be a number/
  const shallow = /^body must not be nested deeper than 32 levels$/
  for (const [path, text, message] of [
    ['', '{"total_quota": 1e999}', finite],
    [`/${made.id}`, '{"total_quota": 1e999}', finite],
    ['/create', `{"key": "sk-other", "starts_at": "${starts_at}", "total_quota": 1e999}`, finite],
    ['/update', `{${own}, "total_quota": -1e999}`, finite],
    ['/sync', synced('"total_quota": 1e999'), finite],
    ['/sync', synced(`"name": "${large}", "total_quota": 1e999`), finite],
    [`/${made.id}`, '{"models": [null]}', /^models\[0\]: must be/],
    [`/${made.id}`, '{"allowed_ips": [null]}', /^allowed_ips\[0\]: must be/],
    ['/update', `{${own}, "models": [""]}`, /^models\[0\]: must be/],
    ['/sync', synced('"models": [""]'), /models\[0\]: must be/],
    [
      '/list',
      '{"offset": 1e20}',
      /^offset: must be an integer of 0 or more, up to 9007199254740991/
    ],
    ['', '{"key": "x"}', /^key: must be a key without spaces, of at least 4 characters/],
    ['/create', `{"key": "x", "starts_at": "${starts_at}"}`, /^key: must be a key without spaces/],
    ['/sync', `{"keys": [{"key": "x", "starts_at": "${starts_at}"}]}`, /^keys\[0\]\.key: must be/],
    ['', deep(33), shallow],
    ['', deep(200_000), shallow],
    [`/${made.id}`, `{"tags": ${deep(10_000)}}`, shallow],
    ['/update', `{${own}, "tags": ${deep(10_000)}}`, shallow],
    ['/sync', synced(`"tags": ${deep(2_000)}`), shallow],
    ['/sync', synced(`"tags": ${deep(200_000)}`), shallow],
    ['', deep(32), /^body must be a mapping/],
    ['', `{"name": "${'['.repeat(100)}", "models": 1}`, /^models: must be/]
  ] as const) {
    const [status, error] = await send(path, text, path.startsWith('/key_') ? 'PATCH' : 'POST')
    assert.deepEqual([status, message.test(error)], [400, true], `${text.slice(0, 80)}: ${error}`)
  }
  const { status, body } = await ask('GET', '/admin/keys?offset=99999999999999999999')
  assert.deepEqual([status, body.error.param], [400, 'offset'])
  const { body: kept } = await ask('GET', `/admin/keys/${made.id}`)
  assert.deepEqual([kept.total_quota, kept.models], [5, undefined])
})

test('secrets of URLs are not shown', async t => {
  const usage = {
    enabled: true,
    reporters: [
      { name: 'hook', type: 'webhook', webhook: { url: 'https://hooks.example/T0/hush?x=hush' } },
      { name: 'bare', type: 'webhook', webhook: { url: 'http://billing:9000' } }
    ]
  }
  const discovery = {
    enabled: true,
    sources: [{ name: 'h', type: 'http', http: { url: 'http://127.0.0.1:1/list?token=hush' } }]
  }
  const auth = {
    enabled: true,
    pipeline: [{ type: 'webhook', webhook: { url: 'http://127.0.0.1:1/hush' } }]
  }
  const health_check = { path: '/health?token=hush' }
  const { ask } = await open(t, { usage, discovery, auth, health_check })
  const { body } = await ask('GET', '/admin/config')
  assert.doesNotMatch(JSON.stringify(body), /hush/)
  const [hook, bare] = body.usage.reporters
  assert.deepEqual(
    [hook.webhook.url, bare.webhook.url, body.auth.pipeline[0].webhook.url],
    ['https://hooks.example/***?***', 'http://billing:9000', 'http://127.0.0.1:1/***']
  )
  const [{ http }] = body.discovery.sources
  assert.deepEqual(
    [http.url, body.health_check.path],
    ['http://127.0.0.1:1/list?***', '/health?***']
  )
  const wrong = { ...BASE, backends: [{ url: 'http://a:1/?token=hush' }] }
  assert.throws(
    () => parseConfig(JSON.stringify(wrong), 'c', {}),
    /\(got "http:\/\/a:1\/\?\*\*\*"\)$/
  )
})

test('without a token it is no configuration; switched off there is no such route', async t => {
  const yaml = (admin: string) => `backends:\n  - url: demo://\nadmin: ${admin}\n`
  for (const [admin, message] of [
    ['{enabled: true}', /^c:3:\d+ admin\.token: is missing, but the admin API is enabled$/],
    ['{enabled: true, token: ""}', /admin\.token: is missing/],
    ['{enabled: true, token: "a secret"}', /admin\.token: must be text without spaces[^(]*$/],
    ['{enabled: true, token: x, listen: "1"}', /admin\.listen: must be an address such as/],
    ['{enabled: true, token: x, db_path: 5}', /admin\.db_path: must be text/]
  ] as const) {
    assert.throws(() => parseConfig(yaml(admin), 'c', {}), { message })
  }
  const fastify = Fastify()
  t.after(() => fastify.close())
  const open = { enabled: true, listen: ':0' }
  await assert.rejects(
    async () => fastify.register(gatewayPlugin, { backends: [{ url: 'demo://' }], admin: open }),
    /token: is missing/
  )
  const off = await startGateway(t, { backends: [{ url: 'demo://' }] })
  assert.equal((await fetch(`${off.url}/admin/keys`)).status, 404)
})

test('the store has one file, under either name', () => {
  const parse = (sections: string) =>
    parseConfig(`backends: [{url: demo://}]\n${sections}`, 'c', {})
  const on = (db_path: string) => `admin: {enabled: true, token: x, db_path: ${db_path}}`
  assert.equal(parse(on('a.db')).auth.db_path, 'a.db')
  assert.equal(parse(`${on('a.db')}\nauth: {db_path: a.db}`).auth.db_path, 'a.db')
  assert.throws(() => parse(`${on('a.db')}\nauth: {db_path: b.db}`), /must be the same as/)
  assert.equal(parse('admin: {enabled: false, db_path: a.db}').auth.db_path, 'keys.db')
})

test('on a listener of its own it is there and nowhere else', async t => {
  const admin = { ...BASE.admin, listen: '127.0.0.1:0' }
  const { ask, url, logged } = await open(t, { admin })
  const own = String((await logged({ msg: 'the admin API is listening' })).url)
  assert.notEqual(own, url)
  const { status, body, headers } = await asker(own)('POST', '/admin/keys', {})
  assert.equal(status, 201)
  assert.match(headers.get('x-llmproxy-request-id')!, /^req_/)
  assert.equal((await asker(own)('GET', `/admin/keys/${body.id}`)).body.id, body.id)
  assert.equal((await fetch(`${own}/admin/keys`)).status, 401)
  const unknown = await fetch(`${own}/v1/models`)
  assert.equal(unknown.status, 404)
  assert.match(await unknown.text(), /"code":"not_found"/)
  assert.equal((await fetch(`${own}/health`)).status, 200)
  const outside = await ask('GET', '/admin/keys', undefined, { 'x-api-key': body.key })
  assert.deepEqual([outside.status, outside.body.error.code], [404, 'not_found'])
})

test('a listener that cannot be had stops the start', async t => {
  const taken = createServer().listen(0, '127.0.0.1')
  t.after(() => taken.close())
  await once(taken, 'listening')
  const { port } = taken.address() as import('node:net').AddressInfo
  const admin = { ...BASE.admin, listen: `127.0.0.1:${port}` }
  await assert.rejects(startGateway(t, { backends: [{ url: 'http://127.0.0.1:1' }], admin }), {
    code: 'EADDRINUSE'
  })
})

test('the original’s endpoints', async t => {
  const { ask, call, lines } = await open(t)
  const original = async (name: string, body?: unknown) => {
    const { status, body: answer } = await ask('POST', `/admin/keys/${name}`, body)
    return [status, answer]
  }
  const starts_at = '2026-01-01T00:00:00Z'
  const [, { data: first }] = await original('list', {})
  assert.deepEqual([first.total, first.keys[0].name], [1, 'first'])
  const key = 'sk-original-key-of-bob'
  const spec = { key, name: 'bob', user_id: 'u2', starts_at, expires_at: '' }
  const [status, created] = await original('create', spec)
  assert.equal(status, 200)
  const { id, created_at, updated_at, ...data } = created.data
  assert.deepEqual([created.success, typeof created.message], [true, 'string'])
  assert.deepEqual(data, {
    key: 'sk-orig...-bob',
    name: 'bob',
    user_id: 'u2',
    status: 0,
    starts_at: '2026-01-01T00:00:00.000Z'
  })
  assert.equal(await call(key), 200)
  const [conflict, refused] = await original('create', spec)
  assert.equal(conflict, 409)
  assert.deepEqual(refused, {
    success: false,
    message: '',
    error: 'There is such a key already.'
  })
  assert.equal((await original('update', { key, status: 1 }))[1].data.status, 1)
  assert.equal(await call(key), 403)
  const [, updated] = await original('update', { key, status: 'active', name: '', starts_at: '' })
  assert.deepEqual(
    [updated.data.status, updated.data.name, updated.data.starts_at],
    [0, undefined, undefined]
  )
  for (const reference of [key, id]) {
    assert.equal((await original('get', { key: reference }))[1].data.id, id)
  }
  assert.deepEqual(await original('get', { key: 'sk-none' }), [
    404,
    { success: false, message: '', error: 'There is no such key.' }
  ])
  const [, { data: page }] = await original('list', { limit: 1 })
  assert.deepEqual([page.total, page.keys.length, page.keys[0].id], [2, 1, id])

  for (const [name, body, error] of [
    ['create', { starts_at }, /^key: is missing$/],
    ['create', { key: '', starts_at }, /^key: is missing$/],
    ['create', { key: 'sk-x' }, /^starts_at: is missing$/],
    ['create', { key: 'sk-x', starts_at: 'soon' }, /^starts_at: must be a time/],
    ['create', { key: 'sk-x', starts_at, status: 42 }, /^status: must be one of/],
    ['update', { key, status: 42 }, /^status: must be one of/],
    ['delete', {}, /^key: is missing$/],
    ['list', { offset: -1 }, /^offset: must be an integer of 0 or more/],
    ['list', undefined, /^body must be a mapping/],
    ['sync', {}, /^keys: is missing$/],
    ['sync', { keys: [] }, /^keys: is empty: that would delete all keys/],
    ['sync', { keys: [{ key, starts_at }, { key: 'sk-y' }] }, /^keys\[1\]\.starts_at: is missing$/],
    ['sync', { keys: [{ key, starts_at }], mode: 'some' }, /^mode: must be one of full/],
    [
      'sync',
      {
        keys: [
          { key, starts_at },
          { key, starts_at }
        ]
      },
      /^keys\[1\]: has the same key as keys\[0\]$/
    ]
  ] as const) {
    const [status, answer] = await original(name, body)
    assert.deepEqual([status, answer.success, answer.message], [400, false, ''], name)
    assert.match(answer.error, error)
  }
  assert.equal(await call(key), 200, 'nothing was deleted')
  const got = await ask('GET', '/admin/keys/create')
  assert.deepEqual([got.status, got.headers.get('allow')], [405, 'POST'])
  assert.equal(got.body.success, false)
  const missing = await ask('POST', '/admin/keys/list', {}, { 'x-admin-token': '' })
  assert.deepEqual([missing.status, missing.body.success], [401, false])
  const wrong = await ask('POST', '/admin/keys/list', {}, { 'x-admin-token': 'x' })
  assert.deepEqual([wrong.status, wrong.body.success], [403, false])

  const eve = { key: 'sk-eve', starts_at, limits: { requests_per_minute: 9 } }
  assert.equal((await original('sync', { keys: [eve], mode: 'incremental' }))[0], 200)
  assert.deepEqual([await call(key), await call('sk-eve')], [200, 200])
  assert.match((await original('sync', { keys: [eve] }))[1].message, /^1 keys .*full/)
  assert.deepEqual([await call(key), await call('sk-eve')], [401, 200])
  assert.equal((await original('sync', { keys: [], confirm: true }))[0], 200)
  assert.equal((await original('list', {}))[1].data.total, 0)
  assert.equal((await original('delete', { key }))[0], 404)
  assert.ok(!JSON.stringify(lines).includes(key))
})

test('what was spent, by whom and when', async t => {
  const backend = await fakeBackend(t, answerChat)
  const config = (reporters: object[]) => ({
    backends: [{ name: 'gpu', url: backend.url }],
    usage: { enabled: true, tags: { team: 'X-Team' }, reporters }
  })
  const { ask, url } = await open(t, config([{ type: 'builtin', builtin: {} }]))
  const { body: made } = await ask('POST', '/admin/keys', { user_id: 'u1' })
  const headers = { 'x-api-key': made.key, 'x-team': 'red' }
  await (await post(`${url}/v1/chat/completions`, CHAT, headers)).text()
  const sums = async (query: string) => (await ask('GET', `/admin/usage?${query}`)).body.sums
  await eventually(async () => (await sums('group_by=day')).length > 0)
  for (const [by, value] of [
    ['key', made.id],
    ['user', 'u1'],
    ['model', 'm'],
    ['backend', 'gpu'],
    ['tag:team', 'red'],
    ['tag', 'team=red'],
    ['day', new Date().toISOString().slice(0, 10)]
  ]) {
    const [sum] = await sums(`group_by=${by}&since=2026-01-01&until=2999-12-31`)
    const { input_tokens, output_tokens, requests } = sum
    assert.deepEqual([sum.value, input_tokens, output_tokens, requests], [value, 12, 3, 1])
  }
  assert.deepEqual(await sums('group_by=key&until=2020-01-01'), [])
  const without = await open(t, config([]))
  const { status, body } = await without.ask('GET', '/admin/usage?group_by=day')
  assert.deepEqual([status, body.error.code], [409, 'conflict'])
  assert.match(body.error.message, /needs one of type builtin/)
})

test('how the backends are', async t => {
  const backend = await fakeBackend(t, answerChat)
  const dead = `http://127.0.0.1:${await closedPort()}`
  const { ask, logged } = await open(t, {
    backends: [
      { name: 'up', url: `${backend.url}/v1`, weight: 2, api_key: 'sk-upstream' },
      { name: 'down', url: dead }
    ],
    health_check: { enabled: true, path: '/' }
  })
  await logged({ msg: 'backend is unhealthy' })
  const { body } = await ask('GET', '/admin/backends')
  const [up, down] = body.backends
  const { last_error: _, down_since: __, ...rest } = up
  const expected = { name: 'up', url: backend.url, weight: 2, in_flight: 0 }
  assert.partialDeepStrictEqual(rest, expected)
  assert.deepEqual([down.healthy, down.last_error.reason], [false, 'ECONNREFUSED'])
  assert.ok(Date.parse(down.down_since) <= Date.now())
  assert.ok(!JSON.stringify(body).includes('sk-upstream'))
})

test('a drained backend ends what it has and gets nothing more, until it is wanted again', async t => {
  const servers = [0, 1].map(() =>
    fakeBackend(t, (request, response, raw) =>
      request.body.includes('"stream":true')
        ? response.writeHead(200, { 'content-type': 'text/event-stream' }).write(chunk('Hi'))
        : answerChat(request, response, raw)
    )
  )
  const [a, b] = (await Promise.all(servers)) as [FakeBackend, FakeBackend]
  const backends = [
    { name: 'a/1', url: a.url },
    { name: 'b', url: b.url }
  ]
  const gateway = await open(t, { backends, auth: { enabled: false } })
  const { ask } = gateway
  const call = (body: object = CHAT) => post(`${gateway.url}/v1/chat/completions`, body)
  const stream = await call({ ...CHAT, stream: true })
  await a.request()

  const { status, body } = await ask('POST', '/admin/backends/a%2F1/drain')
  assert.equal(status, 200)
  assert.partialDeepStrictEqual(body, { name: 'a/1', drained: true, healthy: true, in_flight: 1 })
  await gateway.logged({ msg: 'admin', action: 'drain backend', backend: 'a/1' })
  for (let count = 0; count < 4; count++) assert.equal((await call()).status, 200)
  assert.deepEqual([a.requests.length, b.requests.length], [1, 4])
  assert.equal(await gateway.metric('llmproxy_backend_drained', { backend: 'a/1' }), 1)
  assert.equal(await gateway.metric('llmproxy_backend_up', { backend: 'a/1' }), 1)
  const reader = stream.body!.getReader()
  assert.match(Buffer.from((await reader.read()).value!).toString(), /Hi/)
  await reader.cancel()

  await ask('POST', '/admin/backends/b/drain')
  const refused = await call()
  assert.equal(refused.status, 503)
  assert.equal((await fetch(`${gateway.url}/health/ready`)).status, 503)
  await ask('POST', '/admin/backends/a%2F1/undrain')
  assert.equal((await call()).status, 200)
  assert.equal(a.requests.length, 2)
  assert.equal((await ask('POST', '/admin/backends/c/drain')).status, 404)
})

test('a drained backend stays so when its connections are made anew', async t => {
  const backend = await fakeBackend(t, answerChat)
  const config = (connect_timeout: string) => ({
    ...BASE,
    auth: { enabled: false },
    backends: [{ name: 'a', url: backend.url, connect_timeout }]
  })
  const { ask, control } = await open(t, config('1s'))
  await ask('POST', '/admin/backends/a/drain')
  await control.reload(sections(parseConfig(JSON.stringify(config('2s')), 'c', {})))
  const { body } = await ask('GET', '/admin/backends')
  assert.equal(body.backends[0].drained, true)
})

test('the running configuration, without its secrets, is a configuration', async t => {
  const secrets = {
    backends: [{ url: 'http://a:1', api_key: 'hush-1', headers: { 'x-key': 'hush-2' } }],
    auth: {
      enabled: true,
      keys: ['hush-3'],
      pipeline: [
        { type: 'webhook', webhook: { url: 'http://h', headers: { authorization: 'hush-4' } } }
      ]
    },
    storage: { caches: [{ name: 'c', driver: 'redis', password: 'hush-5' }] },
    usage: {
      enabled: true,
      reporters: [
        {
          type: 'webhook',
          webhook: { url: 'http://h', secret: 'aHVzaC02aHVzaC02aHVzaC02aHVzaC02' }
        }
      ]
    },
    admin: { enabled: true, token: TOKEN, listen: '' },
    hooks: { enabled: false, on_request: { script: 'hush-7' } }
  }
  const { ask, control, fastify } = await open(t, secrets)
  const { body } = await ask('GET', '/admin/config')
  const text = JSON.stringify(body)
  assert.ok(!/hush|aHVz|admin-token/.test(text), text)
  assert.equal(body.admin.token, '***')
  assert.equal(body.server.drain_timeout, '30s')
  assert.equal(body.routing.timeout, '10m')
  assert.deepEqual(body.backends[0].headers, { 'x-key': '***' })
  const { auth: _, usage: __, ...others } = body
  parseConfig(JSON.stringify(others), 'c', {})

  const changed = {
    ...secrets,
    routing: { timeout: '90s' },
    admin: { ...BASE.admin, token: 'b' }
  }
  await control.reload(sections(parseConfig(JSON.stringify(changed), 'c', {})))
  assert.equal((await ask('GET', '/admin/config')).status, 403)
  const after = await ask('GET', '/admin/config', undefined, { 'x-admin-token': 'b' })
  assert.equal(after.body.routing.timeout, '90s')
  assert.ok(fastify.hasRoute({ method: 'GET', url: '/admin/config' }))
})

test('every route is described, and the description is valid', async t => {
  const routes: string[] = []
  const fastify = Fastify()
  t.after(() => fastify.close())
  fastify.addHook('onRoute', ({ method, url, schema }) => {
    if (!url.startsWith('/admin') || (schema as { hide?: boolean } | undefined)?.hide) return
    for (const each of [method].flat()) {
      if (each !== 'HEAD') routes.push(`${each} ${url.replaceAll(/:(\w+)/g, '{$1}')}`)
    }
  })
  await fastify.register(fp(gatewayPlugin), { ...BASE, auth: { enabled: false } })
  const response = await fastify.inject({
    url: '/admin/openapi.json',
    headers: { 'x-admin-token': TOKEN }
  })
  const description = response.json()
  const described = Object.entries(description.paths).flatMap(([path, methods]) =>
    Object.keys(methods as object).map(method => `${method.toUpperCase()} ${path}`)
  )
  assert.ok(routes.length >= 17)
  assert.deepEqual(described.sort(), routes.sort())
  assert.equal(description.openapi, '3.1.0')
  const { valid, errors } = await new Validator().validate(description)
  assert.ok(valid, JSON.stringify(errors))
  assert.doesNotMatch(response.body, /"(expects|secret|shorthand|partOfType|unit)":/)
})

test('where other gateways cannot be told, the change holds and says so', async t => {
  const storage = {
    caches: [{ name: 'default', driver: 'redis', addr: `127.0.0.1:${await closedPort()}` }]
  }
  const { ask, call, logged } = await open(t, {
    storage,
    rate_limit: { enabled: true, storage: 'redis', on_store_error: 'allow' }
  })
  const { body: made } = await ask('POST', '/admin/keys', {})
  assert.equal(await call(made.key), 200)
  const { status, body } = await ask('POST', `/admin/keys/${made.id}/revoke`)
  assert.deepEqual([status, body.status], [200, 'revoked'])
  assert.match(body.warning, /could not be told/)
  assert.equal(await call(made.key), 403)
  await logged({ msg: 'other gateways could not be told of a changed key' })
})

test('a store that cannot be used is a 503 without its reason', async t => {
  const { ask, dataDir, logged } = await open(t)
  const store = new KeyStore(join(dataDir, 'keys.db'))
  t.after(() => store.close())
  const { DatabaseSync } = await import('node:sqlite')
  const db = new DatabaseSync(join(dataDir, 'keys.db'))
  db.exec('DROP TABLE keys')
  db.close()
  const { status, body } = await ask('GET', '/admin/keys')
  assert.deepEqual([status, body.error.code], [503, 'store_unavailable'])
  assert.ok(!/no such table/.test(JSON.stringify(body)))
  await logged({ msg: 'the admin API has failed' })
})

test('every worker serves it, on the port of its own too; a revoked key is refused by all', async t => {
  for (const listen of ['', `127.0.0.1:${await closedPort()}`]) {
    const dataDir = folder(t)
    const file = writeConfig(join(dataDir, 'config.yaml'), {
      ...BASE,
      server: { listen: '127.0.0.1:0', workers: 2 },
      admin: { ...BASE.admin, listen }
    })
    const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dataDir })
    const ask = asker(listen === '' ? gateway.url : `http://${listen}`)
    const { body: made } = await ask('POST', '/admin/keys', {})
    const status = async () => {
      const response = await fetch(`${gateway.url}/v1/models`, {
        headers: { 'x-api-key': made.key, connection: 'close' }
      })
      await response.text()
      return response.status
    }
    for (let count = 0; count < 4; count++) assert.equal(await status(), 200)
    await ask('POST', `/admin/keys/${made.id}/revoke`)
    const before = performance.now()
    await eventually(async () => (await status()) === 403 && (await status()) === 403)
    assert.ok(performance.now() - before < SOON)
    for (let count = 0; count < 4; count++) {
      assert.equal((await ask('GET', `/admin/keys/${made.id}`)).body.status, 'revoked')
    }
    await ask('POST', '/admin/backends/demo/drain')
    const isDrained = async () => {
      const close = { connection: 'close' }
      const { body } = await ask('GET', '/admin/backends', undefined, close)
      return body.backends[0].drained
    }
    // Each worker takes turns with the other.
    for (let inRow = 0; inRow < 4; ) inRow = (await isDrained()) ? inRow + 1 : 0
    gateway.child.kill('SIGTERM')
    assert.equal(await gateway.exit, 0)
  }
})
