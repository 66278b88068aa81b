import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  appendFileSync,
  closeSync,
  existsSync,
  openSync,
  readFileSync,
  readSync,
  renameSync,
  statSync,
  utimesSync,
  writeFileSync
} from 'node:fs'
import { dirname, join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { type FileOptions, RotatingFile } from '../src/logs/rotating-file.ts'
import { mounted, NO_MOUNT, oldOnes, readAll, smallDisk } from './disk.ts'
import { eventually } from './helper.ts'
import { folder } from './process.ts'

const OPTIONS: FileOptions = {
  path: '',
  rotate: 'size',
  max_size: 1000,
  max_files: 0,
  max_age: 0,
  compress: false
}

function rotating(t: TestContext, options: Partial<FileOptions> & { path: string }) {
  const file = new RotatingFile({ ...OPTIONS, ...options }, { mode: 0o600, isSafe: true })
  t.after(() => file.close())
  return { file, write: (text: string) => file.write(Buffer.from(text)) }
}

const lines = (from: number, to: number) =>
  Array.from({ length: to - from }, (_, at) => `line ${String(from + at).padStart(5, '0')}\n`)

test('a file that is full is followed by another; nothing is lost and the order is kept', async t => {
  const path = join(folder(t), 'logs/of/x.log')
  const { write } = rotating(t, { path })
  await Promise.all(lines(0, 1000).map(write))
  assert.equal(readAll(path), lines(0, 1000).join(''))
  assert.equal(oldOnes(path).length, 11)
  for (const each of oldOnes(path)) {
    assert.match(each, /x\.log\.\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{3}Z-[0-9a-f]{6}$/)
    assert.ok(statSync(each).size <= 1000)
  }
  assert.equal(statSync(path).mode & 0o777, 0o600)
  assert.equal(statSync(dirname(path)).mode & 0o777, 0o700)
})

test('what is larger than a file is written all the same', async t => {
  const path = join(folder(t), 'x.log')
  const { write } = rotating(t, { path, max_size: 10 })
  for (const text of ['a\n', `${'b'.repeat(100)}\n`, 'c\n']) await write(text)
  assert.equal(oldOnes(path).length, 2)
  assert.equal(readAll(path), `a\n${'b'.repeat(100)}\nc\n`)
})

test('a file goes on after a restart, and begins anew on another day or in another hour', async t => {
  for (const [rotate, hours, files] of [
    ['daily', 24, 1],
    ['hourly', 1, 1],
    ['size', 24, 0],
    ['none', 24, 0]
  ] as const) {
    const path = join(folder(t), 'x.log')
    writeFileSync(path, 'before\n')
    await rotating(t, { path, rotate }).write('a\n')
    assert.equal(oldOnes(path).length, 0)
    const then = new Date(Date.now() - hours * 60 * 60 * 1000)
    utimesSync(path, then, then)
    await rotating(t, { path, rotate }).write('b\n')
    assert.equal(oldOnes(path).length, files, rotate)
    assert.equal(readAll(path), 'before\na\nb\n')
  }
})

test('old files are compressed, and removed when they are too many or too old', async t => {
  const path = join(folder(t), 'x.log')
  const old = (time: number) =>
    `${path}.${new Date(time).toISOString().replaceAll(':', '-')}-0000aa`
  const day = 24 * 60 * 60 * 1000
  const tooOld = [`${old(Date.now() - 8 * day)}.gz`, old(Date.now() - 9 * day)]
  const others = [`${path}.old`, join(dirname(path), 'y.log')]
  for (const each of [...tooOld, ...others]) writeFileSync(each, 'x\n')
  const { write } = rotating(t, { path, compress: true, max_files: 3, max_age: 7 * day })
  for (const line of lines(0, 500)) await write(line)
  await eventually(() => oldOnes(path).filter(each => each.endsWith('.gz')).length === 3)
  await eventually(() => oldOnes(path).length === 4)
  for (const each of tooOld) assert.ok(!existsSync(each))
  for (const each of others) assert.ok(existsSync(each))
  const kept = readAll(path).replace('x\n', '')
  assert.ok(lines(0, 500).join('').endsWith(kept), 'the last ones are there')
  for (const each of oldOnes(path)) {
    assert.equal(statSync(each).mode & 0o077, each === others[0] ? 0o044 : 0)
  }
})

test('a file that was moved or taken away is made again', async t => {
  const path = join(folder(t), 'x.log')
  const { write } = rotating(t, { path, rotate: 'none' })
  await write('a\n')
  renameSync(path, `${path}.1`)
  while (!existsSync(path)) await write('b\n')
  await write('c\n')
  assert.equal(readFileSync(path, 'utf8').replaceAll('b\n', ''), 'c\n')
  assert.match(readFileSync(`${path}.1`, 'utf8'), /^a\n(b\n)*$/)
})

test('half a line of one who died is ended', async t => {
  const path = join(folder(t), 'x.log')
  writeFileSync(path, '{"a":1}\n{"b":')
  const { write } = rotating(t, { path })
  await write('{"c":3}\n')
  await write('{"d":4}\n')
  assert.equal(readFileSync(path, 'utf8'), '{"a":1}\n{"b":\n{"c":3}\n{"d":4}\n')
})

test('what cannot be moved away is written on, and that is said once', async t => {
  const source = join(folder(t), 'x.log')
  writeFileSync(source, '')
  const path = mounted(t, true, '--bind', source)
  if (path === undefined) return t.skip(NO_MOUNT)
  const complain = t.mock.method(console, 'error', () => {})
  const { write } = rotating(t, { path, max_size: 1 })
  for (const line of ['a\n', 'b\n', 'c\n']) await write(line)
  assert.equal(readFileSync(source, 'utf8'), 'a\nb\nc\n')
  assert.deepEqual(
    complain.mock.calls.map(call => call.arguments[0]),
    [`llmproxy: ${path} grows on: it cannot be moved (EBUSY)`]
  )
})

test('devices are written to, and left where they are', async t => {
  const { write } = rotating(t, { path: '/dev/null', max_size: 1 })
  for (const line of ['a\n', 'b\n']) assert.equal(await write(line), 2)
  assert.ok(statSync('/dev/null').isCharacterDevice())
  await assert.rejects(rotating(t, { path: '/dev/full' }).write('a\n'), { code: 'ENOSPC' })
})

test('a full disk leaves no half line, and goes on when there is room', async t => {
  const disk = smallDisk(t)
  if (disk === undefined) return t.skip(NO_MOUNT)
  const path = join(disk, 'x.log')
  const { write } = rotating(t, { path, rotate: 'none' })
  writeFileSync(join(disk, 'other'), Buffer.alloc(30_000))
  const record = `${'x'.repeat(2_999)}\n`
  let count = 0
  await assert.rejects(
    (async () => {
      for (; ; count++) await write(record)
    })(),
    { code: 'ENOSPC' }
  )
  assert.ok(count > 5)
  assert.equal(readFileSync(path, 'utf8'), record.repeat(count))
  writeFileSync(join(disk, 'other'), '')
  await write(record)
  assert.equal(readFileSync(path, 'utf8'), record.repeat(count + 1))
})

test('half a line stays where others have written behind it, and is ended', async t => {
  const disk = smallDisk(t)
  if (disk === undefined) return t.skip(NO_MOUNT)
  const path = join(disk, 'x.log')
  const { write } = rotating(t, { path, rotate: 'none' })
  // However busy the machine is: what the other writes is not seen before the disk is full.
  const now = performance.now()
  t.mock.method(performance, 'now', () => now)
  await write('a\n')
  appendFileSync(path, 'the other’s\n')
  await assert.rejects(write(`${'x'.repeat(100_000)}\n`), { code: 'ENOSPC' })
  execFileSync('truncate', ['-s', '1000', path])
  await write('b\n')
  assert.match(readFileSync(path, 'utf8'), /^a\nthe other’s\nx+\nb\n$/)
})

test('a disk that hangs does not keep the end from coming', async t => {
  const path = join(folder(t), 'pipe')
  execFileSync('mkfifo', [path])
  const { file, write } = rotating(t, { path })
  // More than a pipe takes while nobody reads it.
  const stuck = write('x'.repeat(100_000))
  await file.close()
  const reader = openSync(path, 'r')
  while (readSync(reader, Buffer.alloc(65_536)) === 65_536) {}
  await stuck
  closeSync(reader)
})

test('several processes write to one file, and rotate it: no line is lost or torn', async t => {
  const path = join(folder(t), 'x.log')
  const source = new URL('../src/logs/rotating-file.ts', import.meta.url).pathname
  const program = (name: string) => `
    import { RotatingFile } from ${JSON.stringify(source)}
    const file = new RotatingFile(${JSON.stringify({ ...OPTIONS, path, max_size: 20_000, compress: true })})
    for (let count = 0; count < 1500; count++) {
      await file.write(Buffer.from('${name} ' + String(count).padStart(5, '0') + ' ' + '${name}'.repeat(50) + '\\n'))
    }
    await file.close()`
  const exits = ['a', 'b', 'c'].map(name => {
    const args = ['-C', 'llmproxy-source', '--input-type=module', '-e', program(name)]
    return once(spawn(process.execPath, args, { stdio: 'inherit' }), 'exit')
  })
  for (const exit of exits) assert.deepEqual(await exit, [0, null])
  const written = readAll(path).trimEnd().split('\n')
  assert.equal(written.length, 3 * 1500)
  for (const line of written) assert.match(line, /^([abc]) \d{5} \1{50}$/)
  assert.equal(new Set(written).size, written.length)
  // Of each process a file has max_size at most: 265 KB are five files or more.
  assert.ok(oldOnes(path).length >= 4)
})
