import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { test } from 'node:test'
import { parseConfig } from '../src/config.ts'
import { collectGarbage } from '../src/memory.ts'
import {
  answerChat,
  CHAT,
  chunk,
  closedPort,
  DONE,
  events,
  eventually,
  fakeBackend,
  post,
  type RawClient,
  rawClient,
  rawPost,
  responded
} from './helper.ts'
import { CLI, commandLine, folder, start, workersOf, writeConfig } from './process.ts'

/** Several processes on one port. */

const TWO = { server: { listen: '127.0.0.1:0', workers: 2 } }

/** A call over a connection of its own: the primary gives each to the next worker. */
function call(url: string, headers: Record<string, string> = {}) {
  return post(`${url}/v1/chat/completions`, CHAT, { connection: 'close', ...headers })
}

test('workers share a port, their metrics are summed, a reload and the drain reach each', async t => {
  const responses: import('node:http').ServerResponse[] = []
  const old = await fakeBackend(t, (request, response, raw) => {
    if (!request.body.includes('"stream":true')) return void answerChat(request, response, raw)
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    responses.push(response)
  })
  const next = await fakeBackend(t, answerChat)
  const file = join(folder(t), 'config.yaml')
  const auth = (keys: string[]) => ({ auth: { enabled: true, keys, skip_paths: ['/metrics'] } })
  writeConfig(file, { ...TWO, backends: [{ name: 'b', url: old.url }], ...auth(['a']) })
  const gateway = await start(t, [CLI, '--config', file])
  assert.equal(workersOf(gateway.child.pid!).length, 2)

  const text = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }), [
    'x-api-key: a'
  ])
  const streams = [await rawClient(t, gateway.port, text), await rawClient(t, gateway.port, text)]
  for (const stream of streams) await stream.until(/Hi/)
  for (let count = 0; count < 4; count++) {
    assert.equal((await call(gateway.url, { 'x-api-key': 'a' })).status, 200)
  }
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text()
  assert.match(metrics, /llmproxy_requests_total\{[^}]*stream="false"[^}]*status="200"\} 4\n/)
  assert.match(metrics, /llmproxy_requests_in_flight 2\n/)
  assert.match(metrics, /llmproxy_backend_up\{backend="b"\} 1\n/)

  writeConfig(file, { ...TWO, backends: [{ name: 'b', url: next.url }], ...auth(['b']) })
  gateway.child.kill('SIGHUP')
  await gateway.logged('configuration reloaded')
  for (let count = 0; count < 4; count++) {
    assert.equal((await call(gateway.url, { 'x-api-key': 'a' })).status, 401)
    assert.equal((await call(gateway.url, { 'x-api-key': 'b' })).status, 200)
  }
  assert.equal(next.requests.length, 4)

  gateway.child.kill('SIGTERM')
  await gateway.logged('shutting down')
  for (const response of responses) response.end(chunk(' you') + DONE)
  for (const stream of streams) {
    await stream.until(/\r\n0\r\n/)
    assert.equal(events(stream.received).at(-1), '[DONE]')
  }
  assert.equal(await gateway.exit, 0)
})

test('workers warn once together about a backend that cannot be called', async t => {
  const port = await closedPort()
  const refusing = await fakeBackend(t, (_request, response) => response.writeHead(401).end(), {
    listsModels: true
  })
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    server: { listen: '127.0.0.1:0', workers: 3 },
    backends: [
      { name: 'dead', url: `http://127.0.0.1:${port}` },
      { name: 'refusing', url: refusing.url }
    ]
  })
  const gateway = await start(t, [CLI, '--config', file])
  const server = createServer(socket => socket.end()).listen(port, '127.0.0.1')
  t.after(() => server.close())
  await gateway.logged('backend can be reached')
  // Each worker has asked for its models.
  await refusing.request(2)
  gateway.child.kill('SIGTERM')
  await gateway.exit
  const said = gateway.lines.map(({ level, msg, backend, url, reason }) =>
    [level, msg, backend, url, reason].filter(each => each !== undefined).join(' ')
  )
  assert.deepEqual(said.filter(each => each.startsWith('40')).toSorted(), [
    `40 backend cannot be reached dead http://127.0.0.1:${port} ECONNREFUSED`,
    '40 backend lists no models refusing status 401 of /v1/models'
  ])
  assert.equal(said.filter(each => each.includes('can be reached')).length, 1)
})

