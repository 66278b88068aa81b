import assert from 'node:assert/strict'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { createClient } from '@redis/client'
import { checkOptions } from '../src/options.ts'
import { DatabaseReporter, DatabaseReporterOptions } from '../src/reporters/database.ts'
import type { UsageRecord } from '../src/reporters/record.ts'
import { RedisReporter, RedisReporterOptions } from '../src/reporters/redis.ts'
import { Redis } from '../src/store/redis.ts'
import { type Database, quoteName } from '../src/store/sql.ts'
import { openDatabase, StorageOptions } from '../src/store/storage.ts'
import { answerChat, CHAT, fakeBackend, post, startGateway, type TestGateway } from './helper.ts'
import { folder } from './process.ts'
import { door, MYSQL, POSTGRES, REDIS, type TestServer, uniqueName } from './servers.ts'

/** Usage records in databases and in Redis, as real servers take them. */

const SIGNAL = new AbortController().signal

const DRIVERS: { driver: 'postgres' | 'mysql' | 'sqlite'; server?: TestServer; utc: string }[] = [
  {
    driver: 'postgres',
    server: POSTGRES,
    utc: `to_char(timestamp AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')`
  },
  {
    driver: 'mysql',
    server: MYSQL,
    utc: `replace(concat(cast(timestamp AS CHAR), 'Z'), ' ', 'T')`
  },
  { driver: 'sqlite', utc: 'timestamp' }
]

/** A storage of this driver, and a client of the test's own; the table goes when the test is over. */
function storageFor(t: TestContext, { driver, server }: (typeof DRIVERS)[number]) {
  const table = uniqueName('usage')
  const given =
    server === undefined
      ? { name: 'main', driver, path: join(folder(t), 'sub/usage.db') }
      : { name: 'main', driver, dsn: server.url }
  const open = (more: object = {}, timeout = 5_000) => {
    const storage = checkOptions(StorageOptions, { databases: [{ ...given, ...more }] })
    return openDatabase(storage.databases[0]!, undefined, timeout)
  }
  const db = open()
  t.after(async () => {
    await db.run(`DROP TABLE IF EXISTS ${quoteName(driver, table)}`)
    await db.close()
  })
  return { table, given, open, db }
}

const reporterFor = (t: TestContext, db: Database, table: string) => {
  const options = checkOptions(DatabaseReporterOptions, { storage: 'main', table })
  const reporter = new DatabaseReporter(db, options)
  t.after(() => reporter.close())
  return reporter
}

const fast = { max_events: 100, max_wait: '1ms' }

async function gatewayFor(t: TestContext, storage: object, reporters: object[]) {
  const backend = await fakeBackend(t, answerChat)
  return startGateway(t, {
    backends: [{ name: 'gpu', url: backend.url }],
    auth: {
      enabled: true,
      keys: [{ key: 'sk-1', name: 'laptop', user_id: 'alice' }],
      skip_paths: ['/metrics']
    },
    storage,
    usage: {
      enabled: true,
      tags: { team: 'X-Team' },
      prices: [{ model: 'm', input: 2, output: 10, currency: 'EUR' }],
      reporters
    }
  })
}

async function call(gateway: TestGateway): Promise<void> {
  const headers = { authorization: 'Bearer sk-1', 'x-team': 'search' }
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT, headers)).text()
}

async function until<T>(look: () => Promise<T | undefined | false>): Promise<T> {
  for (;;) {
    const found = await look()
    if (found !== undefined && found !== false) return found
    await new Promise(resolve => setTimeout(resolve, 5))
  }
}

let lastId = 0
/** A record, as the outbox has it. */
function entry(more: Partial<UsageRecord> = {}): string {
  const id = `019a0000-0000-7000-8000-${String(++lastId).padStart(12, '0')}`
  return JSON.stringify({
    id,
    request_id: `req_${id.replaceAll('-', '')}`,
    timestamp: '2026-01-31T23:59:59.987Z',
    model: 'm',
    input_tokens: 1,
    stream: true,
    outcome: 'ok',
    ...more
  })
}

