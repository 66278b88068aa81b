import assert from 'node:assert/strict'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { Assembly, fragmentsOf, freeze } from '../src/fragments.ts'
import { CHAT, chunk, eventually, fakeBackend, post } from './helper.ts'
import { CLI, folder, start, workersOf, writeConfig } from './process.ts'

/** Reloads of long lists: no turn of the event loop takes long in any process. LONG=1: lists of the full length. */

const COUNT = process.env.LONG ? 100_000 : 5_000
/** Maximum CPU time (ms) of a turn. Without STRICT=1, other work on the machine may slow it down. */
const LONGEST = process.env.STRICT ? 50 : 100

/** Maximum length of the changes that a reload shows (characters). */
const MAX_CHANGES = 100_000

const KEY = 'sk-always'
const TOKEN = 'admin-token'
const listOf = <T>(item: (at: number) => T) => Array.from({ length: COUNT }, (_, at) => item(at))
const own = (more: object = {}) => ({ key: KEY, name: 'always', ...more })

/** Lists whose content depends on a number. */
const LISTS: Record<string, (version: number) => object> = {
  prices: version => ({
    usage: { prices: listOf(at => ({ model: `m-${at}`, input: version, output: 1 })) }
  }),
  'denied addresses': version => ({
    auth: {
      keys: [
        own({
          denied_ips: listOf(at => `10.${version + (at >> 16)}.${(at >> 8) & 255}.${at & 255}`)
        })
      ]
    }
  }),
  users: version => ({
    rate_limit: {
      users: Object.fromEntries(listOf(at => [`user-${at}`, { requests_per_minute: version }]))
    }
  }),
  keys: version => ({
    auth: { keys: [own(), ...listOf(at => ({ key: `sk-${version}-${at}`, name: `key-${at}` }))] }
  })
}
/** All at once, but for the addresses, which are a list of a key. */
const mixed = (version: number) => ({
  ...LISTS.prices!(version),
  ...LISTS.users!(version),
  ...LISTS.keys!(version)
})

for (const workers of process.env.LONG ? [1, 2] : [2]) {
  test(`${COUNT} entries are reloaded while streams go on, by ${workers} worker${workers > 1 ? 's' : ''}`, {
    timeout: 1_800_000
  }, async t => {
    const { reload, url } = await run(t, workers)
    for (const [name, contentOf] of Object.entries(process.env.LONG ? LISTS : { mixed })) {
      const turns: number[] = []
      // More, others, and none.
      const contents = process.env.LONG ? [contentOf(1), contentOf(2), {}] : [contentOf(3)]
      for (const content of contents) turns.push(await reload(content))
      t.diagnostic(`${name}: longest turns ${turns.map(ms => ms.toFixed()).join(', ')} ms`)
      assert.ok(Math.max(...turns) < LONGEST, name)
    }
    if (process.env.LONG) await reload(LISTS.keys!(3))
    const response = await post(`${url}/v1/chat/completions`, CHAT, {
      authorization: `Bearer sk-3-${COUNT - 1}`
    })
    assert.equal(response.status, 200)
    await response.body!.cancel()
  })
}

/** A gateway with an open stream in each worker: without one it may collect garbage, which takes long. */
async function run(t: TestContext, workers: number) {
  const backend = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    while (!response.destroyed) {
      response.write(chunk('word '))
      await sleep(50)
    }
  })
  const dataDir = folder(t)
  const file = join(dataDir, 'config.json')
  const write = (content: object) =>
    writeConfig(file, {
      server: { listen: '127.0.0.1:0', workers },
      backends: [{ url: backend.url, models: ['m'] }],
      auth: { keys: [own()] },
      admin: { enabled: true, token: TOKEN },
      ...content
    })
  const watch = new URL('./loop-watch.mjs', import.meta.url).href
  const gateway = await start(t, [CLI, '--config', write({})], {
    LLMPROXY_DATA_DIR: dataDir,
    NODE_OPTIONS: `--import ${watch}`
  })
  const { url, child, lines } = gateway
  for (let at = 0; at < workers; at++) {
    const headers = { authorization: `Bearer ${KEY}` }
    const response = await post(`${url}/v1/chat/completions`, CHAT, headers)
    assert.equal(response.status, 200)
    t.after(() => response.body!.cancel())
  }
  const serving = workers === 1 ? [child.pid!] : workersOf(child.pid!)
  let resets = 0
  /** Begins anew with the longest turns; those of before have been written then. */
  async function reset(): Promise<void> {
    for (const pid of serving) process.kill(pid, 'SIGWINCH')
    await gateway.logged('heap', ++resets * serving.length)
  }
  const admin = async (method: string, path: string) => {
    const response = await fetch(url + path, { method, headers: { 'x-admin-token': TOKEN } })
    assert.equal(response.status, 200)
    return response.text()
  }
  return {
    url,
    /** Reloads, and looks at the configuration. Returns the CPU time (ms) of the longest turn of all processes that serve. */
    async reload(content: object): Promise<number> {
      await reset()
      const begun = lines.length
      write(content)
      const changes = await admin('POST', '/admin/reload')
      assert.ok(changes.length < MAX_CHANGES, `${changes.length}`)
      // The gateway also watches the file, and a reload that it has made before may change nothing.
      const isDone = ({ changed }: (typeof lines)[number]) => (changed as string[])?.length > 0
      await eventually(() => lines.slice(begun).some(isDone))
      assert.ok((await admin('GET', '/admin/config')).length > JSON.stringify(content).length / 4)
      await reset()
      const turns = lines.slice(begun).filter(({ pid }) => serving.includes(Number(pid)))
      return Math.max(0, ...turns.map(({ ms }) => Number(ms)))
    }
  }
}

test('a value that travels in fragments is frozen, and what is as before is the same object', () => {
  const travel = <T extends object>(value: T, before?: T) => {
    const assembly = new Assembly(before)
    const fragments = [...fragmentsOf(value)]
    const sizes = fragments.map(fragment => JSON.stringify(fragment).length)
    assert.ok(Math.max(...sizes) < 200_000, String(sizes))
    const results = fragments.map(fragment => assembly.add(JSON.parse(JSON.stringify(fragment))))
    assert.deepEqual(
      results.slice(0, -1).filter(each => each !== undefined),
      []
    )
    return results.at(-1)!
  }
  const longList = (first: string) => [first, ...Array.from({ length: 50_000 }, (_, at) => `${at}`)]
  const value = (first: string) => ({
    a: { b: [{ list: longList(first), c: null }, [], {}], text: 'x'.repeat(100_000) },
    map: JSON.parse(`{"__proto__": 1, "": {"list": ${JSON.stringify(longList('same'))}}}`),
    small: { one: 1, two: [2] }
  })
  const before = freeze(value('one'))
  assert.deepEqual(travel(before), before)
  assert.equal(travel(value('one'), before), before)
  const other = travel(value('two'), before)
  assert.deepEqual(other, value('two'))
  assert.equal(other.map, before.map)
  assert.equal(other.small, before.small)
  assert.equal(Object.getPrototypeOf(other.map), Object.prototype)
  const { a } = other
  assert.ok([other, a, a.b, a.b[0], (a.b[0] as { list: string[] }).list].every(Object.isFrozen))
  const turned = { ...value('one'), small: { two: [2], one: 1 } }
  assert.deepEqual(Object.keys(travel(turned, before).small), ['two', 'one'])
  assert.equal(travel([1, 2], [1, 2, 3]).length, 2)
  assert.deepEqual(travel({ list: [1] } as object, { list: { 0: 1 } }), { list: [1] })
})
