import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { fakeBackend, post, startGateway } from './helper.ts'
import { folder } from './process.ts'
import { door, REDIS, uniqueName } from './servers.ts'

/**
 * The public comparison of budgets in five tests (docs/limits.md): a burst, an oversized response, a store that is away,
 * a restart, and many customers. Prints a row for each; runs in `npm run test:long`.
 */

const LONG = process.env.LONG === '1'
const skip = LONG ? false : 'takes part in npm run test:long only'
const CENT = 0.01
/** 1,000 tokens cost a cent. */
const PRICES = [{ model: '*', input: 0, output: 10 }]

/** Spends all that `max_tokens` allows. */
function spender(t: TestContext) {
  return fakeBackend(t, async (request, response) => {
    const { max_tokens: tokens = 1000 } = JSON.parse(request.body)
    await new Promise(resolve => setTimeout(resolve, 20))
    const usage = { prompt_tokens: 10, completion_tokens: tokens, total_tokens: 10 + tokens }
    response.writeHead(200, { 'content-type': 'application/json' })
    const message = { role: 'assistant', content: 'word '.repeat(tokens) }
    response.end(JSON.stringify({ choices: [{ message, finish_reason: 'stop' }], usage }))
  })
}

async function start(t: TestContext, rate_limit: object, keys: number, dataDir?: string, port = 0) {
  const backend = await spender(t)
  const addr = `127.0.0.1:${port || REDIS.port}`
  const config = {
    backends: [{ url: backend.url }],
    auth: {
      enabled: true,
      keys: Array.from({ length: keys }, (_, at) => ({
        key: `k${at}`,
        name: `k${at}`,
        total_quota: 5 * CENT,
        quota_unit: 'cost'
      }))
    },
    rate_limit: { enabled: true, ...rate_limit },
    storage: { caches: [{ name: 'default', driver: 'redis', addr }] },
    usage: { prices: PRICES }
  }
  const open = () => startGateway(t, config, {}, dataDir)
  return { open, gateway: await open() }
}

/** Sends requests simultaneously; returns how many were let through. */
async function burst(url: string, key: string, requests: number, max_tokens = 1000) {
  const body = { model: 'm', messages: [{ role: 'user', content: 'Hello' }], max_tokens }
  const responses = await Promise.all(
    Array.from({ length: requests }, async () => {
      const response = await post(`${url}/v1/chat/completions`, body, { 'x-api-key': key })
      await response.text()
      return response.status
    })
  )
  return responses.filter(status => status === 200).length
}

function row(t: TestContext, what: string, passed: number, sent: number, spent: number): void {
  t.diagnostic(`| ${what} | ${passed} of ${sent} | $${spent.toFixed(3)} of $0.050 |`)
}

for (const storage of LONG ? (['memory', 'redis'] as const) : []) {
  const settings = () => ({ storage, redis_prefix: uniqueName('five') })

  test(`${storage}: a burst of 20 requests at $0.01 against $0.05`, async t => {
    const { gateway } = await start(t, settings(), 1)
    const passed = await burst(gateway.url, 'k0', 20)
    row(t, `${storage}: burst`, passed, 20, passed * CENT)
    assert.ok(passed >= 4 && passed <= 5)
  })

  test(`${storage}: a response that would cost more than is left`, async t => {
    const { gateway } = await start(t, settings(), 1)
    const passed = await burst(gateway.url, 'k0', 1, 6000)
    row(t, `${storage}: oversized response`, passed, 1, passed * 6 * CENT)
    assert.equal(passed, 0)
  })

  test(`${storage}: the gateway restarts in the middle of a period`, async t => {
    const { gateway, open } = await start(t, settings(), 1, folder(t))
    const before = await burst(gateway.url, 'k0', 3)
    await gateway.fastify.close()
    const after = await burst((await open()).url, 'k0', 20)
    row(t, `${storage}: restart`, before + after, 23, (before + after) * CENT)
    assert.ok(before === 3 && after >= 1 && after <= 2)
  })

  test(`${storage}: 250 customers in parallel, 10 requests each`, async t => {
    const { gateway } = await start(t, settings(), 250)
    const passed = await Promise.all(
      Array.from({ length: 250 }, (_, at) => burst(gateway.url, `k${at}`, 10))
    )
    const [least, most] = [Math.min(...passed), Math.max(...passed)]
    row(t, `${storage}: 250 customers, each ${least} to ${most}`, most, 10, most * CENT)
    assert.ok(least >= 4 && most <= 5)
  })
}

for (const on_store_error of ['local', 'deny'] as const) {
  test(`the store is away, and on_store_error is ${on_store_error}`, { skip }, async t => {
    const way = await door(t, REDIS)
    const settings = { storage: 'redis', redis_prefix: uniqueName('five'), on_store_error }
    const { gateway } = await start(t, settings, 1, undefined, way.port)
    const before = await burst(gateway.url, 'k0', 2)
    way.set('shut')
    const after = await burst(gateway.url, 'k0', 20)
    row(t, `store away, ${on_store_error}`, before + after, 22, (before + after) * CENT)
    assert.equal(before, 2)
    if (on_store_error === 'deny') assert.equal(after, 0)
    else assert.ok(after >= 2 && after <= 3)
  })
}
