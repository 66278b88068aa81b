import assert from 'node:assert/strict'
import { join } from 'node:path'
import { test } from 'node:test'
import { pino } from 'pino'
import { parseConfig } from '../src/config.ts'
import { type Insert, REQUEST_TABLE, RequestLog } from '../src/logs/requests.ts'
import { type RequestRow, toRow } from '../src/logs/row.ts'
import { checkOptions } from '../src/options.ts'
import { openDatabase, StorageOptions } from '../src/store/storage.ts'
import { answerChat, CHAT, eventually, fakeBackend, post, startGateway } from './helper.ts'
import { folder } from './process.ts'
import { MYSQL, POSTGRES, uniqueName } from './servers.ts'

/** Rows of requests on their way into a database. */

const row = (id: number) => ({ request_id: `req_${id}` }) as RequestRow

function requestLog(insert: Insert) {
  const said: { msg: string; rows?: number; lost?: number; reason?: string }[] = []
  const log = pino({ base: null }, { write: (line: string) => said.push(JSON.parse(line)) })
  return { requests: new RequestLog(insert, log), said }
}

test('the row of a call, with its body only where that is asked for', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ name: 'gpu', url: backend.url }],
    auth: { enabled: true, keys: [{ key: 'sk-1', name: 'laptop', user_id: 'alice' }] }
  })
  const rows: RequestRow[] = []
  const { requests } = requestLog(async batch => rows.push(...batch))
  gateway.control.exchanges.onEnd('log', exchange => {
    requests.add(toRow(exchange))
    requests.add(toRow(exchange), Buffer.from(`${'x'.repeat(64 * 1024 - 1)}€`))
  })
  const headers = { authorization: 'Bearer sk-1', 'user-agent': 'test' }
  await (await post(`${gateway.url}/v1/chat/completions?a=b`, CHAT, headers)).text()
  await gateway.logged({ msg: 'exchange' })
  await requests.close()
  const [plain, withBody] = rows
  assert.equal(withBody!.request_body, 'x'.repeat(64 * 1024 - 1), 'no half of a character')
  assert.deepEqual(Object.keys(withBody!), Object.keys(REQUEST_TABLE.kinds))
  const { request_id, timestamp, latency_ms, ttft_ms, ...rest } = plain!
  assert.match(request_id, /^req_/)
  assert.match(timestamp, /Z$/)
  assert.ok(latency_ms >= 0 && ttft_ms === null)
  assert.deepEqual(rest, {
    client_ip: '127.0.0.1',
    method: 'POST',
    path: '/v1/chat/completions',
    api_key_id: 'laptop',
    caller: 'laptop',
    user_id: 'alice',
    model: 'm',
    is_stream: false,
    status_code: 200,
    outcome: 'ok',
    error: null,
    backend: 'gpu',
    backend_url: backend.url,
    attempts: 1,
    input_tokens: 12,
    output_tokens: 3,
    user_agent: 'test'
  })
})

test('rows go together, in their order, one batch at a time', async () => {
  const batches: number[] = []
  const ids: string[] = []
  let running = 0
  const { requests, said } = requestLog(async rows => {
    assert.equal(++running, 1)
    await new Promise(resolve => setImmediate(resolve))
    batches.push(rows.length)
    ids.push(...rows.map(each => each.request_id))
    running--
  })
  for (let id = 0; id < 1200; id++) requests.add(row(id))
  await requests.close()
  assert.deepEqual(batches, [500, 500, 200])
  assert.deepEqual(
    ids,
    Array.from({ length: 1200 }, (_, id) => `req_${id}`)
  )
  assert.deepEqual(said, [])
})

test('while the database is gone rows wait; what is too much is lost, counted and said once', async () => {
  let isGone = true
  const ids: string[] = []
  const { requests, said } = requestLog(async rows => {
    if (isGone) throw new Error('ECONNREFUSED')
    ids.push(...rows.map(each => each.request_id))
  })
  for (let id = 0; id < 10_500; id++) requests.add(row(id))
  await eventually(() => said.length === 2)
  isGone = false
  await eventually(() => ids.length === 10_000)
  await eventually(() => said.length === 3)
  await requests.close()
  assert.deepEqual(
    said.map(({ msg, lost }) => [msg, lost]),
    [
      ['rows of the request log are lost', undefined],
      ['the request log cannot be written; it will be tried again', undefined],
      ['the request log is written again', 500]
    ]
  )
  assert.equal(ids.at(-1), 'req_9999')
})

