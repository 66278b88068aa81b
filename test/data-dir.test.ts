import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, existsSync, mkdirSync, renameSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { text } from 'node:stream/consumers'
import { type TestContext, test } from 'node:test'
import { KeyStore } from '../src/keys/key-store.ts'
import { toHash } from '../src/keys/static.ts'
import { StoredResponses } from '../src/routes/stored-responses.ts'
import { answerChat, CHAT, eventually, fakeBackend, post, startGateway } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/** The data directory: not writable, deleted, replaced, or of another gateway. */

const BUILTIN = { enabled: true, reporters: [{ type: 'builtin' }] }

function config(t: TestContext, sections: object): string {
  return writeConfig(join(folder(t), 'config.json'), {
    server: { listen: '127.0.0.1:0' },
    backends: [{ url: 'http://127.0.0.1:1' }],
    ...sections
  })
}

/** What a gateway says that does not start. */
async function refusal(t: TestContext, file: string, dataDir: string, uid?: number) {
  const child = spawn(process.execPath, [CLI, '--config', file], {
    env: { ...process.env, NODE_COMPILE_CACHE: '', LLMPROXY_DATA_DIR: dataDir },
    stdio: ['ignore', 'ignore', 'pipe'],
    ...(uid === undefined ? {} : { uid })
  })
  t.after(() => child.kill('SIGKILL'))
  const [said] = await Promise.all([text(child.stderr), once(child, 'exit')])
  assert.equal(child.exitCode, 1)
  return said
}

test('a data directory that is not writable ends a start with a line that names its owner', {
  skip: process.getuid?.() !== 0 && 'only root can start a process as another user'
}, async t => {
  const dataDir = folder(t)
  chmodSync(dataDir, 0o755)
  for (const [sections, dir] of [
    [{ usage: BUILTIN }, dataDir],
    [{ auth: { enabled: true } }, dataDir],
    [{ rate_limit: { enabled: true, per_key: { total_quota: 9 } } }, join(dataDir, 'below')]
  ] as const) {
    const file = config(t, sections)
    chmodSync(join(file, '..'), 0o755)
    assert.equal(
      await refusal(t, file, dir, 65_534),
      `The data directory ${dir} is not writable (EACCES): ${dataDir} belongs to uid 0, gid 0 (mode 755), and the gateway runs as uid 65534. Change its owner, or set LLMPROXY_DATA_DIR to another directory.\n`
    )
  }
})

test('a gateway that keeps no files needs no directory', async t => {
  const dataDir = join(folder(t), 'config.json', 'below')
  const gateway = await start(t, [CLI, '--config', config(t, {})], { LLMPROXY_DATA_DIR: dataDir })
  const health = await (await fetch(`${gateway.url}/health`)).json()
  assert.equal(health.data_dir, 'ok')
})

test('a second gateway does not start on a data directory; after the end of the first it does', async t => {
  const dataDir = folder(t)
  const env = { LLMPROXY_DATA_DIR: dataDir }
  const workers = config(t, { server: { listen: '127.0.0.1:0', workers: 2 }, usage: BUILTIN })
  const single = config(t, { usage: BUILTIN })
  const first = await start(t, [CLI, '--config', workers], env)
  assert.equal(
    await refusal(t, single, dataDir),
    `Another gateway uses the data directory ${dataDir}. Stop it, or set LLMPROXY_DATA_DIR to a directory of its own.\n`
  )
  first.child.kill('SIGKILL')
  await first.exit
  await start(t, [CLI, '--config', single], env)
})

const CHANGES = [
  ['deleted', (dir: string) => rmSync(dir, { recursive: true })],
  [
    'replaced',
    (dir: string) => {
      renameSync(dir, `${dir}.old`)
      mkdirSync(dir)
    }
  ]
] as const