test('a worker that crashes is replaced', async t => {
  const backend = await fakeBackend(t, answerChat)
  const file = join(folder(t), 'config.yaml')
  const gateway = await start(t, [
    CLI,
    '--config',
    writeConfig(file, { ...TWO, backends: [{ url: backend.url }] })
  ])
  const [victim] = workersOf(gateway.child.pid!)
  process.kill(victim!, 'SIGKILL')
  const stopped = await gateway.logged('a worker has stopped')
  assert.deepEqual([stopped.pid, stopped.signal], [victim, 'SIGKILL'])
  await gateway.logged('a worker has been replaced')
  const now = workersOf(gateway.child.pid!)
  assert.equal(now.length, 2)
  assert.ok(!now.includes(victim!))
  for (let count = 0; count < 4; count++) assert.equal((await call(gateway.url)).status, 200)
  gateway.child.kill('SIGINT')
  assert.equal(await gateway.exit, 0)
})

test('a stored response is found from every worker', async t => {
  const backends = await Promise.all(
    ['one', 'two'].map(name =>
      fakeBackend(t, (_request, response) => {
        response.writeHead(200, { 'content-type': 'application/json' })
        response.end(JSON.stringify({ id: `resp_${name}`, object: 'response' }))
      })
    )
  )
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    ...TWO,
    backends: backends.map(({ url }, index) => ({ name: String(index), url }))
  })
  const gateway = await start(t, [CLI, '--config', file])
  const made = await post(`${gateway.url}/v1/responses`, { model: 'm', input: 'x' })
  const { id } = (await made.json()) as { id: string }
  const maker = backends.findIndex(({ requests }) => requests.length === 1)
  // Both workers know once a call that was made after it has been through the primary, too.
  await fetch(`${gateway.url}/metrics`)
  for (let count = 0; count < 6; count++) {
    const headers = { connection: 'close' }
    await (await fetch(`${gateway.url}/v1/responses/${id}`, { headers })).text()
  }
  assert.equal(backends[maker]!.requests.length, 7)
})

test('a port that is taken stops all of it', async t => {
  const taken = createServer().listen(0, '127.0.0.1')
  t.after(() => taken.close())
  await new Promise(resolve => taken.once('listening', resolve))
  const { port } = taken.address() as { port: number }
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    server: { listen: `127.0.0.1:${port}`, workers: 2 },
    backends: [{ url: 'demo://' }]
  })
  assert.throws(
    () => execFileSync(...commandLine([CLI, '--config', file]), { stdio: 'pipe' }),
    (error: { status: number; stderr: Buffer }) =>
      error.status === 1 && /EADDRINUSE/.test(String(error.stderr))
  )
})

test('workers share limits, and what a crashed one had taken comes back', async t => {
  const held: import('node:http').ServerResponse[] = []
  const backend = await fakeBackend(t, (request, response, raw) => {
    if (!request.body.includes('"stream":true')) return void answerChat(request, response, raw)
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    held.push(response)
  })
  const dir = folder(t)
  const rates = { requests_per_minute: 8, max_concurrent: 3, total_quota: 100_000 }
  const file = writeConfig(`${dir}/config.json`, {
    ...TWO,
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, per_key: rates }
  })
  const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dir })
  const text = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }))
  for (let count = 0; count < 3; count++) {
    const stream = await rawClient(t, gateway.port, text)
    await stream.until(/Hi/)
  }
  for (let count = 0; count < 2; count++) {
    const refused = await call(gateway.url)
    assert.equal(refused.status, 429)
    assert.match((await refused.json()).error.message, /3 requests at the same time/)
  }
  process.kill(workersOf(gateway.child.pid!)[0]!, 'SIGKILL')
  await gateway.logged('a worker has been replaced')
  let answered = 0
  for (let isOver = false; !isOver; ) {
    const answer = await call(gateway.url)
    if (answer.status === 200) answered++
    // A slot may be on its way back to the process that counts.
    else isOver = /8 requests a minute/.test((await answer.json()).error.message)
  }
  assert.equal(answered, 5)
})

test('how many workers there are is a number, or auto', () => {
  const parse = (workers: unknown, env = {}) => {
    const config = { server: { workers }, backends: [{ url: 'demo://' }] }
    return parseConfig(JSON.stringify(config), 'config.yaml', env).server.workers
  }
  assert.equal(parse('auto'), 'auto')
  assert.equal(parse('${N}', { N: '3' }), 3)
  for (const wrong of [0, 1.5, 'many', -1, 129, true]) {
    assert.throws(() => parse(wrong), /server\.workers: must be a number of processes/)
  }
})

