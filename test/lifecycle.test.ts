import assert from 'node:assert/strict'
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { copyFileSync, existsSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { Agent, get } from 'node:https'
import { join } from 'node:path'
import { test } from 'node:test'
import {
  answerChat,
  CHAT,
  chunk,
  DONE,
  events,
  eventually,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'
import { CLI, commandLine, folder, start, writeConfig } from './process.ts'

const json = JSON.stringify
const LISTEN = { server: { listen: '127.0.0.1:0' } }

test('SIGTERM: new calls are refused, running streams finish, exit 0', async t => {
  const responses: import('node:http').ServerResponse[] = []
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    responses.push(response)
  })
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    ...LISTEN,
    backends: [{ url: backend.url }]
  })
  const gateway = await start(t, [CLI, 'serve', '--config', file])
  const text = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }))
  const stream = await rawClient(t, gateway.port, text)
  await stream.until(/Hi/)
  const idle = await rawClient(t, gateway.port, 'GET /health HTTP/1.1\r\nhost: g\r\n\r\n')
  await idle.until(/"status":"ok"/)
  const waiting = text.replace('\r\n\r\n', '\r\nexpect: 100-continue\r\n\r\n')
  const halfway = await rawClient(t, gateway.port, waiting.slice(0, -5))
  await halfway.until(/100 Continue/)

  gateway.child.kill('SIGTERM')
  await idle.closed
  const refused = await rawClient(t, gateway.port, text)
  assert.match(await refused.until(/\}\}/), / 503 [\s\S]*connection: close[\s\S]*shutting_down/i)
  const probe = await rawClient(t, gateway.port, 'GET /health/ready HTTP/1.1\r\nhost: g\r\n\r\n')
  assert.match(await probe.until(/\}\}/), / 503 [\s\S]*"status":"draining"/)
  halfway.socket.write(waiting.slice(-5))
  await halfway.until(/Hi/)
  responses[1]!.end(DONE)
  await halfway.until(/\[DONE\][\s\S]*\r\n0\r\n/)
  responses[0]!.end(chunk(' you') + DONE)
  await stream.until(/\[DONE\][\s\S]*\r\n0\r\n/)
  assert.equal(await gateway.exit, 0)
  assert.equal(responses.length, 2)
})

for (const [form, answer] of [
  [
    'a stream',
    (response: import('node:http').ServerResponse) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      response.write(chunk('Hi'))
    }
  ],
  ['a whole response', () => {}]
] as const) {
  test(`SIGTERM: a request that waits behind ${form} on its connection is refused, not cut`, async t => {
    const responses: import('node:http').ServerResponse[] = []
    const asked = Promise.withResolvers<void>()
    const backend = await fakeBackend(t, (_request, response) => {
      answer(response)
      responses.push(response)
      asked.resolve()
    })
    const file = writeConfig(join(folder(t), 'config.yaml'), {
      ...LISTEN,
      backends: [{ url: backend.url }]
    })
    const gateway = await start(t, [CLI, 'serve', '--config', file])
    const isStream = form === 'a stream'
    const text = rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: isStream }))
    const client = await rawClient(t, gateway.port, text + text)
    await asked.promise
    const idle = await rawClient(t, gateway.port, 'GET /health HTTP/1.1\r\nhost: g\r\n\r\n')
    await idle.until(/"status":"ok"/)
    gateway.child.kill('SIGTERM')
    await idle.closed
    if (isStream) responses[0]!.end(DONE)
    else responses[0]!.writeHead(200, { 'content-type': 'application/json' }).end('{"choices":[]}')
    await client.until(/ 503 [\s\S]*connection: close[\s\S]*shutting_down/i)
    assert.equal(await gateway.exit, 0)
    assert.equal(responses.length, 1)
  })
}

