import assert from 'node:assert/strict'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { stringify } from 'yaml'
import { type Change, compare, takeOver } from '../src/changes.ts'
import { runDiff } from '../src/commands/diff.ts'
import { ConfigSchema, parseConfig } from '../src/config.ts'
import { runCommand, runProgram } from './command.ts'
import { folder } from './process.ts'

/** What differs between two configurations, and when it takes effect. */

const BASE = { backends: [{ name: 'a', url: 'http://a:1' }] }
const parse = (config: object) => parseConfig(JSON.stringify(config), 'c', {})

function changes(before: object, after: object) {
  return compare(ConfigSchema, parse({ ...BASE, ...before }), parse({ ...BASE, ...after }))
}

/** Paths of all that differs; marked with ! where it needs a restart. */
function paths(before: object, after: object): string[] {
  const { changed, restart_needed } = changes(before, after)
  return [...changed.map(({ path }) => path), ...restart_needed.map(({ path }) => `!${path}`)]
}

test('members have their path, their values as in a file, and when they take effect', () => {
  assert.deepEqual(changes({}, {}), { changed: [], restart_needed: [] })
  assert.deepEqual(changes({}, { log: { level: 'info' } }).changed, [], 'a default, written out')
  const before = { server: { listen: ':1', drain_timeout: '30s' }, log: { level: 'info' } }
  const after = { server: { listen: ':2', drain_timeout: '90s' }, log: { level: 'debug' } }
  assert.deepEqual(changes(before, after), {
    changed: [
      { path: 'server.drain_timeout', before: '30s', after: '90s' },
      { path: 'log.level', before: 'info', after: 'debug' }
    ],
    restart_needed: [{ path: 'server.listen', before: ':1', after: ':2' }]
  })
  const users = (rpm: number) => ({
    rate_limit: { enabled: false, users: { 'u.1': { requests_per_minute: rpm } } }
  })
  assert.deepEqual(paths(users(1), users(2)), ['rate_limit.users.u.1.requests_per_minute'])
  const [added] = changes({}, users(3)).changed
  assert.deepEqual([added!.path, 'before' in added!], ['rate_limit.users.u.1', false])
  const models = (name: string) => ({
    backends: [{ ...BASE.backends[0], models: ['*', { fast: name }] }]
  })
  assert.deepEqual(changes(models('a'), models('b')).changed, [
    {
      path: 'backends[a].models',
      before: ['*', { fast: 'a' }],
      after: ['*', { fast: 'b' }]
    }
  ])
  const trust = (...networks: string[]) => ({ server: { trust_proxy: networks } })
  assert.deepEqual(changes({}, trust('10.0.0.0/8')).restart_needed, [
    { path: 'server.trust_proxy', before: false, after: ['10.0.0.0/8'] }
  ])
  const reporting = (url: string) => ({
    usage: { enabled: true, reporters: [{ name: 'w', type: 'webhook', webhook: { url } }] }
  })
  assert.deepEqual(changes(reporting('http://w/a'), reporting('http://w/b')).changed, [
    { path: 'usage.reporters[w].webhook.url', before: 'http://w/***', after: 'http://w/***' }
  ])
  const off = { hooks: { enabled: false, on_request: {} } }
  assert.deepEqual(paths({}, off), [], 'what is not built makes no difference')
})

test('what has a name goes by it, anything else by its place', () => {
  const list = (...names: string[]) => ({
    backends: names.map(name => ({ name, url: `http://${name}:1` }))
  })
  assert.deepEqual(paths(list('a', 'b'), list('a', 'c')), ['backends[b]', 'backends[c]'])
  const weight = structuredClone(list('a', 'b')) as { backends: { weight?: number }[] }
  weight.backends[1]!.weight = 2
  assert.deepEqual(changes(list('a', 'b'), weight).changed, [
    { path: 'backends[b].weight', before: 1, after: 2 }
  ])
  assert.deepEqual(changes(list('a', 'b', 'c'), list('x', 'b', 'a')).changed.at(-1), {
    path: 'backends',
    before: ['a', 'b'],
    after: ['b', 'a']
  })
  const prices = (...models: string[]) => ({
    usage: { prices: models.map(model => ({ model, input: 1, output: 1 })) }
  })
  assert.deepEqual(paths(prices('a', 'b', 'c'), prices('x', 'a', 'b', 'c')), ['usage.prices[0]'])
  assert.deepEqual(paths(prices('a', 'b', 'c'), prices('a', 'x', 'c')), ['usage.prices[1].model'])
  assert.deepEqual(paths(prices('a', 'a', 'a'), prices('a', 'a')), ['usage.prices[2]'])
  const keys = { auth: { enabled: false, keys: ['sk-a'] } }
  assert.deepEqual(paths({}, keys), ['auth.keys[0]'])
  const tags = (header: string) => ({ usage: { tags: { team: header } } })
  assert.deepEqual(paths(tags('x-a'), tags('x-b')), ['usage.tags.team'])
})

