import assert from 'node:assert/strict'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { type TestContext, test } from 'node:test'
import { pino } from 'pino'
import { KeyStore } from '../src/keys/key-store.ts'
import { Quotas } from '../src/limits/quotas.ts'
import { makeWhole } from '../src/store/copies.ts'
import { runProgram } from './command.ts'
import { answerChat, CHAT, fakeBackend, post, startGateway } from './helper.ts'
import { folder, writeConfig } from './process.ts'

/** Files in the data directory that are damaged, locked, of another program or of a newer version. */

const QUOTAS = `CREATE TABLE quotas (account TEXT NOT NULL PRIMARY KEY, period_start INTEGER NOT NULL,
  period_end INTEGER, tokens REAL NOT NULL, cost REAL NOT NULL, before TEXT) WITHOUT ROWID;
  INSERT INTO quotas VALUES ('per_key:a', 0, NULL, 60, 0, NULL); PRAGMA user_version = 1;`

function sqlite(file: string, sql: string): void {
  const db = new DatabaseSync(file)
  db.exec(sql)
  db.close()
}

/** A gateway with a quota and a reporter, and the status of two requests. */
async function twoRequests(t: TestContext, dataDir: string) {
  const backend = await fakeBackend(t, answerChat)
  const config = {
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: [{ key: 'k', total_quota: 10_000 }] },
    rate_limit: { enabled: true, assumed_max_tokens: 10 },
    usage: { enabled: true, reporters: [{ type: 'builtin' }] }
  }
  const gateway = await startGateway(t, config, {}, dataDir)
  const status = async () => {
    const headers = { authorization: 'Bearer k' }
    return (await post(`${gateway.url}/v1/chat/completions`, CHAT, headers)).status
  }
  return { gateway, statuses: [await status(), await status()] }
}

const USELESS: [name: string, make: (file: string) => void][] = [
  [
    'text',
    file => writeFileSync(file, 'not a database, but long enough to have a header '.repeat(10))
  ],
  [
    'a torn file',
    file => {
      sqlite(file, `${QUOTAS} CREATE TABLE pages (seq INTEGER PRIMARY KEY, at, entries)`)
      const bytes = readFileSync(file)
      writeFileSync(file, bytes.fill(0xff, 100, bytes.length))
    }
  ],
  ['another program', file => sqlite(file, 'CREATE TABLE photos (id); PRAGMA user_version = 1')],
  [
    'another program of a higher version',
    file => sqlite(file, 'CREATE TABLE photos (id); PRAGMA user_version = 9')
  ]
]

for (const [what, make] of USELESS) {
  test(`${what} in place of limits.db and usage.db is moved aside, and requests are served`, async t => {
    const dataDir = folder(t)
    const files = ['limits.db', 'usage.db'].map(name => join(dataDir, name))
    for (const file of files) make(file)
    const before = files.map(file => readFileSync(file).length)
    const { gateway, statuses } = await twoRequests(t, dataDir)
    assert.deepEqual(statuses, [200, 200])
    for (const [at, file] of files.entries()) {
      const { aside, reason, level } = await gateway.logged({ file })
      assert.equal(level, 50)
      assert.match(String(reason), /not a database|malformed|not made by LLMProxy/)
      assert.equal(readFileSync(String(aside)).length, before[at])
      assert.ok(existsSync(file))
    }
  })
}

for (const [what, make] of USELESS) {
  test(`${what} in place of usage-builtin.db and responses.db is moved aside; in place of keys.db it ends the start`, async t => {
    const dataDir = folder(t)
    const files = ['usage-builtin.db', 'responses.db'].map(name => join(dataDir, name))
    for (const file of files) make(file)
    const { gateway, statuses } = await twoRequests(t, dataDir)
    assert.deepEqual(statuses, [200, 200])
    for (const file of files) {
      const { aside, reason, level } = await gateway.logged({ file })
      assert.equal(level, 50)
      assert.match(String(reason), /not a database|malformed|not made by LLMProxy/)
      assert.ok(existsSync(String(aside)) && existsSync(file))
    }

    const keys = join(dataDir, 'keys.db')
    make(keys)
    const { status, stderr } = await runProgram(['--config', withKeys(t)], {
      LLMPROXY_DATA_DIR: dataDir
    })
    assert.equal(status, 1)
    assert.match(
      stderr,
      /^The API keys in \/\S+\/keys\.db cannot be read: .*(not a database|malformed|not made by LLMProxy)\. Restore it from a backup \(docs\/backup\.md\), or move it away to start without its keys\.\n$/
    )
    assert.deepEqual(
      readdirSync(dataDir).filter(each => each.startsWith('keys.db.unusable')),
      []
    )
    assert.ok(existsSync(keys))
  })
}

/** A configuration whose keys are in the embedded store. */
function withKeys(t: TestContext, sections: object = {}): string {
  return writeConfig(join(folder(t), 'config.json'), {
    server: { listen: '127.0.0.1:0' },
    backends: [{ url: 'http://127.0.0.1:1' }],
    auth: { enabled: true },
    ...sections
  })
}

