import assert from 'node:assert/strict'
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { answerChat, CHAT, fakeBackend, post } from './helper.ts'
import { CLI, commandLine, folder, type Process, start, workersOf, writeConfig } from './process.ts'

/** How the gateway ends where something does not let it, before it has begun, and with its terminal. */

/** What ends late here would never end. */
const LATE = 15_000
const LONG = process.env.LONG === '1'
const server = (workers = 1) => ({ listen: '127.0.0.1:0', workers, drain_timeout: 0 })

/** The exit code, or what says that there is none. */
function exitOf({ exit }: Pick<Process, 'exit'>): Promise<number | null | string> {
  return Promise.race([exit, sleep(LATE, 'still running', { ref: false })])
}

/**
 * SQLite hangs in all threads while a file is there, as on a disk that does not respond: in the system, where no
 * termination of the thread reaches it.
 */
const HANG = `
  const { existsSync, openSync, writeSync } = require('node:fs')
  const { isMainThread } = require('node:worker_threads')
  const { prototype } = require('node:sqlite').DatabaseSync
  const { prepare } = prototype
  prototype.prepare = function (sql) {
    if (!isMainThread && existsSync(process.env.HANG + '.now')) {
      writeSync(1, '{"msg":"hanging"}\\n')
      openSync(process.env.HANG + '.fifo')
    }
    return prepare.call(this, sql)
  }
`

/** A gateway whose key store hangs while a call waits for it. */
async function startHanging(t: TestContext, workers: number): Promise<Process> {
  const dir = folder(t)
  const hang = join(dir, 'hang.cjs')
  writeFileSync(hang, HANG)
  execFileSync('mkfifo', [`${hang}.fifo`])
  const backend = await fakeBackend(t, answerChat)
  const file = writeConfig(join(dir, 'config.yaml'), {
    server: server(workers),
    backends: [{ url: backend.url }],
    auth: { enabled: true, pipeline: [{ type: 'builtin' }] }
  })
  const env = { LLMPROXY_DATA_DIR: dir, HANG: hang, NODE_OPTIONS: `--require=${hang}` }
  const gateway = await start(t, [CLI, '--config', file], env)
  writeFileSync(`${hang}.now`, '')
  void post(`${gateway.url}/v1/chat/completions`, CHAT, { 'x-api-key': 'sk-any' }).catch(() => {})
  await gateway.logged('hanging')
  return gateway
}

const WHO = ['', 'one process', 'two workers']
/** The longer ones, for `npm run test:long`. */
const long = !LONG && 'LONG=1'

for (const workers of [1, 2]) {
  const who = WHO[workers]
  test(`a storage thread that hangs does not keep the gateway from its end (${who})`, {
    skip: long
  }, async t => {
    const gateway = await startHanging(t, workers)
    gateway.child.kill('SIGTERM')
    assert.equal(await exitOf(gateway), 0)
  })

  test(`a second signal ends it immediately, whatever hangs (${who})`, {
    skip: workers === 2 && long
  }, async t => {
    const gateway = await startHanging(t, workers)
    gateway.child.kill('SIGTERM')
    await gateway.logged('shutting down')
    gateway.child.kill('SIGTERM')
    assert.equal(await exitOf(gateway), 1)
  })
}

/** Runs a program in a process whose thread hangs; returns its exit code, or how it ended. */
function runHanging(t: TestContext, program: string): number | string | null {
  const fifo = join(folder(t), 'fifo')
  execFileSync('mkfifo', [fifo])
  const script = `
    import { Worker } from 'node:worker_threads'
    import { once } from 'node:events'
    import { readFileSync } from 'node:fs'
    import { endWithin, exitWithoutWaiting } from '${new URL('../src/exit.ts', import.meta.url)}'
    const text = 'require("node:worker_threads").parentPort.postMessage(0);require("node:fs").openSync("${fifo}")'
    await once(new Worker(text, { eval: true, execArgv: [] }), 'message')
    ${program}`
  const { status, signal } = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
    timeout: LATE,
    killSignal: 'SIGKILL'
  })
  return status ?? signal
}

test('a deadline ends a process whose threads hang, and one whose main thread does', t => {
  assert.equal(runHanging(t, 'exitWithoutWaiting(); process.exit(3)'), 3)
  assert.equal(runHanging(t, 'endWithin(1, () => {}); await new Promise(() => {})'), 1)
  const blocked = 'Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)'
  assert.equal(runHanging(t, `endWithin(1, () => {}); ${blocked}`), 1)
})

