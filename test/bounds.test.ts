import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { hash } from 'node:crypto'
import { globSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { test } from 'node:test'
import { createClient } from '@redis/client'
import { pino } from 'pino'
import { toBackends } from '../src/discovery/entry.ts'
import { CachedKeys } from '../src/keys/cached.ts'
import type { KeyRecord, KeySource } from '../src/keys/key.ts'
import { MemoryStore } from '../src/limits/memory.ts'
import { Periods } from '../src/limits/period.ts'
import { Quotas } from '../src/limits/quotas.ts'
import { isRefusal, type Lease, NOTHING } from '../src/limits/store.ts'
import { Typical } from '../src/limits/typical.ts'
import { Complaint } from '../src/logs/complaint.ts'
import { Choices } from '../src/metering/choices.ts'
import { Estimates } from '../src/metering/estimate.ts'
import { Attained } from '../src/pool/attained.ts'
import type { Live } from '../src/pool/backend.ts'
import { Choice, Decisions } from '../src/pool/decisions.ts'
import { Hedges } from '../src/pool/hedge.ts'
import { Speeds } from '../src/pool/load.ts'
import { answerChat, CHAT, fakeBackend, post, startGateway } from './helper.ts'
import { account, joinRedis } from './limit-stores.ts'
import { folder } from './process.ts'
import { REDIS, uniqueName } from './servers.ts'

/** Every map, cache, queue and set of labels in the source has a bound, and those that strangers fill hold it. */

/** It does not change after the start, or not beyond what the configuration has. */
const FIXED = 'fixed'
const CONFIG = 'configured'
/** A variable of a function: it is gone when that returns, and its content is bounded itself. */
const LOCAL = 'local'
/** Entries are removed when the request, statement or message that they are about ends. */
const FLIGHT = 'in flight'
const REASONS: Record<string, (name: string, text: string) => boolean> = {
  [FIXED]: () => true,
  [CONFIG]: () => true,
  [LOCAL]: isLocal,
  [FLIGHT]: isEmptied
}
/** The same; the test of this name shows it. */
const REQUEST = 'nothing of a request is left after it has ended'
const UPLOADS =
  'remote: uploads of several processes are counted together, until they end or their process is gone'

/** What bounds each of them: one of the above, or a row of docs/security.md. */
const BOUNDS: Record<string, Record<string, string>> = {
  'address.ts': { zeros: FIXED },
  'app.ts': { telling: FLIGHT },
  'batches.ts': { batch: LOCAL },
  'body-budget.ts': { '#byCaller': FLIGHT },
  'changes.ts': { all: LOCAL, itemsBefore: LOCAL, itemsAfter: LOCAL },
  'commands/backup.ts': { files: LOCAL },
  'commands/keys.ts': { changes: LOCAL },
  'commands/usage.ts': { batch: LOCAL },
  'connections.ts': {
    refused: FIXED,
    '#sockets': 'Connections of clients',
    byAddress: 'Connections of clients',
    '#complaints': FIXED
  },
  'config.ts': { known: LOCAL, issues: LOCAL },
  'data-files.ts': { found: LOCAL },
  'defaults.ts': { HARMLESS: FIXED },
  'demo.ts': { chunks: LOCAL },
  'discovery/ask.ts': { chunks: LOCAL, rest: LOCAL },
  'discovery/database.ts': { MEMBERS: FIXED },
  'discovery/dns.ts': { ranks: LOCAL },
  'discovery/entry.ts': { backends: LOCAL },
  'discovery/etcd.ts': { values: 'Discovered backends' },
  'discovery/finder.ts': { '#sources': CONFIG, '#found': 'Discovered backends', sources: CONFIG },
  'discovery/kubernetes.ts': { '#slices': 'Discovered backends', pods: LOCAL },
  'discovery/source.ts': { '#bad': 'Discovered backends', bad: LOCAL },
  'dialects/failure.ts': { statuses: LOCAL },
  'engine-controls.ts': {
    FIELDS: FIXED,
    OPTIONS: FIXED,
    PARAMETERS: FIXED,
    HEADERS: FIXED,
    kept: LOCAL
  },
  'exchange.ts': {
    open: REQUEST,
    onStillborn: FIXED,
    '#finishers': FIXED,
    '#metering': FIXED,
    '#recording': FIXED,
    '#ending': FIXED
  },
  'explain.ts': { asked: FLIGHT },
  'follow.ts': { PLAIN: FIXED },
  'issues.ts': { UNSUPPORTED: FIXED, seen: LOCAL },
  'json.ts': { path: LOCAL, open: LOCAL },
  'keys/answer.ts': { wrong: LOCAL, TRUE: FIXED },
  'keys/builtin.ts': { '#found': 'Cached keys of `builtin`, `static` and `file`' },
  'keys/cached.ts': {
    '#known': 'Cached keys of `redis`, `database`, `webhook`, `jwt`',
    '#unknown': 'Cached keys of `redis`, `database`, `webhook`, `jwt`',
    '#asking': FLIGHT
  },
  'keys/jwt.ts': { NOT_GOOD: FIXED },
  'keys/key-list.ts': { root: LOCAL, issues: LOCAL, fromEnv: LOCAL, parts: LOCAL },
  'keys/lru.ts': { '#entries': CONFIG },
  'keys/sources.ts': { sources: CONFIG },
  'keys/static.ts': {
    '#fields': CONFIG,
    '#records': 'Cached keys of `builtin`, `static` and `file`'
  },
  'keys/webhook.ts': { chunks: LOCAL },
  'limits/memory.ts': { '#counters': 'Counters of client addresses' },
  'limits/period.ts': { '#known': FIXED },
  'limits/quotas.ts': {
    '#changed': 'Counters of client addresses',
    quotas: 'Counters of API keys and users'
  },
  'limits/redis.ts': {
    '#unsure': 'Accounts that Redis has yet to be told of',
    '#unclear': FLIGHT,
    '#lost': 'Counters of client addresses',
    '#settling': FLIGHT
  },
  'limits/remote.ts': { '#asked': FLIGHT, '#open': FLIGHT, '#uploading': UPLOADS },
  'limits/typical.ts': { '#kinds': 'Typical response lengths of callers and models' },
  'limits/uploads.ts': { '#counts': UPLOADS },
  'model-list.ts': {
    '#names': CONFIG,
    '#patterns': CONFIG,
    '#lengths': CONFIG,
    '#found': 'Models whose price or limits are remembered'
  },
  'logs/requests.ts': { '#rows': 'Rows of the request log' },
  'logs/shared-lines.ts': { '#latest': 'Events that several workers log' },
  'logs/sink.ts': { '#whenEmpty': FLIGHT },
  'metering/choices.ts': {
    '#choices': 'Choices of a response whose usage is kept',
    '#unnamed': 'Choices of a response whose usage is kept',
    '#whole': 'Choices of a response whose usage is kept'
  },
  'metering/estimate.ts': {
    '#common': 'Models whose token sizes are learned',
    '#own': 'Models whose token sizes are learned',
    outputTeachers: FIXED,
    inputTeachers: FIXED
  },
  'metering/prompt.ts': { DATA_NAMES: FIXED },
  'metering/sample.ts': { FRAME: FIXED },
  'metering/watcher.ts': { '#codes': FIXED, '#names': FIXED },
  'metrics/departed.ts': {
    before: 'Metrics of backends',
    departed: 'Metrics of backends',
    present: LOCAL
  },
  'openapi.ts': { OURS: FIXED },
  'options.ts': { enabledBy: LOCAL, FRAMING: FIXED, checkers: FIXED, seen: LOCAL },
  'payload.ts': {
    READ: FIXED,
    read: LOCAL,
    READ_IN_STREAM_OPTIONS: FIXED,
    READ_IN_OPTIONS: FIXED,
    READ_IN_PARAMETERS: FIXED,
    '#members': 'JSON of a request body'
  },
  'fragments.ts': { '#open': CONFIG },
  'plugins/admin.ts': { '#byAddress': 'Client addresses with wrong admin tokens' },
  'plugins/auth.ts': { headerNames: CONFIG, sources: CONFIG, onChange: FIXED, closeSources: LOCAL },
  'plugins/backends.ts': {
    found: 'Discovered backends',
    sources: 'Discovered backends',
    onChange: FIXED
  },
  'plugins/limits.ts': { observers: FIXED, watched: REQUEST },
  'plugins/metering.ts': { streamNames: FIXED, wholeNames: FIXED },
  'plugins/proxy.ts': {
    hooks: FIXED,
    NOT_TO_BACKEND: FIXED,
    NOT_TO_CLIENT: FIXED,
    allowed: CONFIG
  },
  'plugins/usage.ts': { onDelivery: FIXED, unwritten: FLIGHT, tags: CONFIG },
  'pool/answer.ts': { '#early': FLIGHT },
  'pool/attained.ts': {
    '#callers': 'Recent usage of callers, for fair queueing',
    '#active': FLIGHT
  },
  'pool/attempt.ts': { asked: FIXED, withdrawn: FIXED },
  'pool/backend.ts': { RUNNING_USAGE: FIXED, COMPLETION_LIMIT: FIXED, '#openingLater': FLIGHT },
  'pool/connector.ts': { left: FLIGHT, asked: FLIGHT },
  'pool/continuation.ts': {
    PLAIN: FIXED,
    NEUTRAL: FIXED,
    '#held': REQUEST,
    '#data': REQUEST,
    '#taken': REQUEST
  },
  'pool/decisions.ts': {
    seen: 'Routing traces',
    choices: 'Routing traces',
    '#ring': 'Routing traces'
  },
  'pool/decoder.ts': { '#stages': REQUEST },
  'pool/discovery.ts': {
    '#watched': 'Discovered backends',
    '#complaints': 'Discovered backends',
    cards: 'Models of a backend',
    chunks: LOCAL
  },
  'pool/dispatcher.ts': { '#suspects': REQUEST, '#withdrawn': FIXED, headers: LOCAL },
  'pool/first-event.ts': { chunks: REQUEST },
  'pool/found.ts': { sources: LOCAL, urls: LOCAL, names: LOCAL },
  'pool/health.ts': { '#watched': 'Discovered backends' },
  'pool/hedge.ts': { '#times': 'Discovered backends', ofModels: 'First-byte times of models' },
  'pool/load.ts': { '#ofModels': 'Speeds of models', '#silent': REQUEST, '#queue': REQUEST },
  'pool/models.ts': { PUBLIC: FIXED, cards: LOCAL },
  'pool/policy.ts': { modelFallbacks: CONFIG },
  'pool/pool.ts': { '#lineups': FLIGHT, '#closing': FLIGHT, all: LOCAL, stays: LOCAL },
  'pool/prefixes.ts': { parts: LOCAL, kept: LOCAL },
  'pool/queue.ts': {
    '#lanes': 'Waiting requests',
    '#timers': 'Waiting requests',
    served: LOCAL,
    lines: 'Waiting requests'
  },
  'pool/race.ts': { '#attempts': REQUEST },
  'pool/refusal.ts': { chunks: REQUEST },
  'pool/renamed.ts': { HEADS: FIXED },
  'pool/retries.ts': { tried: REQUEST, '#notBefore': REQUEST },
  'references.ts': {
    openai: FIXED,
    responses: FIXED,
    anthropic: FIXED,
    ITEMS: FIXED,
    REFERENCES: FIXED,
    WITH_CONTAINER: FIXED,
    WITH_ID: FIXED,
    IGNORED: FIXED,
    ROLES: FIXED,
    TYPES: FIXED,
    DECISIVE: FIXED,
    CONTENT: FIXED,
    levels: 'JSON of a request body'
  },
  'reporters/courier.ts': {
    '#queue': 'Usage records in memory',
    '#open': 'Usage records in memory',
    '#left': 'Usage records in memory'
  },
  'reporters/outbox.ts': { '#asked': FLIGHT },
  'reporters/reporters.ts': { names: LOCAL },
  'reporters/webhook.ts': { TEMPORARY: FIXED },
  'routes/admin-original.ts': { rows: LOCAL },
  'metering/billed.ts': { joined: LOCAL },
  'routes/openai.ts': { UNREADABLE: FIXED },
  'routes/reservations.ts': { '#held': 'Reservations of background responses' },
  'routes/stored-responses.ts': {
    '#recent': 'Stored responses',
    '#billed': 'Stored responses',
    '#writing': 'Statements that wait for `responses.db`',
    '#reading': 'Statements that wait for `responses.db`'
  },
  'settlement.ts': { '#underway': 'Unread stored responses' },
  'store/connections.ts': { '#all': CONFIG, '#idle': CONFIG, '#waiting': FLIGHT },
  'store/mysql.ts': { REFUSED_CODES: FIXED },
  'store/sqlite.ts': { REFUSALS: FIXED, '#asked': FLIGHT },
  'store/sqlite-file.ts': { DAMAGED: FIXED },
  'store/storage.ts': { issues: LOCAL },
  'store/table.ts': { Map: LOCAL },
  'turns.ts': { '#waiting': 'Pipelined requests of a connection' },
  'wire/edits.ts': { pieces: LOCAL },
  'wire/json-scanner.ts': { members: 'JSON of a request body' },
  'workers.ts': { asked: FLIGHT, newsListeners: FIXED },
  'yaml.ts': { reading: LOCAL, all: LOCAL, repeated: LOCAL, wrong: LOCAL }
}

/** What the labels of metrics are. */
const LABELS: Record<string, string> = {
  path: 'patterns of routes, and "other"',
  stream: 'true or false',
  backend: 'Metrics of backends',
  status: 'status codes',
  type: 'four kinds of tokens',
  outcome: 'five outcomes',
  result: 'fixed words',
  reason: 'fixed words',
  scope: 'four scopes',
  limit: 'names of limits',
  mode: 'enforce or shadow',
  priority: 'two priorities',
  source: 'configured sources'
}

const SOURCE = new URL('../src/', import.meta.url).pathname
const sources = globSync('**/*.ts', { cwd: SOURCE }).map(file => ({
  file,
  text: readFileSync(SOURCE + file, 'utf8').replace(/\/\*[\s\S]*?\*\/|^\s*\/\/.*$/gm, '')
}))

/** The name of the collection that a line makes: the first one in it that is no keyword. */
function collectionOf(line: string): string | undefined {
  const isMade = /new (?:Map|Set|Lru|WeakMap|WeakSet)\b/.test(line)
  // Fields of classes, and variables of modules and plugins; deeper ones end with their function.
  const isList = /^(?: {2})?(?:readonly |let |const )?#?\w+(?:: .*)? = (?:\[\]|new Array.*)$/.test(
    line
  )
  if (!isMade && !isList) return undefined
  const keywords =
    /^\s*(?:if \(.*?\)\) |export |return |new |static |readonly |const |let |this\.|\.\.\.)*/
  return /^#?\w+/.exec(line.replace(keywords, ''))?.[0]
}

