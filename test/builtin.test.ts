import assert from 'node:assert/strict'
import { statSync } from 'node:fs'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { pino } from 'pino'
import { parseConfig } from '../src/config.ts'
import { Builtin, builtinFile } from '../src/reporters/builtin.ts'
import type { UsageRecord } from '../src/reporters/record.ts'
import { forgetBefore, openUsageStore, readSums, SUMS } from '../src/reporters/usage-store.ts'
import { createApp } from '../src/server.ts'
import { Sqlite } from '../src/store/sqlite.ts'
import { answerChat, CHAT, eventually, fakeBackend, post } from './helper.ts'
import { folder } from './process.ts'

/** The embedded store: sums that are always right, and days that go when it is time. */

const DAY = 24 * 60 * 60 * 1000
const SIGNAL = new AbortController().signal
const log = pino({ level: 'silent' })

async function storeFor(t: TestContext, file: string) {
  const db = openUsageStore(file)
  t.after(() => db.close())
  const count = async (table: string) => {
    const [row] = await db.run(`SELECT count(*) AS n FROM ${table}`, [])
    return Number(row!.n)
  }
  return { db, count }
}

function builtinFor(t: TestContext, file: string, retention_days: number): Builtin {
  const builtin = new Builtin(file, { retention_days }, log)
  t.after(() => builtin.close())
  return builtin
}

function record(id: string, more: Partial<UsageRecord> = {}): string {
  const timestamp = '2026-01-31T23:59:59.999Z'
  const tokens = { input_tokens: 10, output_tokens: 3, total_tokens: 13 }
  return JSON.stringify({ id, timestamp, model: 'm', backend: 'gpu', ...tokens, ...more })
}

test('the records of calls are kept and summed up, in a file that nobody else reads', async t => {
  const dataDir = folder(t)
  const backend = await fakeBackend(t, answerChat)
  const config = {
    backends: [{ name: 'gpu', url: backend.url }],
    auth: { enabled: true, keys: [{ key: 'sk-1', name: 'laptop', user_id: 'alice' }] },
    usage: {
      enabled: true,
      tags: { team: 'X-Team' },
      prices: [{ model: 'm', input: 1_000_000, output: 0, currency: 'EUR' }],
      reporters: [{ type: 'builtin', builtin: {} }]
    }
  }
  const parsed = parseConfig(JSON.stringify(config), 'test', {})
  assert.deepEqual(parsed.usage.reporters[0]!.builtin, { retention_days: 90 })
  const { fastify } = await createApp(parsed, log, { dataDir })
  const url = await fastify.listen({ host: '127.0.0.1', port: 0 })
  const today = new Date().toISOString().slice(0, 10)
  for (const team of ['search', 'ads', 'search']) {
    const headers = { authorization: 'Bearer sk-1', 'x-team': team }
    await (await post(`${url}/v1/chat/completions`, CHAT, headers)).text()
  }
  await fastify.close()
  const file = builtinFile(dataDir)
  assert.equal(statSync(file).mode & 0o777, 0o600)

  const { db } = await storeFor(t, file)
  const one = { currency: 'EUR', input_tokens: 12, output_tokens: 3, cost: 12 }
  const times = (value: string, requests: number) => ({
    value,
    requests,
    currency: 'EUR',
    input_tokens: one.input_tokens * requests,
    output_tokens: one.output_tokens * requests,
    cached_tokens: 0,
    cache_write_tokens: 0,
    cost: one.cost * requests
  })
  assert.deepEqual(await readSums(db, { by: 'tag:team' }), [times('ads', 1), times('search', 2)])
  assert.deepEqual(await readSums(db, { by: 'tag' }), [
    times('team=ads', 1),
    times('team=search', 2)
  ])
  assert.deepEqual(await readSums(db, { by: 'key' }), [times('laptop', 3)])
  assert.deepEqual(await readSums(db, { by: 'user' }), [times('alice', 3)])
  assert.deepEqual(await readSums(db, { by: 'model' }), [times('m', 3)])
  assert.deepEqual(await readSums(db, { by: 'backend' }), [times('gpu', 3)])
  assert.deepEqual(await readSums(db, { by: 'day', since: today }), [times(today, 3)])
})

