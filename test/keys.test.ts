import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { promisify } from 'node:util'
import Fastify from 'fastify'
import fp from 'fastify-plugin'
import gateway from '../src/app.ts'
import { KeyStore } from '../src/keys/key-store.ts'
import { toRows } from '../src/keys/stored-key.ts'
import { share } from '../src/parts.ts'
import type { News, Peers } from '../src/peers.ts'
import auth from '../src/plugins/auth.ts'
import {
  answerChat,
  CHAT,
  eventually,
  fakeBackend,
  post,
  startGateway,
  type TestGateway
} from './helper.ts'
import { CLI, folder, SOON, start, writeConfig } from './process.ts'
import { door, REDIS, uniqueName } from './servers.ts'

/** The builtin store behind a gateway, in one process and in several. */

const call = (url: string, key: string) =>
  post(`${url}/v1/chat/completions`, CHAT, { authorization: `Bearer ${key}`, connection: 'close' })

async function statusOf(url: string, key: string): Promise<number> {
  const response = await call(url, key)
  await response.text()
  return response.status
}

function openStore(t: TestContext, dataDir: string): KeyStore {
  const store = new KeyStore(join(dataDir, 'keys.db'))
  t.after(() => store.close())
  return store
}

test('auth without keys: the first start makes a key, in a file of its owner, and never another one', async t => {
  const backend = await fakeBackend(t, answerChat)
  const dataDir = folder(t)
  const config = { backends: [{ url: backend.url }], auth: { enabled: true } }
  const gateway = await startGateway(t, config, {}, dataDir)
  const file = join(dataDir, 'first-key')
  const key = readFileSync(file, 'utf8').trim()
  assert.match(key, /^sk-[\w-]{43}$/)
  assert.equal(statSync(file).mode & 0o777, 0o600)
  assert.equal(await statusOf(gateway.url, key), 200)
  assert.equal(await statusOf(gateway.url, 'sk-other'), 401)
  const line = await gateway.logged({ file })
  assert.match(String(line.msg), /^the first API key was made/)
  assert.ok(!JSON.stringify(gateway.lines).includes(key))
  await gateway.fastify.close()
  const again = await startGateway(t, config, {}, dataDir)
  assert.equal(readFileSync(file, 'utf8').trim(), key)
  assert.equal(await statusOf(again.url, key), 200)
  assert.equal((await openStore(t, dataDir).list()).total, 1)
})

test('a start that was killed while it made the first key is no harm to the next one', async t => {
  const dataDir = folder(t)
  // In a container every process has the same number.
  writeFileSync(join(dataDir, `first-key.${process.pid}`), 'sk-half')
  const config = { backends: [{ url: 'demo://' }], auth: { enabled: true } }
  const gateway = await startGateway(t, config, {}, dataDir)
  const key = readFileSync(join(dataDir, 'first-key'), 'utf8').trim()
  assert.equal(await statusOf(gateway.url, key), 200)
})

test('where keys are named, nothing is made', async t => {
  for (const auth of [
    { enabled: true, keys: ['sk-a'] },
    { enabled: true, pipeline: [{ type: 'static', static: { keys: ['sk-a'] } }] },
    { enabled: false }
  ]) {
    const dataDir = folder(t)
    await startGateway(t, { backends: [{ url: 'demo://' }], auth }, {}, dataDir)
    assert.ok(!existsSync(join(dataDir, 'first-key')) && !existsSync(join(dataDir, 'keys.db')))
  }
})

test('a store that cannot be opened stops the start', async t => {
  const dataDir = folder(t)
  const auth = { enabled: true, db_path: '.' }
  await assert.rejects(startGateway(t, { backends: [{ url: 'demo://' }], auth }, {}, dataDir), {
    message: /^The API keys in \S+ cannot be read: EISDIR.* Restore it from a backup .*$/
  })
})

