import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Worker } from 'node:worker_threads'
import { answerChat, CHAT, eventually, fakeBackend, post, startGateway } from './helper.ts'
import { CLI, folder, type Process, start, writeConfig } from './process.ts'

/**
 * Receivers that are down or slow, and a disk that is full: clients notice nothing, and records are not lost.
 * LONG=1: the full numbers, for the documentation.
 */

const { LONG } = process.env

/** A receiver of usage records that can be taken away. */
async function receiver(t: TestContext, answerAfter = 0) {
  const ids: string[] = []
  let deliveries = 0
  const server = createServer(async (request, response) => {
    let body = ''
    for await (const data of request) body += data
    deliveries++
    if (answerAfter > 0) await sleep(answerAfter)
    for (const { request_id } of [JSON.parse(body)].flat()) ids.push(request_id)
    response.end()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as { port: number }
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  return {
    ids,
    url: `http://127.0.0.1:${port}`,
    get deliveries() {
      return deliveries
    },
    async down() {
      server.closeAllConnections()
      server.close()
      await once(server, 'close')
    },
    async up() {
      server.listen(port, '127.0.0.1')
      await once(server, 'listening')
    },
    async taken(count: number) {
      await eventually(() => ids.length >= count)
    }
  }
}

async function startProcess(t: TestContext, dataDir: string, webhook: object): Promise<Process> {
  const backend = await fakeBackend(t, answerChat)
  const file = writeConfig(join(dataDir, 'config.json'), {
    server: { listen: '127.0.0.1:0' },
    backends: [{ url: backend.url }],
    usage: { enabled: true, reporters: [{ name: 'billing', type: 'webhook', webhook }] }
  })
  return start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dataDir })
}

/** Calls at this rate for so long (ms), by a few clients; returns the ids in order and how long each took (ms). */
async function load(url: string, perSecond: number, ms: number, clients = 32) {
  const ids: string[] = []
  const times: number[] = []
  const begin = performance.now()
  const total = Math.round((perSecond * ms) / 1000)
  let next = 0
  const client = async () => {
    while (next < total) {
      const due = begin + (next++ / perSecond) * 1000
      const wait = due - performance.now()
      if (wait > 0) await sleep(wait)
      const startedAt = performance.now()
      const answer = await post(`${url}/v1/chat/completions`, CHAT)
      assert.equal(answer.status, 200)
      await answer.text()
      times.push(performance.now() - startedAt)
      ids.push(answer.headers.get('x-llmproxy-request-id')!)
    }
  }
  await Promise.all(Array.from({ length: clients }, client))
  return { ids, times: times.sort((a, b) => a - b) }
}

function privateMb(pid: number): number {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8')
  return Number(/RssAnon:\s+(\d+)/.exec(status)![1]) / 1024
}

function at(sorted: number[], share: number): string {
  return `${sorted[Math.floor((sorted.length - 1) * share)]!.toFixed(1)} ms`
}

test('a receiver that is down for a while: all is there, in order, and no client notices', async t => {
  const downtime = LONG ? 60_000 : 1_000
  const sink = await receiver(t)
  const gateway = await startProcess(t, folder(t), { url: sink.url, concurrency: 1 })
  // One client: the order of its answers is the order of their ends.
  const before = await load(gateway.url, 100, downtime / 4, 1)
  await sink.taken(before.ids.length)
  await sink.down()
  const during = await load(gateway.url, 100, downtime, 1)
  assert.equal(sink.ids.length, before.ids.length)
  const upAt = performance.now()
  await sink.up()
  const all = [...before.ids, ...during.ids]
  await sink.taken(all.length)
  assert.deepEqual(sink.ids, all)
  t.diagnostic(
    `down for ${downtime / 1000} s at 100 calls/s: ${during.ids.length} records, all there ${Math.round(performance.now() - upAt)} ms after it was up, in order; ` +
      `calls p50 ${at(before.times, 0.5)} before and ${at(during.times, 0.5)} during, p99 ${at(before.times, 0.99)} and ${at(during.times, 0.99)}`
  )
})