test('that a secret differs is said, and nothing of it', () => {
  const secrets = (word: string) => ({
    backends: [{ name: 'a', url: 'http://a:1', api_key: word, headers: { 'x-key': word } }],
    auth: { keys: [{ key: word, name: 'alice' }, `${word}-2`] },
    storage: { caches: [{ name: 'c', driver: 'redis', password: word }] },
    admin: { token: word }
  })
  const found = changes(secrets('hush-1'), secrets('hush-2'))
  assert.deepEqual(
    found.changed.map(({ path }) => path),
    [
      'backends[a].api_key',
      'backends[a].headers.x-key',
      'auth.keys[0].key',
      'auth.keys[1].key',
      'storage.caches[c].password',
      'admin.token'
    ]
  )
  const all = [found, changes({}, secrets('hush-3')), changes(secrets('hush-4'), {})]
  assert.doesNotMatch(JSON.stringify(all), /hush|[0-9a-f]{64}/)
  assert.deepEqual(found.changed.at(-1), { path: 'admin.token', before: '***', after: '***' })
})

test('a gateway takes over all but what needs a restart', () => {
  const running = parse({ ...BASE, server: { listen: ':1' }, metrics: { path: '/m' } })
  const wanted = parse({
    backends: [{ url: 'http://b:2' }],
    server: { listen: ':2', idle_timeout: '7s', max_body_size: '1MB' },
    metrics: { enabled: false },
    admin: { db_path: 'other.db', enabled: true, token: 't' }
  })
  const taken = takeOver(ConfigSchema, running, wanted)
  assert.deepEqual(taken, {
    ...wanted,
    server: { ...running.server, idle_timeout: 7_000 },
    metrics: running.metrics,
    auth: running.auth,
    admin: running.admin
  })
  const { changed, restart_needed } = compare(ConfigSchema, taken, wanted)
  assert.deepEqual(changed, [], 'what was taken over differs no more')
  assert.deepEqual(
    restart_needed.map(({ path }) => path),
    [
      'server.listen',
      'server.max_body_size',
      'auth.db_path',
      'metrics.enabled',
      'metrics.path',
      'admin.enabled',
      'admin.token',
      'admin.db_path'
    ]
  )
})

test('what goes on as it is because it is switched off only at a restart is not said to be changed', () => {
  const on = { admin: { enabled: true, token: 'one' } }
  assert.deepEqual(paths(on, { admin: { enabled: true, token: 'two' } }), ['admin.token'])
  assert.deepEqual(paths(on, { admin: { enabled: false } }), ['!admin.enabled', '!admin.token'])
})

test('llmproxy diff: lines for people, JSON for programs; 0 is no difference, 1 one, 2 a bad file', async t => {
  const path = folder(t)
  const write = (name: string, config: object | string) => {
    mkdirSync(join(path, name))
    const file = join(path, name, 'config.yaml')
    writeFileSync(file, typeof config === 'string' ? config : stringify(config))
    return file
  }
  const diff = (...args: string[]) => runCommand(() => runDiff(args))
  const old = write('old', {
    server: { listen: ':1' },
    backends: [
      { name: 'a', url: 'http://a:1' },
      { name: 'b', url: 'http://b:1', api_key: 'hush' }
    ]
  })
  const same = write('same', `# as the other\n${stringify(BASE)}log: {level: info}\n`)
  const next = write('next', {
    server: { listen: ':2' },
    backends: [{ name: 'b', url: 'http://b:1', api_key: 'other', timeout: '5s' }]
  })
  const bad = write('bad', 'backends:\n  - url: http://a:1\n    weight: ten\n')
  const lines = [
    'Takes effect at a reload:',
    '  backends[a]: removed {"name":"a","url":"http://a:1",...}',
    '  backends[b].api_key: another secret',
    '  backends[b].timeout: added "5s"',
    'Needs a restart:',
    '  server.listen: ":1" -> ":2"'
  ]
  const none = join(path, 'none.yaml')
  const nothing = await diff(write('base', BASE), same)
  const text = await runProgram(['diff', old, next])
  const json = await diff(old, next, '--json')
  const refused = await runProgram(['diff', old, bad])
  const missing = await diff(none, old)
  const few = await diff(old)
  const unknown = await diff(old, next, '--nonsense')
  assert.deepEqual(nothing, { status: 0, stdout: '', stderr: '' })
  text.stdout = text.stdout.replace(/(removed .*?:1",).*\}/, '$1...}')
  assert.deepEqual(text, { status: 1, stdout: `${lines.join('\n')}\n`, stderr: '' })
  assert.equal(json.status, 1)
  const said: { changed: Change[]; restart_needed: Change[] } = JSON.parse(json.stdout)
  assert.deepEqual(said.restart_needed, [{ path: 'server.listen', before: ':1', after: ':2' }])
  assert.deepEqual(
    said.changed.map(({ path }) => path),
    ['backends[a]', 'backends[b].api_key', 'backends[b].timeout']
  )
  assert.deepEqual(refused, {
    status: 2,
    stdout: '',
    stderr:
      `${bad} cannot be used\n` +
      'config.yaml:3:5 backends[0].weight: must be an integer from 1 to 1000000 (got "ten")\n'
  })
  assert.match(missing.stderr, /none\.yaml: cannot be read \(ENOENT\)/)
  assert.match(few.stderr, /diff needs two files/)
  assert.deepEqual([missing.status, few.status, unknown.status], [2, 2, 2])
})
