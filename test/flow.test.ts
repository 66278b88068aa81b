import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  answerChat,
  CHAT,
  chunk,
  DONE,
  events,
  fakeBackend,
  post,
  startGateway,
  USAGE
} from './helper.ts'

test('a whole answer passes byte for byte, with its status and headers', async t => {
  const text = '{ "n":1.0, "big": 9007199254740993, "a":1,"a":2, "usage": null }\n'
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(201, { 'content-type': 'application/json', 'x-own': 'yes' })
    response.end(text)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const sent = '{"model":"m",  "n": 1.0, "big":9007199254740993, "a":1, "a":2}'
  const response = await post(`${gateway.url}/v1/embeddings?x=1&y=%20`, sent)
  assert.equal(response.status, 201)
  assert.equal(response.headers.get('x-own'), 'yes')
  assert.equal(await response.text(), text)
  const [seen] = backend.requests
  assert.equal(seen!.body, sent)
  assert.equal(seen!.url, '/v1/embeddings?x=1&y=%20')
})

test('a stream passes chunk by chunk, and only the usage chunk that nobody asked for is missing', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  assert.equal(response.headers.get('content-type'), 'text/event-stream; charset=utf-8')
  assert.equal(await response.text(), chunk('Hi') + chunk(' there') + chunk('!') + DONE)
  assert.deepEqual(JSON.parse(backend.requests[0]!.body).stream_options, { include_usage: true })
  const line = await gateway.logged({ msg: 'exchange' })
  assert.equal(line.completionTokens, 3)
  assert.equal(line.exactness, 'exact')
})

test('a caller who asks for usage gets it', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = { ...CHAT, stream: true, stream_options: { include_usage: true } }
  const response = await post(`${gateway.url}/v1/chat/completions`, body)
  const all = events(await response.text())
  assert.deepEqual((all.at(-2) as { usage: object }).usage, USAGE)
  assert.equal(all.at(-1), '[DONE]')
  assert.equal(backend.requests[0]!.body, JSON.stringify(body))
})
