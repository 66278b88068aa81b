import assert from 'node:assert/strict'
import { renameSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { createClient } from '@redis/client'
import { exportJWK, generateKeyPair, SignJWT } from 'jose'
import { parseConfig } from '../src/config.ts'
import { GatewayError } from '../src/errors.ts'
import { toAnswer } from '../src/keys/answer.ts'
import { CachedKeys, CacheOptions } from '../src/keys/cached.ts'
import { hashKey, type KeyRecord, type KeySource } from '../src/keys/key.ts'
import { checkOptions } from '../src/options.ts'
import type { Value } from '../src/store/sql.ts'
import { type DatabaseOptions, openDatabase, StorageOptions } from '../src/store/storage.ts'
import { answerChat, CHAT, eventually, fakeBackend, post, startGateway } from './helper.ts'
import { folder } from './process.ts'
import { door, MYSQL, POSTGRES, REDIS, uniqueName } from './servers.ts'

/** Keys that stand elsewhere: what is asked, what is remembered, and what happens while it is away. */

const NO_CACHE = { ttl: '0', negative_ttl: '0', stale_if_error: '0' }

/** A gateway with one source; `say` gives the code of its answer, or the id that the record has. */
async function withSource(t: TestContext, source: object, storage: object = {}) {
  const backend = await fakeBackend(t, answerChat)
  const hook = await fakeBackend(t, (_request, response) => response.end())
  const gateway = await startGateway(
    t,
    {
      backends: [{ url: backend.url }],
      auth: { enabled: true, pipeline: [source] },
      usage: { enabled: true, reporters: [{ type: 'webhook', webhook: { url: hook.url } }] },
      storage
    },
    {},
    folder(t)
  )
  let calls = 0
  const say = async (key: string, model = 'm') => {
    const headers = { authorization: `Bearer ${key}` }
    const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model }, headers)
    const body = await response.json()
    if (!response.ok) return body.error.code as string
    const { api_key_id, user_id } = JSON.parse((await hook.request(calls++)).body)
    return `${api_key_id} ${user_id}`
  }
  return { gateway, say }
}

test('redis: a hash or a text with JSON, under the key or its hash', {
  skip: REDIS.skip
}, async t => {
  const client = createClient({ url: REDIS.url })
  await client.connect()
  const prefix = uniqueName('key')
  const hashed = `${prefix}:${hashKey('sk-hash')}`
  t.after(async () => {
    await client.del([`${prefix}:sk-hash`, `${prefix}:sk-text`, hashed])
    await client.close()
  })
  await client.hSet(`${prefix}:sk-hash`, {
    id: 'k1',
    user_id: 'u1',
    status: '0',
    models: 'm,llama',
    requests_per_minute: '60',
    total_quota: '1000000'
  })
  await client.set(`${prefix}:sk-text`, '{"id":"k2","status":"disabled"}')
  const storage = {
    caches: [{ name: 'main', driver: 'redis', addr: `${REDIS.host}:${REDIS.port}` }]
  }
  const redis = { storage: 'main', key_pattern: `${prefix}:{api_key}` }
  const { say, gateway } = await withSource(t, { type: 'redis', cache: NO_CACHE, redis }, storage)
  assert.equal(await say('sk-hash'), 'k1 u1')
  assert.equal(await say('sk-hash', 'x'), 'model_not_allowed')
  assert.equal(await say('sk-text'), 'key_disabled')
  assert.equal(await say('sk-none'), 'invalid_api_key')
  await client.set(`${prefix}:sk-text`, 'no JSON')
  assert.equal(await say('sk-text'), 'key_refused')
  await client.hSet(`${prefix}:sk-hash`, { used_quota: '1000000' })
  assert.equal(await say('sk-hash'), 'insufficient_quota', 'Redis counts now')
  assert.doesNotMatch(JSON.stringify(gateway.lines), /sk-/)

  await client.hSet(hashed, { id: 'k3' })
  const byHash = await withSource(
    t,
    { type: 'redis', redis: { ...redis, key_pattern: `${prefix}:{api_key_hash}` } },
    storage
  )
  assert.equal(await byHash.say('sk-hash'), 'k3 null')
})