test('the primary keeps the records of all workers, in the store and in a database', async t => {
  const backend = await fakeBackend(t, answerChat)
  const dataDir = folder(t)
  const file = writeConfig(join(dataDir, 'config.yaml'), {
    ...TWO,
    backends: [{ url: backend.url }],
    storage: { databases: [{ name: 'main', driver: 'sqlite' }] },
    usage: {
      enabled: true,
      reporters: [
        { type: 'builtin', builtin: {} },
        { type: 'database', database: { storage: 'main', table: 'spent' } }
      ]
    }
  })
  const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dataDir })
  for (let count = 0; count < 6; count++) await (await call(gateway.url)).text()
  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
  const count = (name: string, query: string) =>
    new DatabaseSync(join(dataDir, name)).prepare(query).get()!.n
  assert.equal(count('llmproxy.db', 'SELECT count(*) AS n FROM spent'), 6)
  const sums = "SELECT requests AS n FROM usage_sums WHERE dimension = 'model'"
  assert.equal(count('usage-builtin.db', sums), 6)
})

test('memory that is not in use goes back', () => {
  let garbage: object[] | undefined = Array.from({ length: 200_000 }, () => ({ some: [1, 2, 3] }))
  assert.equal(garbage.length, 200_000)
  const before = process.memoryUsage().heapTotal
  garbage = undefined
  collectGarbage()
  assert.ok(process.memoryUsage().heapTotal < before * 0.8)
})

test('all workers know how usage records fare that the primary writes down', async t => {
  const backend = await fakeBackend(t, answerChat)
  const sink = await fakeBackend(t, () => {})
  const dataDir = folder(t)
  // No file can be where a folder is.
  mkdirSync(join(dataDir, 'usage.db'))
  const file = writeConfig(join(dataDir, 'config.yaml'), {
    ...TWO,
    backends: [{ url: backend.url }],
    usage: { enabled: true, reporters: [{ type: 'webhook', webhook: { url: sink.url } }] }
  })
  const gateway = await start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dataDir })
  for (let count = 0; count < 3; count++) await (await call(gateway.url)).text()
  await sink.request(2)
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text()
  assert.match(metrics, /llmproxy_webhook_queue 3\n/)
  // Each connection comes to the next worker.
  const health = async () => {
    const answer = await rawClient(
      t,
      gateway.port,
      'GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n'
    )
    await answer.until(/\}\}$/)
    return /"usage":"(\w+)"/.exec(answer.received)?.[1]
  }
  let unsafe = 0
  while (unsafe < 4) unsafe = (await health()) === 'not_safe' ? unsafe + 1 : 0
})

test('workers count slow uploads together, and each worker may have all slots', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json' }).end('{}')
  })
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    ...TWO,
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, per_key: { max_concurrent: 2 } }
  })
  const gateway = await start(t, [CLI, '--config', file])
  const text = rawPost('/v1/embeddings', JSON.stringify({ ...CHAT, input: 'x'.repeat(100_000) }))
  const [head, rest] = [text.slice(0, 1_000), text.slice(1_000)]
  const connections = async (count: number) => {
    const clients: RawClient[] = []
    while (clients.length < count) clients.push(await rawClient(t, gateway.port))
    return clients
  }
  const metrics = async () => (await fetch(`${gateway.url}/metrics`)).text()
  const burst = await connections(20)
  for (const { socket } of burst) socket.write(head)
  const refused = await responded(burst, 18)
  for (const { received } of refused) assert.match(received, /^HTTP\/1.1 429 /)
  const slow = burst.filter(each => !refused.includes(each))
  for (const { socket } of slow) socket.write(rest)
  for (const each of slow) assert.match(await each.until(/\{\}/), /^HTTP\/1.1 200 /)

  // Two of three connections have the same worker.
  const [a, b, c] = (await connections(3)) as [RawClient, RawClient, RawClient]
  for (const pair of [
    [a, b],
    [b, c],
    [c, a]
  ]) {
    await eventually(async () => /llmproxy_requests_in_flight 0\n/.test(await metrics()))
    for (const each of pair) {
      each.received = ''
      each.socket.write(head)
    }
    // The head of the second has arrived before the first is complete.
    await metrics()
    for (const { socket } of pair) socket.write(rest)
    for (const each of pair) assert.match(await each.until(/\}/), /^HTTP\/1.1 200 /)
  }
})