test('SIGTERM: a client that reads slowly gets all of its responses, also to requests behind them', async t => {
  const data = Array.from({ length: 10_000 }, (_, at) => ({ id: `${'m'.repeat(300)}-${at}` }))
  const backend = await fakeBackend(t, (_request, response) => response.end(json({ data })), {
    listsModels: true
  })
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    ...LISTEN,
    backends: [{ url: backend.url }]
  })
  const gateway = await start(t, [CLI, 'serve', '--config', file])
  // Once the models are known the list is sent in one piece.
  const isKnown = async () => {
    const response = await fetch(`${gateway.url}/v1/models`)
    await response.arrayBuffer()
    return response.headers.has('content-length')
  }
  await eventually(isKnown)
  const client = await rawClient(t, gateway.port)
  client.socket.pause()
  client.socket.write('GET /v1/models HTTP/1.1\r\nhost: g\r\n\r\n'.repeat(5))
  const idle = await rawClient(t, gateway.port, 'GET /health HTTP/1.1\r\nhost: g\r\n\r\n')
  await idle.until(/"status":"ok"/)
  gateway.child.kill('SIGTERM')
  await gateway.logged('shutting down')
  // Idle connections are closed now, and every 250 ms.
  await new Promise(resolve => setTimeout(resolve, 300))
  client.socket.resume()
  await client.closed
  const heads = client.received.match(/HTTP\/1.1 \d+/g)!
  const complete = client.received.match(/m-9999"[^\r]*HTTP/g)!
  assert.equal(heads.at(-1), 'HTTP/1.1 503')
  assert.equal(complete.length, heads.length - 1)
  assert.equal(await gateway.exit, 0)
})

test('SIGTERM: for drain_delay calls are still taken, while the probe says that no more should come', async t => {
  const backend = await fakeBackend(t, answerChat)
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    server: { ...LISTEN.server, drain_delay: '1s' },
    backends: [{ url: backend.url }]
  })
  const gateway = await start(t, [CLI, 'serve', '--config', file])
  gateway.child.kill('SIGTERM')
  await gateway.logged('shutting down')
  const probe = await fetch(`${gateway.url}/health/ready`)
  assert.equal(probe.status, 503)
  assert.equal((await probe.json()).status, 'draining')
  assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
  assert.equal(await gateway.exit, 0)
})

test('SIGTERM: a stream that takes longer than drain_timeout is ended honestly', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
  })
  const hook = await fakeBackend(t, (_request, response) => response.end())
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    server: { ...LISTEN.server, drain_timeout: '100ms' },
    backends: [{ url: backend.url }],
    usage: { enabled: true, reporters: [{ type: 'webhook', webhook: { url: hook.url } }] }
  })
  const gateway = await start(t, [CLI, '--config', file])
  const body = JSON.stringify({ ...CHAT, stream: true })
  const stream = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await stream.until(/Hi/)
  gateway.child.kill('SIGTERM')
  await stream.closed
  assert.match(stream.received, /"code":"shutting_down"/)
  assert.doesNotMatch(stream.received, /\r\n0\r\n/)
  assert.equal(await gateway.exit, 0)
  const event = JSON.parse((await hook.request()).body)
  assert.deepEqual([event.outcome, event.completion_tokens], ['timed_out', 1])
  await (await backend.request()).closed
})

