import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { type TestContext, test } from 'node:test'
import fc from 'fast-check'
import Fastify, { type FastifyInstance } from 'fastify'
import { pino } from 'pino'
import { openai } from '../src/dialects/openai.ts'
import auth from '../src/plugins/auth.ts'
import backends from '../src/plugins/backends.ts'
import discovery from '../src/plugins/discovery.ts'
import limits from '../src/plugins/limits.ts'
import log from '../src/plugins/log.ts'
import logging from '../src/plugins/logging.ts'
import metering from '../src/plugins/metering.ts'
import metrics from '../src/plugins/metrics.ts'
import payload from '../src/plugins/payload.ts'
import proxy from '../src/plugins/proxy.ts'
import usage from '../src/plugins/usage.ts'
import { type FakeBackend, fakeBackend } from './helper.ts'
import { folder } from './process.ts'
import { speaks, vllmChat } from './wire.ts'

/** Parts do the same in every order that docs/embedding.md allows. */

const ORDERS = process.env.LONG === '1' ? 500 : 3

/** Each part, and the part that it must be registered after. */
const NEEDS = {
  auth: undefined,
  payload: undefined,
  limits: undefined,
  backends: undefined,
  discovery: 'backends',
  proxy: 'backends',
  metering: 'proxy',
  usage: undefined,
  metrics: undefined,
  log: undefined,
  logging: undefined
} as const
type Part = keyof typeof NEEDS
const PARTS = Object.keys(NEEDS) as Part[]

/** The allowed order that keeps to this one where it can: a part that comes too early waits for the one it needs. */
function allowed(wanted: readonly Part[]): Part[] {
  const order: Part[] = []
  const place = (part: Part) => {
    if (order.includes(part)) return
    const needed = NEEDS[part]
    if (needed !== undefined && !order.includes(needed)) return
    order.push(part)
    for (const other of wanted) if (NEEDS[other] === part) place(other)
  }
  for (const part of wanted) place(part)
  return order
}

const REFERENCE = allowed(PARTS)
/** A pair of parts that do not need one another is in another order here than in the reference. */
const OPPOSITE = allowed(PARTS.toReversed())

test('the two orders have each free pair of parts both ways', () => {
  for (const [at, one] of REFERENCE.entries()) {
    for (const other of REFERENCE.slice(at + 1)) {
      const isSame = OPPOSITE.indexOf(one) < OPPOSITE.indexOf(other)
      let needed: Part | undefined = other
      while (needed !== undefined && needed !== one) needed = NEEDS[needed]
      assert.equal(isSame, needed === one, `${one}, ${other}`)
    }
  }
})

test('the documentation names what each part needs', () => {
  const page = readFileSync(new URL('../docs/embedding.md', import.meta.url), 'utf8')
  const rows = [...page.matchAll(/^\| `llmproxy\/(\w+)` \|.*\| (?:`(\w+)`)? ?\|$/gm)]
  const needs = Object.fromEntries(rows.map(([, part, needed]) => [part, needed]))
  assert.deepEqual(needs, { ...NEEDS })
})

test('parts do the same in every allowed order', async t => {
  const servers = {
    backend: await fakeBackend(t, speaks(vllmChat)),
    hook: await fakeBackend(t, (_request, response) => response.end())
  }
  const expected = [
    await behaviour(t, REFERENCE, servers, false),
    await behaviour(t, REFERENCE, servers, true)
  ]
  for (const { statuses, loggedBodies } of expected) {
    assert.deepEqual(statuses, STATUSES)
    // The bodies of the chats with 401 and 429 are not read.
    assert.equal(loggedBodies, 5)
  }
  assert.deepEqual(expected[1]!.recordedBodies, [undefined, 300_070, undefined])
  const isSame = async (order: Part[], recordsBody: boolean) =>
    assert.deepEqual(await behaviour(t, order, servers, recordsBody), expected[Number(recordsBody)])
  await isSame(OPPOSITE, false)
  await isSame(OPPOSITE, true)
  const orders = fc.shuffledSubarray(PARTS, { minLength: PARTS.length }).map(allowed)
  await fc.assert(fc.asyncProperty(orders, fc.boolean(), isSame), {
    numRuns: ORDERS,
    endOnFailure: true
  })
})

interface Servers {
  backend: FakeBackend
  hook: FakeBackend
}

const ENDPOINT = {
  method: 'POST',
  url: '/v1/chat/completions',
  dialect: openai,
  body: 'json',
  asksForUsage: true,
  spends: 'input and output'
} as const

