import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import type { ServerResponse } from 'node:http'
import { join } from 'node:path'
import { test } from 'node:test'
import Fastify from 'fastify'
import { parseConfig } from '../src/config.ts'
import { toLine } from '../src/logs/access.ts'
import type { RequestRow } from '../src/logs/row.ts'
import logging from '../src/plugins/logging.ts'
import { linesOf, oldOnes } from './disk.ts'
import {
  answerChat,
  CHAT,
  chunk,
  closedPort,
  eventually,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway
} from './helper.ts'
import { CLI, commandLine, folder, start, writeConfig } from './process.ts'

/** A line for each request. */

const toFile = (path: string, access: object = {}, file: object = {}) => ({
  logging: {
    enabled: true,
    access: { enabled: true, output: 'file', ...access, file: { path, ...file } }
  }
})

/** The lines, when there are so many. */
async function lines(path: string, count: number): Promise<string[]> {
  await eventually(() => linesOf(path).length >= count)
  assert.equal(linesOf(path).length, count)
  return linesOf(path)
}

const TIME = String.raw`\[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\]`

test('combined: every outcome has its line, and only answered probes have none', async t => {
  const path = join(folder(t), 'access.log')
  const backend = await fakeBackend(t, (request, response, raw) => {
    const { model } = JSON.parse(request.body)
    if (model === 'broken') return response.writeHead(500).end('{}')
    if (model === 'silent') return
    return answerChat(request, response, raw)
  })
  const gateway = await startGateway(t, {
    backends: [{ name: 'gpu', url: backend.url }],
    auth: {
      enabled: true,
      keys: [{ key: 'sk-secret', name: 'laptop', user_id: 'alice' }],
      skip_paths: ['/health', '/metrics']
    },
    rate_limit: { enabled: true, per_key: { requests_per_minute: 5 } },
    routing: { timeout: '200ms', retry: { enabled: false } },
    ...toFile(path)
  })
  const headers = { authorization: 'Bearer sk-secret' }
  const chat = `${gateway.url}/v1/chat/completions`
  const expected: RegExp[] = []
  const asked = async (response: Promise<Response>, line: string) => {
    await (await response).text()
    expected.push(new RegExp(`^127\\.0\\.0\\.1 - ${line.replace('TIME', TIME)}$`))
    await lines(path, expected.length)
  }
  const answered = (status: number) => `TIME "POST /v1/chat/completions" ${status} \\d+ms`
  const url = `"${backend.url}"`
  await asked(post(chat, CHAT, headers), `alice ${answered(200)} ${url} model=m stream=false`)
  await asked(
    post(`${chat}?api_key=sk-query`, { ...CHAT, stream: true }, headers),
    `alice ${answered(200)} ${url} model=m stream=true`
  )
  await asked(
    post(chat, CHAT),
    `- ${answered(401)} "-" model=- stream=false error="missing_api_key"`
  )
  await asked(
    post(chat, '{', headers),
    `alice ${answered(400)} "-" model=- stream=false error="[a-z_]+"`
  )
  await asked(
    post(chat, { ...CHAT, model: 'broken' }, headers),
    `alice ${answered(500)} ${url} model=broken stream=false`
  )
  await asked(
    post(chat, { ...CHAT, model: 'silent' }, headers),
    `alice ${answered(504)} ${url} model=silent stream=false error="[a-z_]+"`
  )
  await asked(
    fetch(`${gateway.url}/no/such?sk-query`, { headers }),
    'alice TIME "GET /no/such" 404 \\d+ms "-" model=- stream=false error="not_found"'
  )

  await fetch(`${gateway.url}/health`)
  await fetch(`${gateway.url}/metrics`)
  await fetch(`${gateway.url}/health/ready`)
  await asked(post(chat, CHAT, headers), `alice ${answered(200)} ${url} model=m stream=false`)
  await asked(
    post(chat, CHAT, headers),
    `alice ${answered(429)} "-" model=- stream=false error="rate_limit_exceeded"`
  )
  const raw = await rawClient(t, gateway.port, 'this is no HTTP\r\n\r\n')
  await raw.closed
  await asked(
    fetch(`${gateway.url}/health`),
    '- TIME "- -" 400 0ms "-" model=- stream=false error="invalid_request"'
  )

  for (const [at, line] of linesOf(path).entries()) assert.match(line, expected[at]!)
  assert.doesNotMatch(readFileSync(path, 'utf8'), /sk-/)
})