const SERVERS = [
  { name: 'PostgreSQL', skip: POSTGRES.skip, options: { driver: 'postgres', dsn: POSTGRES.url } },
  { name: 'MariaDB', skip: MYSQL.skip, options: { driver: 'mysql', dsn: MYSQL.url } },
  { name: 'SQLite', skip: false, options: { driver: 'sqlite' } }
] as const

for (const { name, skip, options } of SERVERS) {
  test(`database: ${name}, keys in clear or as SHA-256, compared exactly`, { skip }, async t => {
    const path = join(folder(t), 'crm.db')
    const storage = { databases: [{ name: 'crm', ...options, path }] }
    const [found] = checkOptions(StorageOptions, storage).databases
    const db = openDatabase(found as DatabaseOptions, undefined, 5_000)
    const table = uniqueName('keys')
    t.after(async () => {
      await db.run(`DROP TABLE ${table}`)
      await db.close()
    })
    const time = name === 'SQLite' ? 'TEXT' : name === 'MariaDB' ? 'DATETIME' : 'TIMESTAMP'
    await db.run(`CREATE TABLE ${table} (id INTEGER, api_key VARCHAR(100), hash CHAR(64),
      user_id VARCHAR(20), status VARCHAR(20), expires_at ${time}, models VARCHAR(100),
      total_quota BIGINT, balance DECIMAL(10, 2))`)
    const insert = (...row: Value[]) => {
      const places = row.map((_, at) => (name === 'PostgreSQL' ? `$${at + 1}` : '?')).join(', ')
      return db.run(`INSERT INTO ${table} VALUES (${places})`, row)
    }
    const soon = new Date(Date.now() + 60_000).toISOString().replace('T', ' ').slice(0, 19)
    const past = new Date(Date.now() - 60_000).toISOString().replace('T', ' ').slice(0, 19)
    await insert(7, 'sk-a', hashKey('sk-a'), 'u1', 'active', soon, '["m"]', 1e6, null)
    await insert(6, 'sk-small', hashKey('sk-small'), 'u1', null, null, null, 1, null)
    await insert(8, 'sk-old', hashKey('sk-old'), 'u2', '0', past, null, null, null)
    await insert(9, 'sk-poor', hashKey('sk-poor'), 'u3', null, null, null, null, 0)
    const source = (more: object) => ({
      type: 'database',
      cache: NO_CACHE,
      database: { storage: 'crm', table, ...more }
    })
    const plain = await withSource(t, source({}), storage)
    const hashed = await withSource(
      t,
      source({
        key_column: 'hash',
        key_format: 'sha256',
        fields: ['id', 'user_id', 'status', 'expires_at', 'models', 'total_quota', 'balance']
      }),
      storage
    )
    for (const { say } of [plain, hashed]) {
      assert.equal(await say('sk-a'), '7 u1')
      assert.equal(await say('sk-a', 'x'), 'model_not_allowed')
      assert.equal(await say('sk-old'), 'key_expired', 'its time is in UTC')
      assert.equal(await say('sk-poor'), 'insufficient_quota')
      assert.equal(await say('sk-small'), 'insufficient_quota', 'the gateway counts')
      for (const other of ['SK-A', 'sk-b', "' OR 1=1 --"]) {
        assert.equal(await say(other.replaceAll(' ', '')), 'invalid_api_key')
      }
    }
    assert.doesNotMatch(JSON.stringify(plain.gateway.lines), /sk-/)
    const none = await withSource(t, source({ table: 'there_is_none' }), storage)
    assert.equal(await none.say('sk-a'), 'auth_unavailable')
  })
}