/** A server of these parts, registered in this order, with routes of its own. */
async function build(
  order: readonly Part[],
  { backend, hook }: Servers,
  recordsBody: boolean,
  dataDir: string,
  lines: string[]
): Promise<FastifyInstance> {
  const logger = pino({ base: null }, { write: (line: string) => lines.push(line) })
  const fastify = Fastify({
    loggerInstance: logger
  }) as never as FastifyInstance
  const register: Record<Part, () => PromiseLike<unknown>> = {
    auth: () =>
      fastify.register(auth, {
        keys: [
          { key: 'sk-alice', name: 'alice' },
          { key: 'sk-bob', name: 'bob', models: ['m'] }
        ]
      } as never),
    payload: () => fastify.register(payload),
    limits: () => fastify.register(limits, { per_key: { requests_per_minute: 3 } }),
    backends: () =>
      fastify.register(backends, { backends: [{ name: 'gpu', url: backend.url, models: ['m'] }] }),
    discovery: () => fastify.register(discovery, { enabled: false }),
    proxy: () => fastify.register(proxy),
    metering: () => fastify.register(metering),
    usage: () =>
      fastify.register(usage, {
        reporters: [
          {
            name: 'hook',
            type: 'webhook',
            webhook: { url: hook.url, include_request_body: recordsBody }
          }
        ]
      }),
    metrics: () => fastify.register(metrics),
    log: () => fastify.register(log),
    logging: () =>
      fastify.register(logging, {
        access: { enabled: true, format: 'json', output: 'file', file: { path: 'access.log' } },
        request: { enabled: true, storage: 'rows', include_body: true },
        storage: { databases: [{ name: 'rows', driver: 'sqlite', path: 'rows.db' }] },
        dataDir
      } as never)
  }
  for (const part of order) await register[part]()
  fastify.get('/open', { config: { auth: false } }, async () => 'open')
  fastify.post(ENDPOINT.url, { config: { endpoint: ENDPOINT }, bodyLimit: 1_000_000 }, (_, reply) =>
    reply.forward()
  )
  return fastify
}

const STATUSES = [401, 200, 403, 404, 200, 200, 200, 200, 429, 200, 429]

/** What callers, reporters, logs and metrics get. */
async function behaviour(
  t: TestContext,
  order: readonly Part[],
  servers: Servers,
  recordsBody: boolean
) {
  const dataDir = folder(t)
  const lines: string[] = []
  const before = servers.hook.requests.length
  const fastify = await build(order, servers, recordsBody, dataDir, lines)
  const chat = async (key: string, body: object) => {
    const headers = { ...(key === '' ? {} : { authorization: `Bearer ${key}` }) }
    const messages = [{ role: 'user', content: 'Hello' }]
    return fastify.inject({
      method: 'POST',
      url: ENDPOINT.url,
      headers,
      body: { model: 'm', messages, ...body }
    })
  }
  const open = () => fastify.inject('/open')
  const responses = [
    await chat('', {}),
    await chat('sk-alice', { stream: true, user: 'small' }),
    await chat('sk-bob', { model: 'unknown' }),
    await chat('sk-alice', { model: 'unknown' }),
    await chat('sk-alice', { user: 'x'.repeat(300_000) }),
    await open(),
    await open(),
    await open(),
    await open(),
    await chat('sk-alice', { user: 'last' }),
    await chat('sk-alice', {})
  ]
  await fastify.exchanges.drained()
  const counts = await fastify.metricsRegistry.metrics()
  await fastify.close()
  const sent = servers.hook.requests.slice(before).flatMap(({ body }) => JSON.parse(body))
  const rows = rowsOf(join(dataDir, 'rows.db'))
  return {
    statuses: responses.map(({ statusCode }) => statusCode),
    responses: responses.map(({ payload, headers }) => [lasting(payload), steady(headers)]),
    recordedBodies: sent.map(({ request_body_omitted }) => request_body_omitted),
    records: sorted(sent),
    rows,
    loggedBodies: rows.filter(({ request_body }) => request_body !== null).length,
    accesses: jsonLines(readFileSync(join(dataDir, 'access.log'), 'utf8')),
    logged: jsonLines(lines.join('')).filter(({ msg }) => msg === 'exchange'),
    counts: counts.match(/^llmproxy_(?!webhook)\w+_total.*$/gm)?.sort(),
    metrics: counts.match(/^# TYPE \w+/gm)?.sort()
  }
}

/** The text without what is another one each time. */
function lasting(text: string): string {
  return text.replaceAll(/req_[0-9a-f]+/g, 'ID')
}

/** Fields that are another one each time. */
const UNSTEADY = /id$|time|date|ms$|_at$|reset|retry-after/i

function steady(fields: object): object {
  return Object.fromEntries(Object.entries(fields).filter(([name]) => !UNSTEADY.test(name)))
}

/** Ids begin with the time, and are in no order within a millisecond. */
function sorted(rows: object[]): Record<string, unknown>[] {
  const texts = rows.map(row => JSON.stringify(steady(row))).sort()
  return texts.map(text => JSON.parse(text))
}

function jsonLines(text: string): Record<string, unknown>[] {
  const lines = text.split('\n').filter(line => line !== '')
  return sorted(lines.map(line => JSON.parse(line)))
}

function rowsOf(file: string): Record<string, unknown>[] {
  const db = new DatabaseSync(file)
  const rows = db.prepare('SELECT * FROM request_logs').all()
  db.close()
  return sorted(rows)
}
