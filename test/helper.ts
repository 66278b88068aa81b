import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { type AddressInfo, connect, type Socket } from 'node:net'
import type { TestContext } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { pino } from 'pino'
import type { Gateway } from '../src/app.ts'
import { parseConfig } from '../src/config.ts'
import { createApp } from '../src/server.ts'

/** Real sockets for every test: a gateway, backends that do as they are told, and clients. */

export interface TestGateway {
  url: string
  port: number
  control: Gateway
  fastify: Awaited<ReturnType<typeof createApp>>['fastify']
  /** Log lines so far. */
  lines: Record<string, unknown>[]
  /** The next log line that has these members (or one that is there already). */
  logged(members: Record<string, unknown>): Promise<Record<string, unknown>>
  metrics(): Promise<string>
  /** The value of one metric with these labels, 0 if it isn't there. */
  metric(name: string, labels?: Record<string, string>): Promise<number>
}

/** Starts a gateway on a free port with this configuration (the members of a YAML file). */
export async function startGateway(
  t: TestContext,
  config: Record<string, unknown>,
  env: NodeJS.ProcessEnv = {},
  dataDir?: string
): Promise<TestGateway> {
  const lines: Record<string, unknown>[] = []
  const waiting = new Set<() => void>()
  const log = pino(
    { level: 'debug', base: null },
    {
      write(line: string) {
        lines.push(JSON.parse(line))
        for (const look of waiting) look()
      }
    }
  )
  const parsed = parseConfig(JSON.stringify(config), 'test.yaml', env)
  const { fastify, control } = await createApp(parsed, log, { dataDir })
  await fastify.listen({ host: '127.0.0.1', port: 0 })
  t.after(() => fastify.close())
  const { port } = fastify.server.address() as AddressInfo
  const scheme = 'setSecureContext' in fastify.server ? 'https' : 'http'
  const gateway: TestGateway = {
    url: `${scheme}://127.0.0.1:${port}`,
    port,
    control,
    fastify,
    lines,
    logged(members) {
      const find = () =>
        lines.find(line => Object.entries(members).every(([name, value]) => line[name] === value))
      return new Promise(resolve => {
        const look = () => {
          const line = find()
          if (line === undefined) return
          waiting.delete(look)
          resolve(line)
        }
        waiting.add(look)
        look()
      })
    },
    metrics: async () => (await fetch(`${gateway.url}/metrics`)).text(),
    async metric(name, labels = {}) {
      const text = await gateway.metrics()
      const wanted = Object.entries(labels).map(([label, value]) => `${label}="${value}"`)
      const line = text
        .split('\n')
        .find(
          each =>
            (each.startsWith(`${name}{`) || each.startsWith(`${name} `)) &&
            wanted.every(label => each.includes(label))
        )
      return line === undefined ? 0 : Number(line.slice(line.lastIndexOf(' ') + 1))
    }
  }
  return gateway
}

/** A request as a backend saw it. */
export interface SeenRequest {
  method: string
  url: string
  headers: IncomingMessage['headers']
  rawHeaders: string[]
  body: string
  /** Resolves when the connection it came on is closed. */
  closed: Promise<unknown>
}

export interface FakeBackend {
  url: string
  port: number
  server: Server
  requests: SeenRequest[]
  /** Resolves with the request number `index`, when it has come. */
  request(index?: number): Promise<SeenRequest>
}

export type Answerer = (
  request: SeenRequest,
  response: ServerResponse,
  raw: IncomingMessage
) => unknown