test('what comes twice counts once; currencies, days and what is unknown stay apart', async t => {
  const file = join(folder(t), 'usage.db')
  const builtin = builtinFor(t, file, 0)
  const all = [
    record('a', { cost: 0.5, currency: 'EUR', cached_tokens: 4 }),
    record('b', { cost: 0.25, currency: 'USD' }),
    record('c', { model: null, tags: { team: 'x', 'a"b': "it's" } }),
    record('d', { timestamp: '2026-02-01T00:00:00.000Z', cost: 2, currency: 'EUR' })
  ]
  assert.deepEqual(await builtin.send([...all, all[0]!], SIGNAL), { kind: 'delivered' })
  assert.deepEqual(await builtin.send(all, SIGNAL), { kind: 'delivered' })
  const { db, count } = await storeFor(t, file)
  assert.equal(await count('usage_records'), 4)
  const brief = async (question: Parameters<typeof readSums>[1]) =>
    (await readSums(db, question)).map(
      ({ value, currency, requests, input_tokens, cached_tokens, cost }) =>
        [value, currency, requests, input_tokens, cached_tokens, cost].join()
    )
  assert.deepEqual(await brief({ by: 'day' }), [
    '2026-01-31,,1,10,0,0',
    '2026-01-31,EUR,1,10,4,0.5',
    '2026-01-31,USD,1,10,0,0.25',
    '2026-02-01,EUR,1,10,0,2'
  ])
  assert.deepEqual(await brief({ by: 'model' }), [
    ',,1,10,0,0',
    'm,EUR,2,20,4,2.5',
    'm,USD,1,10,0,0.25'
  ])
  assert.deepEqual(await brief({ by: 'model', until: '2026-01-31' }), [
    ',,1,10,0,0',
    'm,EUR,1,10,4,0.5',
    'm,USD,1,10,0,0.25'
  ])
  assert.deepEqual(await brief({ by: 'model', since: '2026-02-01' }), ['m,EUR,1,10,0,2'])
  assert.deepEqual(await brief({ by: 'tag:a"b' }), ["it's,,1,10,0,0"])
  const [row] = await db.run("SELECT record FROM usage_records WHERE id = 'c'", [])
  assert.deepEqual(JSON.parse(String(row!.record)), JSON.parse(all[2]!))
})

test('of 200,000 records none is read for a sum, and the sums are those of the records', async t => {
  const { db } = await storeFor(t, ':memory:')
  await db.run(`
    INSERT INTO usage_records
    WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 200000)
    SELECT 'id' || n, n, date(1767225600 + n % 30 * 86400, 'unixepoch'), 'key' || (n % 50),
      'user' || (n % 20), 'model' || (n % 7), 'gpu' || (n % 3), 'EUR', n % 1000, n % 100, 0, n % 8 / 4.0,
      json_object('team', 'team' || (n % 5)), '{}', 0
    FROM numbers
  `)
  for (const [by, column] of [
    ['key', 'api_key_id'],
    ['model', 'model'],
    ['day', 'day'],
    ['tag:team', "json_extract(tags, '$.team')"]
  ] as const) {
    const slow = await db.run(
      `SELECT ${column} AS value, currency, count(*) AS requests, sum(input_tokens) AS input_tokens,
        sum(output_tokens) AS output_tokens, 0 AS cached_tokens, 0 AS cache_write_tokens, sum(cost) AS cost
      FROM usage_records GROUP BY 1 ORDER BY 1`,
      []
    )
    assert.deepEqual(await readSums(db, { by }), slow, by)
  }
  const plan = await db.run(`EXPLAIN QUERY PLAN ${SUMS}`, ['key', '', '9999'])
  const steps = plan.map(({ detail }) => String(detail)).join('\n')
  assert.match(steps, /SEARCH usage_sums USING PRIMARY KEY \(dimension=\? AND day>\? AND day<\?\)/)
  assert.doesNotMatch(steps, /usage_records/)
})

