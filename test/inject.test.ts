import assert from 'node:assert/strict'
import type { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { type TestContext, test } from 'node:test'
import Fastify, { type FastifyInstance } from 'fastify'
import gatewayPlugin, { type Gateway, type GivenOptions } from '../src/app.ts'
import {
  type Answerer,
  CHAT,
  chunk,
  DONE,
  type FakeBackend,
  fakeBackend,
  post,
  writable
} from './helper.ts'
import {
  dies,
  messages,
  nativeChat,
  responses,
  type Say,
  speaks,
  vllmChat,
  vllmCompletions
} from './wire.ts'

/** `fastify.inject` gets what a client gets, without a socket. */

const STREAM = { ...CHAT, stream: true }
const ROUTES: Record<string, Say> = {
  '/v1/chat/completions': vllmChat,
  '/v1/completions': vllmCompletions,
  '/v1/responses': responses,
  '/v1/messages': messages(),
  '/api/chat': nativeChat
}

interface Host {
  fastify: FastifyInstance
  gateway: Gateway
  backend: FakeBackend
}

/** A host with a gateway in it. Nothing listens. */
async function host(t: TestContext, answerer: Answerer, options: GivenOptions = {}): Promise<Host> {
  const backend = await fakeBackend(t, answerer)
  const fastify = Fastify()
  t.after(() => fastify.close())
  let gateway: Gateway
  await fastify.register(gatewayPlugin, {
    backends: [{ url: backend.url }],
    onGateway: given => {
      gateway = given
    },
    ...options
  })
  await fastify.ready()
  return { fastify, gateway: gateway!, backend }
}

function ask(path: string, body: object = STREAM) {
  return { method: 'POST', url: path, body } as const
}

/** The body of an injected request, read both ways. */
async function bodies(fastify: FastifyInstance, path: string, body?: object): Promise<string[]> {
  const whole = await fastify.inject(ask(path, body))
  const piecewise = await fastify.inject({ ...ask(path, body), payloadAsStream: true })
  return [whole.payload, await text(piecewise.stream())]
}

for (const [path, say] of Object.entries(ROUTES)) {
  test(`${path}: inject gets the stream that a socket gets`, async t => {
    const { fastify, gateway } = await host(t, speaks(say))
    const url = await fastify.listen({ port: 0, host: '127.0.0.1' })
    const sent = await (await post(url + path, STREAM)).text()
    assert.deepEqual(await bodies(fastify, path), [sent, sent])
    await gateway.exchanges.drained()
  })
}

test('inject gets heartbeats, and the whole stream after them', async t => {
  const go: (() => void)[] = []
  const late: Answerer = async (...call) => {
    await new Promise<void>(resolve => go.push(resolve))
    return speaks(vllmChat)(...call)
  }
  const { fastify, backend } = await host(t, late, { proxy: { heartbeat: '10ms' } })
  const { payload: expected } = await (await host(t, speaks(vllmChat))).fastify.inject(
    ask('/v1/chat/completions')
  )
  const piecewise = await fastify.inject({ ...ask('/v1/chat/completions'), payloadAsStream: true })
  const stream = piecewise.stream()
  assert.match(String(await first(stream)), /^:/)
  await backend.request()
  go[0]!()
  const rest = await text(stream)
  assert.equal(rest.replace(/^(:[^\n]*\n\n)+/, ''), expected)
})

test('inject gets whole responses', async t => {
  const { fastify } = await host(t, speaks(vllmChat))
  const [expected] = vllmChat({}).events
  assert.deepEqual(await bodies(fastify, '/v1/chat/completions', CHAT), [expected, expected])
})

test('an upload through inject reaches the backend', async t => {
  const { fastify, backend } = await host(t, (_request, response) => response.end('{"text":""}'))
  const body = new FormData()
  body.set('file', new Blob(['x'.repeat(100_000)]), 'a.wav')
  const { payload } = await fastify.inject(ask('/v1/audio/transcriptions', body))
  assert.equal(payload, '{"text":""}')
  assert.match(backend.requests[0]!.body, /x{100000}/)
})

test('a long injected stream is whole, and the backend waits for its reader', async t => {
  const piece = chunk('x'.repeat(16_000))
  const pieces = 1_000
  let sent = 0
  const full = Promise.withResolvers<void>()
  const { fastify } = await host(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    for (; sent < pieces; sent++) {
      if (response.write(piece)) continue
      const stalled = setTimeout(full.resolve, 100)
      await writable(response)
      clearTimeout(stalled)
    }
    response.end(DONE)
  })
  const injected = await fastify.inject({ ...ask('/v1/chat/completions'), payloadAsStream: true })
  await full.promise
  assert.ok(sent < pieces, 'all of it left the backend although none was read')
  assert.equal((await text(injected.stream())).length, pieces * piece.length + DONE.length)
})

test('a stream that breaks off is an error event, and then an error', async t => {
  const { fastify } = await host(t, dies(vllmChat, 3))
  const broken = { code: 'LIGHT_ECONNRESET' }
  const whole = assert.rejects(async () => fastify.inject(ask('/v1/chat/completions')), broken)
  const injected = await fastify.inject({ ...ask('/v1/chat/completions'), payloadAsStream: true })
  let received = ''
  const piecewise = async () => {
    for await (const data of injected.stream()) received += data
  }
  await assert.rejects(piecewise, broken)
  assert.ok(received.startsWith(vllmChat(STREAM).events.slice(0, 3).join('')), received)
  assert.match(received, /"code":"backend_failed"/)
  await whole
})

test('a reader that leaves an injected stream is gone after write_timeout', async t => {
  const piece = chunk('x'.repeat(16_000))
  const { fastify, gateway, backend } = await host(
    t,
    async (_request, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      while (!response.destroyed) if (!response.write(piece)) await writable(response)
    },
    { proxy: { write_timeout: '50ms' } }
  )
  const injected = await fastify.inject({ ...ask('/v1/chat/completions'), payloadAsStream: true })
  injected.stream().destroy()
  await (await backend.request()).closed
  await gateway.exchanges.drained()
})

test('a stream passes the write that middleware of the host has put in place of Node’s', async t => {
  const { fastify } = await host(t, speaks(vllmChat))
  const { payload: plain } = await fastify.inject(ask('/v1/chat/completions'))
  const seen: string[] = []
  const other = Fastify()
  t.after(() => other.close())
  other.addHook('onRequest', async (_request, { raw }) => {
    const write = raw.write.bind(raw)
    raw.write = (data: unknown, ...more: unknown[]) => {
      seen.push(String(data))
      return write(data, ...(more as []))
    }
  })
  const backend = await fakeBackend(t, speaks(vllmChat))
  await other.register(gatewayPlugin, { backends: [{ url: backend.url }] })
  const url = await other.listen({ port: 0, host: '127.0.0.1' })
  const response = await post(`${url}/v1/chat/completions`, STREAM)
  assert.equal(await response.text(), plain)
  assert.equal(seen.join(''), plain)
})

function first(stream: Readable): Promise<Buffer> {
  return new Promise(resolve => {
    stream.once('data', data => {
      stream.pause()
      resolve(data)
    })
  })
}
