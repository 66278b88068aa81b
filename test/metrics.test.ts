import assert from 'node:assert/strict'
import { test } from 'node:test'
import { answerChat, CHAT, fakeBackend, post, startGateway } from './helper.ts'

test('the original’s five names and labels, and ours', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ name: 'gpu', url: backend.url }],
    usage: {
      enabled: true,
      reporters: [{ type: 'webhook', webhook: { url: `${backend.url}/hook` } }]
    },
    rate_limit: { enabled: true, global: { requests_per_minute: 2 } }
  })
  await (await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })).text()
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  await backend.request(3)
  const text = await gateway.metrics()
  const sample = (line: string) => assert.ok(text.includes(`${line}`), `${line} in\n${text}`)
  const labels = 'path="/v1/chat/completions",stream="true",backend="gpu"'
  sample(`llmproxy_requests_total{${labels},status="200"} 1`)
  sample(
    'llmproxy_requests_total{path="/v1/chat/completions",stream="false",backend="none",status="429"} 1'
  )
  sample(`llmproxy_latency_ms_bucket{le="600000",${labels}} 1`)
  sample(`llmproxy_latency_ms_count{${labels}} 1`)
  sample('llmproxy_usage_tokens_total{type="prompt"} 24')
  sample('llmproxy_usage_tokens_total{type="completion"} 6')
  for (const name of ['llmproxy_webhook_success_total', 'llmproxy_webhook_failure_total'])
    sample(name)
  sample('llmproxy_time_to_first_token_seconds_count{path="/v1/chat/completions",backend="gpu"} 1')
  sample(
    'llmproxy_time_per_output_token_seconds_count{path="/v1/chat/completions",backend="gpu"} 1'
  )
  sample('llmproxy_requests_in_flight 0')
  sample('llmproxy_backend_up{backend="gpu"} 1')
  sample('llmproxy_backend_in_flight{backend="gpu"} 0')
  sample('llmproxy_attempts_total{backend="gpu",result="2xx"} 2')
  sample(
    'llmproxy_limit_refusals_total{scope="global",limit="requests_per_minute",mode="enforce"} 1'
  )
  sample('llmproxy_exchanges_total{outcome="ok"} 2')
  sample('llmproxy_exchanges_total{outcome="rejected"} 1')
  sample('process_resident_memory_bytes')
})

test('what a client sends never becomes a label', async t => {
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  for (let call = 0; call < 20; call++) {
    await fetch(`${gateway.url}/random-${call}?q=${call}`)
    await fetch(`${gateway.url}/v1/models/random-${call}`)
    await post(`${gateway.url}/v1/embeddings`, { ...CHAT, model: `random-${call}` })
  }
  const text = await gateway.metrics()
  assert.doesNotMatch(text, /random-/)
  assert.equal(
    await gateway.metric('llmproxy_requests_total', { path: 'other', status: '404' }),
    20
  )
})

test('/metrics can be elsewhere, or not at all', async t => {
  const moved = await startGateway(t, {
    backends: [{ url: 'http://127.0.0.1:1' }],
    metrics: { path: '/internal/metrics', latency_buckets: [1, 2] }
  })
  assert.equal((await fetch(`${moved.url}/metrics`)).status, 404)
  const text = await (await fetch(`${moved.url}/internal/metrics`)).text()
  assert.match(text, /llmproxy_requests_in_flight/)
  const off = await startGateway(t, {
    backends: [{ url: 'http://127.0.0.1:1' }],
    metrics: { enabled: false }
  })
  assert.equal((await fetch(`${off.url}/metrics`)).status, 404)
})

test('one log line for each exchange, and no key, body or query in any', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, api_key: 'hunter2-backend' }],
    auth: { enabled: true, keys: ['hunter2-key'] }
  })
  const key = { authorization: 'Bearer hunter2-key' }
  const body = { ...CHAT, messages: [{ role: 'user', content: 'hunter2-prompt' }] }
  await (await post(`${gateway.url}/v1/chat/completions?hunter2=query`, body, key)).text()
  await post(`${gateway.url}/v1/chat/completions`, body, { authorization: 'Bearer hunter2-wrong' })
  await fetch(`${gateway.url}/nothing/here?hunter2=query`, { headers: key })
  await fetch(`${gateway.url}/hunter2-path`, { headers: key })
  await gateway.logged({ msg: 'exchange', status: 404 })
  const lines = gateway.lines.filter(line => line.msg === 'exchange')
  assert.deepEqual(lines.map(({ status, route }) => [status, route]).slice(0, 3), [
    [200, '/v1/chat/completions'],
    [401, '/v1/chat/completions'],
    [404, 'none']
  ])
  assert.doesNotMatch(JSON.stringify(gateway.lines), /hunter2/)
})