test('a database that goes away: what is known is good, what is not is a 503', {
  skip: POSTGRES.skip
}, async t => {
  const way = await door(t, POSTGRES)
  const db = openDatabase(
    checkOptions(StorageOptions, {
      databases: [{ name: 'x', driver: 'postgres', dsn: POSTGRES.url }]
    }).databases[0] as DatabaseOptions,
    undefined,
    5_000
  )
  const table = uniqueName('keys')
  await db.run(`CREATE TABLE ${table} (api_key TEXT, user_id TEXT)`)
  await db.run(`INSERT INTO ${table} VALUES ('sk-a', 'u1'), ('sk-b', 'u2')`)
  t.after(async () => {
    await db.run(`DROP TABLE ${table}`)
    await db.close()
  })
  const dsn = new URL(POSTGRES.url)
  dsn.port = String(way.port)
  const { say, gateway } = await withSource(
    t,
    {
      type: 'database',
      cache: { ttl: '1ms', stale_if_error: '1m' },
      database: { storage: 'crm', table, timeout: '200ms' }
    },
    { databases: [{ name: 'crm', driver: 'postgres', dsn: dsn.href }] }
  )
  const known = await say('sk-a')
  way.set('silent')
  assert.equal(await say('sk-a'), known, 'after one timeout')
  await gateway.logged({ msg: 'what is known of keys is used for now' })
  assert.equal(await say('sk-b'), 'auth_unavailable')
  way.set('shut')
  assert.equal(await say('sk-a'), known)
  way.set('open')
  await eventually(async () => (await say('sk-b')) === `key_${hashKey('sk-b').slice(0, 12)} u2`)
  await gateway.logged({ msg: 'a key source is back' })
})

/** A source that does as it is told. */
function scripted() {
  const asked: string[] = []
  const state = { answer: (): unknown => undefined }
  const source: KeySource = {
    name: 'scripted',
    async lookup(key) {
      asked.push(key)
      return (await state.answer()) as KeyRecord
    }
  }
  return { source, asked, state }
}

const LOG = { info() {}, warn() {} } as never
const RECORD: KeyRecord = { id: 'k', status: 'active' }

function cached(source: KeySource, given: object) {
  const keys = new CachedKeys(source, checkOptions(CacheOptions, given), LOG)
  return { keys, look: (key = 'sk-a') => keys.lookup(key, hashKey(key)) }
}

test('cache: one question for all who wait, and none while the answer is good', async () => {
  const { source, asked, state } = scripted()
  const { keys, look } = cached(source, { ttl: '1h', negative_ttl: '1h' })
  const answer = Promise.withResolvers<KeyRecord>()
  state.answer = () => answer.promise
  const all = Promise.all([look(), look(), look()])
  answer.resolve(RECORD)
  assert.deepEqual(await all, [RECORD, RECORD, RECORD])
  await look()
  assert.equal(asked.length, 1)
  state.answer = () => undefined
  assert.equal(await look('sk-none'), undefined)
  assert.equal(await look('sk-none'), undefined)
  assert.equal(asked.length, 2)
  keys.forget(hashKey('sk-a'))
  assert.equal(await look(), undefined)
  assert.equal(asked.length, 3)
  state.answer = () => RECORD
  keys.forget()
  assert.deepEqual([await look(), await look('sk-none')], [RECORD, RECORD])
})

test('cache: what was asked for before it was forgotten is not remembered', async () => {
  const { source, asked, state } = scripted()
  const { keys, look } = cached(source, { ttl: '1h' })
  const old = Promise.withResolvers<KeyRecord>()
  state.answer = () => old.promise
  const first = look()
  keys.forget(hashKey('sk-a'))
  state.answer = () => new GatewayError('key_disabled', 'gone')
  old.resolve(RECORD)
  assert.equal(await first, RECORD)
  assert.ok((await look()) instanceof GatewayError)
  assert.equal(asked.length, 2)
})