test('SIGHUP and a changed file reload; a broken file is refused; streams go on', async t => {
  const responses: import('node:http').ServerResponse[] = []
  const old = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    responses.push(response)
  })
  const next = await fakeBackend(t, answerChat)
  const file = join(folder(t), 'config.yaml')
  const auth = (keys: string[]) => ({ auth: { enabled: true, keys } })
  writeConfig(file, { ...LISTEN, backends: [{ url: old.url }], ...auth(['a']) })
  const gateway = await start(t, [CLI, '--config', file])
  const stream = await rawClient(
    t,
    gateway.port,
    rawPost('/v1/chat/completions', JSON.stringify({ ...CHAT, stream: true }), ['x-api-key: a'])
  )
  await stream.until(/Hi/)

  writeConfig(file, {
    ...LISTEN,
    server: { ...LISTEN.server, max_body_size: '5MB' },
    backends: [{ url: next.url }],
    ...auth(['b'])
  })
  gateway.child.kill('SIGHUP')
  const { changed, restart_needed } = await gateway.logged('configuration reloaded')
  assert.deepEqual(restart_needed, ['server.max_body_size'])
  assert.deepEqual(changed, [
    `backends[127.0.0.1:${old.port}]`,
    `backends[127.0.0.1:${next.port}]`,
    'auth.keys[0].key'
  ])
  const status = async (key: string) =>
    (await post(`${gateway.url}/v1/chat/completions`, CHAT, { 'x-api-key': key })).status
  assert.equal(await status('a'), 401)
  assert.equal(await status('b'), 200)
  assert.equal(next.requests.length, 1)

  writeFileSync(file, 'backends: [{url: nonsense}]')
  const { errors } = await gateway.logged('reload refused')
  assert.match(String(errors), /config\.yaml:1:13 backends\[0\]\.url: must be a URL/)
  assert.equal(await status('b'), 200, 'the last good one stays')

  responses[0]!.end(chunk(' you') + DONE)
  await stream.until(/\r\n0\r\n/)
  assert.equal(events(stream.received).at(-1), '[DONE]')
  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
})

test('a reload keeps what was counted', async t => {
  const backend = await fakeBackend(t, answerChat)
  const file = join(folder(t), 'config.yaml')
  const config = (requests_per_minute: number) => ({
    ...LISTEN,
    backends: [{ url: backend.url }],
    rate_limit: { enabled: true, per_key: { requests_per_minute } }
  })
  writeConfig(file, config(2))
  const gateway = await start(t, [CLI, '--config', file])
  const status = async () => (await post(`${gateway.url}/v1/chat/completions`, CHAT)).status
  assert.deepEqual([await status(), await status(), await status()], [200, 200, 429])
  writeConfig(file, config(3))
  gateway.child.kill('SIGHUP')
  await gateway.logged('configuration reloaded')
  assert.deepEqual([await status(), await status()], [200, 429])
  assert.match(
    await (await fetch(`${gateway.url}/metrics`)).text(),
    /llmproxy_requests_total\{[^}]*status="200"\} 3/
  )
})

const NO_CURL = spawnSync('curl', ['--version']).error ? 'curl is not installed' : false

test('the shipped file serves the demo backend, and the curl line of the log works', {
  skip: NO_CURL
}, async t => {
  const data = folder(t)
  const config = readFileSync(new URL('../config/llmproxy.yaml', import.meta.url), 'utf8')
  const file = join(data, 'config.yaml')
  writeFileSync(file, config.replace('":8000"', '":0"'))
  const gateway = await start(t, [CLI], { LLMPROXY_CONFIG: file, LLMPROXY_DATA_DIR: data })
  const line = await gateway.logged('curl ')
  const output = execFileSync('sh', ['-c', String(line.msg)], {
    stdio: ['ignore', 'pipe', 'ignore']
  })
  assert.equal(events(output.toString()).at(-1), '[DONE]')
  const { completionTokens, exactness } = await gateway.logged('exchange')
  assert.equal(completionTokens, events(output.toString()).length - 2)
  assert.equal(exactness, 'exact')
})

/** `npm start` compiles the program first: the first test has done it. */
const ALREADY_BUILT = ['--ignore-scripts']

for (const signal of ['SIGTERM', 'SIGHUP'] as const) {
  test(`npm start: ${signal} to npm ends the serving process in order`, {
    skip: signal === 'SIGHUP' && process.env.LONG !== '1' && 'takes part in npm run test:long only'
  }, async t => {
    const file = writeConfig(join(folder(t), 'config.yaml'), {
      ...LISTEN,
      backends: [{ url: 'demo://' }]
    })
    const built = signal === 'SIGTERM' ? [] : ALREADY_BUILT
    const gateway = await start(t, ['start', ...built, '--', '--config', file], {}, 'npm')
    assert.equal((await fetch(`${gateway.url}/health`)).status, 200)
    gateway.child.kill(signal)
    await gateway.logged('stopped')
    await gateway.exit
    await assert.rejects(fetch(`${gateway.url}/health`))
  })
}

