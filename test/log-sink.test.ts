import assert from 'node:assert/strict'
import { execFileSync, type StdioOptions, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, constants, createReadStream, openSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { LogSink } from '../src/logs/sink.ts'
import { CHAT, closedPort, eventually, fakeBackend, post, rawClient, rawPost } from './helper.ts'
import { CLI, commandLine, folder, writeConfig } from './process.ts'

/** A gateway whose log goes where the test says, and which therefore can't tell its port. */
async function serve(
  t: TestContext,
  stdout: 'pipe' | number,
  log: object = {},
  url = 'demo://',
  more: object = {}
) {
  const port = await closedPort()
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    server: { listen: `127.0.0.1:${port}` },
    log: { level: 'debug', ...log },
    backends: [{ url }],
    ...more
  })
  const stdio: StdioOptions = ['ignore', stdout, 'pipe']
  const env = { ...process.env, LLMPROXY_DATA_DIR: dirname(file) }
  const child = spawn(...commandLine([CLI, '--config', file]), { stdio, env })
  t.after(() => child.kill('SIGKILL'))
  let stderr = ''
  child.stderr!.on('data', (data: Buffer) => {
    stderr += data
  })
  const health = async () => (await fetch(`http://127.0.0.1:${port}/health`)).text()
  await eventually(() => health().catch(() => ''))
  return {
    child,
    port,
    health,
    stderr: () => stderr,
    /** Sends a signal and resolves with the exit code. */
    async stop(signal: NodeJS.Signals) {
      const exit = once(child, 'exit')
      child.kill(signal)
      return (await exit)[0]
    }
  }
}

/** A pipe by its name, and a descriptor to which a write never waits. */
function namedPipe(t: TestContext): { path: string; pipe: number } {
  const path = join(folder(t), 'pipe')
  execFileSync('mkfifo', [path])
  return { path, pipe: openSync(path, constants.O_RDWR | constants.O_NONBLOCK) }
}

/** A descriptor of a pipe that nobody reads. */
function stuckPipe(t: TestContext): number {
  return namedPipe(t).pipe
}

for (const [name, stdout, log, complaint] of [
  ['a pipe whose reader has gone', 'pipe', {}, /EPIPE/],
  ['a full disk', openSync('/dev/full', 'w'), {}, /ENOSPC/],
  ['a full disk, as text', openSync('/dev/full', 'w'), { format: 'text' }, /ENOSPC/],
  ['a file on a full disk', 'pipe', { output: 'file', file: { path: '/dev/full' } }, /ENOSPC/]
] as const) {
  test(`serving goes on without a log: ${name}`, { timeout: 20_000 }, async t => {
    const gateway = await serve(t, stdout, log)
    if (name.includes('reader')) gateway.child.stdout!.destroy()
    while (!complaint.test(gateway.stderr())) {
      await gateway.health()
      await sleep(20)
    }
    for (let call = 0; call < 50; call++) assert.match(await gateway.health(), /"status":"ok"/)
    assert.equal(await gateway.stop('SIGTERM'), 0)
    assert.equal(gateway.stderr().split('\n').length, 2, 'it is said once')
  })
}

test('serving goes on, and ends, when nobody reads the log', { timeout: 30_000 }, async t => {
  const gateway = await serve(t, stuckPipe(t))
  // More than a pipe holds (64 KB).
  for (let call = 0; call < 600; call++) await gateway.health()
  assert.equal(await gateway.stop('SIGTERM'), 0)
  assert.equal(gateway.stderr(), '')
})

test('the access log on a standard output that nobody reads does not keep the process from its end', {
  timeout: 30_000
}, async t => {
  const logs = { log: { output: 'file' }, logging: { enabled: true, access: { enabled: true } } }
  const gateway = await serve(t, stuckPipe(t), logs.log, 'demo://', { logging: logs.logging })
  const url = `http://127.0.0.1:${gateway.port}/${'x'.repeat(500)}`
  for (let call = 0; call < 200; call++) await (await fetch(url)).text()
  assert.equal(await gateway.stop('SIGTERM'), 0)
})

