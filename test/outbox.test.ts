import assert from 'node:assert/strict'
import { once } from 'node:events'
import { rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { pino } from 'pino'
import { parseConfig } from '../src/config.ts'
import { RemoteStore } from '../src/limits/remote.ts'
import { Complaint } from '../src/logs/complaint.ts'
import type { Peers } from '../src/peers.ts'
import { Answer } from '../src/pool/answer.ts'
import type { OnDelivery } from '../src/reporters/courier.ts'
import { Ledger } from '../src/reporters/ledger.ts'
import { Outbox } from '../src/reporters/outbox.ts'
import { type Reporter, recordJson, type Verdict } from '../src/reporters/reporter.ts'
import { createApp } from '../src/server.ts'
import {
  type Answerer,
  answerChat,
  CHAT,
  chunk,
  DONE,
  eventually,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'
import { folder } from './process.ts'

/** A gateway whose records are safe when the test says so. */
async function heldGateway(
  t: TestContext,
  answer: Answerer,
  durability = 'strict',
  include_request_body = false
) {
  const backend = await fakeBackend(t, answer)
  const records: Record<string, unknown>[] = []
  const appended = Promise.withResolvers<void>()
  const safe = Promise.withResolvers<void>()
  const peers: Peers = {
    count: 2,
    metrics: async () => '',
    tell() {},
    say() {},
    onNews() {},
    reload: async () => '{}',
    outbox: { pending: 0, trouble: undefined },
    limits: new RemoteStore(() => {}),
    usage: {
      append(entry) {
        records.push(JSON.parse(recordJson(entry, true)))
        appended.resolve()
        return safe.promise
      }
    }
  }
  const reporters = [
    { type: 'webhook', webhook: { url: 'http://127.0.0.1:1', include_request_body } }
  ]
  const config = {
    server: { heartbeat: '10ms' },
    backends: [{ url: backend.url }],
    usage: { enabled: true, durability, reporters }
  }
  const log = pino({ level: 'silent' })
  const { fastify, control } = await createApp(
    parseConfig(JSON.stringify(config), 'test', {}),
    log,
    {
      peers
    }
  )
  await fastify.listen({ host: '127.0.0.1', port: 0 })
  t.after(() => fastify.close())
  const { port } = fastify.server.address() as { port: number }
  return {
    port,
    url: `http://127.0.0.1:${port}`,
    records,
    appended: appended.promise,
    safe,
    bodies: control.exchanges.bodies
  }
}

test('a request body in a record counts with all others until the record is written down', async t => {
  const held = await heldGateway(t, answerChat, 'relaxed', true)
  const { bodies, records, url } = held
  const ask = async () => (await post(`${url}/v1/chat/completions`, CHAT)).text()
  await ask()
  const size = JSON.stringify(CHAT).length
  const isHeld = async (bytes: number) => {
    await eventually(() => bodies.held === bytes)
  }
  await isHeld(size)
  assert.deepEqual(records[0]!.request_body, CHAT)

  // Room for the request itself, and none for its record.
  bodies.most = 2.5 * size
  await ask()
  const { request_body, request_body_omitted } = records[1]!
  assert.deepEqual([request_body, request_body_omitted], [undefined, size])
  held.safe.resolve()
  await isHeld(0)
})

const MESSAGE_STOP = 'event: message_stop\ndata: {"type":"message_stop"}\n\n'

const STREAMS = [
  { path: '/v1/chat/completions', type: 'text/event-stream', before: chunk('Hi'), last: DONE },
  {
    path: '/v1/messages',
    type: 'text/event-stream',
    before: 'event: ping\ndata: {"type":"ping"}\n\n',
    last: MESSAGE_STOP
  },
  {
    path: '/api/chat',
    type: 'application/x-ndjson',
    before: '{"message":{"content":"Hi"},"done":false}\n',
    last: '{"message":{"content":""},"done":true,"eval_count":1,"prompt_eval_count":2}\n'
  }
]

for (const { path, type, before, last } of STREAMS) {
  for (const form of ['apart', 'together', 'byte by byte', 'after heartbeats']) {
    test(`${path}, ${form}: the last event waits until the record is safe, what is before it does not`, async t => {
      const gateway = await heldGateway(t, async (_request, response) => {
        if (form === 'after heartbeats') await new Promise(resolve => setTimeout(resolve, 30))
        response.writeHead(200, { 'content-type': type })
        const pieces =
          form === 'together'
            ? [before + last]
            : form === 'byte by byte'
              ? [...(before + last)]
              : [before, last]
        for (const piece of pieces) {
          response.write(piece)
          await new Promise(resolve => setImmediate(resolve))
        }
        response.end()
      })
      const body = JSON.stringify({ ...CHAT, stream: true })
      const client = await rawClient(t, gateway.port, rawPost(path, body))
      await gateway.appended
      const [record] = gateway.records
      assert.equal(record!.outcome, 'ok')
      const text = () => client.received.replaceAll(/\r\n[0-9a-f]+\r\n/g, '')
      while (!/Hi|ping/.test(text())) await once(client.socket, 'data')
      await new Promise(resolve => setTimeout(resolve, 20))
      assert.ok(!text().includes(last), text())
      gateway.safe.resolve()
      await client.until(/\r\n0\r\n\r\n$/)
      assert.ok(text().includes(last))
      assert.equal(gateway.records.length, 1)
    })
  }
}

test('a whole answer, and one that comes in parts under a length: the last bytes wait', async t => {
  for (const parts of [1, 3]) {
    const answer = JSON.stringify({
      choices: [],
      text: 'x'.repeat(3000),
      usage: { prompt_tokens: 20, completion_tokens: 1000, total_tokens: 1020 }
    })
    const gateway = await heldGateway(t, async (_request, response) => {
      response.writeHead(200, {
        'content-type': 'application/json',
        'content-length': answer.length
      })
      const size = Math.ceil(answer.length / parts)
      for (let at = 0; at < answer.length; at += size) {
        response.write(answer.slice(at, at + size))
        await new Promise(resolve => setTimeout(resolve, 5))
      }
      response.end()
    })
    const client = await rawClient(
      t,
      gateway.port,
      rawPost('/v1/chat/completions', JSON.stringify(CHAT))
    )
    await gateway.appended
    await new Promise(resolve => setTimeout(resolve, 20))
    assert.ok(!client.received.endsWith(answer.slice(-100)), `${parts} parts`)
    gateway.safe.resolve()
    await client.until(/total_tokens":1020}}$/)
    assert.equal(gateway.records[0]!.total_tokens, 1020)
  }
})

test('relaxed: nothing waits', async t => {
  const gateway = await heldGateway(t, answerChat, 'relaxed')
  const answer = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  assert.match(await answer.text(), /\[DONE\]/)
  assert.equal(gateway.records.length, 1)
})

test('a client that leaves in the middle: one record, at once', async t => {
  const gateway = await heldGateway(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
  })
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/Hi/)
  client.socket.destroy()
  await gateway.appended
  assert.equal(gateway.records[0]!.outcome, 'client_gone')
})

test('a client that leaves while the record is being written: still one record', async t => {
  const gateway = await heldGateway(t, answerChat)
  const body = JSON.stringify({ ...CHAT, stream: true })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await gateway.appended
  client.socket.destroy()
  await new Promise(resolve => setTimeout(resolve, 20))
  gateway.safe.resolve()
  await new Promise(resolve => setTimeout(resolve, 20))
  assert.deepEqual(
    gateway.records.map(each => each.outcome),
    ['ok']
  )
})

test('a receiver that is down for a while gets everything, in order, and no client notices', async t => {
  const backend = await fakeBackend(t, answerChat)
  const seen: string[] = []
  let isDown = true
  const sink = createServer((request, response) => {
    let body = ''
    request.on('data', data => {
      body += data
    })
    request.on('end', () => {
      if (isDown) return void request.socket.destroy()
      seen.push(JSON.parse(body).request_id)
      response.end()
    })
  })
  await new Promise<void>(resolve => sink.listen(0, '127.0.0.1', resolve))
  t.after(() => sink.close())
  const { port } = sink.address() as { port: number }
  const webhook = { url: `http://127.0.0.1:${port}`, concurrency: 1 }
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    usage: { enabled: true, reporters: [{ type: 'webhook', webhook }] }
  })
  const ids: (string | null)[] = []
  for (let call = 0; call < 50; call++) {
    const answer = await post(`${gateway.url}/v1/chat/completions`, CHAT)
    await answer.text()
    ids.push(answer.headers.get('x-llmproxy-request-id'))
  }
  assert.equal(seen.length, 0)
  isDown = false
  await eventually(() => seen.length >= 50)
  assert.deepEqual(seen, ids)
})