test('npm start: Ctrl-C, which npm passes on a second time, ends the serving process in order', async t => {
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    ...LISTEN,
    backends: [{ url: 'demo://' }]
  })
  const args = ['start', ...ALREADY_BUILT, '--', '--config', file]
  const gateway = await start(t, args, {}, 'npm', { detached: true })
  // As a terminal does: to the whole group.
  process.kill(-gateway.child.pid!, 'SIGINT')
  await gateway.exit
  assert.deepEqual(
    gateway.lines.slice(-2).map(({ msg }) => msg),
    ['shutting down', 'stopped']
  )
})

test('log.output: file writes below the data directory', async t => {
  const data = folder(t)
  const file = writeConfig(join(data, 'config.yaml'), {
    ...LISTEN,
    log: { output: 'file', file: { path: 'logs/gateway.log' } },
    backends: [{ url: 'demo://' }]
  })
  const child = spawn(...commandLine([CLI, '--config', file]), {
    env: { ...process.env, LLMPROXY_DATA_DIR: data }
  })
  t.after(() => child.kill('SIGKILL'))
  const path = join(data, 'logs/gateway.log')
  const read = () => (existsSync(path) ? readFileSync(path, 'utf8') : '')
  await eventually(() => read().includes('is listening'))
  child.kill('SIGTERM')
  const [code] = await once(child, 'exit')
  assert.equal(code, 0)
  assert.match(read(), /"msg":"stopped"/)
})

/** The status of a GET over TLS, and whose certificate the server showed. */
function getTls(url: string, options: object): Promise<{ status: number; name: string }> {
  return new Promise((resolve, reject) => {
    get(
      `${url}/health`,
      { rejectUnauthorized: false, agent: new Agent(), ...options },
      response => {
        const { subject } = (response.socket as import('node:tls').TLSSocket).getPeerCertificate()
        response
          .resume()
          .on('end', () => resolve({ status: response.statusCode!, name: String(subject.CN) }))
      }
    ).on('error', reject)
  })
}

test('TLS, client certificates, and a certificate that is renewed while it runs', async t => {
  const path = folder(t)
  const fixture = (name: string) => new URL(`./tls/${name}`, import.meta.url)
  const server = { cert: join(path, 'server.crt'), key: join(path, 'server.key') }
  const renew = (name: string) => {
    for (const part of ['key', 'crt']) {
      copyFileSync(fixture(`${name}.${part}`), join(path, 'new'))
      renameSync(join(path, 'new'), join(path, `server.${part}`))
    }
  }
  renew('first')
  const file = writeConfig(join(path, 'config.yaml'), {
    server: {
      ...LISTEN.server,
      tls: {
        enabled: true,
        cert_file: server.cert,
        key_file: server.key,
        client_ca_file: fixture('authority.crt').pathname,
        client_auth: 'require'
      }
    },
    backends: [{ url: 'demo://' }]
  })
  const gateway = await start(t, [CLI, '--config', file])
  assert.match(gateway.url, /^https:/)
  const shown = {
    cert: readFileSync(fixture('client.crt')),
    key: readFileSync(fixture('client.key'))
  }
  assert.deepEqual(await getTls(gateway.url, shown), { status: 200, name: 'first' })
  await assert.rejects(getTls(gateway.url, {}))

  renew('second')
  let name = ''
  while (name !== 'second') {
    await gateway.logged('TLS certificate renewed', 1)
    name = (await getTls(gateway.url, shown)).name
  }
})

