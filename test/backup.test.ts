import assert from 'node:assert/strict'
import {
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync
} from 'node:fs'
import { basename, join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { type TestContext, test } from 'node:test'
import { runBackup } from '../src/commands/backup.ts'
import { runUsage } from '../src/commands/usage.ts'
import { incompleteness, makeWhole } from '../src/store/copies.ts'
import { runCommand, runProgram } from './command.ts'
import { answerChat, CHAT, fakeBackend, post } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/** Copies of what a gateway keeps: complete ones, and those that only look like it. */

const TOKEN = 'admin-token'
const ADMIN = { 'x-admin-token': TOKEN }

/** A gateway that has a key, with which one request was made. */
async function used(t: TestContext, workers = 1) {
  const { url: backend } = await fakeBackend(t, answerChat)
  const home = folder(t)
  const config = writeConfig(join(home, 'config.yaml'), {
    server: { listen: '127.0.0.1:0', workers },
    backends: [{ url: backend }],
    admin: { enabled: true, token: TOKEN },
    auth: { enabled: true },
    usage: { enabled: true, reporters: [{ type: 'builtin' }] }
  })
  const run = (dataDir: string) =>
    start(t, [CLI, '--config', config], { LLMPROXY_DATA_DIR: dataDir })
  const data = join(home, 'data')
  const gateway = await run(data)
  const made = await post(`${gateway.url}/admin/keys`, { name: 'laptop' }, ADMIN)
  const { key } = (await made.json()) as { key: string }
  assert.equal(await status(gateway.url, key), 200)
  return { home, config, data, gateway, key, run }
}

async function status(url: string, key: string): Promise<number> {
  const response = await post(`${url}/v1/chat/completions`, CHAT, { 'x-api-key': key })
  await response.text()
  return response.status
}

/** As `cp *.db` does it. */
function copyDatabases(from: string, to: string): string {
  mkdirSync(to)
  for (const name of readdirSync(from).filter(each => each.endsWith('.db'))) {
    copyFileSync(join(from, name), join(to, name))
  }
  return to
}

test('a backup of a running gateway has its keys and records; a plain copy is noticed', async t => {
  const { home, config, data, gateway, key, run } = await used(t)
  const backup = join(home, 'backup')
  const { status: code, stdout } = await runCommand(() => runBackup([backup], data, config))
  assert.equal(code, 0)
  const names = ['keys.db', 'usage-builtin.db', 'usage.db']
  assert.deepEqual(readdirSync(backup).sort(), names)
  for (const name of names) {
    assert.equal(statSync(join(backup, name)).mode & 0o777, 0o600)
    assert.match(stdout, new RegExp(`${name}: \\d+ bytes`))
  }
  const again = await runCommand(() => runBackup([backup], data, config))
  assert.deepEqual([again.status, /exists/.test(again.stderr)], [1, true])
  const copy = copyDatabases(data, join(home, 'copy'))
  gateway.child.kill('SIGKILL')

  const refused = await runProgram(['--config', config], { LLMPROXY_DATA_DIR: copy })
  assert.equal(refused.status, 1)
  assert.match(refused.stderr, /^llmproxy: \S+\.db is an incomplete copy: .*-wal, which is missing/)
  assert.match(refused.stderr, /llmproxy backup/)

  const restored = await run(backup)
  assert.equal(await status(restored.url, key), 200)
  assert.ok(!restored.lines.some(({ level }) => Number(level) >= 50))
  const exported = await runCommand(() => runUsage(['export', '--since', '1d'], backup, config))
  assert.equal(exported.stdout.trim().split('\n').length, 2)
})

test('a gateway leaves its files whole, whose plain copy later is noticed if it is not', async t => {
  const { home, data, gateway, key, run } = await used(t, 2)
  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
  assert.deepEqual(
    readdirSync(data).filter(each => /-(wal|shm)$/.test(each)),
    []
  )
  const whole = await run(copyDatabases(data, join(home, 'whole')))
  assert.equal(await status(whole.url, key), 200)
  assert.ok(!whole.lines.some(({ level }) => Number(level) >= 50))
  const partial = await run(copyDatabases(join(home, 'whole'), join(home, 'partial')))
  const { file, level } = await partial.logged('this database may be an incomplete copy')
  assert.deepEqual([basename(String(file)).endsWith('.db'), level], [true, 50])
})

test('files are told apart by what is in them', async t => {
  const dir = folder(t)
  const file = join(dir, 'a.db')
  assert.equal(await incompleteness(file), undefined)
  const db = new DatabaseSync(file)
  db.exec('PRAGMA journal_mode = WAL; CREATE TABLE words (word)')
  const copy = (name: string) => {
    copyFileSync(file, join(dir, name))
    return join(dir, name)
  }
  assert.equal(await incompleteness(file), undefined, 'in use')
  assert.equal(await incompleteness(copy('b.db')), 'empty')
  await makeWhole(file)
  assert.equal(await incompleteness(file), undefined, 'still in use')
  db.exec('PRAGMA wal_checkpoint')
  assert.equal(
    await incompleteness(copy('c.db')),
    'partial',
    'marked, and in use when it was copied'
  )
  db.close()
  await makeWhole(file)
  assert.equal(await incompleteness(copy('d.db')), undefined)
  assert.equal(readFileSync(file).readUInt32BE(68).toString(16), '4c4c4d50')
  writeFileSync(join(dir, 'e.db'), 'no database')
  assert.equal(await incompleteness(join(dir, 'e.db')), undefined)
  const unmarked = new DatabaseSync(join(dir, 'f.db'))
  unmarked.exec('CREATE TABLE words (word); PRAGMA journal_mode = WAL')
  unmarked.close()
  assert.equal(await incompleteness(join(dir, 'f.db')), undefined, 'of an earlier version')
})

test('backup says what is wrong with its arguments', async t => {
  const dir = folder(t)
  const config = writeConfig(join(dir, 'config.yaml'), { backends: [{ url: 'demo://' }] })
  const run = (...args: string[]) => runCommand(() => runBackup(args, join(dir, 'none'), config))
  assert.deepEqual((await run()).status, 2)
  assert.deepEqual((await run('a', 'b')).status, 2)
  const { status, stderr } = await run(join(dir, 'backup'))
  assert.deepEqual(
    [status, /there is no database in \S+; is LLMPROXY_DATA_DIR/.test(stderr)],
    [1, true]
  )
  assert.match((await run('--help')).stdout, /llmproxy backup DIR/)
})
