import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { CLI, commandLine } from './process.ts'

const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8'))

function run(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(...commandLine([CLI, ...args]), {
    encoding: 'utf8',
    timeout: 20_000,
    env: { ...process.env, LLMPROXY_CONFIG: '' }
  })
  return { status, stdout, stderr }
}

test('--version, --help and misuse', () => {
  assert.deepEqual(run('--version'), { status: 0, stdout: `${version}\n`, stderr: '' })
  const help = run('--help')
  assert.equal(help.status, 0)
  for (const word of [
    'check [FILE]',
    '--config',
    'LLMPROXY_CONFIG',
    'LLMPROXY_DATA_DIR',
    'SIGHUP'
  ]) {
    assert.ok(help.stdout.includes(word), word)
  }
  const fly = run('fly')
  assert.equal(fly.status, 2)
  assert.match(fly.stderr, /no command "fly"/)
  assert.match(run('check').stdout, /llmproxy\.yaml is valid\n$/, 'the default file')
  assert.match(run('-config', '/none.yaml').stderr, /none\.yaml: cannot be read/, 'as the original')
  assert.equal(run('--config=').status, 2)
  const nonsense = run('--nonsense')
  assert.equal(nonsense.status, 2)
  assert.match(nonsense.stderr, /nonsense/)
})

test('check says whether a file is valid; serve exits with 1 and says why, within two seconds', t => {
  const path = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  t.after(() => rmSync(path, { recursive: true }))
  const good = join(path, 'good.yaml')
  writeFileSync(good, 'backends:\n  - url: http://a:1\n')
  assert.deepEqual(run('check', good), { status: 0, stdout: `${good} is valid\n`, stderr: '' })
  const bad = join(path, 'config.yaml')
  writeFileSync(bad, 'backends:\n  - url: http://a:1\n    weight: ten\n    wieght: 1\n')
  const lines =
    'config.yaml:3:5 backends[0].weight: must be an integer from 1 to 1000000 (got "ten")\n' +
    'config.yaml:4:5 backends[0].wieght: is not known; did you mean "weight"?\n'
  assert.deepEqual(run('check', bad), { status: 1, stdout: '', stderr: lines })
  const start = performance.now()
  assert.deepEqual(run('serve', '--config', bad), { status: 1, stdout: '', stderr: lines })
  assert.ok(performance.now() - start < (process.env.STRICT ? 2_000 : 20_000))
  const missing = run('--config', join(path, 'missing.yaml'))
  assert.equal(missing.status, 1)
  assert.match(missing.stderr, /missing\.yaml: cannot be read \(ENOENT\)/)
})

test('a port that is taken is said in a line', async t => {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => server.close())
  const { port } = server.address() as import('node:net').AddressInfo
  const path = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  t.after(() => rmSync(path, { recursive: true }))
  const file = join(path, 'config.yaml')
  writeFileSync(file, `server: {listen: "127.0.0.1:${port}"}\nbackends: [{url: "http://a:1"}]\n`)
  const { status, stderr } = run('--config', file)
  assert.equal(status, 1)
  assert.match(stderr, /^llmproxy: listen EADDRINUSE[^\n]*\n$/)
})