test('fields of a key hold on each call, and come into its record', async t => {
  const dataDir = folder(t)
  const backend = await fakeBackend(t, answerChat)
  const hook = await fakeBackend(t, (_request, response) => response.end())
  const gateway = await startGateway(
    t,
    {
      backends: [{ url: backend.url }],
      auth: { enabled: true, keys: ['sk-static'], pipeline: [{ type: 'builtin' }] },
      usage: {
        enabled: true,
        tags: { team: 'X-Team', app: 'X-App' },
        reporters: [{ type: 'webhook', webhook: { url: hook.url } }]
      }
    },
    {},
    dataDir
  )
  const store = openStore(t, dataDir)
  const { key, record } = await store.create({
    name: 'alice',
    user_id: 'u1',
    models: ['m'],
    tags: { team: 'red' }
  })
  const headers = { authorization: `Bearer ${key}`, 'x-team': 'blue', 'x-app': 'ide' }
  const url = `${gateway.url}/v1/chat/completions`
  assert.equal((await post(url, CHAT, headers)).status, 200)
  const sent = JSON.parse((await hook.request()).body)
  assert.deepEqual([sent.api_key_id, sent.caller, sent.user_id], [record.id, 'alice', 'u1'])
  assert.deepEqual(sent.tags, { team: 'red', app: 'ide' })
  const refused = await post(url, { ...CHAT, model: 'other' }, headers)
  assert.equal((await refused.json()).error.code, 'model_not_allowed')
})

test('what is changed in the same process holds at once', async t => {
  const fastify = Fastify()
  t.after(() => fastify.close())
  await fastify.register(auth, { pipeline: [{ type: 'builtin' }], dataDir: folder(t) })
  fastify.get('/', async request => request.caller!.id)
  const store = fastify.keys.store()
  const { key, record } = await store.create({})
  const status = async () => {
    const { statusCode } = await fastify.inject({ url: '/', headers: { 'x-api-key': key } })
    return statusCode
  }
  assert.equal(await status(), 200)
  await store.update(record.id, { status: 'disabled' })
  assert.equal(await status(), 403)
  await store.update(record.id, { status: 'active' })
  assert.equal(await status(), 200)
  await store.revoke(record.id)
  assert.equal(await status(), 403)
  await store.delete(record.id)
  assert.equal(await status(), 401)
})

test('of several workers one makes the first key; what is revoked is refused by all of them', async t => {
  const dataDir = folder(t)
  const file = writeConfig(join(dataDir, 'config.yaml'), {
    server: { listen: '127.0.0.1:0', workers: 3 },
    backends: [{ url: 'demo://' }],
    auth: { enabled: true }
  })
  const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dataDir })
  const store = openStore(t, dataDir)
  const { keys, total } = await store.list()
  assert.equal(total, 1)
  const key = readFileSync(join(dataDir, 'first-key'), 'utf8').trim()
  const all = async (wanted: number) => {
    for (let count = 0; count < 6; count++) {
      const response = await fetch(`${gateway.url}/v1/models`, {
        headers: { authorization: `Bearer ${key}`, connection: 'close' }
      })
      await response.text()
      if (response.status !== wanted) return false
    }
    return true
  }
  assert.ok(await all(200))
  await store.revoke(keys[0]!.id)
  const before = performance.now()
  await eventually(() => all(403))
  assert.ok(performance.now() - before < SOON)
})

test('auth in code means what it means in a file', async t => {
  const cwd = folder(t)
  const source = new URL('../src/', import.meta.url)
  const script = `
    import Fastify from '${import.meta.resolve('fastify')}'
    import { readFileSync } from 'node:fs'
    import gateway from '${source}app.ts'
    import auth from '${source}plugins/auth.ts'
    const status = async (plugin, options, file) => {
      const fastify = Fastify()
      await fastify.register(plugin, options)
      if (plugin === auth) fastify.get('/v1/models', async () => 'own')
      const key = readFileSync(file, 'utf8').trim()
      const { statusCode } = await fastify.inject({ url: '/v1/models', headers: { 'x-api-key': key } })
      console.log(statusCode)
      await fastify.close()
    }
    const backends = [{ url: 'demo://' }]
    await status(gateway, { backends, auth: { enabled: true } }, 'data/first-key')
    await status(gateway, { backends, auth: { enabled: true, db_path: 'a/keys.db' } }, 'data/a/first-key')
    await status(auth, { db_path: 'b/keys.db' }, 'data/b/first-key')
    await status(auth, { dataDir: 'c' }, 'c/first-key')
    await status(auth, { pipeline: [{ type: 'builtin' }], dataDir: 'd' }, 'd/first-key')`
  const { stdout, stderr } = await promisify(execFile)(
    process.execPath,
    ['--input-type=module', '-e', script],
    { cwd }
  )
  assert.equal(stderr, '')
  assert.deepEqual(stdout.trim().split('\n'), Array(5).fill('200'))
})

