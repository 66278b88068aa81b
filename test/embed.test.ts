import assert from 'node:assert/strict'
import { globSync, readFileSync } from 'node:fs'
import { connect } from 'node:http2'
import type { AddressInfo } from 'node:net'
import { type TestContext, test } from 'node:test'
import rateLimit from '@fastify/rate-limit'
import replyFrom from '@fastify/reply-from'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import { buildParts } from '../examples/embed/parts.ts'
import { buildServer } from '../examples/embed/server.ts'
import gateway from '../src/app.ts'
import { openai } from '../src/dialects/openai.ts'
import type { Exchanges } from '../src/exchange.ts'
import auth from '../src/plugins/auth.ts'
import backends from '../src/plugins/backends.ts'
import limits from '../src/plugins/limits.ts'
import metrics from '../src/plugins/metrics.ts'
import payload from '../src/plugins/payload.ts'
import proxy from '../src/plugins/proxy.ts'
import usage from '../src/plugins/usage.ts'
import { answerChat, CHAT, fakeBackend, post } from './helper.ts'

async function listen(t: TestContext, fastify: FastifyInstance): Promise<string> {
  t.after(() => fastify.close())
  return fastify.listen({ port: 0, host: '127.0.0.1' })
}

test('two gateways in a server with its own auth, errors and metrics: none disturbs another', async t => {
  const team = await fakeBackend(t, answerChat)
  const lab = await fakeBackend(t, answerChat)
  const url = await listen(t, await buildServer({ team: team.url, lab: lab.url }))

  const own = await fetch(`${url}/own/hello`)
  assert.equal(own.status, 401)
  assert.deepEqual(await own.json(), { oops: 'who are you?' })
  assert.equal(own.headers.get('x-llmproxy-request-id'), null)
  const hello = await fetch(`${url}/own/hello`, { headers: { user: 'me' } })
  assert.deepEqual(await hello.json(), { hello: 'me' })
  assert.equal(await (await fetch(`${url}/metrics`)).text(), 'requests_of_this_server 1\n')
  const missing = await fetch(`${url}/nothing`)
  assert.match(await missing.text(), /Route GET:\/nothing not found/)

  const chat = '/v1/chat/completions'
  const refused = await post(`${url}/team${chat}`, CHAT)
  assert.equal(refused.status, 401)
  assert.equal((await refused.json()).error.code, 'missing_api_key')
  const served = await post(`${url}/team${chat}`, CHAT, { 'x-api-key': 'sk-team' })
  assert.equal(served.status, 200)
  assert.equal(served.headers.get('x-ratelimit-limit-requests'), '60')
  const open = await post(`${url}/lab${chat}`, { ...CHAT, stream: true })
  assert.match(await open.text(), /\[DONE\]/)
  assert.equal(open.headers.get('x-ratelimit-limit-requests'), null)
  assert.deepEqual(
    [...team.requests, ...lab.requests].map(request => request.url),
    [chat, chat]
  )
  assert.equal((await fetch(`${url}/lab/nothing`)).status, 404)
  assert.equal((await (await fetch(`${url}/lab/nothing`)).json()).error.code, 'not_found')

  const key = { headers: { 'x-api-key': 'sk-team' } }
  const metrics = [`${url}/team/metrics`, `${url}/lab/metrics`].map(async each =>
    (await fetch(each, key)).text()
  )
  const [ofTeam, ofLab] = await Promise.all(metrics)
  assert.match(ofTeam!, /llmproxy_requests_total\{[^}]*backend="gpu",status="200"\} 1/)
  assert.doesNotMatch(ofTeam!, /backend="lab"/)
  assert.match(ofLab!, /llmproxy_requests_total\{[^}]*backend="lab",status="200"\} 1/)
  assert.equal((await fetch(`${url}/lab/health/ready`)).status, 200)
})

test('single plugins serve a route of one’s own', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{"results":[]}'))
  const url = await listen(t, await buildParts(backend.url))
  const headers = { authorization: 'Bearer sk-1' }
  assert.equal((await fetch(`${url}/hello`)).status, 401)
  assert.deepEqual(await (await fetch(`${url}/hello`, { headers })).json(), { hello: 'alice' })
  const reranked = await post(`${url}/v1/rerank`, { query: 'x', documents: [] }, headers)
  assert.equal(await reranked.text(), '{"results":[]}')
  assert.equal((await fetch(`${url}/hello`, { headers })).status, 429)
})

