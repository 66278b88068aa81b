import assert from 'node:assert/strict'
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { test } from 'node:test'
import { runKeys } from '../src/commands/keys.ts'
import { hashKey } from '../src/keys/key.ts'
import { runCommand, runProgram } from './command.ts'
import { CHAT, closedPort, eventually, post } from './helper.ts'
import { joinRedis } from './limit-stores.ts'
import { CLI, folder, SOON, start, writeConfig } from './process.ts'
import { REDIS, uniqueName } from './servers.ts'

/** Runs `llmproxy keys ...` in this process, beside the gateway's. */
function keys(dataDir: string, ...args: string[]) {
  return runCommand(() => runKeys(args, dataDir, join(dataDir, 'config.yaml')))
}

/** Runs it as a process of its own. */
function keysProgram(dataDir: string, ...args: string[]) {
  const env = { LLMPROXY_CONFIG: join(dataDir, 'config.yaml'), LLMPROXY_DATA_DIR: dataDir }
  return runProgram(['keys', ...args], env)
}

const BUILTIN = { backends: [{ url: 'demo://' }], auth: { enabled: true } }

test('beside a running gateway: made, listed, changed, rotated, revoked', async t => {
  const dataDir = folder(t)
  const config = writeConfig(join(dataDir, 'config.yaml'), {
    ...BUILTIN,
    server: { listen: '127.0.0.1:0' }
  })
  const gateway = await start(t, [CLI, '--config', config], { LLMPROXY_DATA_DIR: dataDir })
  const url = `${gateway.url}/v1/chat/completions`
  const codeOf = async (key: string, model = 'demo') => {
    const response = await post(url, { ...CHAT, model }, { authorization: `Bearer ${key}` })
    return response.ok ? 'ok' : (await response.json()).error.code
  }
  const fields = ['--name', 'alice', '--user', 'u1', '--models', 'demo, llama', '--expires', '30d']
  const more = ['--rpm', '60', '--max-concurrent', '2', '--quota', '1e6', '--quota-period', 'daily']
  const made = await keysProgram(
    dataDir,
    'create',
    ...fields,
    ...more,
    '--tag',
    'team=red',
    '--json'
  )
  assert.deepEqual([made.status, made.stderr], [0, ''])
  const { key, id, expires_at, created_at, ...rest } = JSON.parse(made.stdout)
  assert.equal(Math.round((Date.parse(expires_at) - Date.parse(created_at)) / 86_400_000), 30)
  assert.deepEqual(rest, {
    status: 'active',
    name: 'alice',
    user_id: 'u1',
    models: ['demo', 'llama'],
    limits: { requests_per_minute: 60, max_concurrent: 2 },
    tags: { team: 'red' },
    total_quota: 1e6,
    quota_reset_period: 'daily',
    updated_at: created_at
  })
  assert.deepEqual([await codeOf(key), await codeOf(key, 'x')], ['ok', 'model_not_allowed'])

  const list = await keys(dataDir, 'list')
  assert.ok(list.stdout.includes(id) && list.stdout.includes('first'), list.stdout)
  assert.ok(!list.stdout.includes(key))
  const ofUser = await keys(dataDir, 'list', '--user', 'u1', '--json')
  assert.equal(JSON.parse(ofUser.stdout).id, id)

  const rotated = await keys(dataDir, 'rotate', id, '--grace', '1h')
  const next = rotated.stdout.split('\n')[0]!
  assert.match(next, /^sk-/)
  assert.deepEqual([await codeOf(next), await codeOf(key)], ['ok', 'ok'])

  const changed = await keys(dataDir, 'update', id, '--models', '', '--rpm', '', '--tag', 'team=')
  assert.equal(changed.status, 0)
  const shown = JSON.parse((await keys(dataDir, 'show', id, '--json')).stdout)
  assert.deepEqual([shown.models, shown.limits, shown.tags], [undefined, { max_concurrent: 2 }, {}])

  const revoked = await keys(dataDir, 'revoke', id)
  assert.deepEqual([revoked.status, revoked.stdout], [0, `${id} is revoked\n`])
  const before = performance.now()
  await eventually(async () => (await codeOf(next)) !== 'ok')
  assert.ok(performance.now() - before < SOON)
  assert.deepEqual([await codeOf(next), await codeOf(key)], ['key_disabled', 'key_disabled'])
  assert.match((await keys(dataDir, 'rotate', id)).stderr, /is revoked/)
})