/** A reporter that does what the test says. */
function reporterFor(send: Reporter['send'], more: Partial<Reporter> = {}): Reporter {
  return {
    name: 'test',
    wantsBody: false,
    concurrency: 1,
    batch: { max_events: 100, max_wait: 1 },
    maxAge: 1e9,
    accepts: () => true,
    send,
    close: async () => {},
    ...more
  }
}

test('a delivery takes no more records than fit, and at least one', async t => {
  const sizes: number[][] = []
  const all = Promise.withResolvers<void>()
  let count = 0
  const reporter = reporterFor(async entries => {
    sizes.push(entries.map(each => each.length))
    count += entries.length
    if (count === 6) all.resolve()
    return { kind: 'delivered' }
  })
  const outbox = new Outbox(':memory:', [reporter], KEEPING, pino({ level: 'silent' }), () => {})
  t.after(() => outbox.close(AbortSignal.abort()))
  const megabytes = [0.9, 0.9, 0.9, 3, 0.1, 0.1].map(each => each * 1024 * 1024)
  for (const size of megabytes) void outbox.append('x'.repeat(size))
  await all.promise
  assert.deepEqual(
    sizes.map(each => each.length),
    [2, 1, 1, 2]
  )
})

/** A receiver that never answers. */
function untilStopped(_entries: readonly string[], signal: AbortSignal): Promise<Verdict> {
  const stopped = Promise.withResolvers<Verdict>()
  const verdict = { kind: 'unavailable', reason: 'stopped', retryAfter: 0 } as const
  signal.addEventListener('abort', () => stopped.resolve(verdict))
  return stopped.promise
}

