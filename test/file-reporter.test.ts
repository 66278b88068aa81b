import assert from 'node:assert/strict'
import {
  appendFileSync,
  existsSync,
  readFileSync,
  renameSync,
  statSync,
  writeFileSync
} from 'node:fs'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { parseConfig } from '../src/config.ts'
import { linesOf, NO_MOUNT, oldOnes, smallDisk } from './disk.ts'
import { answerChat, CHAT, eventually, fakeBackend, post, startGateway } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/** Usage records in files. */

const usage = (...reporters: object[]) => ({ usage: { enabled: true, reporters } })
const reporter = (path: string, file: object = {}, more: object = {}) => ({
  type: 'file',
  ...more,
  file: { path, ...file }
})

async function gatewayWith(t: TestContext, ...reporters: object[]) {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ name: 'gpu', url: backend.url }],
    ...usage(...reporters)
  })
  const call = async (model = 'm') => {
    const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model })
    assert.equal(response.status, 200)
    await response.text()
    return response.headers.get('x-llmproxy-request-id')
  }
  return { ...gateway, call }
}

const ids = (path: string) => linesOf(path).map(line => JSON.parse(line).request_id)

test('each record is a line, in the order of the answers; each file gets what its filter lets through', async t => {
  const home = folder(t)
  const [all, some] = [join(home, 'all.jsonl'), join(home, 'deep/some.jsonl')]
  const { call } = await gatewayWith(
    t,
    reporter(all),
    reporter(some, {}, { filter: { models: ['gpt*'] } })
  )
  const made: unknown[] = []
  for (const model of ['m', 'gpt-a', 'm', 'gpt-b']) made.push(await call(model))
  await eventually(() => linesOf(all).length === 4 && linesOf(some).length === 2)
  assert.deepEqual(ids(all), made)
  assert.deepEqual(ids(some), [made[1], made[3]])
  const record = JSON.parse(linesOf(all)[0]!)
  assert.deepEqual([record.backend, record.total_tokens, record.outcome], ['gpu', 15, 'ok'])
  assert.equal(statSync(some).mode & 0o777, 0o600)
  assert.equal(statSync(join(home, 'deep')).mode & 0o777, 0o700)
})

test('a full file is followed by another, and the old one is compressed', async t => {
  const path = join(folder(t), 'usage.jsonl')
  const { call } = await gatewayWith(t, reporter(path, { max_size: '2KB', compress: true }))
  const made: unknown[] = []
  while (oldOnes(path).length < 3) made.push(await call())
  await eventually(() => oldOnes(path).every(each => each.endsWith('.gz')))
  await eventually(() => linesOf(path).length === made.length)
  assert.deepEqual(ids(path), made)
})

test('on a full disk records wait, and come once and whole when there is room', async t => {
  const disk = smallDisk(t)
  if (disk === undefined) return t.skip(NO_MOUNT)
  const path = join(disk, 'usage.jsonl')
  const { call, logged } = await gatewayWith(t, reporter(path))
  const made = [await call()]
  await eventually(() => linesOf(path).length === 1)
  const rest = join(disk, 'rest')
  assert.throws(() => {
    while (true) appendFileSync(rest, Buffer.alloc(4096))
  }, /ENOSPC/)
  for (let count = 0; count < 20; count++) made.push(await call())
  const line = await logged({ msg: 'usage cannot be reported; it will be tried again' })
  assert.match(String(line.reason), /^ENOSPC/)
  // Each try may leave half a line for a moment.
  await eventually(() => readFileSync(path, 'utf8').endsWith('}\n'))
  writeFileSync(rest, '')
  await logged({ msg: 'usage is reported again' })
  await eventually(() => linesOf(path).length === made.length)
  assert.deepEqual(ids(path), made)
})

test('a file that was moved away is made again', async t => {
  const path = join(folder(t), 'usage.jsonl')
  const { call } = await gatewayWith(t, reporter(path))
  const made = [await call()]
  await eventually(() => linesOf(path).length === 1)
  renameSync(path, `${path}.1`)
  while (!existsSync(path)) made.push(await call())
  await eventually(() => linesOf(path).length === made.length)
  assert.deepEqual(ids(path), made)
})

test('a path that cannot be written holds up no answer', async t => {
  const file = join(folder(t), 'file')
  writeFileSync(file, '')
  const { call, logged, fastify } = await gatewayWith(t, reporter(join(file, 'usage.jsonl')))
  await call()
  const line = await logged({ msg: 'usage cannot be reported; it will be tried again' })
  assert.match(String(line.reason), /^(ENOTDIR|EEXIST)/)
  await fastify.close()
})

test('of several processes one writes the file', async t => {
  const home = folder(t)
  const backend = await fakeBackend(t, answerChat)
  const config = writeConfig(join(home, 'config.yaml'), {
    server: { listen: '127.0.0.1:0', workers: 2 },
    backends: [{ url: backend.url }],
    ...usage(reporter('logs/usage.jsonl'))
  })
  const gateway = await start(t, [CLI, '--config', config], { LLMPROXY_DATA_DIR: home })
  const made: unknown[] = []
  for (let count = 0; count < 20; count++) {
    const headers = { connection: 'close' }
    const response = await post(`${gateway.url}/v1/chat/completions`, CHAT, headers)
    made.push(response.headers.get('x-llmproxy-request-id'))
    await response.text()
  }
  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
  const path = join(home, 'logs/usage.jsonl')
  assert.deepEqual(ids(path).toSorted(), made.toSorted())
  assert.equal(statSync(path).mode & 0o777, 0o600)
})

test('two reporters on one file are refused; sizes and ages are those of the dialect', () => {
  const parse = (...reporters: object[]) =>
    parseConfig(
      JSON.stringify({ backends: [{ url: 'demo://' }], ...usage(...reporters) }),
      'config.yaml',
      {}
    )
  assert.throws(
    () => parse(reporter('a'), reporter('a', {}, { name: 'b' })),
    /usage\.reporters\[1\]: has the same file as usage\.reporters\[0\]/
  )
  assert.throws(() => parse({ type: 'file' }), /reporters\[0\]\.file: is missing/)
  const [bare, text] = parse(
    reporter('a', { max_size: 5, max_age: 30 }),
    reporter('b', { max_size: '5KB', max_age: '12h', rotate: 'daily' })
  ).usage.reporters.map(each => each.file!)
  assert.deepEqual([bare!.max_size, bare!.max_age], [5 * 1024 ** 2, 30 * 24 * 60 * 60 * 1000])
  assert.deepEqual([text!.max_size, text!.max_age], [5 * 1024, 12 * 60 * 60 * 1000])
})
