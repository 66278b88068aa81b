import assert from 'node:assert/strict'
import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import {
  cpSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync
} from 'node:fs'
import { type AddressInfo, connect, createServer } from 'node:net'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { type TestContext, test } from 'node:test'
import { createServer as createTlsServer, TLSSocket } from 'node:tls'
import Fastify from 'fastify'
import gateway from '../src/app.ts'
import { parseConfig } from '../src/config.ts'
import { checkOptions, type Given } from '../src/options.ts'
import usage from '../src/plugins/usage.ts'
import { Connections } from '../src/store/connections.ts'
import { parseDsn } from '../src/store/dsn.ts'
import { Redis } from '../src/store/redis.ts'
import { Sqlite } from '../src/store/sqlite.ts'
import { openDatabase, StorageOptions } from '../src/store/storage.ts'
import { folder } from './process.ts'
import { POSTGRES, REDIS } from './servers.ts'

/** Where databases and caches are, and who may name them. */

function complaint(storage: object, ...reporters: object[]): string {
  const config = { backends: [{ url: 'demo://' }], storage, usage: { enabled: true, reporters } }
  try {
    parseConfig(JSON.stringify(config, null, 2), 'config.yaml', {})
    return ''
  } catch (error) {
    return (error as Error).message
  }
}

const toDatabase = { type: 'database', database: { storage: 'main' } }
const toRedis = { type: 'redis', redis: { storage: 'main' } }
const main = (more: object) => ({ name: 'main', ...more })

test('a storage that is not there, is off or is of another kind is refused at its place', () => {
  const databases = [main({ driver: 'sqlite' })]
  assert.equal(complaint({ databases }, toDatabase), '')
  assert.equal(complaint({ caches: [main({ driver: 'redis' })] }, toRedis), '')
  assert.match(
    complaint({ databases }, { type: 'database', database: { storage: 'mian' } }),
    /^config\.yaml:\d+:\d+ usage\.reporters\[0\]\.database\.storage: must be the name of a database of storage\.databases \(got "mian"\); did you mean "main"\?$/
  )
  assert.match(complaint({ databases }, toRedis), /must be the name of a redis of storage\.caches/)
  assert.match(
    complaint({ caches: [main({ driver: 'memory' })] }, toRedis),
    /must be the name of a redis/
  )
  assert.match(
    complaint({ databases: [main({ driver: 'sqlite', enabled: false })] }, toDatabase),
    /names a database that is switched off$/
  )
  const off = { ...toDatabase, enabled: false }
  assert.equal(complaint({}, off), '')
  assert.match(
    complaint({ databases: [...databases, ...databases] }),
    /storage\.databases\[1\]: has the same name as storage\.databases\[0\]/
  )
  assert.match(complaint({ databases: [main({ driver: 'oracle' })] }), /one of postgres, mysql/)
})

test('in code it is refused, too', async () => {
  const reporters = [{ type: 'database' as const, database: { storage: 'a' } }]
  await assert.rejects(
    async () =>
      Fastify().register(gateway, {
        backends: [{ url: 'demo://' }],
        usage: { enabled: true, reporters }
      }),
    /llmproxy: usage\.reporters\[0\]\.database\.storage: must be the name/
  )
  await assert.rejects(
    async () => Fastify().register(usage, { reporters }),
    /options: reporters\[0\]\.database\.storage: must be the name/
  )
})

test('what is wrong with a DSN or a password is said without it', () => {
  const dsns = ['postgres://me:hunter2@db:99999/x', 'me:hunter2', 'postgres://a@b/c?sslmode=prefer']
  for (const dsn of [...dsns, 5, ['hunter2']]) {
    const said = complaint({ databases: [main({ driver: 'postgres', dsn })] }, toDatabase)
    assert.match(said, /storage\.databases\[0\]\.dsn: must be /)
    assert.doesNotMatch(said, /hunter2/)
  }
  const said = complaint({ caches: [main({ driver: 'redis', password: ['hunter2'] })] })
  assert.match(said, /password: must be text$/)
})

