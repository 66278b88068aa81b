import assert from 'node:assert/strict'
import { createHook } from 'node:async_hooks'
import { readFileSync } from 'node:fs'
import type { Server, ServerResponse } from 'node:http'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { loadConfig } from '../src/config.ts'
import { followFile } from '../src/follow.ts'
import { collectGarbage } from '../src/memory.ts'
import { startServer } from '../src/server.ts'
import { CHAT, chunk, DONE, fakeBackend, post, USAGE_CHUNK } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/**
 * Reloads while streams run: other backends, limits, keys, logs and reporters each time; every stream comes whole, byte
 * for byte, and nothing of what a reload has made is left behind. LONG=1: the full number.
 */

const RELOADS = process.env.LONG ? 1_000 : 10
const CLIENTS = 8
const TOKEN = 'admin-token'
const KEY = 'always'
/** What is compiled, and what is kept up to some size, has come by then. */
const WARM = RELOADS / 2
/** What the other half may leave (bytes): a lineup with its connections takes some 10 KB. */
const MAX_GROWTH = 3 * 1024 * 1024
/** Timers of a gateway with two backends that has nothing to do, and of this test. */
const MAX_TIMERS = 20

/** What a backend sends for a question: words, and pauses between them, that depend on it alone. */
function answerTo(seed: number): string[] {
  const words = Array.from({ length: 8 + (seed % 20) }, (_, at) => chunk(`${seed}-${at * seed}é `))
  return [...words, USAGE_CHUNK, DONE]
}

/** Three backends that stream; the answer to `long` goes on until it is ended. */
async function openBackends(t: TestContext) {
  const long: { response: ServerResponse; sent: string }[] = []
  const backends = await Promise.all(
    ['a', 'b', 'c'].map(() =>
      fakeBackend(t, async (request, response) => {
        // Health checks, and usage records.
        if (!request.url.endsWith('/chat/completions')) return void response.end()
        const { content } = JSON.parse(request.body).messages[0]
        response.writeHead(200, { 'content-type': 'text/event-stream' })
        if (content === 'long') return void long.push({ response, sent: '' })
        for (const [at, piece] of answerTo(Number(content)).entries()) {
          response.write(piece)
          await sleep((at % 3) * 2)
        }
        response.end()
      })
    )
  )
  const more = setInterval(() => {
    for (const each of long) {
      const piece = chunk(`word ${each.sent.length}`)
      each.sent += piece
      each.response.write(piece)
    }
  }, 20)
  t.after(() => clearInterval(more))
  /** Ends the long ones, and returns what each has sent. */
  const end = () => {
    clearInterval(more)
    return long.map(({ response, sent }) => {
      response.end(USAGE_CHUNK + DONE)
      return sent + USAGE_CHUNK + DONE
    })
  }
  return { backends, long, end }
}

/** The configuration after so many reloads; the last is as the first. */
function configOf(at: number, urls: string[], workers = 1) {
  const [a, b, c] = urls.map((url, place) => ({ name: 'abc'[place]!, url }))
  const lists = [
    [a, b],
    [a, { ...b, weight: 3 }],
    [b, c],
    [c],
    [{ ...c, connect_timeout: '3s' }, a],
    [a, { ...b, headers: { 'x-at': String(at) } }, c]
  ]
  const webhook = { type: 'webhook', webhook: { url: `${urls[0]}/hook-${at}` } }
  return {
    server: { listen: '127.0.0.1:0', workers, idle_timeout: `${60 + (at % 3)}s` },
    log: {
      level: at % 4 === 1 ? 'fatal' : 'error',
      output: 'file',
      file: { max_files: 9 + (at % 2) }
    },
    backends: lists[at % lists.length],
    routing: {
      load_balance: ['round_robin', 'least_connections'][at % 2],
      model_discovery: { timeout: '1s' }
    },
    health_check: { enabled: at % 3 === 1, interval: '50ms', timeout: '1s' },
    auth: { enabled: true, keys: [KEY, `key-${at}`], skip_paths: ['/metrics'] },
    rate_limit: {
      enabled: true,
      per_key: { max_concurrent: 100 + (at % 7), requests_per_minute: 1_000_000 + (at % 5) }
    },
    usage: {
      enabled: true,
      prices: [{ model: 'm', input: 1, output: 1 + (at % 2) }],
      reporters: [
        { name: 'kept', type: 'file', file: { path: 'usage.jsonl' } },
        ...(at % 5 === 2 ? [{ ...webhook, name: 'other', max_age: '1s' }] : [])
      ]
    },
    logging: { enabled: at % 2 === 1, access: { enabled: true, output: 'file' } },
    admin: { enabled: true, token: TOKEN }
  }
}