test('a host with the same names, its own reply-from and rate-limit, and a prefix with a slash', async t => {
  const backend = await fakeBackend(t, answerChat)
  const fastify = Fastify()
  for (const name of ['caller', 'exchange', 'payload']) {
    fastify.decorateRequest(name as never, 'the host’s' as never)
  }
  for (const name of ['lifecycle', 'limits', 'usage']) {
    fastify.decorate(name as never, 'the host’s' as never)
  }
  await fastify.register(replyFrom, { base: backend.url })
  await fastify.register(rateLimit, { max: 1000 })
  await fastify.register(auth, { enabled: false })
  fastify.get('/own', (_request, reply) => reply.from('/v1/models'))
  let exchanges: Exchanges
  fastify.register(gateway, {
    prefix: '/llm/',
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, per_key: { tokens_per_minute: 1000 } },
    onGateway: given => {
      exchanges = given.exchanges
    }
  })
  const url = await listen(t, fastify)
  const callers: unknown[] = []
  exchanges!.onEnd('record', ({ request }) => callers.push(request.caller, request.payload?.model))
  const response = await post(`${url}/llm/v1/chat/completions`, { ...CHAT, stream: true })
  assert.match(await response.text(), /\[DONE\]/)
  assert.equal(backend.requests[0]!.url, '/v1/chat/completions')
  assert.equal((await fetch(`${url}/llm/v1/models/m`)).status, 200)
  assert.deepEqual(callers, [undefined, 'm', undefined, undefined])
  assert.equal((await fetch(`${url}/own`)).status, 200)
  assert.equal(backend.requests.at(-1)!.url, '/v1/models')
})

test('limits apply to the caller that a hook of the host sets, whichever hook it is', async t => {
  const backend = await fakeBackend(t, answerChat)
  for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const) {
    const fastify = Fastify()
    fastify.addHook(hook, async (request: FastifyRequest) => {
      Object.assign(request, { caller: { id: 'alice', limits: { requests_per_minute: 2 } } })
    })
    await fastify.register(gateway, {
      backends: [{ url: backend.url }],
      rate_limit: { enabled: true, per_key: { requests_per_minute: 100 } }
    })
    const url = await listen(t, fastify)
    const statuses: number[] = []
    for (let count = 0; count < 3; count++) {
      const response = await post(`${url}/v1/chat/completions`, CHAT)
      await response.arrayBuffer()
      statuses.push(response.status)
    }
    assert.deepEqual([hook, ...statuses], [hook, 200, 200, 429])
  }
})

test('a prefix with a parameter is refused', async () => {
  const fastify = Fastify()
  fastify.register(gateway, { prefix: '/t/:tenant', backends: [{ url: 'http://a:1' }] })
  await assert.rejects(async () => fastify.ready(), /prefix: must be a path without parameters/)
  await fastify.close()
})

test('an HTTP/2 server can hold a gateway, and close', async t => {
  const backend = await fakeBackend(t, answerChat)
  const fastify = Fastify({ http2: true })
  await fastify.register(gateway as never, { backends: [{ url: backend.url }] })
  await fastify.listen({ port: 0, host: '127.0.0.1' })
  const { port } = fastify.server.address() as AddressInfo
  const session = connect(`http://127.0.0.1:${port}`)
  t.after(() => session.destroy())
  const stream = session.request({
    ':method': 'POST',
    ':path': '/v1/chat/completions',
    'content-type': 'application/json'
  })
  stream.end(JSON.stringify({ ...CHAT, stream: true }))
  let text = ''
  for await (const data of stream) text += data
  assert.match(text, /\[DONE\]/)
  session.destroy()
  await fastify.close()
})

test('a decorator of the host is never taken for a part of the gateway', async t => {
  const backend = await fakeBackend(t, answerChat)
  const hook = await fakeBackend(t, (_request, response) => response.end())
  const fastify = Fastify()
  for (const name of ['connections', 'dataDir', 'discovery', 'keys', 'peers', 'tokens']) {
    fastify.decorate(name as never, 'the host’s' as never)
  }
  await fastify.register(backends, { backends: [{ url: backend.url }] })
  await fastify.register(limits, { per_key: { tokens_per_minute: 1000, max_concurrent: 3 } })
  await fastify.register(proxy)
  await fastify.register(usage, {
    reporters: [{ name: 'hook', type: 'webhook', webhook: { url: hook.url } }]
  })
  await fastify.register(metrics)
  const config = {
    endpoint: { method: 'POST', url: '/chat', dialect: openai, body: 'json' }
  } as const
  await fastify.register(async scope => {
    await scope.register(payload)
    scope.post('/v1/chat/completions', { config }, (_request, reply) => reply.forward())
  })
  const url = await listen(t, fastify)
  const response = await post(`${url}/v1/chat/completions`, CHAT)
  assert.equal((await response.json()).choices[0].message.content, 'Hi there!')
  await hook.request()
  assert.match(await fastify.metricsRegistry.metrics(), /llmproxy_backend_up\{[^}]*\} 1/)
  assert.equal(fastify.keys as unknown, 'the host’s')
})

test('only the types a host asks for change those of Fastify', () => {
  const src = new URL('../src/', import.meta.url).pathname
  const files = globSync('**/*.ts', { cwd: src })
  const changing = files.filter(file => /^declare module/m.test(readFileSync(src + file, 'utf8')))
  assert.deepEqual(changing.sort(), ['internal-types.ts', 'types.ts'])
  for (const file of files) {
    const text = readFileSync(src + file, 'utf8')
    assert.doesNotMatch(text, /from '.*\/(?:internal-)?types\.ts'/, file)
  }
})