/** Says when the first handler of SIGTERM is there, and whether the program has been loaded by then. */
const FIRST = `
  const { on } = process
  process.on = function (name, listener) {
    const result = on.call(this, name, listener)
    if (name !== 'SIGTERM') return result
    process.on = on
    const isLoaded = Object.keys(require.cache).some(each => each.includes('/fastify/'))
    require('node:fs').writeSync(1, JSON.stringify({ isLoaded }))
    return result
  }
`

const NAMESPACE = ['--pid', '--fork', '--kill-child', '--mount-proc']
const canUnshare = spawnSync('unshare', [...NAMESPACE, 'true']).status === 0

for (const [what, command] of [
  ['', []],
  [' as process 1', ['unshare', ...NAMESPACE]]
] as const) {
  const skip = command.length > 0 && !canUnshare && 'no process namespace can be made here'
  test(`SIGTERM is handled from the first line on${what}`, { skip }, async t => {
    const dir = folder(t)
    const first = join(dir, 'first.cjs')
    writeFileSync(first, FIRST)
    const file = writeConfig(join(dir, 'config.yaml'), {
      server: server(),
      backends: [{ url: 'demo://' }]
    })
    const [name, ...args] = [
      ...command,
      process.execPath,
      '--require',
      first,
      CLI,
      '--config',
      file
    ]
    const child = spawn(name!, args, { stdio: ['ignore', 'pipe', 'inherit'] })
    t.after(() => child.kill('SIGKILL'))
    const exit = once(child, 'exit').then(([code]) => code as number | null)
    const [text] = await once(child.stdout, 'data')
    assert.equal(JSON.parse(text).isLoaded, false)
    process.kill(command.length > 0 ? workersOf(child.pid!)[0]! : child.pid!, 'SIGTERM')
    assert.equal(await exitOf({ exit }), 0)
  })
}

test('SIGTERM at any moment of the start ends it with 0', { skip: long }, async t => {
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    server: server(2),
    backends: [{ url: 'demo://' }]
  })
  for (let delay = 200; delay <= 1_400; delay += 100) {
    const child = spawn(...commandLine([CLI, '--config', file]), { stdio: 'ignore' })
    t.after(() => child.kill('SIGKILL'))
    const exit = once(child, 'exit').then(([code]) => code as number | null)
    await sleep(delay)
    child.kill('SIGTERM')
    assert.equal(await exitOf({ exit }), 0, `after ${delay} ms`)
  }
})

const NO_SCRIPT = spawnSync('script', ['--version']).error ? 'script is not installed' : false

for (const [who, workers, isNpm] of [
  ['one process', 1, false],
  ['two workers', 2, false],
  ['npm start', 1, true]
] as const) {
  test(`a closed terminal ends the gateway in its foreground; before that SIGHUP reloads (${who})`, {
    skip: NO_SCRIPT || (who !== 'one process' && long)
  }, async t => {
    const file = writeConfig(join(folder(t), 'config.yaml'), {
      server: server(workers),
      log: { format: 'json' },
      backends: [{ url: 'demo://' }]
    })
    const program = isNpm ? 'npm start --' : `${process.execPath} ${CLI}`
    // A shell is in between, as in a terminal.
    const command = `${program} --config ${file}; true`
    const gateway = await start(t, ['-qfec', command, '/dev/null'], {}, 'script')
    const pid = childOf(gateway.child.pid!, isNpm ? 3 : 2)
    t.after(() => spawnSync('kill', ['-9', String(pid)]))
    process.kill(pid, 'SIGHUP')
    await gateway.logged('configuration reloaded')
    gateway.child.kill('SIGKILL')
    const late = AbortSignal.timeout(LATE)
    const isServing = () =>
      fetch(`${gateway.url}/health`).then(
        () => true,
        () => false
      )
    while (await isServing()) {
      assert.ok(!late.aborted, 'still serving')
      await sleep(20)
    }
  })
}

/** The process that many generations below this one. */
function childOf(pid: number, generations: number): number {
  return generations === 0 ? pid : childOf(workersOf(pid)[0]!, generations - 1)
}