test('a receiver that takes a second for each delivery, at 500 calls/s: batches, and bounded memory', async t => {
  const duration = LONG ? 60_000 : 500
  const sink = await receiver(t, 1_000)
  const batch = { max_events: 100, max_wait: '200ms' }
  const gateway = await startProcess(t, folder(t), { url: sink.url, timeout: '5s', batch })
  await load(gateway.url, 500, 500)
  const before = privateMb(gateway.child.pid!)
  let most = before
  const watch = setInterval(() => {
    most = Math.max(most, privateMb(gateway.child.pid!))
  }, 100)
  const { ids, times } = await load(gateway.url, 500, duration)
  clearInterval(watch)
  await sink.taken(ids.length + 250)
  assert.equal(new Set(sink.ids).size, sink.ids.length, 'none twice')
  assert.ok(sink.deliveries < sink.ids.length / 10, `${sink.deliveries} deliveries`)
  assert.ok(most < before + 80, `${before} MB, then ${most} MB`)
  t.diagnostic(
    `${ids.length} calls at 500/s, 1 s for a delivery: ${sink.deliveries} deliveries; calls p50 ${at(times, 0.5)}, p99 ${at(times, 0.99)}; ` +
      `private memory ${before.toFixed(0)} MB before, ${most.toFixed(0)} MB at most`
  )
})

test('a full disk: serving and reporting go on, /health says so, and records are safe again when there is room', async t => {
  const dataDir = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  const mount = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', dataDir])
  if (mount.status !== 0) return t.skip('a tmpfs cannot be mounted here')
  t.after(() => {
    execFileSync('umount', ['--lazy', dataDir])
    rmSync(dataDir, { recursive: true })
  })
  const sink = await receiver(t)
  const gateway = await startProcess(t, dataDir, { url: sink.url })
  const usage = async () => (await (await fetch(`${gateway.url}/health`)).json()).usage
  const safe = await load(gateway.url, 500, 100)
  assert.equal(await usage(), 'ok')
  const filler = join(dataDir, 'filler')
  assert.throws(() => writeFileSync(filler, Buffer.alloc(2 * 1024 * 1024)), { code: 'ENOSPC' })
  const calls = LONG ? 10_000 : 200
  const full = await load(gateway.url, 500, calls * 2)
  await gateway.logged('usage records cannot be written')
  assert.equal(await usage(), 'not_safe')
  await sink.taken(safe.ids.length + full.ids.length)
  rmSync(filler)
  const again = await load(gateway.url, 500, 100)
  await gateway.logged('usage records are written again')
  assert.equal(await usage(), 'ok')
  const all = [...safe.ids, ...full.ids, ...again.ids]
  await sink.taken(all.length)
  assert.deepEqual(sink.ids.toSorted(), all.toSorted())
  t.diagnostic(
    `${full.ids.length} calls while the disk was full: all answered and reported, none twice; p50 ${at(full.times, 0.5)}, p99 ${at(full.times, 0.99)}`
  )
})

test('the thread that writes dies: another takes its place, and nothing is lost', async t => {
  const threads: Worker[] = []
  const remember = (thread: Worker) => threads.push(thread)
  process.on('worker', remember)
  t.after(() => process.off('worker', remember))
  const sink = await receiver(t)
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    usage: { enabled: true, reporters: [{ type: 'webhook', webhook: { url: sink.url } }] }
  })
  const { ids } = await load(gateway.url, 1_000, 20, 1)
  assert.equal(threads.length, 1)
  await threads[0]!.terminate()
  await gateway.logged({ reason: 'the thread has stopped' })
  assert.equal(await gateway.metric('llmproxy_usage_not_safe'), 1)
  const more = await load(gateway.url, 1_000, 20, 1)
  assert.equal(threads.length, 2)
  await sink.taken(ids.length + more.ids.length)
  assert.deepEqual(new Set(sink.ids), new Set([...ids, ...more.ids]))
  await gateway.logged({ msg: 'usage records are written again' })
  assert.equal(await gateway.metric('llmproxy_usage_not_safe'), 0)
})