/** Whether a collection is a variable of a function: no field of a class, and none of a module. */
function isLocal(name: string, text: string): boolean {
  const isField = name.startsWith('#') || new RegExp(`^  readonly ${name}\\b`, 'm').test(text)
  return !isField && !new RegExp(`^(export )?(const|let) ${name}\\b`, 'm').test(text)
}

/** Whether something removes entries of a collection, or replaces all of it. */
function isEmptied(name: string, text: string): boolean {
  const removal = '\\??\\.(delete|pop|shift|splice|clear)\\(| = |\\.length = 0'
  const declaration = new RegExp(`(const|let|readonly) ${name}\\b.*|^  ${name}\\b.* = .*`, 'gm')
  return new RegExp(`${name}(${removal})`).test(text.replace(declaration, ''))
}

test('every map, cache, queue and set of labels has a bound', () => {
  const page = readFileSync(new URL('../docs/security.md', import.meta.url), 'utf8')
  const rows = [...page.matchAll(/^\| ([^|]+) \|/gm)].map(([, row]) => row!)
  const tests = globSync('*.test.ts', { cwd: import.meta.dirname }).flatMap(file => {
    const text = readFileSync(`${import.meta.dirname}/${file}`, 'utf8')
    return [...text.matchAll(/^test\('(.*?)'/gm)].map(([, name]) => name!)
  })
  const bounds = new Set([...tests, ...rows])
  const wrong: string[] = []
  for (const { file, text } of sources) {
    const names = new Set(text.split('\n').map(collectionOf))
    names.delete(undefined)
    const known = BOUNDS[file] ?? {}
    for (const name of names) {
      const bound = known[name!]
      if (bound === undefined) wrong.push(`src/${file} ${name}: BOUNDS does not say what bounds it`)
      else if (bound in REASONS) {
        if (!REASONS[bound]!(name!, text)) wrong.push(`src/${file} ${name}: is not ${bound}`)
      } else if (!bounds.has(bound))
        wrong.push(`docs/security.md has no row "${bound}", and no test is called so`)
    }
    for (const name of Object.keys(known)) {
      if (!names.has(name)) wrong.push(`src/${file} ${name}: is not there any more`)
    }
    for (const [, labels] of text.matchAll(/labelNames(?:: | = )\[(.*?)\]/g)) {
      for (const [, label] of labels!.matchAll(/'(\w+)'/g)) {
        if (!(label! in LABELS))
          wrong.push(`src/${file}: LABELS does not say what "${label}" may be`)
      }
    }
  }
  assert.deepEqual(wrong, [])
})

const quota = (id: string) => account({ total_quota: 100 }, id)
const UTC = new Periods('UTC')
const log = pino({ level: 'silent' })

test('with a small heap fewer client addresses are counted', () => {
  const code = "import { MAX_ADDRESSES } from './src/limits/store.ts'; console.log(MAX_ADDRESSES)"
  const flags = ['--max-old-space-size=256', '-C', 'llmproxy-source', '--input-type=module']
  const cwd = join(import.meta.dirname, '..')
  const most = Number(execFileSync(process.execPath, [...flags, '-e', code], { cwd }))
  assert.ok(most > 10_000 && most < 30_000, String(most))
})

test('client addresses with a quota never exceed their bound, and keys are not forgotten', () => {
  const store = new MemoryStore(UTC)
  const use = (id: string, tokens: number) => {
    const lease = store.reserve({ accounts: [quota(id)], hold: NOTHING, least: NOTHING })
    if (!isRefusal(lease)) store.settle(lease, { tokens, cost: 0 })
    return lease
  }
  use('alice', 100)
  use('\n10.0.0.1', 100)
  assert.ok(isRefusal(use('\n10.0.0.1', 1)))
  const running = store.reserve({ accounts: [quota('\nruns')], hold: NOTHING, least: NOTHING })
  for (let at = 0; at < 120_000; at++) {
    use(`\n2001:db8::${at}`, 1)
    assert.ok(store.size <= 100_000)
  }
  assert.ok(isRefusal(use('alice', 1)))
  store.settle(running as Lease, { tokens: 100, cost: 0 })
  assert.ok(isRefusal(use('\nruns', 1)))
})

test('the file of quotas drops addresses that memory has dropped', async t => {
  const file = `${folder(t)}/limits.db`
  const rows = () => {
    const db = new DatabaseSync(file)
    const names = db.prepare('SELECT account FROM quotas ORDER BY account').all()
    db.close()
    return names.map(({ account }) => account)
  }
  const quotas = await Quotas.open(file, log)
  const spending = { start: 0, end: Number.POSITIVE_INFINITY, tokens: 1, cost: 0 }
  for (const each of ['per_key:alice', 'per_key:\na', 'per_key:\nb']) quotas.note(each, spending)
  await quotas.written()
  quotas.forget('per_key:\na')
  await quotas.close()
  assert.deepEqual(rows(), ['per_key:\nb', 'per_key:alice'])
})

test('redis: addresses expire whose quota has no period, and keys do not', {
  skip: REDIS.skip
}, async t => {
  const prefix = uniqueName('addresses')
  const store = await joinRedis(t, REDIS, prefix)
  const client = createClient({ url: REDIS.url })
  await client.connect()
  t.after(() => client.destroy())
  for (const id of ['alice', '\n10.0.0.1']) {
    const lease = await store.reserve({ accounts: [quota(id)], hold: NOTHING, least: NOTHING })
    await store.book(lease as Lease, { tokens: 1, cost: 0 })
    const name = hash('sha256', `per_key:${id}`).slice(0, 32)
    const ttl = await client.ttl(`${prefix}:{limits}:${name}`)
    assert.equal(ttl > 0, id !== 'alice', `${id}: ${ttl}`)
  }
})

test('models that callers invent share one count, listed ones have their own', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url, models: ['large', 'small', '*'] }],
    rate_limit: {
      per_model: { requests_per_minute: 2 },
      models: { 'mini-*': { requests_per_minute: 3 } }
    }
  })
  const statuses = async (models: string[]) => {
    const all = []
    for (const model of models) {
      all.push((await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model })).status)
    }
    return all
  }
  assert.deepEqual(await statuses(['invented-1', 'invented-2', 'invented-3']), [200, 200, 429])
  assert.deepEqual(await statuses(['mini-1', 'mini-2', 'mini-3', 'mini-4']), [200, 200, 200, 429])
  assert.deepEqual(await statuses(['large', 'large', 'large', 'small']), [200, 200, 429, 200])
})

