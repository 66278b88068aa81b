import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import {
  copyFileSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'

/** The package as a stranger gets it: packed, installed into an empty folder, and used from there. */

const ROOT = new URL('../..', import.meta.url).pathname
const HOSTS = join(import.meta.dirname, 'hosts')
const { exports, version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'))
const NO_PLUGINS = ['./package.json', './types']
let folder: string

const run = (command: string, ...args: string[]) =>
  execFileSync(command, args, { cwd: folder, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] })

before(() => {
  folder = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  writeFileSync(join(folder, 'package.json'), '{"type": "module"}')
  const [{ filename }] = JSON.parse(
    execFileSync('npm', ['pack', '--json', '--pack-destination', folder], {
      cwd: ROOT,
      encoding: 'utf8'
    })
  )
  run('npm', 'install', '--no-audit', '--no-fund', '--prefer-offline', join(folder, filename))
})
after(() => rmSync(folder, { recursive: true, force: true }))

test('every subpath exports a plugin and its types', () => {
  const subpaths = Object.keys(exports).filter(path => !NO_PLUGINS.includes(path))
  const names = subpaths.map(path => path.replace(/^\./, 'llmproxy'))
  const script = names
    .map(
      (name, at) =>
        `import p${at} from '${name}'; if (typeof p${at} !== 'function') throw '${name}'`
    )
    .join('\n')
  writeFileSync(join(folder, 'all.js'), script)
  run(process.execPath, 'all.js')
  for (const path of subpaths) {
    const types = readFileSync(join(folder, 'node_modules/llmproxy', exports[path].types), 'utf8')
    assert.match(types, /export default/)
  }
})

test('a program that mounts it type-checks and serves', () => {
  for (const name of ['server', 'parts']) {
    const source = readFileSync(join(ROOT, `examples/embed/${name}.ts`), 'utf8')
    writeFileSync(join(folder, `${name}.ts`), source)
  }
  writeFileSync(
    join(folder, 'try.ts'),
    `import { buildServer } from './server.ts'
    const fastify = await buildServer({ team: 'demo://', lab: 'demo://' })
    const body = { model: 'demo', messages: [{ role: 'user', content: 'Hello' }] }
    const answer = await fastify.inject({ method: 'POST', url: '/lab/v1/chat/completions', body })
    if (answer.statusCode !== 200) throw new Error(answer.body)
    await fastify.close()`
  )
  run(process.execPath, 'try.ts')
  typeCheck('server.ts', 'parts.ts', 'try.ts')
})

for (const host of readdirSync(HOSTS)) {
  test(`a host type-checks and runs: ${host}`, () => {
    copyFileSync(join(HOSTS, host), join(folder, host))
    typeCheck(host)
    run(process.execPath, host)
  })
}

function typeCheck(...files: string[]): void {
  const tsc = join(ROOT, 'node_modules/.bin/tsc')
  const options = ['--noEmit', '--strict', '--module', 'nodenext', '--target', 'es2024']
  const more = ['--exactOptionalPropertyTypes', '--allowImportingTsExtensions']
  const roots = ['--types', 'node', '--typeRoots', join(ROOT, 'node_modules/@types')]
  run(tsc, ...options, ...more, ...roots, ...files)
}

test('the command works from there', () => {
  const bin = join(folder, 'node_modules/.bin/llmproxy')
  assert.equal(run(process.execPath, bin, '--version'), `${version}\n`)
  writeFileSync(join(folder, 'config.yaml'), 'backends:\n  - url: demo://\n')
  assert.equal(run(process.execPath, bin, 'check', 'config.yaml'), 'config.yaml is valid\n')
})

const OLD_NODE = (process.env.PATH ?? '')
  .split(':')
  .map(path => join(path, 'node'))
  .find(path => existsSync(path) && Number(run(path, '-p', 'parseInt(process.versions.node)')) < 24)

test('an old Node is refused in one line', {
  skip: OLD_NODE === undefined && 'no Node below 24 is in PATH'
}, () => {
  const { stderr } = spawnSync(OLD_NODE!, [join(folder, 'node_modules/llmproxy/dist/cli.js')], {
    encoding: 'utf8'
  })
  assert.match(stderr, /^llmproxy needs Node.js 24 or later; this is .*\n$/)
  const subpaths = Object.keys(exports).filter(path => !NO_PLUGINS.includes(path))
  const names = subpaths.map(path => path.replace(/^\./, 'llmproxy'))
  const script = `for (const name of ${JSON.stringify(names)}) {
    console.log(await import(name).then(() => name, error => error.message))
  }`
  writeFileSync(join(folder, 'old.js'), script)
  const lines = run(OLD_NODE!, 'old.js').trim().split('\n')
  assert.equal(lines.length, names.length)
  for (const line of lines) assert.match(line, /^llmproxy needs Node.js 24 or later; this is /)
})

test('it holds what is needed and nothing else', () => {
  const files = run(
    'find',
    'node_modules/llmproxy',
    '-type',
    'f',
    '-not',
    '-path',
    '*/node_modules/llmproxy/node_modules/*'
  )
  assert.doesNotMatch(files, /\/(src|test|docs|\.ci)\//)
  for (const file of ['dist/cli.js', 'config/llmproxy.yaml', 'README.md', 'package.json']) {
    assert.ok(files.includes(`node_modules/llmproxy/${file}\n`), file)
  }
})
