import assert from 'node:assert/strict'
import { test } from 'node:test'
import { queryObjects } from 'node:v8'
import { createGzip, gzipSync } from 'node:zlib'
import { Exchange } from '../src/exchange.ts'
import { Continuation } from '../src/pool/continuation.ts'
import { Decoder } from '../src/pool/decoder.ts'
import { FirstEvent } from '../src/pool/first-event.ts'
import { Job } from '../src/pool/load.ts'
import { Race } from '../src/pool/race.ts'
import { Refusal } from '../src/pool/refusal.ts'
import { Retries } from '../src/pool/retries.ts'
import {
  CHAT,
  chunk,
  DONE,
  eventually,
  fakeBackend,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'

/** Classes of which a request has objects of its own; each is marked, so that the heap is searched once for all. */
class OfRequest {}
const ofRequest = [
  Exchange,
  Job,
  Race,
  Retries,
  Refusal,
  FirstEvent,
  Continuation,
  Decoder
] as const
for (const each of ofRequest) Object.setPrototypeOf(each.prototype, OfRequest.prototype)
const countOfRequests = () => queryObjects(OfRequest, { format: 'count' }) - ofRequest.length

test('nothing of a request is left after it has ended', async t => {
  const backend = await fakeBackend(t, (request, response) => {
    if (request.url.startsWith('/v1/responses')) {
      const status = request.method === 'POST' ? 'queued' : 'completed'
      response.writeHead(200, { 'content-type': 'application/json' })
      return void response.end(JSON.stringify({ id: 'resp_1', status, background: true }))
    }
    const { stream, user } = JSON.parse(request.body)
    if (user === 'fails') return void response.writeHead(500, { connection: 'close' }).end('{}')
    const type = stream ? 'text/event-stream' : 'application/json'
    response.writeHead(200, { 'content-type': type, 'content-encoding': 'gzip' })
    if (!stream) return void response.end(gzipSync('{"choices":[]}'))
    const events = createGzip()
    events.pipe(response)
    events.write(chunk('Hi'))
    events.flush()
    if (user !== 'leaves') events.end(DONE)
  })
  const continuation = 'continue_final_message'
  const gateway = await startGateway(t, {
    backends: [
      { url: backend.url, continuation },
      { url: 'http://127.0.0.1:1', continuation }
    ],
    rate_limit: { enabled: true, per_key: { total_quota: 1e9, max_concurrent: 9 } },
    routing: { retry: { enabled: true, max_retries: 1, initial_wait: '1ms' } }
  })
  const send = (body: object) => {
    const text = JSON.stringify({ ...CHAT, ...body })
    return rawClient(t, gateway.port, rawPost('/v1/chat/completions', text, ['connection: close']))
  }
  const leaving = await send({ stream: true, user: 'leaves' })
  await leaving.until(/event-stream/)
  for (const body of [{}, { stream: true }, { user: 'fails' }, { n: 0.5 }]) {
    for (let at = 0; at < 2; at++) await (await send(body)).closed
  }
  // A response in the background, which keeps its reservation, and is settled before it is deleted.
  const close = ['connection: close']
  const background = JSON.stringify({ model: 'm', input: 'Hi', background: true })
  await (await rawClient(t, gateway.port, rawPost('/v1/responses', background, close))).closed
  const remove = 'DELETE /v1/responses/resp_1 HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n'
  await (await rawClient(t, gateway.port, remove)).closed
  assert.ok(countOfRequests() > 0)
  leaving.socket.destroy()
  await leaving.closed
  await (await backend.request()).closed
  const ended = () => gateway.lines.filter(({ msg }) => msg === 'exchange').length
  await eventually(() => ended() >= 12)
  // Sockets and timers let go of it a little later.
  let left = countOfRequests()
  for (let looks = 0; left > 0 && looks < 10; looks++) {
    await new Promise(setImmediate)
    left = countOfRequests()
  }
  assert.equal(left, 0)
})