test('CORS', async t => {
  const cors = {
    enabled: true,
    allowed_origins: ['http://app.example'],
    allowed_methods: ['POST'],
    allow_credentials: true,
    expose_headers: ['x-own'],
    allowed_headers: ['Authorization'],
    max_age: 60
  }
  const gateway = await startGateway(t, {
    server: { cors },
    auth: { enabled: true, keys: ['a'] },
    backends: [{ url: 'demo://' }]
  })
  const preflight = await fetch(`${gateway.url}/v1/chat/completions`, {
    method: 'OPTIONS',
    headers: { origin: 'http://app.example', 'access-control-request-method': 'POST' }
  })
  assert.equal(preflight.status, 204)
  assert.equal(preflight.headers.get('access-control-allow-origin'), 'http://app.example')
  assert.match(preflight.headers.get('access-control-allow-headers')!, /Authorization/)
  assert.equal(preflight.headers.get('access-control-max-age'), '60')
  assert.equal(preflight.headers.get('access-control-allow-methods'), 'POST')
  assert.equal(preflight.headers.get('access-control-allow-credentials'), 'true')
  const headers = { origin: 'http://app.example', 'x-api-key': 'a' }
  const call = await post(`${gateway.url}/v1/chat/completions`, CHAT, headers)
  assert.equal(call.headers.get('access-control-allow-origin'), 'http://app.example')
  assert.match(call.headers.get('access-control-expose-headers')!, /x-request-id.*x-own$/)
  const other = await post(`${gateway.url}/v1/chat/completions`, CHAT, {
    ...headers,
    origin: 'http://evil.example'
  })
  assert.notEqual(other.headers.get('access-control-allow-origin'), 'http://evil.example')
})

test('a stream that is cut at the end of the drain gets nothing more after its error', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    const timer = setInterval(() => response.write(chunk('more')), 5)
    response.on('close', () => clearInterval(timer))
  })
  const file = writeConfig(join(folder(t), 'config.yaml'), {
    server: { ...LISTEN.server, drain_timeout: '50ms' },
    backends: [{ url: backend.url }]
  })
  const gateway = await start(t, [CLI, '--config', file])
  const body = JSON.stringify({ ...CHAT, stream: true })
  const stream = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await stream.until(/more/)
  gateway.child.kill('SIGTERM')
  await stream.closed
  assert.match(stream.received, /"code":"shutting_down"\}\}\n\n\s*$/)
  await (await backend.request()).closed
  assert.equal(await gateway.exit, 0)
})

test('a call that waits to be tried again goes on as it began, and log.level changes at once', async t => {
  const old = await fakeBackend(t, (_request, response) => {
    response.writeHead(old.requests.length === 1 ? 503 : 200)
    response.end('{}')
  })
  const next = await fakeBackend(t, answerChat)
  const file = join(folder(t), 'config.yaml')
  const retry = { enabled: true, initial_wait: '700ms', max_wait: '700ms' }
  writeConfig(file, { ...LISTEN, backends: [{ url: old.url, api_key: 'one' }], routing: { retry } })
  const gateway = await start(t, [CLI, '--config', file])
  const call = post(`${gateway.url}/v1/embeddings`, CHAT)
  await old.request()
  writeConfig(file, { ...LISTEN, log: { level: 'debug' }, backends: [{ url: next.url }] })
  gateway.child.kill('SIGHUP')
  await gateway.logged('configuration reloaded')
  assert.equal((await call).status, 200)
  assert.equal(old.requests.length, 2)
  assert.equal(old.requests[1]!.headers.authorization, 'Bearer one')
  assert.equal((await post(`${gateway.url}/v1/chat/completions`, CHAT)).status, 200)
  assert.equal(next.requests.length, 1)
  await fetch(`${gateway.url}/health`)
  await new Promise<void>(resolve => {
    const look = () =>
      gateway.lines.some(({ route }) => route === '/health') ? resolve() : setImmediate(look)
    look()
  })
})

for (const workers of [1, 2]) {
  test(`SIGTERM while it starts (${workers === 1 ? 'one process' : 'two workers'}): it ends with 0 as soon as it has begun`, async t => {
    const file = writeConfig(join(folder(t), 'config.yaml'), {
      server: { ...LISTEN.server, workers },
      backends: [{ url: 'http://127.0.0.1:1' }]
    })
    const gateway = await start(t, [CLI, 'serve', '--config', file])
    // The line that it listens comes before the start is over.
    gateway.child.kill('SIGTERM')
    assert.equal(await gateway.exit, 0)
  })
}