test('a damaged page anywhere in keys.db ends the start', async t => {
  const dataDir = folder(t)
  const file = join(dataDir, 'keys.db')
  const store = new KeyStore(file)
  for (let count = 0; count < 200; count++) await store.create({ name: `key-${count}` })
  await store.close()
  await makeWhole(file)
  const bytes = readFileSync(file)
  writeFileSync(file, bytes.fill(0xff, bytes.length - 4096))
  const { status, stderr } = await runProgram(['--config', withKeys(t)], {
    LLMPROXY_DATA_DIR: dataDir
  })
  assert.deepEqual([status, stderr.split('\n').length], [1, 2])
  assert.match(stderr, /^The API keys in .* Restore it from a backup/)
})

for (const [name, table, known] of [
  ['keys.db', 'keys', 1],
  ['limits.db', 'quotas', 1],
  ['usage.db', 'pages', 1],
  ['usage-builtin.db', 'usage_records', 2],
  ['responses.db', 'responses', 2]
] as const) {
  test(`a ${name} of a newer version ends a start with a line that names both versions`, async t => {
    for (const workers of name === 'usage.db' || name === 'responses.db' ? [1, 2] : [1]) {
      const dataDir = folder(t)
      const file = join(dataDir, name)
      sqlite(file, `CREATE TABLE ${table} (id); PRAGMA user_version = 7`)
      const server = { listen: '127.0.0.1:0', workers }
      const usage = {
        enabled: true,
        reporters: [{ type: 'builtin' }, { type: 'file', file: { path: 'out.jsonl' } }]
      }
      const rate_limit = { enabled: true, per_key: { total_quota: 100 } }
      const config = withKeys(t, { server, usage, rate_limit })
      const { status, stderr } = await runProgram(['--config', config], {
        LLMPROXY_DATA_DIR: dataDir
      })
      assert.equal(status, 1)
      assert.equal(
        stderr,
        `${file} was written by a newer version of LLMProxy: it has format 7, and this version knows ${known}\n`
      )
    }
  })
}

test('a locked keys.db ends the start; a locked usage-builtin.db or responses.db does not', async t => {
  const dataDir = folder(t)
  const hold = (name: string) => {
    const db = new DatabaseSync(join(dataDir, name))
    db.exec('PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE locked (id)')
    t.after(() => db.close())
    return db
  }
  for (const name of ['usage-builtin.db', 'responses.db']) hold(name)
  const { gateway, statuses } = await twoRequests(t, dataDir)
  assert.deepEqual(statuses, [200, 200])
  for (const name of ['usage-builtin.db', 'responses.db']) {
    const { level, aside } = await gateway.logged({ file: join(dataDir, name) })
    assert.deepEqual([level, aside], [50, undefined])
  }
  hold('keys.db')
  const { status, stderr } = await runProgram(['--config', withKeys(t)], {
    LLMPROXY_DATA_DIR: dataDir
  })
  assert.equal(status, 1)
  assert.match(stderr, /^The API keys in \S+ cannot be read: .*locked\. End the program .*\n$/)
})

test('a quotas table with other columns is not ours', async t => {
  const file = join(folder(t), 'limits.db')
  sqlite(file, 'CREATE TABLE quotas (customer, euros)')
  const quotas = await Quotas.open(file, pino({ level: 'silent' }))
  t.after(() => quotas.close())
  quotas.note('per_key:a', { start: 0, end: Number.POSITIVE_INFINITY, tokens: 1, cost: 0 })
  await quotas.written()
  const db = new DatabaseSync(file, { readOnly: true })
  t.after(() => db.close())
  assert.equal(db.prepare('SELECT tokens FROM quotas').get()!.tokens, 1)
})

test('a limits.db that another process is writing is read; one that it has for itself is left as it is', async t => {
  const file = join(folder(t), 'limits.db')
  sqlite(file, `PRAGMA journal_mode = WAL; ${QUOTAS}`)
  const other = new DatabaseSync(file)
  t.after(() => other.close())
  const lines: string[] = []
  const log = pino({ base: null }, { write: line => void lines.push(line) })
  other.exec('BEGIN IMMEDIATE')
  const quotas = await Quotas.open(file, log, Date.now(), 2_000)
  assert.equal(quotas.take('per_key:a')?.tokens, 60)
  await quotas.close()
  other.exec(
    'ROLLBACK; PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; UPDATE quotas SET tokens = 61'
  )
  other.exec('COMMIT')
  const blind = await Quotas.open(file, log, Date.now(), 2_000)
  t.after(() => blind.close())
  assert.equal(blind.take('per_key:a'), undefined)
  assert.match(lines.at(-1)!, /"quotas cannot be read: all quotas start anew"/)
  assert.equal(other.prepare('SELECT tokens FROM quotas').get()!.tokens, 61)
})