test('json: an object a line, with the tokens and the times', async t => {
  const path = join(folder(t), 'access.log')
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    server: { trust_proxy: true },
    backends: [{ name: 'gpu', url: backend.url }],
    auth: { enabled: true, keys: [{ key: 'sk-1', name: 'laptop', user_id: 'alice' }] },
    ...toFile(path, { format: 'json' })
  })
  const headers = {
    authorization: 'Bearer sk-1',
    'user-agent': 'test',
    'x-forwarded-for': '10.1.2.3'
  }
  const response = await post(
    `${gateway.url}/v1/chat/completions`,
    { ...CHAT, stream: true },
    headers
  )
  await response.text()
  const [line] = await lines(path, 1)
  const { timestamp, latency_ms, ttft_ms, ...row } = JSON.parse(line!)
  assert.ok(Math.abs(Date.parse(timestamp) - Date.now()) < 60_000)
  assert.ok(latency_ms >= ttft_ms && ttft_ms >= 0)
  assert.deepEqual(row, {
    request_id: response.headers.get('x-llmproxy-request-id'),
    client_ip: '10.1.2.3',
    method: 'POST',
    path: '/v1/chat/completions',
    api_key_id: 'laptop',
    caller: 'laptop',
    user_id: 'alice',
    model: 'm',
    is_stream: true,
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

const EVIL = 'm" error="x"\n1.2.3.4 - root [\r\t\0\u001b[31m\u2028\u0085é\\'

test('what a client sends forges neither lines nor fields', async t => {
  const home = folder(t)
  const backend = await fakeBackend(t, answerChat)
  for (const format of ['combined', 'json']) {
    const path = join(home, format)
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      ...toFile(path, { format })
    })
    const headers = { 'user-agent': '" x\t' }
    await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, model: EVIL }, headers)
    await lines(path, 1)
    const raw = await rawClient(t, gateway.port, 'GET /a"b\'{c} HTTP/1.1\r\nhost: x\r\n\r\n')
    await raw.until(/404/)
    const [first, second] = (await lines(path, 2)) as [string, string]
    for (const line of [first, second]) assert.match(line, /^[\x20-\x7e]+(é[\x20-\x7e]+)?$/)
    if (format === 'json') {
      assert.equal(JSON.parse(first).model, EVIL)
      assert.equal(JSON.parse(second).path, '/a"b\'{c}')
    } else {
      const model = String.raw`m\x22\x20error=\x22x\x22\x0A1.2.3.4\x20-\x20root\x20[\x0D\x09\x00\x1B[31m\xE2\x80\xA8\xC2\x85\xC3\xA9\x5C`
      assert.ok(first.endsWith(` model=${model} stream=false`), first)
      assert.ok(second.includes(String.raw`"GET /a\x22b'{c}" 404`), second)
    }
  }
})

test('names of users, too, are escaped; a key’s id stands where there is no user', () => {
  const row = {
    client_ip: null,
    method: 'GET',
    path: '/',
    status_code: 200,
    user_id: 'a b] "GET',
    api_key_id: 'id',
    model: '',
    error: null,
    timestamp: '2026-03-01T10:20:30.000Z'
  } as RequestRow
  assert.match(toLine(row, 'combined'), /^- - a\\x20b\]\\x20\\x22GET \[\d\d\/Mar\/2026:/)
  assert.match(toLine({ ...row, user_id: null }, 'combined'), /^- - id \[.* model=- stream=/)
})

test('to stdout, between the lines of the log', async t => {
  const backend = await fakeBackend(t, answerChat)
  const config = writeConfig(join(folder(t), 'config.yaml'), {
    server: { listen: '127.0.0.1:0' },
    backends: [{ url: backend.url }],
    logging: { enabled: true, access: { enabled: true, format: 'json' } }
  })
  const gateway = await start(t, [CLI, '--config', config])
  for (let count = 0; count < 50; count++) {
    await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  }
  gateway.child.kill('SIGTERM')
  assert.equal(await gateway.exit, 0)
  assert.equal(gateway.lines.filter(line => line.status_code === 200).length, 50)
  assert.equal(gateway.lines.filter(line => line.msg === 'exchange').length, 50)
})

test('a file that is full, or was moved away, is followed by another', async t => {
  const path = join(folder(t), 'logs/access.log')
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    ...toFile(path, { format: 'json' }, { max_size: '2KB', compress: true })
  })
  const ids: unknown[] = []
  const call = async () => {
    const response = await post(`${gateway.url}/v1/chat/completions`, CHAT)
    ids.push(response.headers.get('x-llmproxy-request-id'))
    await response.text()
  }
  while (!existsSync(path) || oldOnes(path).length < 3) await call()
  renameSync(path, `${path}.moved`)
  while (!existsSync(path)) await call()
  await gateway.fastify.close()
  assert.deepEqual(
    linesOf(path)
      .map(line => JSON.parse(line).request_id)
      .toSorted(),
    ids.toSorted()
  )
})