/** Starts a backend that answers as it is told. */
export async function fakeBackend(
  t: TestContext,
  answer: Answerer,
  { listsModels = false } = {}
): Promise<FakeBackend> {
  const requests: SeenRequest[] = []
  const closes = new WeakMap<Socket, Promise<unknown>>()
  const waiting = new Set<() => void>()
  const server = createServer(async (raw, response) => {
    response.on('error', () => {})
    const closed = closes.get(raw.socket) ?? closing(raw.socket)
    closes.set(raw.socket, closed)
    const chunks: Buffer[] = []
    try {
      for await (const chunk of raw) chunks.push(chunk)
    } catch {
      return
    }
    const request: SeenRequest = {
      method: raw.method!,
      url: raw.url!,
      headers: raw.headers,
      rawHeaders: raw.rawHeaders,
      body: Buffer.concat(chunks).toString(),
      closed
    }
    // The gateway itself asks for its models; a test that is about them says so.
    if (!listsModels && raw.headers['user-agent']?.startsWith('llmproxy/')) {
      if (/(^|\/)(v1\/models|api\/tags)$/.test(raw.url!)) {
        response.writeHead(404).end()
        return
      }
    }
    requests.push(request)
    for (const look of waiting) look()
    await answer(request, response, raw)
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  const { port } = server.address() as AddressInfo
  return {
    url: `http://127.0.0.1:${port}`,
    port,
    server,
    requests,
    request(index = 0) {
      return new Promise(resolve => {
        const look = () => {
          const request = requests[index]
          if (request === undefined) return
          waiting.delete(look)
          resolve(request)
        }
        waiting.add(look)
        look()
      })
    }
  }
}

/** Resolves when it is closed, with or without an error. */
export function closing(emitter: NodeJS.EventEmitter): Promise<void> {
  return new Promise(resolve => emitter.once('close', () => resolve()))
}

/** Resolves when a response takes more, or is closed. */
export function writable(response: ServerResponse): Promise<void> {
  return new Promise(resolve => {
    const done = () => {
      response.off('drain', done).off('close', done)
      resolve()
    }
    response.once('drain', done).once('close', done)
  })
}

/** Waits until a condition holds. It pauses between checks, because a busy loop takes the CPU from other tests. */
export async function eventually(condition: () => unknown): Promise<void> {
  while (!(await condition())) await sleep(5)
}

/** Returns how many turns the event loop makes during some work. */
export async function turnsOf(work: () => Promise<unknown>): Promise<number> {
  let turns = 0
  let isOver = false
  const count = () => {
    if (isOver) return
    turns++
    setImmediate(count)
  }
  setImmediate(count)
  await work()
  isOver = true
  return turns
}

/** A port of the loopback interface on which nothing listens. */
export async function closedPort(): Promise<number> {
  for (;;) {
    // Below the range from which the system gives ports to the servers of other tests.
    const port = 12_000 + Math.floor(Math.random() * 18_000)
    const server = createServer().listen(port, '127.0.0.1')
    const isFree = await once(server, 'listening').then(
      () => true,
      () => false
    )
    if (!isFree) continue
    server.close()
    await once(server, 'close')
    return port
  }
}

/** A port that completes no more connections: its owner is stopped and its queue is full. */
export async function fullPort(t: TestContext): Promise<number> {
  const child = spawn(process.execPath, [
    '-e',
    `const server = require('node:net').createServer()
    server.listen({ port: 0, host: '127.0.0.1', backlog: 1 }, () => {
      process.stdout.write(String(server.address().port))
    })`
  ])
  t.after(() => child.kill('SIGKILL'))
  const [data] = await once(child.stdout, 'data')
  const port = Number(data)
  child.kill('SIGSTOP')
  // The queue takes backlog + 1 connections; the next one's SYN is dropped.
  for (let opened = 0; opened < 2; opened++) {
    const socket = connect(port, '127.0.0.1')
    t.after(() => socket.destroy())
    await once(socket, 'connect')
  }
  return port
}

export const CHAT = { model: 'm', messages: [{ role: 'user', content: 'Hello' }] }

/** Sends a JSON body and leaves the answer to the test. */
export function post(
  url: string,
  body: unknown,
  headers: Record<string, string> = {},
  signal?: AbortSignal
): Promise<Response> {
  return fetch(url, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: typeof body === 'string' ? body : JSON.stringify(body),
    ...(signal === undefined ? {} : { signal })
  })
}

/** A connection that sends text as it is and collects what comes back. */
export interface RawClient {
  socket: Socket
  received: string
  /** Resolves as soon as what was received matches. */
  until(pattern: RegExp): Promise<string>
  closed: Promise<unknown>
}

export async function rawClient(t: TestContext, port: number, text = ''): Promise<RawClient> {
  const socket = connect(port, '127.0.0.1')
  socket.on('error', () => {})
  t.after(() => socket.destroy())
  const client: RawClient = {
    socket,
    received: '',
    closed: closing(socket),
    until(pattern) {
      return new Promise((resolve, reject) => {
        const settle = (done: () => void) => {
          socket.off('data', look).off('close', fail)
          done()
        }
        const look = () => {
          if (pattern.test(client.received)) settle(() => resolve(client.received))
        }
        const fail = () =>
          settle(() => reject(new Error(`closed before ${pattern}: ${client.received}`)))
        socket.on('data', look).on('close', fail)
        look()
        if (socket.destroyed) fail()
      })
    }
  }
  socket.on('data', data => {
    client.received += data.toString('latin1')
  })
  await once(socket, 'connect')
  if (text !== '') socket.write(text)
  return client
}

/** Resolves with the clients that have an error response, when as many have. */
export async function responded(clients: RawClient[], count: number): Promise<RawClient[]> {
  const all: RawClient[] = []
  await new Promise<void>(resolve => {
    for (const client of clients) {
      const add = () => {
        if (all.push(client) === count) resolve()
      }
      // The others close without one.
      client.until(/\}\}/).then(add, () => {})
    }
  })
  return all
}

