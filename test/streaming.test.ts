import assert from 'node:assert/strict'
import { Transform } from 'node:stream'
import { test } from 'node:test'
import { brotliCompressSync, createGzip, gzipSync, zstdCompressSync } from 'node:zlib'
import Fastify from 'fastify'
import gatewayPlugin from '../src/app.ts'
import {
  CHAT,
  chunk,
  DONE,
  events,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  USAGE_CHUNK,
  writable
} from './helper.ts'

const STREAM = JSON.stringify({ ...CHAT, stream: true })
const ASKED = JSON.stringify({ ...CHAT, stream: true, stream_options: { include_usage: true } })

for (const body of [STREAM, ASKED]) {
  test(`each chunk goes on before the next one comes, asked for usage: ${body === ASKED}`, async t => {
    const next: (() => void)[] = []
    const backend = await fakeBackend(t, (_request, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      let count = 0
      const send = () => response.write(chunk(`word${count++}`))
      next.push(send)
      send()
    })
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
    for (let count = 0; count < 20; count++) {
      await client.until(new RegExp(`word${count}"`))
      next[0]!()
    }
  })
}

test('a keep-alive comment passes, before the first event too', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(':\n\n')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', STREAM))
  await client.until(/\r\n3\r\n:\n\n\r\n/)
})

test('a slow client makes the backend wait, and nothing piles up in between', async t => {
  const piece = chunk('x'.repeat(16_000))
  let sent = 0
  let isFull: () => void
  const full = new Promise<void>(resolve => {
    isFull = resolve
  })
  const backend = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    while (sent < 200_000_000 && !response.destroyed) {
      sent += piece.length
      if (!response.write(piece)) {
        const stalled = setTimeout(isFull, 500)
        await writable(response)
        clearTimeout(stalled)
      }
    }
    response.end(DONE)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const client = await rawClient(t, gateway.port)
  client.socket.removeAllListeners('data')
  client.socket.pause()
  client.socket.write(rawPost('/v1/chat/completions', STREAM))
  await full
  const held = sent
  assert.ok(held < 20_000_000, `${held} bytes left the backend although the client took none`)
  // Socket buffers of the kernel on both connections hold most of it.
  assert.ok(process.memoryUsage().arrayBuffers < 30_000_000)
  let received = 0
  client.socket.on('data', data => {
    received += data.length
    if (received > held + 1_000_000) client.socket.destroy()
  })
  client.socket.resume()
  await client.closed
  assert.ok(received > held, 'it went on when the client did')
})

test('a client that takes nothing at all is cut after write_timeout', async t => {
  const piece = chunk('x'.repeat(16_000))
  const backend = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    while (!response.destroyed) {
      if (!response.write(piece)) {
        await writable(response)
      }
    }
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    server: { write_timeout: '200ms' }
  })
  const client = await rawClient(t, gateway.port)
  client.socket.removeAllListeners('data')
  client.socket.pause()
  client.socket.write(rawPost('/v1/chat/completions', STREAM))
  await (await backend.request()).closed
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'client_gone')
})

test('an onSend hook of the embedding server may change a stream', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('one'))
    response.write(USAGE_CHUNK)
    response.end(chunk('two') + DONE)
  })
  const fastify = Fastify()
  t.after(() => fastify.close())
  fastify.addHook('onSend', async (_request, _reply, payload) => {
    const upper = new Transform({
      transform: (data, _encoding, done) => done(null, String(data).toUpperCase())
    })
    return (payload as NodeJS.ReadableStream).pipe(upper)
  })
  await fastify.register(gatewayPlugin, { backends: [{ url: backend.url }] })
  const url = await fastify.listen({ port: 0, host: '127.0.0.1' })
  const response = await post(`${url}/v1/chat/completions`, STREAM)
  assert.equal(await response.text(), (chunk('one') + chunk('two') + DONE).toUpperCase())
})

const ENCODINGS = { gzip: gzipSync, br: brotliCompressSync, zstd: zstdCompressSync }

for (const [encoding, compress] of Object.entries(ENCODINGS)) {
  test(`an answer that is ${encoding}-compressed against our wish is metered and passed on plain`, async t => {
    const backend = await fakeBackend(t, (_request, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream', 'content-encoding': encoding })
      response.end(compress(chunk('Hi') + USAGE_CHUNK + DONE))
    })
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    const response = await post(`${gateway.url}/v1/chat/completions`, STREAM)
    assert.equal(response.headers.get('content-encoding'), null)
    assert.equal(await response.text(), chunk('Hi') + DONE)
    assert.equal((await gateway.logged({ msg: 'exchange' })).completionTokens, 3)
  })
}

test('many streams at once do not mix', async t => {
  const backend = await fakeBackend(t, async (request, response) => {
    const { model } = JSON.parse(request.body)
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    for (let count = 0; count < 50; count++) {
      response.write(chunk(`${model}-${count}`))
      await new Promise(resolve => setImmediate(resolve))
    }
    response.end(DONE)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  await Promise.all(
    Array.from({ length: 100 }, async (_, index) => {
      const body = { ...CHAT, model: `m${index}`, stream: true }
      const response = await post(`${gateway.url}/v1/chat/completions`, body)
      const texts = events(await response.text())
        .slice(0, -1)
        .map(
          event =>
            (event as { choices: { delta: { content: string } }[] }).choices[0]!.delta.content
        )
      assert.deepEqual(
        texts,
        Array.from({ length: 50 }, (_, count) => `m${index}-${count}`)
      )
    })
  )
  assert.equal(await gateway.metric('llmproxy_backend_in_flight'), 0)
})

test('a stream of a kind that has no last event ends as its backend ends it', async t => {
  const text = 'data: {"type":"transcript.text.done","text":"hello"}\n\n'
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(text)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const form = new FormData()
  form.set('stream', 'true')
  const url = `${gateway.url}/v1/audio/transcriptions`
  const response = await fetch(url, { method: 'POST', body: form })
  assert.equal(await response.text(), text)
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'ok')
})

test('a chat stream that ends with a finish reason and no [DONE] is complete', async t => {
  const text = chunk('Hi') + chunk('').replace('"finish_reason":null', '"finish_reason":"stop"')
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(text)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  assert.equal(await (await post(`${gateway.url}/v1/chat/completions`, STREAM)).text(), text)
  assert.equal((await gateway.logged({ msg: 'exchange' })).outcome, 'ok')
})

test('a compressed stream, too, goes on piece by piece', async t => {
  let more: (() => void) | undefined
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream', 'content-encoding': 'gzip' })
    const gzip = createGzip()
    gzip.on('data', data => response.write(data))
    const send = (word: string) => {
      gzip.write(chunk(word))
      gzip.flush()
    }
    send('one')
    more = () => send('two')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', STREAM))
  await client.until(/"one"/)
  more!()
  await client.until(/"two"/)
})

test('nginx in front is told not to collect a stream', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(DONE)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const response = await post(`${gateway.url}/v1/chat/completions`, STREAM)
  assert.equal(response.headers.get('x-accel-buffering'), 'no')
})
