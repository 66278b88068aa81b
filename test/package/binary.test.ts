import assert from 'node:assert/strict'
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { before, test } from 'node:test'
import { createClient } from '@redis/client'
import { createConnection } from 'mysql2/promise'
import pg from 'pg'
import { folder, start, writeConfig } from '../process.ts'
import { MYSQL, POSTGRES, REDIS, uniqueName } from '../servers.ts'

/** The single binary: in an empty directory, without Node, and through the tests of the program. */

const ROOT = new URL('../..', import.meta.url).pathname
const BINARY = join(ROOT, 'build/llmproxy')
const LISTEN = { listen: '127.0.0.1:0' }
const DEMO = [{ name: 'demo', url: 'demo://' }]
const TOKEN = 'x'.repeat(32)

before(() => execFileSync('npm', ['run', '-s', 'build:binary'], { cwd: ROOT }))

/** Runs a command in a directory, with an environment in which there is no Node. */
function run(cwd: string, ...args: string[]): string {
  const { status, stdout, stderr } = spawnSync(BINARY, args, { cwd, env: {}, encoding: 'utf8' })
  assert.equal(stderr, '')
  assert.equal(status, args[0] === 'diff' ? 1 : 0)
  return stdout
}

function send(url: string, body: object, key = 'sk-none'): Promise<Response> {
  const headers = { 'content-type': 'application/json', 'x-api-key': key, 'x-admin-token': TOKEN }
  return fetch(url, { method: 'POST', headers, body: JSON.stringify(body) })
}

const chat = (url: string, key?: string) =>
  send(`${url}/v1/chat/completions`, { model: 'demo', messages: [], max_tokens: 1 }, key)

test('commands work in an empty directory', t => {
  const cwd = folder(t)
  assert.match(run(cwd, '--version'), /^\d+\.\d+\.\d+\n$/)
  assert.match(run(cwd, '--help'), /^LLMProxy/)
  assert.equal(run(cwd, 'check'), 'built-in llmproxy.yaml is valid\n')
  writeConfig(join(cwd, 'old.yaml'), { backends: DEMO })
  const auth = { enabled: true, pipeline: [{ type: 'builtin' }] }
  writeConfig(join(cwd, 'new.yaml'), { auth, backends: DEMO })
  assert.match(run(cwd, 'diff', 'old.yaml', 'new.yaml'), /auth/)
  const on = ['--config', 'new.yaml']
  const [, id = ''] = /\nid +(\S+)/.exec(run(cwd, 'keys', 'create', '--name', 'laptop', ...on))!
  for (const command of [
    ['list'],
    ['show', id],
    ['update', id, '--rpm', '9'],
    ['rotate', id],
    ['revoke', id]
  ]) {
    assert.match(run(cwd, 'keys', ...command, ...on), new RegExp(id))
  }
  assert.match(run(cwd, 'backup', 'copy'), /^copy\/keys\.db: \d+ bytes\n$/)
})

test('it serves the demo backend, and logs text', async t => {
  const cwd = folder(t)
  const log = { format: 'text' }
  const config = writeConfig(join(cwd, 'c.yaml'), { server: LISTEN, log, backends: DEMO })
  const child = spawn(BINARY, ['--config', config], { cwd, env: {} })
  t.after(() => child.kill('SIGKILL'))
  const exit = once(child, 'exit')
  let output = ''
  child.stdout.on('data', data => {
    output += data
  })
  while (!output.includes('curl -N')) await once(child.stdout, 'data')
  const [, url] = /"url":"([^"]+)"/.exec(output)!
  assert.equal((await chat(url!)).status, 200)
  child.kill('SIGTERM')
  assert.deepEqual(await exit, [0, null])
})

