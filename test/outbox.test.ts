import assert from 'node:assert/strict'
import { once } from 'node:events'
import { createServer } from 'node:http'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { pino } from 'pino'
import { parseConfig } from '../src/config.ts'
import { RemoteStore } from '../src/limits/remote.ts'
import type { Peers } from '../src/peers.ts'
import { Answer } from '../src/pool/answer.ts'
import type { OnDelivery } from '../src/reporters/courier.ts'
import { Outbox } from '../src/reporters/outbox.ts'
import type { Reporter, Verdict } from '../src/reporters/reporter.ts'
import { createApp } from '../src/server.ts'
import {
  type Answerer,
  answerChat,
  CHAT,
  chunk,
  DONE,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'
import { folder } from './process.ts'

/** A gateway whose records are safe when the test says so. */
async function heldGateway(t: TestContext, answer: Answerer, durability = 'strict') {
  const backend = await fakeBackend(t, answer)
  const records: Record<string, unknown>[] = []
  const appended = Promise.withResolvers<void>()
  const safe = Promise.withResolvers<void>()
  const peers: Peers = {
    metrics: async () => '',
    tell() {},
    onNews() {},
    outbox: { pending: 0, trouble: undefined },
    limits: new RemoteStore(() => {}),
    usage: {
      append(entry) {
        records.push(JSON.parse(entry))
        appended.resolve()
        return safe.promise
      }
    }
  }
  const reporters = [{ type: 'webhook', webhook: { url: 'http://127.0.0.1:1' } }]
  const config = {
    backends: [{ url: backend.url }],
    usage: { enabled: true, durability, reporters }
  }
  const log = pino({ level: 'silent' })
  const { fastify } = await createApp(parseConfig(JSON.stringify(config), 'test', {}), log, {
    peers
  })
  await fastify.listen({ host: '127.0.0.1', port: 0 })
  t.after(() => fastify.close())
  const { port } = fastify.server.address() as { port: number }
  return { port, url: `http://127.0.0.1:${port}`, records, appended: appended.promise, safe }
}

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
  for (const form of ['apart', 'together', 'byte by byte']) {
    test(`${path}, ${form}: the last event waits until the record is safe, what is before it does not`, async t => {
      const gateway = await heldGateway(t, async (_request, response) => {
        response.writeHead(200, { 'content-type': type })
        const pieces =
          form === 'together'
            ? [before + last]
            : form === 'apart'
              ? [before, last]
              : [...(before + last)]
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
      usage: { total_tokens: 3 }
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
    await client.until(/total_tokens":3}}$/)
    assert.equal(gateway.records[0]!.total_tokens, 3)
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
  while (seen.length < 50) await new Promise(resolve => setTimeout(resolve, 5))
  assert.deepEqual(seen, ids)
})

/** A reporter that does what the test says, and an outbox for it. */
function outboxFor(
  t: TestContext,
  file: string,
  send: (entries: readonly string[]) => Promise<Verdict>,
  more: Partial<Reporter> = {},
  onDelivery: OnDelivery = () => {}
) {
  const reporter: Reporter = {
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
  const keeping = { keep: 1e9, max_size: 1e9 }
  const outbox = new Outbox(file, [reporter], keeping, pino({ level: 'silent' }), onDelivery)
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
  while (seen.length < all.length) await new Promise(resolve => setImmediate(resolve))
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
  while (seen.length < 3) await new Promise(resolve => setImmediate(resolve))
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
  while (seen.length < 1) await new Promise(resolve => setImmediate(resolve))
  await outbox.close(AbortSignal.timeout(1_000))
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