test('who shares limits with the gateway is told, or it is said that they were not', {
  skip: REDIS.skip
}, async t => {
  const dataDir = folder(t)
  const redis_prefix = uniqueName('command')
  const config = (port: number) =>
    writeConfig(join(dataDir, 'config.yaml'), {
      ...BUILTIN,
      storage: { caches: [{ name: 'default', driver: 'redis', addr: `${REDIS.host}:${port}` }] },
      rate_limit: { storage: 'redis', redis_prefix }
    })
  config(REDIS.port)
  const heard = new Map<string, boolean>()
  const other = await joinRedis(t, REDIS, redis_prefix, {
    async onKeyNews(news) {
      for (const { hash, revokedAt } of news) heard.set(hash, revokedAt !== undefined)
    }
  })
  const { key, id } = JSON.parse((await keys(dataDir, 'create', '--json')).stdout)
  const next = JSON.parse((await keys(dataDir, 'rotate', id, '--json')).stdout).key
  const revoked = await keys(dataDir, 'revoke', id)
  assert.deepEqual([revoked.status, revoked.stderr], [0, ''])
  await other.beat()
  await other.beat()
  assert.deepEqual([heard.get(hashKey(key)), heard.get(hashKey(next))], [true, true])
  config(await closedPort())
  const unheard = await keys(dataDir, 'revoke', id)
  assert.deepEqual([unheard.status, unheard.stdout], [0, `${id} is revoked\n`])
  assert.match(unheard.stderr, /other gateways could not be told/)
})

test('what makes no sense is said, and exits with 2; what is not there with 1', async t => {
  const dataDir = folder(t)
  writeConfig(join(dataDir, 'config.yaml'), BUILTIN)
  const none = await keys(dataDir, 'list')
  assert.equal(none.status, 1)
  assert.match(none.stderr, /^llmproxy: there is no .*keys\.db; is LLMPROXY_DATA_DIR right\?\n$/)
  await keys(dataDir, 'create')
  for (const [args, status, message] of [
    [['fly'], 2, /no command "keys fly"/],
    [['create', '--expires', 'soon'], 2, /expires_at must be a time such as .*\(got "soon"\)/],
    [['create', '--rpm', 'many'], 2, /--rpm must be a number \(got "many"\)/],
    [['create', '--quota-period', 'hourly'], 2, /quota_reset_period must be one of never, daily/],
    [['create', '--tag', 'red'], 2, /--tag must be NAME=VALUE/],
    [['create', '--nmae', 'x'], 2, /--nmae/],
    [['show'], 2, /which key\? give its id/],
    [['show', 'key_none'], 1, /there is no key key_none/],
    [['update', 'key_none', '--name', 'x'], 1, /there is no key key_none/],
    [['update', 'key_none'], 2, /nothing to change was given/],
    [['rotate', 'key_none', '--grace', 'long'], 2, /--grace must be such as 24h/],
    [['revoke'], 2, /which keys\?/],
    [['list', '--config', '/none.yaml'], 1, /none\.yaml: cannot be read/]
  ] as const) {
    const result = await keys(dataDir, ...args)
    assert.deepEqual([result.status, result.stdout], [status, ''], args.join(' '))
    assert.match(result.stderr, message)
  }
  for (const [args, status, message] of [
    [['create', '--nmae', 'x'], 2, /^llmproxy: .*--nmae/],
    [['show', 'key_none'], 1, /^llmproxy: there is no key key_none\n$/]
  ] as const) {
    const result = await keysProgram(dataDir, ...args)
    assert.deepEqual([result.status, result.stdout], [status, ''], args.join(' '))
    assert.match(result.stderr, message)
  }
  assert.equal((await keys(dataDir)).status, 2)
  assert.match((await keys(dataDir, '--help')).stdout, /^Usage\n {2}llmproxy keys create/)
})