/** An HTTP/1.1 POST as text. */
export function rawPost(path: string, body: string, headers: string[] = []): string {
  return [
    `POST ${path} HTTP/1.1`,
    'host: gateway',
    'content-type: application/json',
    `content-length: ${Buffer.byteLength(body)}`,
    ...headers,
    '',
    body
  ].join('\r\n')
}

/** The JSON of each `data:` line, `[DONE]` left as text. */
export function events(stream: string): unknown[] {
  return stream
    .split('\n')
    .filter(line => line.startsWith('data: '))
    .map(line => (line === 'data: [DONE]' ? '[DONE]' : JSON.parse(line.slice(6))))
}

/** One chunk of a chat answer, as vLLM writes it. */
export function chunk(content: string, more: object = {}): string {
  const choices = [{ index: 0, delta: { content }, finish_reason: null }]
  return `data: ${JSON.stringify({ id: 'chatcmpl-1', object: 'chat.completion.chunk', model: 'm', choices, ...more })}\n\n`
}

export const USAGE = { prompt_tokens: 12, completion_tokens: 3, total_tokens: 15 }
export const USAGE_CHUNK = `data: ${JSON.stringify({ id: 'chatcmpl-1', object: 'chat.completion.chunk', model: 'm', choices: [], usage: USAGE })}\n\n`
export const DONE = 'data: [DONE]\n\n'

/** Answers a chat call as vLLM does: usage only when it was asked for. */
export const answerChat: Answerer = (request, response) => {
  const body = JSON.parse(request.body || '{}')
  if (body.stream !== true) {
    response.writeHead(200, { 'content-type': 'application/json' })
    const message = { role: 'assistant', content: 'Hi there!' }
    const choices = [{ index: 0, message, finish_reason: 'stop' }]
    response.end(
      JSON.stringify({
        id: 'chatcmpl-1',
        object: 'chat.completion',
        created: 1,
        model: 'm',
        choices,
        usage: USAGE
      })
    )
    return
  }
  response.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8' })
  for (const word of ['Hi', ' there', '!']) response.write(chunk(word))
  if (body.stream_options?.include_usage) response.write(USAGE_CHUNK)
  response.end(DONE)
}