test('metrics do not grow with what clients send', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const send = async (at: string) => {
    const model = `model-${at}`
    await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model, user: at }, { 'x-id': at })
    await post(`${gateway.url}/v1/path-${at}?query=${at}`, CHAT)
    await fetch(`${gateway.url}/${at}`, { method: 'PUT' })
  }
  const series = async () => (await gateway.metrics()).match(/^(llmproxy|http)_/gm)!.length
  await send('first')
  await gateway.metrics()
  const before = await series()
  for (let at = 0; at < 100; at++) await send(String(at))
  assert.equal(await series(), before)
})

test('a source of keys remembers a bounded number of keys, known and unknown', async () => {
  let asked = 0
  const source: KeySource = {
    name: 'source',
    async lookup(key) {
      asked++
      const record: KeyRecord = { id: key, status: 'active' }
      return key.startsWith('known') ? record : undefined
    }
  }
  const ttl = { ttl: 60_000, negative_ttl: 60_000, stale_if_error: 0 }
  for (const kind of ['known', 'unknown']) {
    const keys = new CachedKeys(source, ttl, log)
    const look = (at: number) => keys.lookup(`${kind}-${at}`, `${kind}-${at}`)
    asked = 0
    for (let at = 0; at < 10_001; at++) await look(at)
    await look(10_000)
    assert.equal(asked, 10_001, 'the latest is remembered')
    await look(0)
    assert.equal(asked, 10_002, 'the first is not')
  }
})

