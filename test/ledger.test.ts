import assert from 'node:assert/strict'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { test } from 'node:test'
import { Ledger } from '../src/reporters/ledger.ts'
import { folder } from './process.ts'

test('pages come back as they were written, in order', () => {
  const ledger = new Ledger(':memory:')
  const pages = [['{"id":"a"}', '{"id":"b","text":"\\u001e\\n"}\0{ "raw":\n1 }'], ['{"id":"c"}']]
  const seqs = pages.map(page => ledger.append(page, 1))
  assert.deepEqual(seqs, [1, 2])
  assert.deepEqual(ledger.next(0), { seq: 1, at: 1, entries: pages[0] })
  assert.deepEqual(ledger.next(1), { seq: 2, at: 1, entries: pages[1] })
  assert.equal(ledger.next(2), undefined)
})

test('whoever reads all records keeps nobody from writing, nor the file from being tidied', t => {
  const file = join(folder(t), 'usage.db')
  const ledger = new Ledger(file)
  for (const at of [1, 2, 3, 4]) ledger.append([`a${at}`, `b${at}`], at)
  const entries = ledger.entries(2)
  assert.equal(entries.next().value, 'a2')
  ledger.append(['late'], 5)
  const other = new DatabaseSync(file)
  const { busy } = other.prepare('PRAGMA wal_checkpoint(TRUNCATE)').get()!
  assert.equal(busy, 0, 'no statement is open')
  other.close()
  assert.deepEqual([...entries], ['b2', 'a3', 'b3', 'a4', 'b4'])
  assert.deepEqual([...ledger.entries(6)], [])
  ledger.close()
})

test('a new reporter begins with what comes, and keeps its mark', () => {
  const ledger = new Ledger(':memory:')
  ledger.append(['1'])
  assert.equal(ledger.markOf('late'), 1)
  ledger.append(['2'])
  assert.equal(ledger.markOf('late'), 1)
  ledger.mark('late', 2)
  assert.equal(ledger.markOf('late'), 2)
})

test('what was put aside comes back in its order, and is settled by itself', () => {
  const ledger = new Ledger(':memory:')
  ledger.defer('a', 5, 'one')
  ledger.defer('b', 6, 'other')
  ledger.defer('a', 7, 'two')
  const [one, two] = ledger.deferred('a', 0, 10)
  assert.deepEqual([one!.entry, one!.at, two!.entry], ['one', 5, 'two'])
  ledger.settle(one!.rowid)
  assert.deepEqual(
    ledger.deferred('a', 0, 10).map(each => each.entry),
    ['two']
  )
})

/** Prunes to the end; returns how many records somebody still waited for. */
function pruneAll(ledger: Ledger, ...args: Parameters<Ledger['prune']>): number {
  let lost = 0
  for (let step = ledger.prune(...args); step.gone > 0; step = ledger.prune(...args)) {
    assert.ok(step.gone <= 100, 'a step does not take long')
    lost += step.lost
  }
  return lost
}

test('old pages go when everybody has had them, and not before', () => {
  const ledger = new Ledger(':memory:')
  ledger.markOf('fast')
  ledger.markOf('slow')
  for (const at of [1, 2, 3]) ledger.append([String(at)], at)
  ledger.mark('fast', 3)
  ledger.mark('slow', 1)
  assert.equal(pruneAll(ledger, ['fast', 'slow'], 3, 1e9), 0)
  assert.equal(ledger.next(0)!.seq, 2)
  ledger.mark('slow', 3)
  pruneAll(ledger, ['fast', 'slow'], 3, 1e9)
  assert.equal(ledger.next(0)!.seq, 3)
})

test('too much: the oldest go first, and what somebody still waited for is told', () => {
  const ledger = new Ledger(':memory:')
  ledger.markOf('dead')
  for (let page = 0; page < 200; page++) ledger.append(['x'.repeat(10_000), 'y'])
  const lost = pruneAll(ledger, ['dead'], 0, 1_000_000)
  const left = ledger.next(0)!.seq
  assert.ok(left > 50 && left < 200, String(left))
  assert.equal(lost, (left - 1) * 2)
})