for (const [what, change] of CHANGES) {
  test(`a data directory that is ${what} while the gateway runs is an error, and no record is lost`, async t => {
    const dataDir = join(folder(t), 'data')
    mkdirSync(dataDir)
    const ids: string[] = []
    const hook = await fakeBackend(t, (request, response) => {
      for (const { request_id } of [JSON.parse(request.body)].flat()) ids.push(request_id)
      response.end()
    })
    const backend = await fakeBackend(t, answerChat)
    const gateway = await startGateway(
      t,
      {
        backends: [{ url: backend.url }],
        usage: { enabled: true, reporters: [{ type: 'webhook', webhook: { url: hook.url } }] }
      },
      {},
      dataDir
    )
    const chat = async () => {
      const response = await post(`${gateway.url}/v1/chat/completions`, CHAT)
      await response.text()
      return response.headers.get('x-llmproxy-request-id')!
    }
    const health = async () => (await fetch(`${gateway.url}/health`)).json()
    const sent = [await chat()]
    assert.equal((await health()).data_dir, 'ok')
    change(dataDir)
    sent.push(await chat())
    sent.push(await chat())
    const { level } = await gateway.logged({
      msg: 'the data directory cannot be used: its files are not safe'
    })
    assert.equal(level, 50)
    assert.equal((await health()).data_dir, 'not_safe')
    assert.equal(await gateway.metric('llmproxy_data_dir_not_safe'), 1)
    while (ids.length < sent.length) await hook.request(hook.requests.length)
    assert.deepEqual(ids.toSorted(), sent.toSorted())
  })

  test(`quotas and usage sums go into a new file if the data directory is ${what}`, async t => {
    const dataDir = join(folder(t), 'data')
    mkdirSync(dataDir)
    const backend = await fakeBackend(t, answerChat)
    const key = (name: string) => ({ key: name, name, total_quota: 100_000 })
    const gateway = await startGateway(
      t,
      {
        backends: [{ url: backend.url }],
        auth: { enabled: true, keys: [key('a'), key('b')] },
        rate_limit: { enabled: true },
        usage: BUILTIN
      },
      {},
      dataDir
    )
    const chat = async (name: string) => {
      const response = await post(`${gateway.url}/v1/chat/completions`, CHAT, { 'x-api-key': name })
      assert.equal(response.status, 200)
      return ((await response.json()) as { usage: { total_tokens: number } }).usage.total_tokens
    }
    const rows = (file: string, sql: string) => {
      if (!existsSync(join(dataDir, file))) return []
      const db = new DatabaseSync(join(dataDir, file))
      try {
        return db.prepare(sql).all()
      } catch {
        return []
      } finally {
        db.close()
      }
    }
    const quotas = 'SELECT account, tokens FROM quotas ORDER BY account'
    const tokens = await chat('a')
    const records = 'SELECT id FROM usage_records'
    await eventually(() => rows('limits.db', quotas).length === 1)
    await eventually(() => rows('usage-builtin.db', records).length === 1)
    change(dataDir)
    await chat('b')
    // What the first key has used is in the new file, too, although it has made no request since.
    await eventually(() => rows('limits.db', quotas).length === 2)
    assert.deepEqual(
      rows('limits.db', quotas).map(row => ({ ...row })),
      ['a', 'b'].map(name => ({ account: `per_key:${name}`, tokens }))
    )
    await eventually(() => rows('usage-builtin.db', records).length > 0)
    for (const file of ['limits.db', 'usage-builtin.db']) {
      const { level } = await gateway.logged({
        file: join(dataDir, file),
        reason: 'it was deleted or replaced'
      })
      assert.equal(level, 50)
    }
  })

  test(`stored responses go into a new file if the data directory is ${what}; keys do not`, async t => {
    const dataDir = join(folder(t), 'data')
    mkdirSync(dataDir)
    const lines: object[] = []
    const log = { warn: assert.fail, error: (line: object) => lines.push(line) }
    const file = join(dataDir, 'responses.db')
    const responses = new StoredResponses(file, log as never)
    const response = (id: string) => ({ id, backend: 'gpu', model: 'm', caller: 'ann' })
    const keyFile = join(dataDir, 'keys.db')
    const keys = new KeyStore(keyFile)
    const { key, record } = await keys.create({ name: 'ann' })
    responses.add(response('resp_1'))
    // A statement after the first one, which has opened the file.
    await responses.claim(1)
    change(dataDir)
    responses.add(response('resp_2'))
    assert.deepEqual(await responses.find('resp_1'), response('resp_1'), 'from memory')
    await responses.close()
    assert.deepEqual(lines, [{ file, reason: 'it was deleted or replaced' }])
    const again = new StoredResponses(file, log as never)
    assert.deepEqual(await again.find('resp_2'), response('resp_2'))
    await again.close()

    // An empty file would revoke every key.
    assert.equal((await keys.find(toHash(key)))?.id, record.id)
    const gone = { message: `${keyFile}: it was deleted or replaced; restart the gateway` }
    await assert.rejects(keys.revoke(record.id), gone)
    await assert.rejects(keys.create({ name: 'ben' }), gone)
    await assert.rejects(keys.sync([], 'full'), gone)
    assert.ok(!existsSync(keyFile))
    await keys.close()
  })
}

test('a keys.db that is replaced while the gateway runs is an error, and its keys stay valid', async t => {
  const dataDir = folder(t)
  const backend = await fakeBackend(t, answerChat)
  const store = new KeyStore(join(dataDir, 'keys.db'))
  const { key } = await store.create({ name: 'ann' })
  await store.close()
  const token = 'admin-token-of-some-length-0123456789'
  const gateway = await startGateway(
    t,
    {
      backends: [{ url: backend.url }],
      auth: { enabled: true },
      admin: { enabled: true, token }
    },
    {},
    dataDir
  )
  const chat = async () =>
    (await post(`${gateway.url}/v1/chat/completions`, CHAT, { 'x-api-key': key })).status
  const health = async () => (await (await fetch(`${gateway.url}/health`)).json()).data_dir
  assert.deepEqual([await chat(), await health()], [200, 'ok'])
  renameSync(join(dataDir, 'keys.db'), join(dataDir, 'keys.old'))
  const { level, reason } = await gateway.logged({
    msg: 'the data directory cannot be used: its files are not safe'
  })
  assert.equal(level, 50)
  assert.equal(reason, `${join(dataDir, 'keys.db')} was deleted or replaced; restart the gateway`)
  assert.deepEqual([await chat(), await health()], [200, 'not_safe'])
  const made = await post(`${gateway.url}/admin/keys`, {}, { authorization: `Bearer ${token}` })
  assert.equal(made.status, 503)
  renameSync(join(dataDir, 'keys.old'), join(dataDir, 'keys.db'))
  await gateway.logged({ msg: 'the data directory can be used again' })
  assert.equal(await health(), 'ok')
})