test('bodies count, too', async () => {
  let bytes = 0
  const { requests, said } = requestLog(async rows => {
    for (const each of rows) bytes += each.request_body!.length
  })
  const body = Buffer.alloc(1024 * 1024, 'x')
  for (let id = 0; id < 500; id++) requests.add(row(id), body)
  await requests.close()
  assert.ok(bytes > 4 * 1024 * 1024 && bytes <= 8 * 1024 * 1024)
  assert.equal(said[0]!.msg, 'rows of the request log are lost')
})

test('of a batch only the rows that are refused are lost', async () => {
  const ids: string[] = []
  let inserts = 0
  const { requests, said } = requestLog(async rows => {
    inserts++
    if (rows.some(each => /^req_(7|300)$/.test(each.request_id))) {
      throw Object.assign(new Error('too long'), { kind: 'refused' })
    }
    ids.push(...rows.map(each => each.request_id))
  })
  for (let id = 0; id < 501; id++) requests.add(row(id))
  await requests.close()
  const taken = Array.from({ length: 501 }, (_, id) => id).filter(id => id !== 7 && id !== 300)
  assert.deepEqual(
    ids,
    taken.map(id => `req_${id}`)
  )
  assert.deepEqual([said[0]!.rows, said[0]!.reason], [1, 'too long'])
  assert.ok(inserts < 60, String(inserts))
})

test('a database that hangs does not keep the end from coming', { timeout: 20_000 }, async () => {
  const { requests, said } = requestLog(() => new Promise(() => setTimeout(() => {}, 10_000)))
  requests.add(row(1))
  await requests.close()
  assert.deepEqual([said[0]!.rows, said.length], [1, 1])
})

const DRIVERS = [
  { driver: 'sqlite', server: undefined },
  { driver: 'postgres', server: POSTGRES },
  { driver: 'mysql', server: MYSQL }
] as const

for (const { driver, server } of DRIVERS) {
  for (const include_body of [false, true]) {
    const name = `${driver}${include_body ? ', with bodies' : ''}: a row for each request, also for one that was refused`
    test(name, { skip: server?.skip ?? false }, async t => {
      const table = uniqueName('requests')
      const given =
        server === undefined
          ? { name: 'main', driver, path: join(folder(t), 'requests.db') }
          : { name: 'main', driver, dsn: server.url }
      const storage = { databases: [given] }
      const db = openDatabase(checkOptions(StorageOptions, storage).databases[0]!, undefined, 5_000)
      t.after(async () => {
        await db.run(`DROP TABLE IF EXISTS ${table}`)
        await db.close()
      })
      const backend = await fakeBackend(t, answerChat)
      const gateway = await startGateway(t, {
        backends: [{ name: 'gpu', url: backend.url }],
        auth: { enabled: true, keys: [{ key: 'sk-1', name: 'laptop', user_id: 'alice' }] },
        storage,
        logging: { enabled: true, request: { enabled: true, storage: 'main', table, include_body } }
      })
      const url = `${gateway.url}/v1/chat/completions?secret=1`
      const headers = { authorization: 'Bearer sk-1', 'user-agent': 'test/1' }
      await (await post(url, { ...CHAT, user: '\0é' }, headers)).text()
      await (await post(url, CHAT)).text()
      await gateway.fastify.close()
      const rows = await db.run(
        `SELECT status_code, outcome, error, path, caller, user_id, model, backend, input_tokens, user_agent, request_body
        FROM ${table} ORDER BY status_code`,
        []
      )
      assert.deepEqual(
        rows.map(({ status_code }) => Number(status_code)),
        [200, 401]
      )
      const [taken, refused] = rows
      assert.equal(taken!.path, '/v1/chat/completions')
      assert.deepEqual(
        [taken!.caller, taken!.user_id, taken!.backend, taken!.user_agent],
        ['laptop', 'alice', 'gpu', 'test/1']
      )
      assert.deepEqual([refused!.outcome, refused!.error], ['rejected', 'missing_api_key'])
      if (!include_body)
        assert.deepEqual([taken!.request_body, refused!.request_body], [null, null])
      else assert.equal(JSON.parse(String(taken!.request_body)).model, CHAT.model)
    })
  }
}

test('a request log without a database is refused, at its place', () => {
  const parse = (request: string) =>
    parseConfig(
      `backends: [{url: "http://a:1"}]\nlogging: {enabled: true, request: ${request}}\n`,
      'config.yaml',
      {}
    )
  assert.throws(() => parse('{enabled: true, storage: x}'), {
    message: /^config\.yaml:2:\d+ logging\.request\.storage: must be the name of a database/
  })
  assert.throws(() => parse('{enabled: true}'), /logging\.request.*must be the name of a database/)
  assert.equal(parse('{enabled: false}').logging.request.enabled, false)
})
