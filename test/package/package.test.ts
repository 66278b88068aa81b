import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'

/** The package as a stranger gets it: packed, installed into an empty folder, and used from there. */

const ROOT = new URL('../..', import.meta.url).pathname
const { exports, version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'))
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
  const subpaths = Object.keys(exports).filter(path => path !== './package.json')
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
  const tsc = join(ROOT, 'node_modules/.bin/tsc')
  const options = ['--noEmit', '--strict', '--module', 'nodenext', '--target', 'es2024']
  const more = ['--exactOptionalPropertyTypes', '--allowImportingTsExtensions', '--skipLibCheck']
  const roots = ['--types', 'node', '--typeRoots', join(ROOT, 'node_modules/@types')]
  run(tsc, ...options, ...more, ...roots, 'server.ts', 'parts.ts', 'try.ts')
})

test('the command works from there', () => {
  const bin = join(folder, 'node_modules/.bin/llmproxy')
  assert.equal(run(process.execPath, bin, '--version'), `${version}\n`)
  writeFileSync(join(folder, 'config.yaml'), 'backends:\n  - url: demo://\n')
  assert.equal(run(process.execPath, bin, 'check', 'config.yaml'), 'config.yaml is valid\n')
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