test('its threads work, in each worker', async t => {
  const cwd = folder(t)
  const many = Array.from({ length: 1_000 }, (_, at) => ({ key: `sk-file-${at}`, user_id: 'u' }))
  const keys = join(cwd, 'keys.json')
  writeFileSync(keys, JSON.stringify(many))
  const config = {
    server: { ...LISTEN, workers: 2 },
    backends: DEMO,
    admin: { enabled: true, token: TOKEN },
    auth: {
      enabled: true,
      pipeline: [{ type: 'file', file: { path: keys } }, { type: 'builtin' }]
    },
    rate_limit: { enabled: true, per_key: { total_quota: 1_000, quota_reset_period: 'daily' } },
    usage: { enabled: true, reporters: [{ type: 'builtin' }] }
  }
  const file = writeConfig(join(cwd, 'config.json'), config)
  const env = { LLMPROXY_DATA_DIR: join(cwd, 'data') }
  const gateway = await start(t, ['--config', file], env, BINARY)
  assert.equal((await chat(gateway.url)).status, 401)
  assert.equal((await chat(gateway.url, 'sk-file-999')).status, 200)

  const synced = many.map(({ key }) => ({ key: `${key}-new`, starts_at: '2026-01-01T00:00:00Z' }))
  const sync = await send(`${gateway.url}/admin/keys/sync`, { keys: synced })
  assert.equal(sync.status, 200, await sync.text())
  assert.equal((await chat(gateway.url, 'sk-file-999-new')).status, 200)

  const prices = many.map((_, at) => ({ model: `m-${at}`, input: 1, output: 1, currency: 'EUR' }))
  writeConfig(file, { ...config, usage: { ...config.usage, prices } })
  gateway.child.kill('SIGHUP')
  const { changed } = await gateway.logged('configuration reloaded')
  assert.equal((changed as string[])[0], 'usage.prices[0]')

  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
  assert.equal(run(cwd, 'usage', 'export', '--since', '1d').trim().split('\n').length, 2)
  assert.match(run(cwd, 'usage', 'sums', '--by', 'day'), /\d{4}-\d\d-\d\d/)
  assert.doesNotMatch(run(cwd, 'usage', 'dead-letters', 'list'), /usage/)
})

test('the clients of databases and of Redis are inside', async t => {
  const name = uniqueName('binary')
  const { storage, reporters, counts } = await stores(name)
  t.after(() => Promise.all(counts.map(each => each.end())))
  const cwd = folder(t)
  const file = writeConfig(join(cwd, 'config.json'), {
    server: LISTEN,
    backends: DEMO,
    storage,
    usage: { enabled: true, reporters }
  })
  const gateway = await start(t, ['--config', file], { LLMPROXY_DATA_DIR: cwd }, BINARY)
  assert.equal((await chat(gateway.url)).status, 200)
  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
  for (const { count } of counts) assert.equal(await count(), 1)
})

/** Storages and reporters of the servers that are there, with what each of them has received. */
async function stores(name: string) {
  const databases: object[] = []
  const reporters: object[] = []
  const caches: object[] = []
  const counts: { count(): Promise<number>; end(): Promise<unknown> }[] = []
  const add = (type: string, storage: string, place: object) =>
    reporters.push({ name: storage, type, [type]: { storage, ...place } })
  if (!POSTGRES.skip) {
    const client = new pg.Client(POSTGRES.url)
    await client.connect()
    databases.push({ name: 'postgres', driver: 'postgres', dsn: POSTGRES.url })
    add('database', 'postgres', { table: name })
    counts.push({
      count: async () => (await client.query(`SELECT * FROM ${name}`)).rows.length,
      end: () => client.query(`DROP TABLE ${name}`).finally(() => client.end())
    })
  }
  if (!MYSQL.skip) {
    const client = await createConnection(MYSQL.url)
    databases.push({ name: 'mysql', driver: 'mysql', dsn: MYSQL.url })
    add('database', 'mysql', { table: name })
    counts.push({
      count: async () => ((await client.query(`SELECT * FROM ${name}`))[0] as object[]).length,
      end: () => client.query(`DROP TABLE ${name}`).finally(() => client.end())
    })
  }
  if (!REDIS.skip) {
    const client = await createClient({ url: REDIS.url }).connect()
    caches.push({ name: 'redis', driver: 'redis', addr: new URL(REDIS.url).host })
    add('redis', 'redis', { stream: name })
    counts.push({
      count: () => client.xLen(name),
      end: () => client.del(name).finally(() => client.destroy())
    })
  }
  return { storage: { databases, caches }, reporters, counts }
}

/** The tests that run the program as a process. */
const PROCESS_TESTS = ['cli', 'lifecycle', 'workers'].map(name => `test/${name}.test.ts`)

test('the tests of the program pass', async () => {
  const args = ['-C', 'llmproxy-source', '--test', '--test-timeout=60000', '--test-reporter=tap']
  const skip = '--test-skip-pattern=npm start'
  const env = { ...process.env, LLMPROXY_BINARY: BINARY, NODE_TEST_CONTEXT: undefined }
  const child = spawn(process.execPath, [...args, skip, ...PROCESS_TESTS], { cwd: ROOT, env })
  let output = ''
  child.stdout.on('data', data => {
    output += data
  })
  const [code] = await once(child, 'close')
  assert.equal(code, 0, output)
})