test('the original’s storage section is read', () => {
  const yaml = `
backends: [{url: "http://vllm:8000"}]
storage:
  databases:
    - name: default
      enabled: true
      driver: mysql
      host: mysql
      port: 3306
      user: llmproxy
      password: secret
      database: llmproxy
      max_open_conns: 100
      max_idle_conns: 10
      conn_max_lifetime: 1h
      conn_max_idle_time: 10m
    - {name: local, enabled: true, driver: sqlite, path: ./data/llmproxy.db}
  caches:
    - name: default
      enabled: true
      driver: redis
      addr: redis:6379
      password: ""
      db: 0
      pool_size: 100
      min_idle_conns: 10
      dial_timeout: 5s
      read_timeout: 3s
      write_timeout: 3s
    - {name: memory, enabled: true, driver: memory, max_size: 10000, ttl: 5m}
`
  const { storage } = parseConfig(yaml, 'config.yaml', {})
  assert.equal(storage.databases[0]!.conn_max_lifetime, 3_600_000)
  assert.equal(storage.caches[0]!.read_timeout, 3_000)
})

test('DSNs in all their forms', () => {
  const target = { host: 'db', port: 1, user: 'me', password: 'p@s/s:w', database: 'x' }
  const none = { tls: undefined, caFile: undefined }
  for (const [driver, dsn] of [
    ['postgres', 'postgres://me:p%40s%2Fs%3Aw@db:1/x'],
    ['postgres', "host=db port=1 user = me password='p@s/s:w' dbname=x"],
    ['mysql', 'mysql://me:p%40s%2Fs%3Aw@db:1/x?charset=utf8mb4'],
    ['mysql', 'me:p@s/s:w@tcp(db:1)/x?parseTime=true&loc=Local']
  ] as const) {
    assert.deepEqual(parseDsn(driver, dsn), { ...target, ...none }, dsn)
  }
  const least = { port: undefined, user: undefined, password: undefined, database: undefined }
  assert.deepEqual(parseDsn('mysql', '/'), { host: 'localhost', ...least, ...none })
  assert.equal(parseDsn('mysql', 'root@unix(/run/my.sock)/x')!.host, '/run/my.sock')
  assert.equal(parseDsn('mysql', 'root@tcp([::1]:3306)/x')!.host, '::1')
  assert.equal(parseDsn('postgres', 'postgres://[::1]/x')!.host, '::1')
  assert.equal(parseDsn('postgres', 'postgres:///x?host=/run/pg')!.host, '/run/pg')
  assert.equal(parseDsn('postgres', "password='it\\'s' user=a")!.password, "it's")
  for (const [mode, tls] of [
    ['sslmode=disable', 'off'],
    ['sslmode=require', 'verified'],
    ['sslmode=verify-full', 'verified'],
    ['sslmode=no-verify', 'unverified'],
    ['tls=true', 'verified'],
    ['tls=skip-verify', 'unverified']
  ] as const) {
    assert.equal(parseDsn('mysql', `mysql://db/x?${mode}`)!.tls, tls, mode)
  }
  const wrong = ['sslmode=prefer', 'tls=preferred', 'tls=custom', 'sslmode=']
  for (const mode of wrong) assert.equal(parseDsn('mysql', `mysql://db/x?${mode}`), undefined, mode)
  for (const dsn of ['', 'nothing', 'a=b c', 'postgres://%zz@db/x', 'postgres://db:0/x']) {
    assert.equal(parseDsn('postgres', dsn), undefined, dsn)
  }
})

/** A copy of the program that finds all packages but these. */
function programWithout(t: TestContext, packages: string[]): string {
  const root = new URL('..', import.meta.url).pathname
  const copy = folder(t)
  for (const part of ['src', 'package.json']) {
    cpSync(join(root, part), join(copy, part), { recursive: true })
  }
  mkdirSync(join(copy, 'node_modules'))
  for (const each of readdirSync(join(root, 'node_modules'))) {
    if (packages.includes(each)) continue
    symlinkSync(join(root, 'node_modules', each), join(copy, 'node_modules', each))
  }
  return copy
}