for (const each of DRIVERS) {
  const { driver, server, utc } = each
  const count = async (db: Database, table: string) => {
    const [row] = await db.run(`SELECT count(*) AS n FROM ${quoteName(driver, table)}`, [])
    return Number(row!.n)
  }
  const skip = server?.skip ?? false

  test(`${driver}: a call's record arrives in a table that is made for it`, { skip }, async t => {
    const { table, given, db } = storageFor(t, each)
    const hook = await fakeBackend(t, (_request, response) => response.end())
    const gateway = await gatewayFor(t, { databases: [given] }, [
      { type: 'database', database: { storage: 'main', table, batch: fast } },
      { type: 'webhook', webhook: { url: hook.url } }
    ])
    await call(gateway)
    const record: UsageRecord = JSON.parse((await hook.request()).body)
    await until(async () => (await gateway.metric('llmproxy_webhook_success_total')) === 2)
    const [row] = await db.run(`SELECT *, ${utc} AS utc FROM ${quoteName(driver, table)}`, [])
    const { id, utc: timestamp, tags, cost, stream, ...rest } = row!
    assert.equal(id, record.id)
    assert.equal(timestamp, record.timestamp)
    assert.deepEqual(typeof tags === 'string' ? JSON.parse(tags) : tags, { team: 'search' })
    assert.equal(Number(cost), record.cost)
    assert.equal(Boolean(stream), false)
    const { user_id, api_key_id, caller, model, exactness, outcome, currency, endpoint } = rest
    assert.deepEqual(
      { user_id, api_key_id, caller, model, exactness, outcome, currency, endpoint },
      {
        user_id: 'alice',
        api_key_id: 'laptop',
        caller: 'laptop',
        model: 'm',
        exactness: 'exact',
        outcome: 'ok',
        currency: 'EUR',
        endpoint: '/v1/chat/completions'
      }
    )
    for (const name of ['request_id', 'requested_model', 'method', 'path', 'backend'] as const) {
      assert.equal(rest[name], record[name], name)
    }
    assert.equal(rest.backend_url, record.backend_url)
    const numbers = ['input_tokens', 'output_tokens', 'total_tokens', 'attempts', 'status_code']
    for (const name of [...numbers, 'ttft_ms', 'duration_ms'] as (keyof UsageRecord)[]) {
      assert.equal(Number(rest[name]), Number(record[name]), name)
    }
    const { cached_tokens, cache_write_tokens, reasoning_tokens } = rest
    assert.deepEqual([cached_tokens, cache_write_tokens, reasoning_tokens], [null, null, null])
  })

  test(`${driver}: what comes twice is there once`, { skip }, async t => {
    const { table, open, db } = storageFor(t, each)
    const reporter = reporterFor(t, open(), table)
    const [one, two] = [entry(), entry()]
    assert.deepEqual(await reporter.send([one, two, one], SIGNAL), { kind: 'delivered' })
    assert.deepEqual(await reporter.send([two, entry()], SIGNAL), { kind: 'delivered' })
    assert.equal(await count(db, table), 3)
  })

  test(`${driver}: a table that lacks columns gets them, and keeps its rows`, { skip }, async t => {
    const { table, open, db } = storageFor(t, each)
    const quoted = quoteName(driver, table)
    await db.run(`CREATE TABLE ${quoted} (id VARCHAR(40) PRIMARY KEY, model VARCHAR(100))`)
    await db.run(`INSERT INTO ${quoted} VALUES ('old', 'm')`)
    const reporter = reporterFor(t, open(), table)
    const record = entry({ output_tokens: 7, cache_write_tokens: 5 })
    assert.deepEqual(await reporter.send([record], SIGNAL), { kind: 'delivered' })
    const names = 'output_tokens, cache_write_tokens'
    const rows = await db.run(`SELECT ${names} FROM ${quoted} ORDER BY id DESC`, [])
    const toNumber = (value: unknown) => (value === null ? null : Number(value))
    assert.deepEqual(
      rows.map(row => [toNumber(row.output_tokens), toNumber(row.cache_write_tokens)]),
      [
        [null, null],
        [7, 5]
      ]
    )
  })

  test(`${driver}: a table of the original is left as it is, and nothing is lost`, {
    skip
  }, async t => {
    const { table, given, db } = storageFor(t, each)
    const quoted = quoteName(driver, table)
    const number = { postgres: 'BIGSERIAL', mysql: 'BIGINT AUTO_INCREMENT', sqlite: 'INTEGER' }
    await db.run(
      `CREATE TABLE ${quoted} (id ${number[driver]} PRIMARY KEY, request_id VARCHAR(64))`
    )
    const gateway = await gatewayFor(t, { databases: [given] }, [
      { type: 'database', database: { storage: 'main', table, batch: fast } }
    ])
    await call(gateway)
    const line = await gateway.logged({
      msg: 'usage cannot be reported; it will be tried again'
    })
    assert.match(String(line.reason), new RegExp(`${table} is not one for .*choose another table`))
    assert.equal(await count(db, table), 0)
    await db.run(`DROP TABLE ${quoted}`)
    await gateway.logged({ msg: 'usage is reported again' })
    assert.equal(await count(db, table), 1)
  })

  test(`${driver}: odd texts are taken, too long ones are cut`, { skip }, async t => {
    const { table, open, db } = storageFor(t, each)
    const reporter = reporterFor(t, open(), table)
    const odd = 'a\0b\ud800"\'\\ %s ? $1 😀'
    const record = entry({ model: odd, tags: { team: odd }, path: '/é'.repeat(10_000) })
    assert.deepEqual(await reporter.send([record], SIGNAL), { kind: 'delivered' })
    const [row] = await db.run(`SELECT model, tags, path FROM ${quoteName(driver, table)}`, [])
    const clean = 'ab\ufffd"\'\\ %s ? $1 😀'
    assert.equal(row!.model, clean)
    const tags = typeof row!.tags === 'string' ? JSON.parse(row!.tags) : row!.tags
    assert.deepEqual(tags, { team: clean })
    assert.equal(row!.path, '/é'.repeat(500))
    assert.deepEqual(await reporter.send([entry({ model: 'x'.repeat(5_000) })], SIGNAL), {
      kind: 'delivered'
    })
  })

  test(`${driver}: as many rows as a batch may have`, { skip }, async t => {
    const { table, open, db } = storageFor(t, each)
    const reporter = reporterFor(t, open(), table)
    const entries = Array.from({ length: 1000 }, () => entry())
    assert.deepEqual(await reporter.send(entries, SIGNAL), { kind: 'delivered' })
    assert.equal(await count(db, table), 1000)
  })

  if (server === undefined) continue

  test(`${driver}: a value that does not fit is refused, and only its record`, {
    skip
  }, async t => {
    const { table, open, db } = storageFor(t, each)
    const reporter = reporterFor(t, open(), table)
    const wrong = entry({ input_tokens: 1e30 })
    const verdict = await reporter.send([entry(), wrong], SIGNAL)
    assert.equal(verdict.kind, 'refused')
    assert.match('reason' in verdict ? verdict.reason : '', /out of range|invalid input syntax/i)
    assert.equal(await count(db, table), 0)
    assert.deepEqual(await reporter.send([entry()], SIGNAL), { kind: 'delivered' })
  })

  test(`${driver}: away, silent and back: every record arrives once`, { skip }, async t => {
    const { table, given, db } = storageFor(t, each)
    const way = await door(t, server)
    way.set('shut')
    const dsn = server.url.replace(`:${server.port}`, `:${way.port}`)
    const gateway = await gatewayFor(t, { databases: [{ ...given, dsn }] }, [
      { type: 'database', database: { storage: 'main', table, timeout: '150ms', batch: fast } }
    ])
    const MESSAGE = { msg: 'usage cannot be reported; it will be tried again' }
    for (const state of ['shut', 'silent'] as const) {
      gateway.lines.length = 0
      way.set(state)
      await call(gateway)
      const { reason } = await gateway.logged(MESSAGE)
      if (state === 'silent') assert.equal(reason, 'no answer in 150 ms')
      assert.doesNotMatch(JSON.stringify(gateway.lines), /:\/\//)
      way.set('open')
      await gateway.logged({ msg: 'usage is reported again' })
    }
    await call(gateway)
    await until(async () => (await gateway.metric('llmproxy_webhook_success_total')) === 3)
    assert.equal(await count(db, table), 3)
    assert.equal(await gateway.metric('llmproxy_webhook_failure_total'), 0)
  })

  test(`${driver}: a server that hangs does not keep the end from coming`, { skip }, async t => {
    const { table, open } = storageFor(t, each)
    const way = await door(t, server)
    way.set('silent')
    const dsn = server.url.replace(`:${server.port}`, `:${way.port}`)
    const reporter = reporterFor(t, open({ dsn }, 60_000), table)
    const stop = new AbortController()
    const sent = reporter.send([entry()], stop.signal)
    setTimeout(() => stop.abort(), 20)
    assert.equal((await sent).kind, 'unavailable')
    await reporter.close()
  })
}

const redisCaches = (addr: string, timeout = '150ms') => {
  const { username, password } = new URL(REDIS.url)
  return {
    caches: [
      {
        name: 'main',
        driver: 'redis',
        addr,
        read_timeout: timeout,
        dial_timeout: timeout,
        ...(username === '' ? {} : { username }),
        ...(password === '' ? {} : { password: decodeURIComponent(password) })
      }
    ]
  }
}

async function redisClient(t: TestContext, stream: string) {
  const client = createClient({ url: REDIS.url })
  await client.connect()
  t.after(async () => {
    await client.del(stream)
    client.destroy()
  })
  return client
}

test('redis: away, silent and back: every record is in the stream', {
  skip: REDIS.skip
}, async t => {
  const stream = uniqueName('stream')
  const client = await redisClient(t, stream)
  const way = await door(t, REDIS)
  const hook = await fakeBackend(t, (_request, response) => response.end())
  const gateway = await gatewayFor(t, redisCaches(`127.0.0.1:${way.port}`), [
    { type: 'redis', redis: { storage: 'main', stream, batch: fast } },
    { type: 'webhook', webhook: { url: hook.url } }
  ])
  for (const state of ['shut', 'silent'] as const) {
    gateway.lines.length = 0
    way.set(state)
    await call(gateway)
    const { reason } = await gateway.logged({
      msg: 'usage cannot be reported; it will be tried again'
    })
    assert.ok(reason)
    way.set('open')
    await gateway.logged({ msg: 'usage is reported again' })
  }
  await call(gateway)
  const found = await until(async () => {
    const messages = (await client.xRange(stream, '-', '+')) ?? []
    return messages.length >= 3 && messages
  })
  const sent = hook.requests.map(({ body }) => JSON.parse(body))
  const ids = new Set(found.map(({ message }) => message.id))
  assert.deepEqual(ids, new Set(sent.map(({ id }) => id)))
  for (const { message } of found) {
    const record = JSON.parse(message.record!)
    assert.deepEqual(
      record,
      sent.find(({ id }) => id === message.id)
    )
  }
})

function redisReporter(t: TestContext, port: number, options: object, timeout?: string) {
  const storage = checkOptions(StorageOptions, redisCaches(`${REDIS.host}:${port}`, timeout))
  const reporter = new RedisReporter(
    new Redis(storage.caches[0]!),
    checkOptions(RedisReporterOptions, { storage: 'main', ...options })
  )
  t.after(() => reporter.close())
  return reporter
}

test('redis: a server that hangs does not keep the end from coming', {
  skip: REDIS.skip
}, async t => {
  const way = await door(t, REDIS)
  way.set('silent')
  const reporter = redisReporter(t, way.port, { stream: uniqueName('stream') })
  assert.deepEqual(await reporter.send([entry()], SIGNAL), {
    kind: 'unavailable',
    reason: 'no answer in 150 ms',
    retryAfter: 0
  })
  const stop = new AbortController()
  const sent = reporter.send([entry()], stop.signal)
  stop.abort()
  assert.equal((await sent).kind, 'unavailable')
  await reporter.close()
})

test('redis: the stream stays about as long as it may be', { skip: REDIS.skip }, async t => {
  const stream = uniqueName('stream')
  const client = await redisClient(t, stream)
  const reporter = redisReporter(t, REDIS.port, { stream, max_length: 200 }, '20s')
  for (let batch = 0; batch < 5; batch++) {
    const entries = Array.from({ length: 200 }, () => entry())
    assert.deepEqual(await reporter.send(entries, SIGNAL), { kind: 'delivered' })
  }
  const length = await client.xLen(stream)
  assert.ok(length >= 200 && length <= 400, String(length))

  await client.del(stream)
  await client.set(stream, 'something else')
  const verdict = await reporter.send([entry()], SIGNAL)
  assert.equal(verdict.kind, 'unavailable')
  assert.match('reason' in verdict ? verdict.reason : '', /WRONGTYPE/)
})
