import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { globSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { nodeIssue } from '../src/node-version.ts'
import { CLI } from './process.ts'

/** An old Node is refused in one line, whatever else it lacks. */

const ROOT = new URL('..', import.meta.url).pathname
const { engines, exports } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'))
const OLD = `Object.defineProperty(process, 'version', { value: 'v22.1.0' })`
const MESSAGE = `llmproxy needs Node.js 24 or later; this is v22.1.0 (${process.execPath})`

function onOldNode(...args: string[]) {
  const preload = ['--import', `data:text/javascript,${encodeURIComponent(OLD)}`]
  return spawnSync(process.execPath, [...preload, ...args], { cwd: ROOT, encoding: 'utf8' })
}

test('versions below that of engines are refused', () => {
  assert.equal(engines.node, '>=24')
  for (const version of ['v8.0.0', 'v18.20.8', 'v22.23.3', 'v23.11.1']) {
    assert.match(nodeIssue(version)!, /^llmproxy needs Node.js 24 or later; this is v\S+ \(.*\)$/)
  }
  for (const version of ['v24.0.0', 'v26.10.0', 'v100.0.0', 'v27.0.0-nightly2026']) {
    assert.equal(nodeIssue(version), undefined)
  }
})

test('at start it says so in one line', () => {
  const { status, stdout, stderr } = onOldNode(CLI)
  assert.deepEqual([status, stdout, stderr], [1, '', `${MESSAGE}\n`])
})

test('every module that a host imports says so', () => {
  const modules = Object.values<Record<string, string>>(exports)
    .map(each => each['llmproxy-source'])
    .filter(file => file !== undefined && file !== './src/types.ts')
  const script = `for (const file of ${JSON.stringify(modules)}) {
    console.log(await import(file).then(() => file, error => error.message))
  }`
  const { stdout } = onOldNode('--input-type=module', '-e', script)
  assert.deepEqual(stdout.trim().split('\n'), Array(modules.length).fill(MESSAGE))
})

test('no name is imported that Node 18 lacks: that would fail before the version is looked at', () => {
  for (const file of globSync('src/**/*.ts', { cwd: ROOT })) {
    const text = readFileSync(join(ROOT, file), 'utf8')
    assert.doesNotMatch(text, /^import \{[^}]*\bhash\b[^}]*\} from 'node:crypto'/m, file)
  }
})