test('several processes write to one file: no line is lost or torn', async t => {
  const home = folder(t)
  const backend = await fakeBackend(t, answerChat)
  const port = await closedPort()
  const config = writeConfig(join(home, 'config.yaml'), {
    server: { listen: `127.0.0.1:${port}`, workers: 2 },
    log: { output: 'file', file: { path: 'llmproxy.log', max_size: '10KB', max_files: 0 } },
    backends: [{ url: backend.url }],
    ...toFile('access.log', { format: 'json' }, { max_size: '10KB', max_files: 0 })
  })
  const child = spawn(...commandLine([CLI, '--config', config]), {
    env: { ...process.env, LLMPROXY_DATA_DIR: home },
    stdio: 'inherit'
  })
  t.after(() => child.kill('SIGKILL'))
  const url = `http://127.0.0.1:${port}`
  await eventually(() =>
    linesOf(join(home, 'llmproxy.log')).some(line => line.includes('is listening'))
  )
  const call = async () => {
    const headers = { connection: 'close', 'user-agent': 'x'.repeat(150) }
    const response = await post(`${url}/v1/chat/completions`, CHAT, headers)
    await response.text()
    return response.headers.get('x-llmproxy-request-id')
  }
  const ids: unknown[] = []
  for (let round = 0; round < 20; round++) {
    ids.push(...(await Promise.all(Array.from({ length: 10 }, call))))
  }
  const exit = new Promise(resolve => child.once('exit', resolve))
  child.kill('SIGTERM')
  assert.equal(await exit, 0)
  for (const [name, id] of [
    ['access.log', 'request_id'],
    ['llmproxy.log', 'requestId']
  ] as const) {
    const path = join(home, name)
    const written = linesOf(path).map(line => JSON.parse(line)[id])
    assert.deepEqual(written.filter(each => each !== undefined).toSorted(), ids.toSorted(), name)
    assert.ok(oldOnes(path).length > 0)
  }
})

test('a reload opens another file, and one that cannot be written changes nothing', async t => {
  const home = folder(t)
  const backend = await fakeBackend(t, answerChat)
  const config = (more: object) => ({ backends: [{ url: backend.url }], ...more })
  const [one, two] = [join(home, 'one'), join(home, 'two')]
  const gateway = await startGateway(t, config(toFile(one)))
  const reload = (more: object) =>
    gateway.control.reload(parseConfig(JSON.stringify(config(more)), 'test.yaml', {}) as never)
  const call = async () => {
    await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  }
  await call()
  await reload(toFile(two))
  await call()
  mkdirSync(join(home, 'folder'))
  await assert.rejects(reload(toFile(join(home, 'folder'))), /EISDIR/)
  await call()
  await reload({})
  await call()
  await reload(toFile(one, { format: 'json' }))
  await call()
  await gateway.fastify.close()
  const [first, second] = await lines(one, 2)
  assert.match(first!, / model=m stream=false$/)
  assert.equal(JSON.parse(second!).model, 'm')
  assert.equal((await lines(two, 2)).length, 2)
})

test('a file that cannot be written stops the start', async t => {
  const path = join(folder(t), 'file')
  writeFileSync(path, '')
  await assert.rejects(
    startGateway(t, { backends: [{ url: 'demo://' }], ...toFile(join(path, 'access.log')) }),
    /ENOTDIR|EEXIST/
  )
})

test('alone in somebody else’s server: its own routes have lines, too', async t => {
  const path = join(folder(t), 'access.log')
  const fastify = Fastify()
  await fastify.register(logging, { access: { enabled: true, output: 'file', file: { path } } })
  fastify.get('/hello', async () => 'hello')
  await fastify.inject('/hello?name=x')
  await fastify.close()
  const [line] = await lines(path, 1)
  assert.match(line!, /"GET \/hello" 200 /)
})

test('who leaves before an answer is a 499; a stream that is cut is a 200 with an error', async t => {
  const path = join(folder(t), 'access.log')
  const responses: ServerResponse[] = []
  const backend = await fakeBackend(t, (request, response) => {
    if (request.body.includes('silent')) return
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(chunk('Hi'))
    responses.push(response)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }], ...toFile(path) })
  const silent = JSON.stringify({ ...CHAT, model: 'silent' })
  const left = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', silent))
  await backend.request(0)
  left.socket.destroy()
  const [first] = await lines(path, 1)
  assert.match(first!, /^127\.0\.0\.1 - .* 499 \d+ms .* model=silent stream=false/)

  const stream = JSON.stringify({ ...CHAT, stream: true })
  const reader = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', stream))
  await reader.until(/Hi/)
  responses[0]!.destroy()
  const [, second] = await lines(path, 2)
  assert.match(second!, / 200 \d+ms .* stream=true error="[a-z_]+"$/)
})