test('cache: while the source is down an answer is used at once, until it is too old', async t => {
  let now = 0
  t.mock.method(performance, 'now', () => now)
  const { source, asked, state } = scripted()
  const { look } = cached(source, { ttl: '10s', negative_ttl: '2s', stale_if_error: '5m' })
  state.answer = () => RECORD
  assert.equal(await look(), RECORD)
  now = 11_000
  state.answer = () => Promise.reject(new Error('down'))
  assert.equal(await look(), RECORD, 'the first one waits for the error')
  const slow = Promise.withResolvers<KeyRecord>()
  state.answer = () => slow.promise
  assert.equal(await look(), RECORD, 'the next one does not')
  assert.equal(await look(), RECORD)
  assert.equal(asked.length, 3, 'and asks only if nobody does')
  await assert.rejects(async () => {
    state.answer = () => Promise.reject(new Error('down'))
    await look('sk-b')
  }, /down/)
  const next = { ...RECORD, id: 'k2' }
  slow.resolve(next)
  await new Promise(setImmediate)
  assert.equal(await look(), next)
  now += 300_000
  state.answer = () => Promise.reject(new Error('down'))
  await assert.rejects(look(), /down/, 'too old')
})

test('cache: a refusal is asked for again sooner than an admission', async t => {
  let now = 0
  t.mock.method(performance, 'now', () => now)
  const { source, asked, state } = scripted()
  const { look } = cached(source, { ttl: '10s', negative_ttl: '2s' })
  state.answer = () => new GatewayError('insufficient_quota', 'used up')
  await look()
  now = 1_999
  await look()
  assert.equal(asked.length, 1)
  now = 2_000
  state.answer = () => RECORD
  assert.equal(await look(), RECORD)
})

test('a reload leaves alone what it does not change: while a source is down, its keys stay known', async t => {
  let status = 200
  const hook = await fakeBackend(t, (_request, response) => {
    response.statusCode = status
    response.end('{}')
  })
  const backend = await fakeBackend(t, answerChat)
  const config = (name: string, ttl: string) => ({
    backends: [{ name, url: backend.url }],
    auth: {
      enabled: true,
      pipeline: [{ type: 'webhook', webhook: { url: hook.url }, cache: { ttl } }]
    }
  })
  const gateway = await startGateway(t, config('a', '1h'))
  const statusOf = async (key: string) => {
    const headers = { authorization: `Bearer ${key}` }
    return (await fetch(`${gateway.url}/v1/models`, { headers })).status
  }
  assert.equal(await statusOf('sk-a'), 200)
  status = 500
  const reload = (changed: object) =>
    gateway.control.reload(parseConfig(JSON.stringify(changed), 'config.yaml', {}))
  await reload(config('b', '1h'))
  assert.equal(await statusOf('sk-a'), 200)
  assert.equal(await statusOf('sk-b'), 503)
  await reload(config('b', '2h'))
  assert.equal(await statusOf('sk-a'), 503, 'another source')
})

test('a limit that is no number refuses the key', async () => {
  const answer = (members: Parameters<typeof toAnswer>[0]) => toAnswer(members, 'a1b2', () => {})
  for (const amount of [Number.POSITIVE_INFINITY, 'Infinity', -1, ' ', [], true, 'many', {}]) {
    for (const members of [
      { total_quota: amount },
      { requests_per_minute: amount },
      { limits: { requests_per_minute: amount } }
    ]) {
      assert.ok((await answer(members)) instanceof GatewayError, JSON.stringify(members))
    }
  }
  for (const amount of [0, 5, '5', 5n]) {
    assert.ok(!((await answer({ total_quota: amount })) instanceof GatewayError), String(amount))
  }
})

test('only what says so lets a key see traces; another member of that name refuses nothing', async () => {
  const traceOf = async (trace: unknown) =>
    ((await toAnswer({ trace }, 'a1b2', () => {})) as { trace?: boolean }).trace
  for (const trace of [true, 'true', 1, '1']) assert.equal(await traceOf(trace), true)
  for (const trace of [undefined, null, false, 'false', 0, '', 'trace-4711', {}]) {
    assert.equal(await traceOf(trace), undefined, JSON.stringify(trace))
  }
})