const KEEPING = { keep: 1e9, max_size: 1e9 }

/** A reporter that does what the test says, and an outbox for it. */
function outboxFor(
  t: TestContext,
  file: string,
  send: Reporter['send'],
  more: Partial<Reporter> = {},
  onDelivery: OnDelivery = () => {},
  log = pino({ level: 'silent' })
) {
  const reporter = reporterFor(send, more)
  const outbox = new Outbox(file, [reporter], KEEPING, log, onDelivery)
  t.after(() => outbox.close(AbortSignal.abort()))
  return outbox
}

test('a slow reporter: what waits lies in the ledger, not in memory, and comes in order', async t => {
  const gate = Promise.withResolvers<void>()
  const seen: string[] = []
  const outbox = outboxFor(t, ':memory:', async entries => {
    await gate.promise
    seen.push(...entries)
    return { kind: 'delivered' }
  })
  const all = Array.from({ length: 20_000 }, (_, index) => `{"id":"${index}"}`)
  for (let at = 0; at < all.length; at += 500) {
    await Promise.all(all.slice(at, at + 500).map(each => outbox.append(each)))
  }
  assert.ok(outbox.pending <= 5_600, String(outbox.pending))
  gate.resolve()
  await eventually(() => seen.length >= all.length)
  assert.deepEqual(seen, all)
})

test('what was not delivered before the end is delivered after the next start, and nothing else', async t => {
  const file = join(folder(t), 'usage.db')
  const seen: string[] = []
  const take = async (entries: readonly string[]): Promise<Verdict> => {
    seen.push(...entries)
    return { kind: 'delivered' }
  }
  const first = outboxFor(t, file, take)
  await first.append('{"id":"1"}')
  await first.close(AbortSignal.timeout(1_000))
  const dead = outboxFor(t, file, async () => ({ kind: 'unavailable', reason: 'x', retryAfter: 0 }))
  await dead.append('{"id":"2"}')
  await dead.close(AbortSignal.abort())
  assert.deepEqual(seen, ['{"id":"1"}'])
  const second = outboxFor(t, file, take)
  await second.append('{"id":"3"}')
  await eventually(() => seen.length >= 3)
  assert.deepEqual(seen, ['{"id":"1"}', '{"id":"2"}', '{"id":"3"}'])
})

test('a file that cannot be used holds nothing up: records are delivered from memory', async t => {
  const seen: string[] = []
  const outbox = outboxFor(t, folder(t), async entries => {
    seen.push(...entries)
    return { kind: 'delivered' }
  })
  await outbox.append('{"id":"1"}')
  assert.match(outbox.trouble!, /EISDIR|unable to open/)
  await eventually(() => seen.length >= 1)
  await outbox.close(AbortSignal.timeout(1_000))
})

