import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { chunk, DONE, type FakeBackend, fakeBackend, post, startGateway } from './helper.ts'

/** Prompts go where their beginning is in the cache, over real calls; and what is learned of backends shows. */

const TOKEN = 'admin-token'
const LONG = 'All happy families are alike. '.repeat(1000)
const TTFT_MS = 30

type Message = { role: string; content: string }

/** Streams an answer of ten pieces, with usage. */
function streaming(t: TestContext): Promise<FakeBackend> {
  return fakeBackend(t, async ({ body }, response) => {
    await sleep(TTFT_MS)
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    for (let piece = 0; piece < 10; piece++) {
      response.write(chunk('Hi '))
      await sleep(2)
    }
    const usage = { prompt_tokens: Math.round(body.length / 4), completion_tokens: 10 }
    response.end(chunk('', { choices: [], usage }) + DONE)
  })
}

async function start(t: TestContext, routing: object, more: object = {}) {
  const backends = [await streaming(t), await streaming(t), await streaming(t)]
  const gateway = await startGateway(t, {
    backends: backends.map(({ url }, at) => ({ name: `gpu-${at + 1}`, url })),
    routing,
    admin: { enabled: true, token: TOKEN },
    ...more
  })
  const ask = async (messages: Message[], key = 'none') => {
    const headers = { authorization: `Bearer ${key}` }
    const body = { model: 'm', stream: true, messages }
    return (await post(`${gateway.url}/v1/chat/completions`, body, headers)).text()
  }
  const results = async () => {
    const headers = { authorization: 'Bearer one' }
    const text = await (await fetch(`${gateway.url}/metrics`, { headers })).text()
    return ['hit', 'miss', 'left'].map(result => {
      const line = `llmproxy_prefix_affinity_total{result="${result}"} `
      return Number(text.split(line)[1]?.split('\n')[0] ?? 0)
    })
  }
  const admin = async () => {
    const headers = { 'x-admin-token': TOKEN }
    const answer = await fetch(`${gateway.url}/admin/backends`, { headers })
    return ((await answer.json()) as { backends: Shown[] }).backends
  }
  return { backends, gateway, ask, results, admin }
}

interface Shown {
  name: string
  warm: number
  wait_ms: number
  ttft_ms: number | null
  prefixes: number
  speed: { prefill_tokens_per_second: number; time_per_output_token_ms: number }
  models_speed: Record<string, Shown['speed']>
}

/** A conversation of so many turns; returns which backends it went to. */
async function converse(
  ask: (messages: Message[]) => Promise<unknown>,
  begin: string,
  turns: number
) {
  const messages: Message[] = []
  for (let turn = 0; turn < turns; turn++) {
    messages.push({ role: 'user', content: turn === 0 ? begin : `And then, ${turn}?` })
    await ask(messages)
    messages.push({ role: 'assistant', content: 'Hi '.repeat(10) })
  }
}

test('least_wait keeps conversations where they began, and shows what it has learned', async t => {
  const { backends, ask, results, admin } = await start(t, { load_balance: 'least_wait' })
  await Promise.all([1, 2, 3].map(each => converse(ask, `${each} ${LONG}`, 6)))
  for (const { requests } of backends) {
    const begins = new Set(requests.map(({ body }) => /"content":"(\d)/.exec(body)![1]))
    assert.equal(requests.length, 6 * begins.size, 'all of a conversation, or none')
  }
  assert.deepEqual(await results(), [15, 3, 0])
  const shown = await admin()
  assert.ok(shown.every(({ warm, wait_ms }) => warm === 1 && wait_ms === 0))
  const used = shown.find(({ ttft_ms }) => ttft_ms !== null)!
  assert.ok(used.ttft_ms! >= TTFT_MS - 1)
  assert.ok(used.prefixes > 20 && used.prefixes < 300, String(used.prefixes))
  const { prefill_tokens_per_second, time_per_output_token_ms } = used.models_speed.m!
  assert.notEqual(prefill_tokens_per_second, 8000)
  assert.ok(time_per_output_token_ms < 30, 'learned: 2 ms and not 30')
})

test('callers do not share prefixes', async t => {
  const auth = { enabled: true, keys: ['one', 'two'] }
  const { ask, results } = await start(t, { load_balance: 'prefix_affinity' }, { auth })
  const messages = [{ role: 'user', content: LONG }]
  await ask(messages, 'one')
  await ask(messages, 'two')
  assert.deepEqual(await results(), [0, 2, 0])
  await ask(messages, 'one')
  assert.deepEqual(await results(), [1, 2, 0])
})

test('with prefix_affinity off, or another strategy, no prompt is remembered', async t => {
  for (const routing of [
    { load_balance: 'least_wait', prefix_affinity: false },
    { load_balance: 'least_connections' }
  ]) {
    const { ask, results, admin } = await start(t, routing)
    await converse(ask, LONG, 3)
    assert.deepEqual(await results(), [0, 0, 0])
    assert.ok((await admin()).every(({ prefixes }) => prefixes === 0))
  }
})

test('least_connections sends next to nothing to what fails fast, without a breaker', async t => {
  const failing = await fakeBackend(t, (_request, response) => {
    response.writeHead(500)
    response.end('{}')
  })
  const good = await Promise.all([1, 2].map(() => streaming(t)))
  const gateway = await startGateway(t, {
    backends: [failing, ...good].map(({ url }) => ({ url })),
    routing: { load_balance: 'least_connections', circuit_breaker: { enabled: false } }
  })
  const body = { model: 'm', stream: true, messages: [{ role: 'user', content: 'Hello' }] }
  const worker = async () => {
    for (let call = 0; call < 20; call++) {
      await (await post(`${gateway.url}/v1/chat/completions`, body)).text()
    }
  }
  await Promise.all(Array.from({ length: 10 }, worker))
  assert.ok(failing.requests.length < 8, `${failing.requests.length} of 200`)
})
