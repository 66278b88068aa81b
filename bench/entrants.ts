import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { existsSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Target } from './load.ts'

/** The programs that are compared, and how each is started in front of one backend. */

export interface Surroundings {
  backendPort: number
  sinkPort: number
  /** For configurations and logs. */
  folder: string
}

export interface Entrant {
  name: string
  /** What it is, with its version; undefined when it is not installed. */
  describe(): string | undefined
  /** Command line, and headers its clients send. */
  command(port: number, surroundings: Surroundings): string[]
  headers?(surroundings: Surroundings): Record<string, string>
  env?: Record<string, string>
  /** Sends a usage event for each request. */
  reports?: boolean
}

export interface Running {
  target: Target
  pid: number
  stop(): Promise<void>
}

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url))
const PORTKEY = here('node_modules/@portkey-ai/gateway/')
const KEY = 'sk-bench'
const MANY = 1_000_000_000
/** Held streams of the largest figure, and some more. */
const MAX_CONNECTIONS = 12_000

/** Everything on: auth, limits, metering, metrics, a usage event and a log line for each exchange. */
function llmproxyConfig({ backendPort, sinkPort }: Surroundings, port: number) {
  return {
    // All clients of the benchmark come from one address.
    server: {
      listen: `127.0.0.1:${port}`,
      max_connections: MAX_CONNECTIONS,
      max_connections_per_address: MAX_CONNECTIONS
    },
    log: { format: 'json' },
    backends: [{ name: 'bench', url: `http://127.0.0.1:${backendPort}` }],
    routing: { load_balance: 'least_connections', retry: { enabled: true } },
    health_check: { enabled: true },
    auth: {
      enabled: true,
      keys: [{ key: KEY, name: 'bench', user_id: 'bench', models: ['bench*'] }]
    },
    rate_limit: {
      enabled: true,
      global: { requests_per_minute: MANY, max_concurrent: MANY },
      per_key: { requests_per_second: MANY, requests_per_minute: MANY, max_concurrent: MANY }
    },
    usage: {
      enabled: true,
      reporters: [
        {
          name: 'sink',
          type: 'webhook',
          webhook: {
            url: `http://127.0.0.1:${sinkPort}/usage`,
            batch: { max_events: 100, max_wait: '500ms' }
          }
        }
      ]
    },
    metrics: { enabled: true }
  }
}

const direct: Entrant = {
  name: 'direct',
  describe: () => 'no proxy at all',
  command: () => []
}

const CLI = here('../dist/cli.js')

/** Node's flags, as `npm start` has them: exec node FLAGS dist/cli.js. */
function nodeFlags(): string[] {
  const { scripts } = JSON.parse(readFileSync(here('../package.json'), 'utf8'))
  return scripts.start.split(' ').slice(2, -1)
}

const llmproxy: Entrant = {
  name: 'llmproxy',
  describe: () =>
    existsSync(CLI)
      ? `LLMProxy ${version(here('../package.json'))}, Node ${process.version}, everything on, usage events in batches of 100`
      : undefined,
  command: (port, surroundings) => {
    const config = llmproxyConfig(surroundings, port)
    const file = write(surroundings, 'llmproxy.yaml', JSON.stringify(config))
    // For example --cpu-prof: a profile of the whole run.
    const flags = (process.env.BENCH_NODE_FLAGS ?? '').split(' ').filter(flag => flag !== '')
    return [process.execPath, ...nodeFlags(), ...flags, CLI, '--config', file]
  },
  headers: () => ({ authorization: `Bearer ${KEY}` }),
  reports: true
}

/** Answers do not wait for their usage records. */
export const llmproxyRelaxed: Entrant = {
  ...llmproxy,
  command: (port, surroundings) => {
    const { usage, ...config } = llmproxyConfig(surroundings, port)
    const text = JSON.stringify({ ...config, usage: { ...usage, durability: 'relaxed' } })
    return [
      process.execPath,
      ...nodeFlags(),
      CLI,
      '--config',
      write(surroundings, 'relaxed.yaml', text)
    ]
  }
}

/** Limits are off: they are counted in one process so far. */
export const llmproxyWithWorkers: Entrant = {
  ...llmproxy,
  command: (port, surroundings) => {
    const { server, rate_limit: _, ...config } = llmproxyConfig(surroundings, port)
    const text = JSON.stringify({ ...config, server: { ...server, workers: 2 } })
    return [
      process.execPath,
      ...nodeFlags(),
      CLI,
      '--config',
      write(surroundings, 'workers.yaml', text)
    ]
  }
}

const replyFrom: Entrant = {
  name: 'reply-from',
  describe: () => {
    const installed = here('../node_modules/@fastify/reply-from/package.json')
    return `a bare @fastify/reply-from ${version(installed)} app, Node ${process.version}`
  },
  command: (port, { backendPort }) => [
    process.execPath,
    here('bare.ts'),
    String(port),
    `http://127.0.0.1:${backendPort}`
  ]
}