test('a record that is put aside while the disk takes nothing is not forgotten', async t => {
  const parent = join(folder(t), 'parent')
  writeFileSync(parent, '')
  const seen: string[] = []
  const verdicts: Verdict['kind'][] = ['refused']
  const outbox = outboxFor(
    t,
    join(parent, 'usage.db'),
    async entries => {
      const kind = verdicts.shift() ?? 'delivered'
      if (kind === 'delivered') seen.push(...entries)
      return kind === 'delivered' ? { kind } : { kind, reason: 'status 400', retryAfter: 0 }
    },
    { concurrency: 2 }
  )
  await outbox.append('{"id":"1"}')
  await eventually(() => seen.length >= 1)
  assert.deepEqual(seen, ['{"id":"1"}'])
})

test('a record at which a receiver alone fails holds up no others, whatever it says', async t => {
  const file = join(folder(t), 'usage.db')
  const poison = '{"id":"poison"}'
  const seen: string[] = []
  let failures = 0
  const outbox = outboxFor(
    t,
    file,
    async entries => {
      if (entries.includes(poison)) {
        failures++
        return { kind: 'unavailable', reason: 'status 500', retryAfter: 0 }
      }
      seen.push(...entries)
      return { kind: 'delivered' }
    },
    { concurrency: 3, batch: { max_events: 2, max_wait: 1 } }
  )
  await Promise.all([outbox.append(poison), outbox.append('{"id":"beside"}')])
  await eventually(() => failures >= 2)
  const ledger = new Ledger(file)
  const count = () => ledger.deferred('test', 0, 10).length
  for (let id = 0; count() === 0; id++) {
    await outbox.append(`{"id":"${id}"}`)
    await new Promise(resolve => setTimeout(resolve, 20))
  }
  assert.deepEqual(
    ledger.deferred('test', 0, 10).map(({ entry }) => entry),
    [poison]
  )
  await eventually(() => seen.includes('{"id":"beside"}'))
  assert.equal(new Set(seen).size, seen.length)
  ledger.close()
})

test('as many of them as there are deliveries at a time hold up no others either', async t => {
  const file = join(folder(t), 'usage.db')
  const seen = new Set<string>()
  const all = Promise.withResolvers<void>()
  const outbox = outboxFor(
    t,
    file,
    async ([entry]) => {
      if (entry!.includes('poison'))
        return { kind: 'unavailable', reason: 'status 500', retryAfter: 0 }
      seen.add(entry!)
      if (seen.size === 4) all.resolve()
      return { kind: 'delivered' }
    },
    { concurrency: 2, batch: { max_events: 1, max_wait: 1 } }
  )
  for (const id of ['poison 1', 'poison 2', 'poison 3', 1, 2, 3, 4]) {
    await outbox.append(JSON.stringify({ id }))
  }
  await all.promise
})

test('of a batch only what is too old becomes a dead letter', async t => {
  const file = join(folder(t), 'usage.db')
  const ledger = new Ledger(file)
  ledger.markOf('test')
  ledger.append(['{"id":"old"}'], Date.now() - 100_000)
  ledger.append(['{"id":"new"}'])
  const seen: string[] = []
  let calls = 0
  outboxFor(
    t,
    file,
    async entries => {
      if (++calls === 1) return { kind: 'unavailable', reason: 'status 500', retryAfter: 0 }
      seen.push(...entries)
      return { kind: 'delivered' }
    },
    { maxAge: 50_000, batch: { max_events: 2, max_wait: 10_000 } }
  )
  await eventually(() => seen.length >= 1)
  assert.deepEqual(seen, ['{"id":"new"}'])
  assert.deepEqual(
    ledger.deadLetters().map(({ entry }) => entry),
    ['{"id":"old"}']
  )
  ledger.close()
})

test('what was put aside and is too old becomes a dead letter, also when nobody can say why', async t => {
  const file = join(folder(t), 'usage.db')
  const ledger = new Ledger(file)
  ledger.defer('test', Date.now() - 100_000, '{"id":"old"}')
  const send = async () => ({ kind: 'unavailable', reason: 'status 500', retryAfter: 0 }) as const
  outboxFor(t, file, send, { maxAge: 50_000 })
  await eventually(() => ledger.deadLetters().length >= 1)
  await eventually(() => ledger.deferred('test', 0, 10).length === 0)
  ledger.close()
})

test('a new reporter gets what was written while its place was not known yet', async t => {
  const parent = join(folder(t), 'parent')
  writeFileSync(parent, '')
  const seen: string[] = []
  const outbox = outboxFor(t, join(parent, 'usage.db'), async entries => {
    seen.push(...entries)
    return { kind: 'delivered' }
  })
  await outbox.append('{"id":"1"}')
  assert.ok(outbox.trouble)
  rmSync(parent)
  await outbox.append('{"id":"2"}')
  assert.equal(outbox.trouble, undefined)
  await eventually(() => seen.length >= 2)
  assert.deepEqual(seen, ['{"id":"1"}', '{"id":"2"}'])
})