async function signer(alg: string, kid: string) {
  const { publicKey, privateKey } = await generateKeyPair(alg, { extractable: true })
  const jwk = { ...(await exportJWK(publicKey)), kid, alg }
  const sign = (claims: object, from = 'https://login.example', ends: string | number = '1h') =>
    new SignJWT({ sub: 'alice', aud: 'llm', ...claims })
      .setProtectedHeader({ alg, kid })
      .setIssuer(from)
      .setExpirationTime(ends)
      .sign(privateKey)
  return { jwk, sign }
}

test('jwt: who signed it, for whom, until when; and what it says of its owner', async t => {
  const good = await signer('ES256', 'one')
  const other = await signer('ES256', 'one')
  const weak = await signer('RS512', 'two')
  const jwks = await fakeBackend(t, (_request, response) => {
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify({ keys: [good.jwk, weak.jwk] }))
  })
  const { say, gateway } = await withSource(t, {
    type: 'jwt',
    jwt: {
      jwks_url: `${jwks.url}/keys`,
      issuer: 'https://login.example',
      audience: 'llm',
      leeway: '0',
      claims: { user_id: 'org', models: 'llm_models' }
    }
  })
  const now = Math.floor(Date.now() / 1000)
  const { sign } = good
  assert.equal(await say(await sign({ org: 'acme', name: 'Alice' })), 'jwt:alice acme')
  assert.equal(await say(await sign({ llm_models: ['x-*'] })), 'model_not_allowed')
  assert.equal(await say(await sign({}, undefined, now - 10)), 'key_expired')
  for (const [what, token] of [
    ['another signer', await other.sign({})],
    ['another issuer', await sign({}, 'https://evil.example')],
    ['another audience', await sign({ aud: 'mail' })],
    ['an algorithm that is not taken', await weak.sign({})],
    ['not yet', await sign({ nbf: now + 1000 })],
    ['nobody', await sign({ sub: undefined })],
    ['no token', 'sk-123'],
    ['rubbish', 'a.b.c'],
    ['none', `${btoa('{"alg":"none"}').replace(/=/g, '')}.${(await sign({})).split('.')[1]}.`]
  ] as const) {
    assert.equal(await say(token), 'invalid_api_key', what)
  }
  assert.equal(jwks.requests.length, 1)
  assert.ok(!JSON.stringify(gateway.lines).includes((await sign({})).slice(0, 20)))
})

test('jwt: keys that cannot be had are a 503; those of a file are read again when it changes', async t => {
  const [one, two] = [await signer('EdDSA', 'one'), await signer('EdDSA', 'two')]
  const down = await fakeBackend(t, (_request, response) => {
    response.statusCode = 500
    response.end()
  })
  const common = { issuer: 'https://login.example', audience: 'llm' }
  const away = await withSource(t, { type: 'jwt', jwt: { ...common, jwks_url: down.url } })
  assert.equal(await away.say(await one.sign({})), 'auth_unavailable')
  const file = join(folder(t), 'jwks.json')
  const write = (...keys: object[]) => {
    writeFileSync(`${file}.new`, JSON.stringify({ keys }))
    renameSync(`${file}.new`, file)
  }
  write(one.jwk)
  const { say } = await withSource(t, {
    type: 'jwt',
    cache: NO_CACHE,
    jwt: { ...common, jwks_file: file }
  })
  assert.equal(await say(await one.sign({})), 'jwt:alice alice')
  assert.equal(await say(await two.sign({})), 'invalid_api_key')
  write(two.jwk)
  const token = await two.sign({})
  await eventually(async () => (await say(token)) === 'jwt:alice alice')
  assert.equal(await say(await one.sign({})), 'invalid_api_key')
})