test('a client that is not installed is asked for by name, and not missed by others', t => {
  const program = programWithout(t, ['pg', 'mysql2', '@redis'])
  const file = join(program, 'config.yaml')
  const check = (storage: object, ...reporters: object[]) => {
    const config = { backends: [{ url: 'demo://' }], storage, usage: { enabled: true, reporters } }
    writeFileSync(file, JSON.stringify(config))
    const args = [join(program, 'src/cli.ts'), 'check', file]
    const { stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8' })
    return stdout + stderr
  }
  for (const [driver, name] of [
    ['postgres', 'pg'],
    ['mysql', 'mysql2']
  ]) {
    assert.match(
      check({ databases: [main({ driver })] }, toDatabase),
      new RegExp(
        `^config\\.yaml:1:\\d+ storage\\.databases\\[0\\]\\.driver: ${driver} needs the package "${name}": npm install ${name}\n$`
      )
    )
  }
  assert.match(
    check({ caches: [main({ driver: 'redis' })] }, toRedis),
    /storage\.caches\[0\]\.driver: redis needs the package "@redis\/client": npm install/
  )
  const all = { databases: [main({ driver: 'postgres' })], caches: [main({ driver: 'redis' })] }
  assert.match(check(all, { type: 'builtin', builtin: {} }), /is valid/)
})

const certificate = (name: string) => readFileSync(new URL(`tls/${name}`, import.meta.url))
const TLS_FILES = { cert: certificate('client.crt'), key: certificate('client.key') }
const ca_file = new URL('tls/authority.crt', import.meta.url).pathname

test('PostgreSQL over TLS: its certificate is checked unless that is switched off', {
  skip: POSTGRES.skip
}, async t => {
  // What stands before the real server says that it speaks TLS, and does.
  const front = createServer(socket => {
    socket.on('error', () => {})
    socket.once('data', () => {
      socket.write('S')
      const secure = new TLSSocket(socket, { isServer: true, ...TLS_FILES })
      const behind = connect(POSTGRES.port, POSTGRES.host)
      for (const each of [secure, behind]) each.on('error', () => {})
      secure.pipe(behind).pipe(secure)
    })
  }).listen(0, '127.0.0.1')
  await once(front, 'listening')
  t.after(() => front.close())
  const { port } = front.address() as AddressInfo
  const { username, password, pathname } = new URL(POSTGRES.url)
  const ask = async (query: string, tls: object) => {
    const dsn = `postgres://${username}:${password}@127.0.0.1:${port}${pathname}${query}`
    const given = { databases: [main({ driver: 'postgres', dsn, tls })] } as Given<StorageOptions>
    const { databases } = checkOptions(StorageOptions, given)
    const db = openDatabase(databases[0]!, undefined, 2_000)
    try {
      return await db.run('SELECT 1 AS one', [])
    } finally {
      await db.close()
    }
  }
  assert.deepEqual(await ask('', { enabled: true, ca_file }), [{ one: 1 }])
  assert.deepEqual(await ask(`?sslmode=verify-full&sslrootcert=${ca_file}`, {}), [{ one: 1 }])
  assert.deepEqual(await ask('?sslmode=no-verify', {}), [{ one: 1 }])
  assert.deepEqual(await ask('', { enabled: true, verify: false }), [{ one: 1 }])
  const unknown = { kind: 'unavailable', message: /certificate/ }
  await assert.rejects(ask('?sslmode=require', {}), unknown)
  await assert.rejects(ask('', { enabled: true }), unknown)
})

test('Redis over TLS: its certificate is checked unless that is switched off', {
  skip: REDIS.skip
}, async t => {
  const front = createTlsServer(TLS_FILES, secure => {
    const behind = connect(REDIS.port, REDIS.host)
    for (const each of [secure, behind]) each.on('error', () => {})
    secure.pipe(behind).pipe(secure)
  }).listen(0, '127.0.0.1')
  front.on('tlsClientError', () => {})
  await once(front, 'listening')
  t.after(() => front.close())
  const { port } = front.address() as AddressInfo
  const { username, password } = new URL(REDIS.url)
  const ask = async (tls: object) => {
    const given = main({ driver: 'redis', addr: `127.0.0.1:${port}`, username, password, tls })
    const { caches } = checkOptions(StorageOptions, { caches: [given] })
    const redis = new Redis(caches[0]!)
    try {
      return await redis.run(client => client.ping())
    } finally {
      await redis.close()
    }
  }
  assert.equal(await ask({ enabled: true, ca_file }), 'PONG')
  assert.equal(await ask({ enabled: true, verify: false }), 'PONG')
  await assert.rejects(ask({ enabled: true }), /certificate/)
})

test('connections: as many as there may be, kept as long as they may be', async () => {
  const opened: { isOpen: boolean; answer(): void }[] = []
  const open = () => {
    let done: () => void
    const connection = {
      ready: Promise.resolve(),
      isOpen: true,
      answer: () => done(),
      query: () =>
        new Promise<[]>((resolve, reject) => {
          done = () => (connection.isOpen ? resolve([]) : reject(new Error('cut')))
        }),
      end: () => {
        connection.isOpen = false
      },
      destroy: () => {
        connection.isOpen = false
        done?.()
      }
    }
    opened.push(connection)
    return connection
  }
  const turn = () => new Promise(resolve => setImmediate(resolve))
  const limits = { max_open_conns: 2, max_idle_conns: 1, conn_max_lifetime: 0 }
  const options = { ...limits, conn_max_idle_time: 20, timeout: 200 }
  const db = new Connections(
    'mysql',
    async () => open,
    () => false,
    options
  )
  const [one, two, three] = [db.run('1'), db.run('2'), db.run('3')]
  await turn()
  assert.equal(opened.length, 2, 'the third waits')
  opened[0]!.answer()
  await one
  await turn()
  opened[0]!.answer()
  opened[1]!.answer()
  await Promise.all([two, three])
  assert.deepEqual(opened.map(({ isOpen }) => isOpen).sort(), [false, true], 'one is kept')
  while (opened.some(({ isOpen }) => isOpen)) await turn()

  const late = db.run('4')
  await assert.rejects(late, { kind: 'unavailable', message: 'no answer in 200 ms' })
  assert.equal(opened.length, 3)
  const cut = db.run('5')
  await turn()
  await db.close()
  await assert.rejects(cut, { kind: 'unavailable' })
  await assert.rejects(db.run('6'), { kind: 'unavailable', message: 'closed' })
})

test('a SQLite file that nobody closes does not keep the process running', async t => {
  const source = new URL('../src/store/sqlite.ts', import.meta.url)
  const script = `import { Sqlite } from '${source}'
    console.log(await new Sqlite(':memory:', 1000).run('SELECT 1 AS one', []))`
  const child = spawn(process.execPath, ['--input-type=module', '-e', script])
  t.after(() => child.kill('SIGKILL'))
  const [[output], [code]] = await Promise.all([once(child.stdout, 'data'), once(child, 'exit')])
  assert.match(String(output), /one: 1/)
  assert.equal(code, 0)
})

test('a SQLite file that another one holds, and a statement that takes too long', async t => {
  const file = join(folder(t), 'sub/some.db')
  const db = new Sqlite(file, 500)
  await db.run('CREATE TABLE words (word TEXT UNIQUE)')
  assert.equal(statSync(file).mode & 0o777, 0o600)
  assert.equal(statSync(join(file, '..')).mode & 0o777, 0o700)
  const holder = new DatabaseSync(file)
  holder.exec('BEGIN IMMEDIATE')
  const late = { kind: 'unavailable', message: 'no answer in 500 ms' }
  await assert.rejects(db.run('INSERT INTO words VALUES (?)', ['a']), late)
  holder.exec('ROLLBACK')
  holder.close()
  await db.run('INSERT INTO words VALUES (?)', ['b'])
  await assert.rejects(db.run('INSERT INTO words VALUES (?)', ['b']), { kind: 'refused' })
  await assert.rejects(db.run('INSERT INTO nothing VALUES (1)', []), { kind: 'unavailable' })
  const script = "INSERT INTO words VALUES ('c'); INSERT INTO words VALUES ('b')"
  await assert.rejects(db.run(script), { kind: 'refused' })
  assert.deepEqual(await db.run("SELECT word FROM words WHERE word != 'a'", []), [{ word: 'b' }])
  await db.close()
  await assert.rejects(db.run('SELECT 1', []), { message: 'closed' })
})