test('the store is where the configuration or --db says; one that nobody looks into is made known', async t => {
  const dataDir = folder(t)
  const auth = { enabled: true, db_path: 'other.db' }
  writeConfig(join(dataDir, 'config.yaml'), { ...BUILTIN, auth })
  await keys(dataDir, 'create', '--name', 'a')
  const there = await keys(dataDir, 'list', '--json', '--db', join(dataDir, 'other.db'))
  assert.equal(JSON.parse(there.stdout).name, 'a')
  writeConfig(join(dataDir, 'config.yaml'), { ...BUILTIN, auth: { ...auth, keys: ['sk-a'] } })
  const unused = await keys(dataDir, 'list')
  assert.deepEqual(unused.status, 0)
  assert.match(unused.stderr, /does not look into the store/)
})

test('the commands of the documentation', async t => {
  const dataDir = folder(t)
  writeConfig(join(dataDir, 'config.yaml'), BUILTIN)
  const page = readFileSync(new URL('../docs/keys.md', import.meta.url), 'utf8')
  const commands = page.match(/^llmproxy keys .*$/gm)!
  assert.equal(commands.length, 6)
  let id = ''
  for (const command of commands) {
    const result = await keys(dataDir, ...words(command.replace('KEY_ID', id)).slice(2))
    assert.deepEqual([result.status, result.stderr], [0, ''], command)
    id ||= /^id +(key_\w+)$/m.exec(result.stdout)![1]!
  }
})

/** The words of a command line, as a shell reads it. */
function words(command: string): string[] {
  const script = `printf '%s\\0' ${command}`
  return execFileSync('sh', ['-c', script], { encoding: 'utf8' }).split('\0').slice(0, -1)
}

const NO_TERMINAL = spawnSync('script', ['--version']).error ? 'script is not installed' : false

test('on a terminal the first key is shown, and is in no file', { skip: NO_TERMINAL }, async t => {
  const dataDir = folder(t)
  const config = writeConfig(join(dataDir, 'config.yaml'), {
    ...BUILTIN,
    server: { listen: '127.0.0.1:0' }
  })
  // Without `exec` some shells (dash) stay, and end by the Ctrl-C below whatever the gateway's status is.
  const command = `exec "${process.execPath}" "${CLI}" --config "${config}"`
  const child = spawn('script', ['-qefc', command, '/dev/null'], {
    env: { ...process.env, LLMPROXY_CONFIG: '', LLMPROXY_DATA_DIR: dataDir }
  })
  t.after(() => child.kill('SIGKILL'))
  let seen = ''
  await new Promise<void>(resolve => {
    child.stdout.on('data', data => {
      seen += data
      if (seen.includes('LLMProxy is listening')) resolve()
    })
  })
  const [, key] = /The first API key[\s\S]*?(sk-[\w-]{43})\r?\n/.exec(seen)!
  assert.equal(seen.split(key!).length, 2, 'once')
  const url = /http:\/\/127\.0\.0\.1:\d+/.exec(seen)![0]
  const answer = await fetch(`${url}/v1/models`, { headers: { 'x-api-key': key! } })
  assert.equal(answer.status, 200)
  assert.throws(() => readFileSync(join(dataDir, 'first-key')), { code: 'ENOENT' })
  // Ctrl-C on the terminal ends the gateway, and `script` with its status when it has.
  child.stdin.write('\x03')
  assert.deepEqual(await once(child, 'exit'), [0, null], seen)
})

test('a reader that stops early ends a command without an error', async t => {
  const dataDir = folder(t)
  const config = writeConfig(join(dataDir, 'config.yaml'), BUILTIN)
  for (const args of [['create', '--name', 'a'], ['list']]) {
    const child = spawn(process.execPath, [CLI, 'keys', ...args], {
      env: { ...process.env, LLMPROXY_CONFIG: config, LLMPROXY_DATA_DIR: dataDir },
      stdio: ['ignore', 'pipe', 'pipe']
    })
    child.stdout.destroy()
    const [said] = await Promise.all([text(child.stderr), once(child, 'close')])
    assert.deepEqual([said, child.exitCode], ['', 0], args.join(' '))
  }
})