async function reload(url: string): Promise<void> {
  const response = await fetch(`${url}/admin/reload`, {
    method: 'POST',
    headers: { 'x-admin-token': TOKEN, connection: 'close' }
  })
  const text = await response.text()
  assert.equal(response.status, 200, text)
}

function ask(url: string, content: string, key = KEY): Promise<Response> {
  const body = {
    ...CHAT,
    messages: [{ role: 'user', content }],
    stream: true,
    stream_options: { include_usage: true }
  }
  return post(`${url}/v1/chat/completions`, body, { 'x-api-key': key, connection: 'close' })
}

/** Streams, one after the other for each client, until it is told to stop. */
function load(t: TestContext, url: string) {
  let isOver = false
  t.after(() => {
    isOver = true
  })
  let streams = 0
  const client = async () => {
    while (!isOver) {
      const seed = ++streams
      const response = await ask(url, String(seed))
      assert.equal(await response.text(), answerTo(seed).join(''), `stream ${seed}`)
    }
  }
  const clients = Promise.all(Array.from({ length: CLIENTS }, client))
  // An error of a client is thrown by stop().
  clients.catch(() => {})
  return {
    async stop() {
      isOver = true
      await clients
      return streams
    }
  }
}

/** Timers that live, wherever they come from and whether or not they hold the process. */
function countTimers(t: TestContext): () => number {
  const alive = new Set<number>()
  const hook = createHook({
    init: (id, type) => void (type === 'Timeout' && alive.add(id)),
    destroy: id => void alive.delete(id)
  }).enable()
  t.after(() => hook.disable())
  return () => alive.size
}

function connectionsOf(server: Server): Promise<number> {
  return new Promise((resolve, reject) => {
    server.getConnections((error, count) => (error ? reject(error) : resolve(count)))
  })
}

/** Resolves when it is so, or when it should have been for long. */
async function until(isSo: () => boolean | Promise<boolean>): Promise<void> {
  const startedAt = performance.now()
  while (!(await isSo()) && performance.now() - startedAt < 10_000) await sleep(20)
}

async function inFlight(url: string): Promise<string[]> {
  const text = await (await fetch(`${url}/metrics`, { headers: { connection: 'close' } })).text()
  return text.split('\n').filter(line => /^llmproxy_(backend|requests)_in_flight/.test(line))
}

const NOTHING_IN_FLIGHT = [
  'llmproxy_requests_in_flight 0',
  'llmproxy_backend_in_flight{backend="a"} 0',
  'llmproxy_backend_in_flight{backend="b"} 0'
]