const nginx: Entrant = {
  name: 'nginx',
  describe: () => output('nginx', '-v')?.replace('nginx version: ', ''),
  command: (port, surroundings) => {
    const file = write(
      surroundings,
      'nginx.conf',
      `daemon off; worker_processes 1; worker_rlimit_nofile 20000; pid nginx.pid; error_log stderr error;
events { worker_connections 20000; }
http {
  access_log off;
  client_max_body_size 64m; client_body_buffer_size 2m; client_body_temp_path .;
  proxy_temp_path .; fastcgi_temp_path .; uwsgi_temp_path .; scgi_temp_path .;
  upstream backend { server 127.0.0.1:${surroundings.backendPort}; keepalive 256; keepalive_requests 1000000; }
  server {
    listen 127.0.0.1:${port} backlog=4096;
    keepalive_requests 1000000;
    location / {
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }
  }
}
`
    )
    return ['nginx', '-p', surroundings.folder, '-c', file]
  }
}

const haproxy: Entrant = {
  name: 'haproxy',
  describe: () => /^HAProxy version \S+/.exec(output('haproxy', '-v') ?? '')?.[0],
  command: (port, surroundings) => {
    const file = write(
      surroundings,
      'haproxy.cfg',
      `global
  nbthread 1
  maxconn 9000
defaults
  mode http
  option http-no-delay
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend in
  bind 127.0.0.1:${port} backlog 4096
  default_backend out
backend out
  server bench 127.0.0.1:${surroundings.backendPort}
`
    )
    return ['haproxy', '-db', '-f', file]
  }
}

const portkey: Entrant = {
  name: 'portkey',
  describe: () =>
    existsSync(PORTKEY)
      ? `@portkey-ai/gateway ${version(join(PORTKEY, 'package.json'))}, Node ${process.version}`
      : undefined,
  command: port => [
    process.execPath,
    join(PORTKEY, 'build/start-server.js'),
    '--headless',
    `--port=${port}`
  ],
  env: { TRUSTED_CUSTOM_HOSTS: '127.0.0.1' },
  headers: ({ backendPort }) => ({
    authorization: `Bearer ${KEY}`,
    'x-portkey-provider': 'openai',
    'x-portkey-custom-host': `http://127.0.0.1:${backendPort}/v1`
  })
}

export const ENTRANTS = [direct, llmproxy, replyFrom, nginx, haproxy, portkey]

/** Starts an entrant, and waits until it answers its first request. */
export async function start(
  entrant: Entrant,
  surroundings: Surroundings
): Promise<Running & { startMs: number }> {
  const headers = entrant.headers?.(surroundings) ?? {}
  if (entrant === direct) {
    const target = { port: surroundings.backendPort, headers }
    return { target, pid: 0, startMs: 0, stop: async () => {} }
  }
  const port = await freePort()
  const [program, ...args] = entrant.command(port, surroundings)
  const log = openSync(join(surroundings.folder, `${entrant.name}.log`), 'w')
  const startedAt = performance.now()
  const child = spawn(program!, args, {
    stdio: ['ignore', log, log],
    env: { ...process.env, ...entrant.env, LLMPROXY_DATA_DIR: surroundings.folder }
  })
  const target = { port, headers }
  while (!(await answers(target))) {
    if (child.exitCode !== null || performance.now() - startedAt > 20_000) {
      child.kill('SIGKILL')
      throw new Error(`${entrant.name} did not start; see its log in ${surroundings.folder}`)
    }
    await new Promise(resolve => setTimeout(resolve, 2))
  }
  return {
    target,
    pid: child.pid!,
    startMs: performance.now() - startedAt,
    stop: () => stop(child)
  }
}

async function answers({ port, headers }: Target): Promise<boolean> {
  try {
    const response = await fetch(`http://127.0.0.1:${port}/v1/chat/completions`, {
      method: 'POST',
      headers: { ...headers, 'content-type': 'application/json' },
      body: '{"model":"bench","messages":[]}',
      signal: AbortSignal.timeout(5_000)
    })
    await response.text()
    return response.ok
  } catch {
    return false
  }
}

async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null) return
  const ended = new Promise(resolve => child.once('exit', resolve))
  child.kill('SIGTERM')
  const late = setTimeout(() => child.kill('SIGKILL'), 3_000)
  await ended
  clearTimeout(late)
}

function freePort(): Promise<number> {
  return new Promise(resolve => {
    const server = createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address() as { port: number }
      server.close(() => resolve(port))
    })
  })
}

function write({ folder }: Surroundings, name: string, text: string): string {
  const file = join(folder, name)
  writeFileSync(file, text)
  return file
}

function version(file: string): string {
  return JSON.parse(readFileSync(file, 'utf8')).version
}

/** What a program says of itself, or undefined if there is no such program. */
function output(program: string, ...args: string[]): string | undefined {
  try {
    return execFileSync('sh', ['-c', `${[program, ...args].join(' ')} 2>&1`], {
      encoding: 'utf8'
    }).trim()
  } catch {
    return undefined
  }
}
