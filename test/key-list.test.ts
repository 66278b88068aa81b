import assert from 'node:assert/strict'
import { renameSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { Type } from 'typebox'
import { parseDocument, stringify } from 'yaml'
import { visitJson } from '../src/json.ts'
import { toNetworks } from '../src/keys/key.ts'
import { readKeyList } from '../src/keys/key-list.ts'
import { KeyStore, MEMORY } from '../src/keys/key-store.ts'
import { OwnedKey, toRows } from '../src/keys/stored-key.ts'
import { checkOptions } from '../src/options.ts'
import { readYaml } from '../src/yaml.ts'
import { answerChat, CHAT, eventually, fakeBackend, post, startGateway, turnsOf } from './helper.ts'
import { folder } from './process.ts'

/** Lists of keys, however long: what is wrong is said with its place, and nobody waits while they are read. */

const COUNT = process.env.LONG ? 100_000 : 500

/** A turn must be shorter than half the time that parsing this many keys takes. */
const SOME = process.env.LONG ? 5_000 : 1_000

const keysOf = (count: number, name = 'caller') =>
  Array.from({ length: count }, (_, at) => ({
    key: `sk-${name}-${at}`,
    name: `${name}-${at}`,
    user_id: `user-${at % 100}`,
    models: ['llama-*', 'm'],
    limits: { requests_per_minute: 60 },
    starts_at: '2026-01-01T00:00:00Z',
    tags: { team: `team-${at % 50}` }
  }))

const FORMATS = {
  json: (keys: object) => JSON.stringify({ keys }, null, 1),
  yaml: (keys: object) => `# Keys\n\nkeys:\n${stringify(keys, { aliasDuplicateObjects: false })}`
}

/** Time (ms) that this thread has worked: it does not grow while others do. */
function worked(): number {
  const { user, system } = process.threadCpuUsage()
  return (user + system) / 1000
}

/** The longest time (ms) that this thread works in one turn of the event loop. */
async function longestTurn(work: () => Promise<unknown>): Promise<number> {
  let longest = 0
  let isOver = false
  let last = worked()
  const look = () => {
    const now = worked()
    longest = Math.max(longest, now - last)
    last = now
    if (!isOver) setImmediate(look)
  }
  setImmediate(look)
  await work()
  isOver = true
  return longest
}

function timeOf(work: () => unknown): number {
  const begun = worked()
  work()
  return worked() - begun
}

async function start(t: TestContext, pipeline: object[], more: object = {}) {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(
    t,
    { backends: [{ url: backend.url }], auth: { enabled: true, pipeline }, ...more },
    {},
    folder(t)
  )
  const status = async (key: string) => {
    const headers = { authorization: `Bearer ${key}` }
    const response = await post(`${gateway.url}/v1/chat/completions`, CHAT, headers)
    await response.arrayBuffer()
    return response.status
  }
  return { gateway, status }
}

for (const [format, toText] of Object.entries(FORMATS)) {
  test(`a file of ${COUNT} keys in ${format} is read while requests go on`, {
    timeout: 120_000
  }, async t => {
    const path = join(folder(t), `keys.${format}`)
    writeFileSync(path, toText(keysOf(1)))
    const { status } = await start(t, [{ type: 'file', file: { path } }])
    const text = toText(keysOf(COUNT, 'new'))
    const last = `sk-new-${COUNT - 1}`
    writeFileSync(`${path}.new`, text)
    const turn = await longestTurn(async () => {
      renameSync(`${path}.new`, path)
      await eventually(async () => (await status(last)) !== 401)
    })
    assert.equal(await status(last), 200)
    assert.equal(await status('sk-caller-0'), 401)
    const some = FORMATS.yaml(keysOf(SOME))
    const parsing = timeOf(() => parseDocument(some))
    t.diagnostic(
      `longest turn ${turn.toFixed()} ms; parsing ${SOME} keys takes ${parsing.toFixed()} ms`
    )
    assert.ok(turn < parsing / 2)
  })
}

test('a list of keys is synchronised while requests go on', { timeout: 120_000 }, async t => {
  const count = process.env.LONG ? 100_000 : 2_000
  const token = 'x'.repeat(32)
  const admin = { enabled: true, token }
  const { gateway, status } = await start(t, [{ type: 'builtin' }], { admin })
  const sync = async (body: string) => {
    const response = await post(`${gateway.url}/admin/keys/sync`, body, { 'x-admin-token': token })
    const { error } = (await response.json()) as { error?: string }
    return [response.status, error] as const
  }
  const keys = keysOf(count)
  const checking = timeOf(() => checkOptions(Type.Array(OwnedKey), keysOf(5_000)))
  const body = JSON.stringify({ keys })
  const few = JSON.stringify({ keys: keys.slice(0, 1) })
  const turn = await longestTurn(async () => {
    assert.deepEqual(await sync(body), [200, undefined])
  })
  assert.deepEqual(
    [await status(`sk-caller-${count - 1}`), await status('sk-caller-0')],
    [200, 200]
  )
  const deleting = await longestTurn(async () => {
    assert.deepEqual(await sync(few), [200, undefined])
  })
  assert.deepEqual(
    [await status(`sk-caller-${count - 1}`), await status('sk-caller-0')],
    [401, 200]
  )
  t.diagnostic(
    `longest turns ${turn.toFixed()} and ${deleting.toFixed()} ms; checking 5,000 takes ${checking.toFixed()} ms`
  )
  assert.ok(Math.max(turn, deleting) < checking)
  keys[count - 1]!.starts_at = 'soon'
  const [, wrong] = await sync(JSON.stringify({ keys }))
  assert.match(wrong!, new RegExp(`^keys\\[${count - 1}\\]\\.starts_at: must be a time`))
  assert.deepEqual(await sync('{"keys": ['), [400, 'The request body is not valid JSON.'])
  assert.match(
    (await sync(`${body.slice(0, -1)}, "mode": "some"}`))[1]!,
    /^mode: must be one of full/
  )
})

test('a long list of networks is read in slices', async () => {
  const networks = Array.from({ length: 50_000 }, (_, at) => `10.${at >> 8}.${at & 255}.0/24`)
  let list: Awaited<ReturnType<typeof toNetworks>>
  const turns = await turnsOf(async () => {
    list = await toNetworks(networks)
  })
  assert.ok(turns > 1, String(turns))
  assert.deepEqual([list!.check('10.100.1.1'), list!.check('11.1.1.1')], [true, false])
})

test('keys that a list deletes are told of some at a time', async t => {
  const told: number[] = []
  const store = new KeyStore(MEMORY, hashes => void told.push(hashes?.length ?? 0))
  t.after(() => store.close())
  await store.sync(toRows(keysOf(2_500)), 'full')
  assert.equal((await store.list()).total, 2_500)
  told.length = 0
  await store.sync([], 'full')
  assert.deepEqual(told, [1_000, 1_000, 500, 0])
})

test('what is wrong with a key is said with its place, in JSON and in parts of YAML', () => {
  const complaint = (text: string) => {
    try {
      readKeyList(text, 'keys')
      return ''
    } catch (error) {
      return (error as Error).message
    }
  }
  const small = (count: number) => keysOf(count).map(({ key, name }) => ({ key, name }))
  const keys: object[] = small(2_500)
  keys[2_400] = { key: 'sk-x', name: 'x', expires_at: 'soon' }
  keys[1_200] = { key: 'sk-y', limits: { requests_per_minute: -1 } }
  keys[2_300] = { key: 'sk-y' }
  for (const toText of Object.values(FORMATS)) {
    const text = toText(keys)
    const lines = text.split('\n')
    const place = (pattern: RegExp, from = 0) => {
      const line = lines.findIndex((each, at) => at >= from && pattern.test(each))
      return [line + 1, lines[line]!.search(/[\w"{-]/) + 1] as const
    }
    const [limitLine, limitColumn] = place(/requests_per_minute.*-1/)
    const [timeLine, timeColumn] = place(/expires_at/)
    const all = complaint(text).split('\n')
    assert.equal(all.length, 3, all.join('\n'))
    const time = `keys:${timeLine}:${timeColumn} keys[2400].expires_at: must be a time`
    const limit = `keys:${limitLine}:${limitColumn} keys[1200].limits.requests_per_minute: must be`
    assert.ok(all[0]!.startsWith(limit), `${all[0]} is no ${limit}`)
    assert.match(all[1]!, /^keys:\d+:\d+ keys\[2300\]: has the same key as keys\[1200\]$/)
    assert.ok(all[2]!.startsWith(time), `${all[2]} is no ${time}`)
  }
  // As the YAML parser has it, with nothing split.
  const list = stringify(small(2_100), { aliasDuplicateObjects: false })
  const wrong = `${list}- key: [\n`
  assert.deepEqual(complaint(wrong).split('\n'), readYaml(wrong, 'keys', {}).errors)
  assert.equal(complaint(`${list}other: 1\n`).split(' ')[0], `keys:${list.split('\n').length}:1`)
  const anchored = `- &a {key: sk-a, name: a}\n${list}- {<<: *a, key: sk-b, name: b}\n`
  assert.equal(readKeyList(anchored, 'keys').length, 2_102)
  for (const text of [
    `  - sk-a # a\n# b\n\n  - key: sk-b\n${list.replaceAll(/^/gm, '  ')}`,
    list
  ]) {
    assert.equal(readKeyList(text.trimEnd(), 'keys').length, text === list ? 2_100 : 2_102)
  }
})

test('JSON is read as JSON: with the environment, and no name twice', () => {
  const read = (text: string) => readYaml(text, 'f', { A: 'one' })
  const { root, fromEnv } = read('{"a": "${A}", "b": null, "c": [null, "$${A}"], "d": {}}')
  assert.deepEqual(root, { a: 'one', c: [null, '${A}'], d: {} })
  assert.deepEqual([...fromEnv], ['a:', 'c[1]:'])
  const twice = '{"a": 1,\n "b": {"c": 1, "\\u0063": 2}}'
  assert.deepEqual(read(twice).errors, ['f:2:16 Map keys must be unique'])
  const { issues, placeOf } = read('{"a": [\n  {"b": "${NONE}"}]}')
  assert.match(issues[0]!.message, /\$\{NONE\}, which is not set/)
  assert.deepEqual(placeOf(['a', 0, 'b']), { line: 2, column: 4 })
  assert.deepEqual(placeOf(['a', 0, 'none']), { line: 2, column: 3 })
  assert.deepEqual(placeOf(['none']), { line: 1, column: 1 })
  assert.deepEqual(read('[a, b]').root, ['a', 'b'], 'flow YAML is no JSON')
  const seen: string[] = []
  visitJson('{"a":[{"b":{}},[],[1]],"c\\"d":"]"}', (path, at) =>
    seen.push(`${path.join('/')}@${at}`)
  )
  assert.deepEqual(seen, ['a@1', 'a/0@6', 'a/0/b@7', 'a/1@15', 'a/2@18', 'a/2/0@19', 'c"d@23'])
})
