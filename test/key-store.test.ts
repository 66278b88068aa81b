import assert from 'node:assert/strict'
import { readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { GatewayError } from '../src/errors.ts'
import { BuiltinKeys } from '../src/keys/builtin.ts'
import { hashKey, type KeyRecord } from '../src/keys/key.ts'
import { KeyExistsError, KeyStore } from '../src/keys/key-store.ts'
import { Lru } from '../src/keys/lru.ts'
import { toRows } from '../src/keys/stored-key.ts'
import { folder } from './process.ts'
import { randomizer } from './random.ts'

/** The builtin store of keys, on a real file. */

function open(t: TestContext, dataDir = folder(t)) {
  const file = join(dataDir, 'keys.db')
  const told: (readonly string[] | undefined)[] = []
  const store: KeyStore = new KeyStore(file, hashes => {
    told.push(hashes)
    for (const hash of hashes ?? [undefined]) source.forget(hash)
  })
  const source = new BuiltinKeys('builtin', store)
  t.after(() => store.close())
  const look = (key: string) => source.lookup(key, hashKey(key))
  /** What a lookup comes to, in a word. */
  const verdict = async (key: string) => {
    const found = await look(key)
    if (found instanceof GatewayError) return found.code
    return found?.status ?? 'unknown'
  }
  return { dataDir, store, told, look, verdict }
}

test('a key is shown once: the file has its hash, and nobody else can read it', async t => {
  const { dataDir, store } = open(t)
  const { key, record } = await store.create({ name: 'alice' })
  assert.match(key, /^sk-[\w-]{43}$/)
  assert.equal(record.key, `${key.slice(0, 7)}...${key.slice(-4)}`)
  const { key: imported } = await store.create({ key: 'an-old-key-of-somebody' })
  assert.equal(imported, 'an-old-key-of-somebody')
  await store.rotate(record.id, { grace: 60_000 })
  await store.close()
  for (const name of readdirSync(dataDir)) {
    assert.equal(statSync(join(dataDir, name)).mode & 0o777, 0o600, name)
    const bytes = readFileSync(join(dataDir, name), 'latin1')
    assert.ok(!bytes.includes(key) && !bytes.includes('an-old-key'), name)
  }
})

test('all fields come back as they were, times in one form', async t => {
  const { store, look } = open(t)
  const fields = {
    name: 'alice',
    user_id: 'u1',
    models: ['qwen-*'],
    starts_at: '2026-01-01',
    expires_at: 4070908800,
    allowed_ips: ['10.0.0.0/8'],
    denied_ips: ['10.0.0.1'],
    limits: { requests_per_minute: 60, tokens_per_minute: 1000, max_concurrent: 2 },
    total_quota: 1e6,
    quota_unit: 'tokens' as const,
    quota_reset_period: 'monthly' as const,
    used_quota: 5,
    last_reset_at: '2026-01-01T00:00:00Z',
    tags: { team: 'red' }
  }
  const { key, record } = await store.create(fields)
  const { id, key: _, created_at, updated_at, ...rest } = record
  assert.match(id, /^key_[0-9a-f]{16}$/)
  assert.equal(created_at, updated_at)
  assert.deepEqual(rest, {
    ...fields,
    status: 'active',
    starts_at: '2026-01-01T00:00:00.000Z',
    expires_at: '2099-01-01T00:00:00.000Z',
    last_reset_at: '2026-01-01T00:00:00.000Z'
  })
  assert.deepEqual(await store.get(id), record)
  assert.deepEqual(await store.get(hashKey(key)), record)
  const found = (await look(key)) as KeyRecord
  assert.deepEqual([found.id, found.userId, found.models], [id, 'u1', ['qwen-*']])
  assert.deepEqual(found.limits, {
    ...fields.limits,
    total_quota: 1e6,
    quota_unit: 'tokens',
    quota_reset_period: 'monthly'
  })
  assert.deepEqual(found.spent, { amount: 5, at: Date.parse('2026-01-01') })
  assert.deepEqual(found.tags, { team: 'red' })
  assert.ok(found.allowedIps!.check('10.1.1.1') && found.deniedIps!.check('10.0.0.1'))
})

test('what is wrong with a field is said by its name; a key is never repeated', async t => {
  const { store } = open(t)
  for (const [spec, message] of [
    [{ expires_at: 'soon' }, / key: expires_at: must be a time such as .* \(got "soon"\)$/],
    [{ limits: { requests_per_minut: 5 } }, /limits\.requests_per_minut: is not known; did you/],
    [{ limits: { max_concurrent: -1 } }, /limits\.max_concurrent: must be an integer of 0 or more/],
    [{ allowed_ips: ['10.0.0.0/99'] }, /allowed_ips\[0\]: must be an address or network/],
    [{ status: 'odd' }, /status: must be one of active, disabled/],
    [{ tags: { 'a b': 'c' } }, /key: tags: must be a mapping of names/],
    [{ quota_reset_period: 'hourly' }, /quota_reset_period: must be one of never, daily/],
    [{ key: 'sk secret' }, / key: key: must be a key without spaces[^(]*$/]
  ] as const) {
    await assert.rejects(store.create(spec as never), message)
  }
  await store.create({ key: 'sk-given' })
  await assert.rejects(store.create({ key: 'sk-given' }), KeyExistsError)
  assert.equal((await store.list()).total, 1)
})

test('an update changes what it names, and null takes away', async t => {
  const { store, look, verdict } = open(t)
  const { key, record } = await store.create({
    name: 'alice',
    limits: { requests_per_minute: 60, max_concurrent: 2 },
    tags: { team: 'red', site: 'a' }
  })
  await look(key)
  const changed = await store.update(record.id, {
    name: null,
    user_id: 'u1',
    limits: { requests_per_minute: null },
    tags: { team: 'blue' },
    expires_at: '2099-01-01'
  })
  const { name, user_id, limits, tags, expires_at } = changed!
  assert.deepEqual(
    [name, user_id, limits, tags, expires_at],
    [
      undefined,
      'u1',
      { max_concurrent: 2 },
      { team: 'blue', site: 'a' },
      '2099-01-01T00:00:00.000Z'
    ]
  )
  assert.equal(((await look(key)) as KeyRecord).userId, 'u1', 'at once')
  await store.update(record.id, { status: 1 })
  assert.equal(await verdict(key), 'disabled')
  assert.equal((await store.get(record.id))!.status, 'disabled')
  await store.update(record.id, { status: null })
  assert.equal(await verdict(key), 'active')
  await assert.rejects(store.update(record.id, { expires_at: 'soon' }), /expires_at: must be/)
  assert.equal(await store.update('key_none', { name: 'x' }), undefined)
})

test('a rotated key keeps its id, and the old text as long as the grace lasts', async t => {
  const { store, look, verdict, told } = open(t)
  const { key, record } = await store.create({ name: 'alice' })
  assert.equal(await verdict(key), 'active')
  const next = (await store.rotate(record.id, { grace: 60_000 }))!
  assert.notEqual(next.key, key)
  assert.equal(next.record.id, record.id)
  assert.ok(Date.parse(next.record.old_key_until!) > Date.now())
  for (const each of [key, next.key]) {
    assert.equal(((await look(each)) as KeyRecord).id, record.id)
  }
  assert.equal((await store.get(hashKey(key)))!.id, record.id)
  t.mock.timers.enable({ apis: ['Date'], now: Date.now() + 60_000 })
  assert.equal(await verdict(key), 'unknown', 'the grace is over')
  assert.equal(await verdict(next.key), 'active')
  const last = (await store.rotate(record.id))!
  assert.equal(await verdict(next.key), 'unknown', 'no grace, and dropped at once')
  assert.equal(await verdict(last.key), 'active')
  await store.revoke(record.id)
  assert.deepEqual(new Set(told.at(-1)).has(hashKey(last.key)), true)
  assert.equal(await store.rotate('key_none'), undefined)
})

test('a revoked key is refused at once, with all that it was before, and for good', async t => {
  const { store, verdict } = open(t)
  const { key, record } = await store.create({})
  const { key: next } = (await store.rotate(record.id, { grace: 60_000 }))!
  assert.deepEqual([await verdict(key), await verdict(next)], ['active', 'active'])
  const revoked = await store.revoke(record.id)
  assert.equal(revoked!.status, 'revoked')
  assert.deepEqual([await verdict(key), await verdict(next)], ['key_disabled', 'key_disabled'])
  await store.update(record.id, { status: 'active' })
  assert.equal(await verdict(next), 'key_disabled')
  assert.equal((await store.revoke(record.id))!.revoked_at, revoked!.revoked_at)
  assert.equal(await store.delete(record.id), true)
  assert.deepEqual([await verdict(key), await verdict(next)], ['unknown', 'unknown'])
  assert.equal(await store.delete(record.id), false)
})

test('what another gateway has revoked is revoked here: that text, unless it was made since then', async t => {
  const { store, verdict, told } = open(t)
  const [plain, old, later] = [
    await store.create({}),
    await store.create({}),
    await store.create({})
  ]
  const next = (await store.rotate(old.record.id, { grace: 60_000 }))!
  const changes = told.length
  const revokedAt = Date.now() + 1
  await store.hearRevoked([
    { hash: hashKey(plain.key), revokedAt },
    { hash: hashKey(old.key), revokedAt },
    { hash: hashKey(later.key), revokedAt: Date.parse(later.record.created_at) - 1 },
    { hash: hashKey('sk-nobody'), revokedAt }
  ])
  assert.equal(told.length, changes, 'or it would go round for ever')
  assert.equal((await store.get(plain.record.id))!.revoked_at, new Date(revokedAt).toISOString())
  t.mock.timers.enable({ apis: ['Date'], now: revokedAt })
  const verdicts = [plain, old, next, later].map(({ key }) => verdict(key))
  assert.deepEqual(await Promise.all(verdicts), ['key_disabled', 'unknown', 'active', 'active'])
})

test('whoever looks while a key is revoked, afterwards nobody is admitted', async t => {
  const { store, verdict } = open(t)
  for (let round = 0; round < 100; round++) {
    const { key, record } = await store.create({})
    const looks = () => Array.from({ length: 3 }, () => verdict(key))
    await Promise.all([...looks(), store.revoke(record.id), ...looks()])
    assert.equal(await verdict(key), 'key_disabled')
  }
})

test('what another process changes is noticed within 500 ms', async t => {
  const here = open(t)
  const there = open(t, here.dataDir)
  const { key, record } = await there.store.create({})
  assert.equal(await here.verdict(key), 'active')
  await there.store.revoke(record.id)
  const { now } = performance
  t.mock.method(performance, 'now', () => now.call(performance) + 500)
  assert.equal(await here.verdict(key), 'key_disabled')
  assert.equal(here.told.length, 0)
})

test('of several processes one makes the first key, once in the life of a file', async t => {
  const first = open(t)
  const all = [first, open(t, first.dataDir), open(t, first.dataDir)]
  const made = await Promise.all(all.map(({ store }) => store.createFirst({ name: 'first' })))
  const [winner, ...others] = made.filter(each => each !== undefined)
  assert.equal(others.length, 0)
  await first.store.delete(winner!.record.id)
  assert.equal(await first.store.createFirst({ name: 'first' }), undefined)
})

test('pages of the list, the newest first, and those of one user', async t => {
  const { store } = open(t)
  for (let n = 0; n < 25; n++) {
    await store.create({ name: `k${n}`, user_id: n % 5 === 0 ? 'five' : 'other' })
  }
  const names = async (options: object) => {
    const { keys, total } = await store.list(options)
    return [total, keys.map(({ name }) => name).join(' ')]
  }
  const [total, page] = await names({})
  assert.equal(total, 25)
  assert.match(String(page), /^k24 k23 .* k5$/)
  assert.deepEqual(await names({ offset: 23 }), [25, 'k1 k0'])
  assert.deepEqual(await names({ limit: 2, user_id: 'five' }), [5, 'k20 k15'])
})

test('sync: all or nothing; full deletes what is not in the list, ids stay', async t => {
  const { store, verdict, told } = open(t)
  const { record } = await store.create({ key: 'sk-a', name: 'a' })
  await store.create({ key: 'sk-b', name: 'b' })
  assert.equal(await verdict('sk-b'), 'active')
  const wrong = store.sync(toRows([{ key: 'sk-c' }, { key: 'sk-d', expires_at: 'soon' }]), 'full')
  await assert.rejects(wrong, / keys: \[1\]\.expires_at: must be a time/)
  assert.equal((await store.list()).total, 2)
  await store.sync(toRows([{ key: 'sk-a', name: 'a2' }, { key: 'sk-c' }]), 'incremental')
  assert.equal((await store.list()).total, 3)
  await store.sync(toRows([{ key: 'sk-a', name: 'a3' }]), 'full')
  assert.equal(told.at(-1), undefined, 'all may have changed')
  assert.equal(await verdict('sk-b'), 'unknown')
  const { keys, total } = await store.list()
  assert.deepEqual([total, keys[0]!.id, keys[0]!.name], [1, record.id, 'a3'])
})

test('a file of a newer version is left as it is', async t => {
  const { store, dataDir } = open(t)
  await store.list()
  const { DatabaseSync } = await import('node:sqlite')
  new DatabaseSync(join(dataDir, 'keys.db')).exec('PRAGMA user_version = 99')
  const next = open(t, dataDir)
  await assert.rejects(next.store.list(), /newer version/)
})

test('what is remembered is bounded', () => {
  const lru = new Lru<number, number>(100)
  for (let n = 0; n < 1000; n++) {
    lru.set(n, n)
    lru.get(0)
  }
  assert.equal(lru.size, 100)
  assert.deepEqual([lru.get(0), lru.get(1), lru.get(999)], [0, undefined, 999])
})

test('the one that was not asked for or set longest is forgotten, in any order of uses', () => {
  const lru = new Lru<number, number>(3)
  /** Pairs, the latest last. */
  let kept: [number, number][] = []
  const without = (key: number) => kept.filter(([each]) => each !== key)
  const next = randomizer(1)
  const random = (count: number) => Math.floor(next() * count)
  for (let value = 0; value < 10_000; value++) {
    const key = random(6)
    const use = random(8)
    if (use < 4) {
      const found = kept.find(([each]) => each === key)
      assert.equal(lru.get(key), found?.[1])
      if (found !== undefined) kept = [...without(key), found]
    } else if (use < 7) {
      lru.set(key, value)
      kept = [...without(key), [key, value] as [number, number]].slice(-3)
    } else {
      lru.delete(key)
      kept = without(key)
    }
    assert.deepEqual([...lru.entries()], kept)
  }
})