test(`${RELOADS} reloads under load: every stream is whole, and nothing is left behind`, {
  timeout: 300_000
}, async t => {
  let close = async () => {}
  // Before its folder goes.
  t.after(() => close())
  const dataDir = folder(t)
  const { backends, long, end } = await openBackends(t)
  const urls = backends.map(({ url }) => url)
  const file = join(dataDir, 'config.yaml')
  const write = (at: number) => writeConfig(file, configOf(at, urls))
  const warnings: string[] = []
  const onWarning = ({ name, message }: Error) => warnings.push(`${name}: ${message}`)
  process.on('warning', onWarning)
  t.after(() => process.off('warning', onWarning))
  write(0)
  const config = await loadConfig(file)
  const timers = countTimers(t)
  const server = await startServer(config, dataDir)
  const following = followFile(file, config, server)
  const { url } = server
  close = async () => {
    close = async () => {}
    await following.stop()
    await server.close()
  }

  // One goes on from the first reload to the last, with a key that the second takes away.
  const whole = ask(url, 'long', 'key-0').then(response => response.text())
  await until(() => long.length === 1)
  const running = load(t, url)
  const run = async (from: number, to: number) => {
    for (let at = from; at < to; at++) {
      write(at)
      await reload(url)
    }
    write(0)
    await reload(url)
  }
  const settle = async (open: number) => {
    await until(() => server.gateway.exchanges.open.length <= open)
    for (const { requests } of backends) requests.length = 0
    collectGarbage()
    return process.memoryUsage().heapUsed
  }
  await run(1, WARM)
  const listenersBefore = process.eventNames().map(name => process.listenerCount(name))
  const heapBefore = await settle(CLIENTS + 1)
  const startedAt = performance.now()
  await run(WARM, RELOADS)
  const took = (performance.now() - startedAt) / (RELOADS - WARM)
  const heapAfter = await settle(CLIENTS + 1)
  const listenersAfter = process.eventNames().map(name => process.listenerCount(name))
  const streams = await running.stop()
  assert.deepEqual(end(), [await whole])
  await settle(0)

  t.diagnostic(
    `${streams} streams; ${took.toFixed(1)} ms a reload; heap ${((heapAfter - heapBefore) / 1024).toFixed()} KB more`
  )
  assert.ok(streams > RELOADS / 2, 'the load was too weak')
  assert.deepEqual(await inFlight(url), NOTHING_IN_FLIGHT, 'no backend is left, and no attempt')
  // Idle connections of health checks close after 4 s, and what waits for an answer that has come after 1 s.
  const { server: gone } = backends[2]!
  await until(async () => (await connectionsOf(gone)) === 0 && timers() <= MAX_TIMERS)
  assert.equal(await connectionsOf(gone), 0)
  assert.ok(timers() <= MAX_TIMERS, `${timers()} timers`)
  assert.deepEqual(listenersAfter, listenersBefore)
  assert.deepEqual(warnings, [])
  assert.ok(heapAfter - heapBefore < MAX_GROWTH)

  // All slots are free: one is enough for the next call.
  writeConfig(file, {
    ...configOf(0, urls),
    rate_limit: { enabled: true, per_key: { max_concurrent: 1 } }
  })
  await reload(url)
  assert.equal(await (await ask(url, '1')).text(), answerTo(1).join(''))

  await close()
  const lines = readFileSync(join(dataDir, 'usage.jsonl'), 'utf8').trim().split('\n')
  const ids = new Set(lines.map(line => JSON.parse(line).request_id))
  assert.equal(ids.size, streams + 2, 'a record for every stream')
})

test('reloads under load reach all workers, and no stream is lost', {
  timeout: 300_000
}, async t => {
  const dataDir = folder(t)
  const { backends, long, end } = await openBackends(t)
  const urls = backends.map(({ url }) => url)
  const file = join(dataDir, 'config.yaml')
  const write = (at: number) => writeConfig(file, { ...configOf(at, urls, 2), log: {} })
  write(0)
  const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dataDir })
  const { url } = gateway
  const whole = ask(url, 'long', 'key-0').then(response => response.text())
  await until(() => long.length === 1)
  const running = load(t, url)
  for (let at = 1; at < RELOADS / 5; at++) {
    write(at)
    await reload(url)
    // Each connection comes to the next worker.
    for (let worker = 0; worker < 2; worker++) {
      await (await ask(url, '1', `key-${at}`)).text()
    }
  }
  write(0)
  await reload(url)
  const streams = await running.stop()
  assert.deepEqual(end(), [await whole])
  assert.ok(streams > RELOADS / 5)
  await until(async () => (await inFlight(url)).join() === NOTHING_IN_FLIGHT.join())
  assert.deepEqual(await inFlight(url), NOTHING_IN_FLIGHT)
  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
})