test('lines that nobody reads are dropped at last, and that is said', async t => {
  const sink = new URL('../src/logs/sink.ts', import.meta.url)
  const code = `
    import { LogSink } from '${sink}'
    const sink = new LogSink(1, 'log')
    for (let line = 0; line < 100_000; line++) sink.write('x'.repeat(99) + '\\n')
    await sink.close()`
  const args = ['--input-type=module', '-e', code]
  const child = spawn(process.execPath, args, { stdio: ['ignore', stuckPipe(t), 'pipe'] })
  let stderr = ''
  child.stderr!.on('data', (data: Buffer) => {
    stderr += data
  })
  await once(child, 'close')
  const counts = stderr.match(/^llmproxy: the log is not read; lines dropped: \d+$/gm)
  assert.equal(counts?.length, 2, stderr)
  const dropped = counts.reduce((sum, line) => sum + Number(/\d+$/.exec(line)![0]), 0)
  assert.ok(dropped > 10_000 && dropped < 20_000, String(dropped))
})

test('two sinks on one pipe that is full: no line gets into another', async t => {
  const { path, pipe } = namedPipe(t)
  const sinks = [new LogSink(pipe, 'log'), new LogSink(pipe, 'access log')]
  // Much more than a pipe holds (64 KB).
  for (let count = 0; count < 2000; count++) {
    for (const [at, sink] of sinks.entries()) sink.write(`${`${at}`.repeat(100 + (count % 50))}\n`)
  }
  let read = ''
  const reader = createReadStream(path, { highWaterMark: 1000 })
  for await (const data of reader) {
    read += data
    if (read.split('\n').length > 4000) break
  }
  for (const line of read.trimEnd().split('\n')) assert.match(line, /^(0+|1+)$/)
  for (const sink of sinks) await sink.close()
  closeSync(pipe)
})

test('a line that comes while a pipe takes others in pieces is written without waiting for more', async t => {
  const { path, pipe } = namedPipe(t)
  const sink = new LogSink(pipe, 'log')
  for (let line = 0; line < 170; line++) sink.write(`${'x'.repeat(99)}\n`)
  sink.write('the last\n')
  let read = ''
  for await (const data of createReadStream(path)) {
    read += data
    if (read.endsWith('the last\n')) break
  }
  assert.equal(read.length, 170 * 100 + 9)
  await sink.close()
  closeSync(pipe)
})

test('a process that ends while a pipe takes lines in pieces writes the rest', async () => {
  const sink = new URL('../src/logs/sink.ts', import.meta.url)
  const code = `
    import { LogSink } from '${sink}'
    const sink = new LogSink(1, 'log')
    for (let line = 100; line < 300; line++) sink.write(line + 'x'.repeat(96) + '\\n')
    process.exit()`
  const args = ['--input-type=module', '-e', code]
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  let read = ''
  child.stdout.on('data', (data: Buffer) => {
    read += data
  })
  await once(child, 'close')
  const lines = read.trimEnd().split('\n').sort()
  assert.deepEqual(
    lines.map(line => Number(line.slice(0, 3))),
    Array.from({ length: 200 }, (_, at) => 100 + at)
  )
})

test('a second signal ends the process at once', { timeout: 30_000 }, async t => {
  const backend = await fakeBackend(t, () => {})
  const gateway = await serve(t, stuckPipe(t), {}, backend.url)
  const body = JSON.stringify(CHAT)
  await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await backend.request()
  for (let call = 0; call < 600; call++) await gateway.health()
  gateway.child.kill('SIGTERM')
  // Draining: no more calls are taken, and idle connections are closed.
  const late = () => post(`http://127.0.0.1:${gateway.port}/v1/embeddings`, CHAT)
  while ((await late().catch(() => undefined))?.status !== 503) {}
  assert.equal(await gateway.stop('SIGINT'), 1)
})
