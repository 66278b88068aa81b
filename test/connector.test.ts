import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import { type TestContext, test } from 'node:test'
import { Client } from 'undici'
import { collectGarbage } from '../src/memory.ts'
import { directConnector } from '../src/pool/connector.ts'
import { CHAT, chunk, fakeBackend, rawClient, rawPost, startGateway } from './helper.ts'

/** Far more than the system itself holds of a connection. */
const SIZE = 32 * 1024 * 1024

const PIECE = 1024 * 1024

const turn = () => new Promise(resolve => setImmediate(resolve))

type Handler = (request: IncomingMessage, response: ServerResponse) => void

async function clientOf(t: TestContext, handler: Handler, tls?: { key: Buffer; cert: Buffer }) {
  const server = tls === undefined ? createServer(handler) : createTlsServer(tls, handler)
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const scheme = tls === undefined ? 'http' : 'https'
  if (tls !== undefined) {
    // The certificate is nobody's; no more than this connector is tested.
    process.env.NODE_TLS_REJECT_UNAUTHORIZED = '0'
    t.after(() => {
      delete process.env.NODE_TLS_REJECT_UNAUTHORIZED
    })
  }
  const { port } = server.address() as AddressInfo
  const connect = directConnector(5_000)
  const client = new Client(`${scheme}://127.0.0.1:${port}`, {
    allowH2: false,
    connect: (options, done) => void connect({ ...options }, done)
  })
  t.after(async () => {
    await client.destroy()
    server.closeAllConnections()
    server.close()
  })
  return { client, server }
}

const digest = (bytes: Buffer) => createHash('sha256').update(bytes).digest('hex')

for (const scheme of ['http', 'https']) {
  const tls =
    scheme === 'http'
      ? undefined
      : {
          key: readFileSync(new URL('tls/first.key', import.meta.url)),
          cert: readFileSync(new URL('tls/first.crt', import.meta.url))
        }

  test(`${scheme}: a reader that stops and goes on gets every byte, and the server waits for it meanwhile`, async t => {
    const bytes = randomBytes(SIZE)
    let unsent = () => 0
    const { client, server } = await clientOf(
      t,
      (_request, response) => {
        for (let at = 0; at < SIZE; at += PIECE) response.write(bytes.subarray(at, at + PIECE))
        response.end()
        unsent = () => response.writableLength
      },
      tls
    )
    for (let call = 1; call <= 2; call++) {
      const { body } = await client.request({ path: '/', method: 'GET' })
      const received = createHash('sha256')
      let length = 0
      for await (const piece of body) {
        // The reader is slow at first: what the system has no room for stays with the server.
        for (let round = 0; length === 0 && round < 200; round++) await turn()
        if (length === 0) assert.ok(unsent() > SIZE / 4, `${unsent()} bytes`)
        received.update(piece)
        length += piece.length
      }
      assert.equal(length, SIZE)
      assert.equal(received.digest('hex'), digest(bytes))
    }
    assert.equal(
      await new Promise(resolve => server.getConnections((_error, count) => resolve(count))),
      1
    )
  })

  test(`${scheme}: an answer without a length ends with its connection`, async t => {
    const { client } = await clientOf(
      t,
      (_request, response) => {
        response.socket!.end('HTTP/1.1 200 OK\r\nconnection: close\r\n\r\none two')
      },
      tls
    )
    const { body } = await client.request({ path: '/', method: 'GET' })
    assert.equal(await body.text(), 'one two')
  })

  test(`${scheme}: an end that comes while the reader stops is told when it has gone on`, async t => {
    for (const head of ['connection: close', 'content-length: 7']) {
      const { client } = await clientOf(
        t,
        (_request, response) => response.socket!.end(`HTTP/1.1 200 OK\r\n${head}\r\n\r\none two`),
        tls
      )
      const text = await new Promise<string>((resolve, reject) => {
        let text = ''
        client.dispatch(
          { path: '/', method: 'GET' },
          {
            onRequestStart() {},
            onResponseStart() {},
            onResponseData(controller, piece) {
              text += piece.toString()
              // undici has an empty piece for whoever goes on.
              if (piece.length === 0) return
              controller.pause()
              setTimeout(() => controller.resume(), 50)
            },
            onResponseEnd: () => resolve(text),
            onResponseError: (_controller, error) => reject(error)
          }
        )
      })
      assert.equal(text, 'one two')
    }
  })

  test(`${scheme}: a connection that breaks breaks the answer`, async t => {
    const { client } = await clientOf(
      t,
      (_request, response) => {
        response.writeHead(200, { 'content-length': 100 })
        response.write('some of it', () => response.socket!.destroy())
      },
      tls
    )
    const { body } = await client.request({ path: '/', method: 'GET' })
    await assert.rejects(body.text(), /other side closed|terminated/)
  })
}

test('what came before is as it was when more has come', async t => {
  const { client } = await clientOf(t, async (_request, response) => {
    for (const letter of 'abcdefgh') {
      response.write(letter.repeat(1_000))
      await turn()
    }
    response.end()
  })
  const { body } = await client.request({ path: '/', method: 'GET' })
  const pieces: Buffer[] = []
  for await (const piece of body) pieces.push(piece)
  assert.equal(
    Buffer.concat(pieces).toString(),
    [...'abcdefgh'].map(letter => letter.repeat(1_000)).join('')
  )
})

test('a connection that the server closes while it is idle is not used again', async t => {
  const { client } = await clientOf(t, (request, response) => {
    response.end(String(request.socket.remotePort))
    response.once('close', () => request.socket.destroySoon())
  })
  const ports: string[] = []
  for (let call = 1; call <= 3; call++) {
    const { body } = await client.request({ path: '/', method: 'GET' })
    ports.push(await body.text())
    await once(client, 'disconnect')
  }
  assert.equal(new Set(ports).size, 3)
})

test('prompts take no memory beside the answers to them', async t => {
  const STREAMS = 20
  const { arrayBuffers: before } = process.memoryUsage()
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hello'))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const content = 'x'.repeat(1024 * 1024)
  const request = { ...CHAT, messages: [{ role: 'user', content }], stream: true }
  for (let count = 1; count <= STREAMS; count++) {
    // What is asked with a question of the gateway's own, and what goes on as it is.
    const stream_options = count % 2 === 0 ? { include_usage: true } : undefined
    const client = await rawClient(t, gateway.port)
    client.socket.write(
      rawPost('/v1/chat/completions', JSON.stringify({ ...request, stream_options }))
    )
    await client.until(/Hello/)
  }
  assert.equal(backend.requests.length, STREAMS)
  for (const { body } of backend.requests)
    assert.equal(JSON.parse(body).messages[0].content, content)
  const bound = before + (STREAMS * content.length) / 4
  // V8 sweeps beside the program, and says later what it has found.
  for (let round = 1; round <= 20 && process.memoryUsage().arrayBuffers > bound; round++) {
    collectGarbage()
    await turn()
  }
  const { arrayBuffers } = process.memoryUsage()
  assert.ok(arrayBuffers < bound, `${arrayBuffers} bytes`)
})