test('what one worker changes the others forget at once', async t => {
  t.mock.method(performance, 'now', () => 1)
  const dataDir = folder(t)
  const listeners: ((news: News) => void)[] = []
  const worker = async () => {
    const fastify = Fastify()
    t.after(() => fastify.close())
    const own: (news: News) => void = news => onNews(news)
    let onNews: (news: News) => void = () => {}
    listeners.push(own)
    share(fastify, 'peers', {
      tell: (news: News) => {
        for (const listener of listeners) if (listener !== own) listener(news)
      },
      onNews: (listener: (news: News) => void) => {
        onNews = listener
      }
    } as unknown as Peers)
    await fastify.register(auth, { pipeline: [{ type: 'builtin' }], dataDir })
    fastify.get('/', async request => request.caller!.id)
    return fastify
  }
  const [one, two] = [await worker(), await worker()]
  const { key, record } = await one.keys.store().create({})
  const status = async () =>
    (await two.inject({ url: '/', headers: { 'x-api-key': key } })).statusCode
  assert.equal(await status(), 200)
  await one.keys.store().revoke(record.id)
  assert.equal(await status(), 403)
  await one.keys.store().sync(toRows([{ key }]), 'full')
  await one.keys.store().sync([], 'full')
  assert.equal(await status(), 401)
})

test('limits of a key hold, whatever the others are; so does what it had spent before', async t => {
  const backend = await fakeBackend(t, answerChat)
  const dataDir = folder(t)
  const gateway = await startGateway(
    t,
    {
      backends: [{ url: backend.url }],
      auth: {
        enabled: true,
        keys: [
          { key: 'sk-slow', name: 'slow', limits: { requests_per_minute: 1 } },
          {
            key: 'sk-poor',
            name: 'poor',
            total_quota: 1e6,
            used_quota: 999_999,
            quota_reset_period: 'monthly',
            last_reset_at: new Date().toISOString()
          },
          {
            key: 'sk-renewed',
            name: 'renewed',
            total_quota: 1e6,
            used_quota: 1e6,
            quota_reset_period: 'daily',
            last_reset_at: '2026-01-01'
          },
          { key: 'sk-used', name: 'used', total_quota: 100, used_quota: 100 }
        ],
        pipeline: [{ type: 'builtin' }]
      }
    },
    {},
    dataDir
  )
  const codeOf = async (key: string) => {
    const response = await call(gateway.url, key)
    const body = await response.json()
    return response.ok ? 'ok' : body.error.code
  }
  assert.deepEqual(
    [await codeOf('sk-slow'), await codeOf('sk-slow')],
    ['ok', 'rate_limit_exceeded']
  )
  assert.equal(await codeOf('sk-poor'), 'insufficient_quota')
  assert.equal(await codeOf('sk-renewed'), 'ok', 'spent before this day')
  assert.equal(await codeOf('sk-used'), 'insufficient_quota')
  const { key } = await openStore(t, dataDir).create({ limits: { requests_per_minute: 2 } })
  assert.deepEqual(
    [await codeOf(key), await codeOf(key), await codeOf(key)],
    ['ok', 'ok', 'rate_limit_exceeded']
  )
})

test('gateways that share their limits forget a key that one of them has changed', {
  skip: REDIS.skip
}, async t => {
  let status = 200
  const hook = await fakeBackend(t, (_request, response) => {
    response.statusCode = status
    response.end('{}')
  })
  const storage = {
    caches: [{ name: 'default', driver: 'redis' as const, addr: `${REDIS.host}:${REDIS.port}` }]
  }
  const redis_prefix = uniqueName('shared')
  const build = async () => {
    const fastify = Fastify()
    t.after(() => fastify.close())
    await fastify.register(fp(gateway), {
      dataDir: folder(t),
      backends: [{ url: 'demo://' }],
      storage,
      rate_limit: { enabled: true, storage: 'redis', redis_prefix },
      auth: {
        enabled: true,
        pipeline: [
          { type: 'webhook', webhook: { url: hook.url }, cache: { ttl: '1h' } },
          { type: 'builtin' }
        ]
      }
    })
    await fastify.ready()
    const answer = async () => {
      const headers = { 'x-api-key': 'sk-a' }
      return (await fastify.inject({ url: '/v1/models', headers })).statusCode
    }
    return { keys: fastify.keys, answer }
  }
  const [one, two] = [await build(), await build()]
  assert.deepEqual([await one.answer(), await two.answer()], [200, 200])
  status = 403
  assert.deepEqual([await one.answer(), await two.answer()], [200, 200], 'remembered')
  await one.keys.store().create({ key: 'sk-a' })
  assert.equal(await one.answer(), 403)
  // An answer without a socket leaves Redis no turn.
  await eventually(async () => (await two.answer()) !== 200)
})