test('days that are older than retention_days go, at the start, records and sums alike', async t => {
  const file = join(folder(t), 'usage.db')
  const { db, count } = await storeFor(t, file)
  const keeps = new Builtin(file, { retention_days: 0 }, log)
  const today = Math.floor(Date.now() / DAY) * DAY
  const entries = Array.from({ length: 2500 }, (_, n) => {
    const timestamp = new Date(today - 11 * DAY + n).toISOString()
    return record(`old${n}`, { timestamp, user_id: `user${n}` })
  })
  entries.push(
    record('first', { timestamp: new Date(today - 10 * DAY).toISOString() }),
    record('last', { timestamp: new Date().toISOString() })
  )
  for (let at = 0; at < entries.length; at += 500) {
    assert.deepEqual(await keeps.send(entries.slice(at, at + 500), SIGNAL), { kind: 'delivered' })
  }
  assert.equal(await count('usage_records'), 2502)
  await keeps.close()

  await builtinFor(t, file, 10).open()
  await eventually(
    async () =>
      (await count('usage_records')) <= 2 && (await readSums(db, { by: 'user' })).length <= 1
  )
  const kept = await db.run('SELECT id FROM usage_records ORDER BY id', [])
  assert.deepEqual(
    kept.map(({ id }) => id),
    ['first', 'last']
  )
  assert.equal((await readSums(db, { by: 'day' })).length, 2)

  await forgetBefore(db, Date.now() + 11 * DAY, 10)
  assert.equal(await count('usage_records'), 0)
  assert.equal(await count('usage_sums'), 0)
})

test('a file of a newer version is left as it is, and nothing is lost', async t => {
  const file = join(folder(t), 'usage.db')
  const { db } = await storeFor(t, file)
  await db.run('PRAGMA user_version = 99', [])
  const builtin = builtinFor(t, file, 0)
  const verdict = await builtin.send([record('a')], SIGNAL)
  assert.equal(verdict.kind, 'unavailable')
  assert.match('reason' in verdict ? verdict.reason : '', /newer version/)
  await db.run('PRAGMA user_version = 2', [])
  assert.deepEqual(await builtin.send([record('a')], SIGNAL), { kind: 'delivered' })
})

/** What the first version has made, with one record. */
const FIRST_VERSION = `
  CREATE TABLE usage_records (
    id TEXT NOT NULL PRIMARY KEY, at INTEGER NOT NULL, day TEXT NOT NULL, api_key_id TEXT NOT NULL,
    user_id TEXT NOT NULL, model TEXT NOT NULL, backend TEXT NOT NULL, currency TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    cost REAL NOT NULL, tags TEXT NOT NULL, record TEXT NOT NULL
  );
  CREATE INDEX usage_records_by_time ON usage_records (at);
  CREATE TABLE usage_sums (
    dimension TEXT NOT NULL, day TEXT NOT NULL, value TEXT NOT NULL, currency TEXT NOT NULL,
    requests INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, cost REAL NOT NULL,
    PRIMARY KEY (dimension, day, value, currency)
  ) WITHOUT ROWID;
  CREATE INDEX usage_sums_by_day ON usage_sums (day);
  CREATE TRIGGER usage_records_summed AFTER INSERT ON usage_records BEGIN
    INSERT INTO usage_sums
    SELECT dimension, NEW.day, value, NEW.currency, 1, NEW.input_tokens, NEW.output_tokens,
      NEW.cached_tokens, NEW.cost
    FROM (SELECT 'day' AS dimension, '' AS value UNION ALL SELECT 'model', NEW.model) WHERE true
    ON CONFLICT DO UPDATE SET requests = requests + 1,
      input_tokens = input_tokens + excluded.input_tokens,
      output_tokens = output_tokens + excluded.output_tokens,
      cached_tokens = cached_tokens + excluded.cached_tokens, cost = cost + excluded.cost;
  END;
  INSERT INTO usage_records VALUES (
    'old', 1767225600000, '2026-01-31', '', '', 'm', 'gpu', '', 100, 10, 5, 1, '{}', '{}'
  );
  PRAGMA user_version = 1;
`

test('a file of the first version gets what it lacks, whoever opens it first, and keeps its sums', async t => {
  const file = join(folder(t), 'usage.db')
  const old = new Sqlite(file, 20_000)
  await old.run(FIRST_VERSION)
  await old.close()
  const builtins = [1, 2, 3].map(() => builtinFor(t, file, 0))
  const verdicts = await Promise.all(
    builtins.map((each, at) => each.send([record(`${at}`, { cache_write_tokens: 4 })], SIGNAL))
  )
  assert.deepEqual(verdicts, Array(3).fill({ kind: 'delivered' }))
  const { db, count } = await storeFor(t, file)
  assert.equal(await count('usage_records'), 4)
  const [sum] = await readSums(db, { by: 'model' })
  const { requests, input_tokens, cached_tokens, cache_write_tokens, cost } = sum!
  assert.deepEqual(
    [requests, input_tokens, cached_tokens, cache_write_tokens, cost],
    [4, 130, 5, 12, 1]
  )
})