test('what is learned about callers and models is bounded', () => {
  const attained = new Attained()
  for (let at = 0; at <= 10_000; at++) attained.add(`caller-${at}`, 1, 0)
  assert.deepEqual([attained.of('caller-0', 0), attained.of('caller-1', 0)], [0, 1])

  const typical = new Typical()
  typical.learn('first', 'm', 7)
  for (let at = 0; at < 5_000; at++) typical.learn(`caller-${at}`, `model-${at}`, 9)
  assert.equal(typical.expect('first', 'm'), 32)

  const text = [7, ...new Array(19).fill(0)] as never
  const estimates = new Estimates(1_000)
  const passed = { text, deltas: 0, isWhole: true }
  const first = (caller: string) => estimates.output({ model: 'first', caller }, passed)
  const unknown = first('alice')
  const learn = () => {
    for (let at = 0; at < 20; at++) {
      for (const caller of ['alice', 'b', 'c', 'd']) {
        estimates.learnOutput({ model: 'first', caller }, passed, 20)
      }
    }
    assert.deepEqual([first('alice') > 15, first('eve') > unknown], [true, true])
  }
  learn()
  for (let at = 0; at < 1_000; at++) {
    estimates.learnOutput({ model: `model-${at}`, caller: 'bob' }, passed, 20)
  }
  assert.deepEqual([first('alice'), first('eve')], [unknown, unknown])
  learn()
  const common = first('eve')
  for (let at = 0; at < 1_000; at++) {
    estimates.learnOutput({ model: 'second', caller: `caller-${at}` }, passed, 20)
  }
  assert.deepEqual([first('alice'), first('eve')], [common, common])

  const choices = new Choices()
  const usage = '{"prompt_tokens":1,"completion_tokens":1}'
  for (let index = 0; index < 2_000; index++) {
    choices.add({ choices: 1, index, usage } as never)
    choices.add({ choices: 0, usage, hasTimings: true } as never)
    choices.add({ choices: 0, usage, hasTimings: false } as never)
  }
  assert.equal(choices.count, 1_000)
  const texts = { all: 1_000_000, first: undefined }
  assert.equal(choices.total(1, texts)?.usage.completionTokens, 1_000)

  const speeds = new Speeds()
  for (let at = 0; at < 1_000; at++) speeds.learners(`model-${at}`)
  assert.equal(speeds.entries().length, 64)

  const hedges = new Hedges()
  const live = {} as Live
  for (let at = 0; at < 20; at++) hedges.observe(live, 'first', 5)
  assert.ok(hedges.lateAfter(live, 'first'))
  for (let at = 0; at < 100; at++) hedges.observe(live, `model-${at}`, 5)
  assert.equal(hedges.lateAfter(live, 'first'), undefined)

  const decisions = new Decisions()
  for (let at = 0; at <= 1_000; at++) {
    const decision = decisions.begin(`req_${at}`, 'm'.repeat(1_000), 'round_robin')
    for (let step = 0; step < 40; step++) decisions.add(decision, new Choice())
  }
  assert.equal(decisions.find('req_0'), undefined)
  const { attempts, model } = decisions.find('req_1000')!.explain()
  assert.deepEqual([attempts.length, model?.length], [32, 200])
})

test('what a backend, a source or a caller repeats is taken and said a bounded number of times', () => {
  const entries = Array.from({ length: 5_000 }, (_, at) => `http://10.0.0.1:${at + 1}`)
  const bad: string[] = []
  assert.equal(toBackends(entries, {}, entry => void bad.push(entry)).length, 1_000)
  assert.equal(bad.length, 1)

  const said: number[] = []
  const complaint = new Complaint(records => said.push(records))
  for (let at = 0; at < 10_000; at++) complaint.add(1, `reason ${at}`)
  complaint.end()
  assert.deepEqual(said, [1, 9_999])
})