test('a key that one gateway revokes, deletes or rotates is dead in the files of all that share its limits', {
  skip: REDIS.skip
}, async t => {
  const redis_prefix = uniqueName('dead')
  const keys = ['sk-revoked', 'sk-deleted', 'sk-rotated', 'sk-gone', 'sk-missed', 'sk-made-again']
  const away = await door(t, REDIS)
  const open = async (port = REDIS.port) => {
    const dataDir = folder(t)
    const store = openStore(t, dataDir)
    const ids: Record<string, string> = {}
    for (const key of keys) ids[key] = (await store.create({ key })).record.id
    const start = () =>
      startGateway(
        t,
        {
          backends: [{ url: 'demo://' }],
          storage: {
            caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${port}` }]
          },
          rate_limit: { enabled: true, storage: 'redis', redis_prefix },
          auth: { enabled: true },
          admin: { enabled: true, token: 'admin-token-of-this-test' }
        },
        {},
        dataDir
      )
    return { ids, start }
  }
  const answer = async ({ url }: TestGateway, key: string) => {
    const response = await fetch(`${url}/v1/models`, { headers: { 'x-api-key': key } })
    await response.text()
    return response.status
  }
  const untilDead = async (gateway: TestGateway, key: string, within = 1_000) => {
    const before = performance.now()
    await eventually(async () => (await answer(gateway, key)) !== 200)
    const took = performance.now() - before
    assert.ok(took < within, `${key} was admitted for ${took} ms`)
    assert.equal(await answer(gateway, key), 403)
  }
  const [a, b, c] = [await open(), await open(away.port), await open()]
  const [one, two] = [await a.start(), await b.start()]
  for (const key of keys) {
    assert.deepEqual([await answer(one, key), await answer(two, key)], [200, 200])
  }
  const ask = async (method: string, path: string, body?: object) => {
    const response = await fetch(`${one.url}/admin/keys${path}`, {
      method,
      headers: { 'x-admin-token': 'admin-token-of-this-test' },
      ...(body === undefined ? {} : { body: JSON.stringify(body) })
    })
    assert.ok(response.ok)
    return response.json()
  }

  await ask('POST', `/${a.ids['sk-revoked']}/revoke`)
  await untilDead(two, 'sk-revoked')
  await ask('DELETE', `/${a.ids['sk-deleted']}`)
  await untilDead(two, 'sk-deleted')

  const grace = 700
  const rotatedAt = performance.now()
  const { key: next } = await ask('POST', `/${a.ids['sk-rotated']}/rotate`, { grace: `${grace}ms` })
  await untilDead(two, 'sk-rotated', grace + 1_000)
  assert.ok(performance.now() - rotatedAt > grace)
  assert.deepEqual([await answer(one, next), await answer(one, 'sk-rotated')], [200, 401])

  away.set('shut')
  await two.logged({ msg: 'limits: Redis is away' })
  await ask('POST', `/${a.ids['sk-missed']}/revoke`)
  assert.equal(await answer(one, 'sk-missed'), 403)
  assert.equal(await answer(two, 'sk-missed'), 200)
  away.set('open')
  await two.logged({ msg: 'limits: Redis is back' })
  await untilDead(two, 'sk-missed')

  const three = await c.start()
  for (const key of ['sk-revoked', 'sk-deleted', 'sk-rotated', 'sk-missed']) {
    assert.equal(await answer(three, key), 403, 'it was down when this happened')
  }

  // Whoever made it anew has heard by now that it was deleted.
  await ask('DELETE', `/${a.ids['sk-made-again']}`)
  await ask('POST', '', { key: 'sk-made-again' })
  await untilDead(two, 'sk-made-again')
  await two.fastify.keys.store().sync([], 'full')
  await untilDead(one, 'sk-gone')
  assert.deepEqual([await answer(one, 'sk-made-again'), await answer(one, next)], [200, 200])
  await untilDead(three, 'sk-made-again')
})