test('file: read again when it changes; a broken one keeps the last good keys', async t => {
  const path = join(folder(t), 'keys.yaml')
  const write = (text: string) => {
    writeFileSync(`${path}.new`, text)
    renameSync(`${path}.new`, path)
  }
  write('- sk-a\n- {key: sk-b, name: bob, status: disabled}\n')
  const { say, gateway } = await withSource(t, { type: 'file', file: { path } })
  assert.equal(await say('sk-b'), 'key_disabled')
  write('keys:\n  - key: sk-c\n    name: carol\n    user_id: u3\n')
  await eventually(async () => (await say('sk-c')) === 'carol u3')
  assert.equal(await say('sk-b'), 'invalid_api_key')
  write('keys:\n  - key: sk-d\n    expires_at: soon\n    user: x\n')
  const { errors } = await gateway.logged({
    msg: 'a changed file of keys cannot be used; the last good one stays'
  })
  assert.deepEqual(errors, [
    `${path}:2:5 keys[0]: has an unknown member; known are ${KNOWN}`,
    `${path}:3:5 keys[0].expires_at: must be a time such as 2026-12-31T00:00:00Z, or Unix seconds or milliseconds`
  ])
  assert.equal(await say('sk-c'), 'carol u3')
  write('[sk-a, sk-e, sk-a]')
  while (gateway.lines.filter(({ errors }) => errors).length < 2) await say('sk-c')
  assert.deepEqual(gateway.lines.findLast(({ errors }) => errors)!.errors, [
    `${path}:1:14 [2]: has the same key as keys[0]`
  ])
  assert.doesNotMatch(JSON.stringify(gateway.lines), /sk-/)
  write('sk-a')
  const bad = startGateway(t, {
    backends: [{ url: 'demo://' }],
    auth: { enabled: true, pipeline: [{ type: 'file', file: { path } }] }
  })
  await assert.rejects(bad, { name: 'KeyFileError', message: `${path}:1:1  must be a mapping` })
})

const KNOWN =
  'key, name, user_id, status, starts_at, expires_at, allowed_ips, denied_ips, models, limits, total_quota, quota_unit, quota_reset_period, used_quota, last_reset_at, priority, trace, tags, created_at, updated_at'

test('what a source names must be there, and is said with its place', async t => {
  const complaint = (source: object) => {
    const config = {
      backends: [{ url: 'demo://' }],
      auth: { enabled: true, pipeline: [source] }
    }
    try {
      parseConfig(JSON.stringify(config, null, 2), 'config.yaml', {})
    } catch (error) {
      return (error as Error).message
    }
    return ''
  }
  const none = join(folder(t), 'none.yaml')
  const jwt = { issuer: 'i', audience: 'a' }
  for (const [source, message] of [
    [{ type: 'redis', redis: { storage: 'a' } }, /redis\.storage: must be the name of a redis/],
    [
      { type: 'database', database: { storage: 'a', table: 't' } },
      /database\.storage: must be the name of a database of storage\.databases/
    ],
    [
      { type: 'database', database: { storage: 'a', table: 't; DROP' } },
      /database\.table: must be the name of a table/
    ],
    [
      { type: 'redis', redis: { storage: 'a', key_pattern: 'k' } },
      /key_pattern: must be a name with \{api_key\}/
    ],
    [{ type: 'file', file: { path: none } }, /file\.path: must be a file that is there/],
    [{ type: 'jwt', jwt }, /\.jwt: must be a mapping with either jwks_url or jwks_file/],
    [{ type: 'jwt', jwt: { ...jwt, jwks_file: none } }, /jwks_file: must be a file that is there/],
    [
      { type: 'jwt', jwt: { ...jwt, jwks_url: 'http://a', algorithms: ['HS256'] } },
      /algorithms\[0\]: must be one of RS256/
    ],
    [{ type: 'file' }, /pipeline\[0\]\.file: is missing/]
  ] as const) {
    assert.match(complaint(source), message)
    assert.match(complaint(source), /^config\.yaml:\d+:\d+ auth\.pipeline\[0\]/)
  }
  assert.equal(complaint({ type: 'builtin' }), '')
  const rich = { key: 'sk-a', total_quota: 5, quota_unit: 'cost' }
  assert.match(
    complaint({ type: 'static', static: { keys: [rich] } }),
    /static\.keys\[0\]\.quota_unit: needs usage\.prices to count by$/
  )
})