test('another configuration while the disk takes nothing: what is in memory is not forgotten', async t => {
  const parent = join(folder(t), 'parent')
  writeFileSync(parent, '')
  const asked = Promise.withResolvers<void>()
  const lost: [string, number][] = []
  const outbox = outboxFor(
    t,
    join(parent, 'usage.db'),
    (entries, signal) => {
      asked.resolve()
      return untilStopped(entries, signal)
    },
    { batch: { max_events: 1, max_wait: 1 } },
    (result, records) => lost.push([result, records])
  )
  await outbox.append('{"id":"1"}')
  await asked.promise
  await outbox.append('{"id":"2"}')
  const seen: string[] = []
  const heir = reporterFor(async entries => {
    seen.push(...entries)
    return { kind: 'delivered' }
  })
  await outbox.update([heir], KEEPING)
  await eventually(() => seen.length >= 2)
  assert.deepEqual(seen, ['{"id":"1"}', '{"id":"2"}'])
  assert.deepEqual(lost, [['delivered', 2]])
})

test('two other configurations at the same moment: each record is delivered once', async t => {
  const seen: string[] = []
  const take = reporterFor(async entries => {
    seen.push(...entries)
    return { kind: 'delivered' }
  })
  const outbox = outboxFor(t, ':memory:', take.send)
  await Promise.all([outbox.update([take], KEEPING), outbox.update([take], KEEPING)])
  for (const id of ['1', '2', '3']) await outbox.append(id)
  await outbox.close(AbortSignal.timeout(1_000))
  assert.deepEqual(seen, ['1', '2', '3'])
})

test('what neither disk nor memory takes is counted, and said at most once in a while', async t => {
  const parent = join(folder(t), 'parent')
  writeFileSync(parent, '')
  const said: { records: number }[] = []
  const write = (line: string) => {
    if (line.includes('are lost: neither')) said.push(JSON.parse(line))
  }
  let lost = 0
  const outbox = outboxFor(
    t,
    join(parent, 'usage.db'),
    untilStopped,
    {},
    (_result, records) => {
      lost += records
    },
    pino({}, { write }) as never
  )
  for (let page = 0; page < 60; page++) {
    await Promise.all(Array.from({ length: 100 }, (_, id) => outbox.append(`${page}-${id}`)))
  }
  assert.equal(lost, 900)
  assert.deepEqual(
    said.map(({ records }) => records),
    [100]
  )
})

test('a complaint is made at once, and then now and then with what has come together', t => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  const said: [number, string][] = []
  const complaint = new Complaint((records, reason) => said.push([records, reason]))
  for (let record = 0; record < 5; record++) complaint.add(1, 'a')
  assert.deepEqual(said, [[1, 'a']])
  t.mock.timers.tick(10_000)
  assert.deepEqual(said[1], [4, 'a'])
  t.mock.timers.tick(10_000)
  complaint.add(2, 'b')
  complaint.add(3, 'c')
  complaint.end()
  assert.deepEqual(said.slice(2), [
    [2, 'b'],
    [3, 'c']
  ])
})

test('what cannot be delivered from memory before the end is counted as lost', async t => {
  const results: [string, number][] = []
  const outbox = outboxFor(
    t,
    ':memory:',
    async () => ({ kind: 'unavailable', reason: 'x', retryAfter: 0 }),
    {},
    (result, records) => results.push([result, records])
  )
  await Promise.all(['{"id":"1"}', '{"id":"2"}'].map(each => outbox.append(each)))
  await outbox.close(AbortSignal.abort())
  assert.deepEqual(results, [['failed', 2]])
})

test('an empty chunk behind the last one under a length does not replace it', async t => {
  const controller = { resume() {}, pause() {}, abort() {} } as never
  const server = createServer((_request, response) => {
    const answer = new Answer(controller)
    response.setHeader('content-length', 3)
    answer.pipe(response)
    for (const chunk of ['a', 'bc', '']) answer.data(Buffer.from(chunk))
    answer.end()
  })
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
  t.after(() => server.close())
  const { port } = server.address() as { port: number }
  assert.equal(await (await fetch(`http://127.0.0.1:${port}`)).text(), 'abc')
})
