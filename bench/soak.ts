import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { Agent, type IncomingMessage, request } from 'node:http'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { ENTRANTS, type Running, start } from './entrants.ts'
import { type Helper, launch, machine } from './helpers.ts'
import { TIME_MARK } from './http1.ts'
import type { Target } from './load.ts'
import { memory } from './process.ts'
import { insert, median } from './report.ts'

/**
 * Does the gateway give back whatever it takes? Clients of every kind, well-behaved and not, use it
 * for a while; then they all leave at once, and nothing of them may be left.
 *
 *   node bench/soak.ts [--minutes 10] [--save]
 */

const { values: options } = parseArgs({
  options: {
    minutes: { type: 'string', default: '10' },
    save: { type: 'boolean', default: false }
  }
})
const minutes = Number(options.minutes)
if (!(minutes >= 1 && minutes <= 7 * 24 * 60)) throw new Error('--minutes must be 1 or more')

const CLIENTS = 100
const WARM_UP_MS = 10_000
const SAMPLE_MS = 10_000
const SAMPLES_PER_ROW = 6
const DRAIN_MS = 30_000
/** For idle connections to be closed, which is nobody's leak. */
const REST_MS = 10_000
/** Connections and file descriptors that may be more than after the warm-up. */
const TOLERANCE = 10
/** How long the gateway may keep a connection whose client has left. */
const HANG_UP_MS = 10_000
const MAX_GROWTH = 1.25

/** The clients of one period: how they reach the gateway, and when they must all leave. */
interface Crowd {
  target: Target
  agent: Agent
  signal: AbortSignal
}

/** One thing a client does; it rejects when the gateway does not answer as it should. */
interface Deed {
  name: string
  /** How often, beside the others. */
  share: number
  act(crowd: Crowd): Promise<void>
}

const DEEDS: Deed[] = [
  { name: 'stream', share: 30, act: readStream },
  { name: 'stream, left in the middle', share: 20, act: leaveStream },
  { name: 'stream, read slowly', share: 0.1, act: readSlowly },
  { name: 'whole answer', share: 20, act: crowd => expect(crowd, 200) },
  { name: 'left before the answer', share: 10, act: leaveEarly },
  { name: 'half a request', share: 4, act: vanish },
  { name: 'wrong key', share: 4, act: crowd => expect(crowd, 401, { key: 'sk-wrong' }) },
  { name: 'broken body', share: 4, act: crowd => expect(crowd, 400, { body: '{"model":"bench"' }) },
  { name: 'forbidden model', share: 4, act: crowd => expect(crowd, 403, { model: 'other' }) },
  { name: 'unknown path', share: 4, act: crowd => expect(crowd, 404, { path: '/v1/nothing' }) }
]
const SHARES = DEEDS.reduce((sum, { share }) => sum + share, 0)

/** What is asked for; what it leaves out is as it should be. */
interface Question {
  path?: string
  key?: string
  model?: string
  body?: string
  stream?: { chunks: number; intervalMs: number }
}

/** Prompts of 500 bytes to 128 KB, small ones as often as large ones. */
function toBody({ model = 'bench', stream }: Question): string {
  const content = 'word '.repeat(100 * 2 ** between(0, 8))
  const wish = stream && { stream: true, user: `bench ${stream.chunks},${stream.intervalMs}` }
  return JSON.stringify({ model, ...wish, messages: [{ role: 'user', content }] })
}

function toOptions({ target, agent, signal }: Crowd, { path, key }: Question) {
  const headers = { ...target.headers, 'content-type': 'application/json' }
  return {
    port: target.port,
    host: '127.0.0.1',
    method: 'POST',
    path: path ?? '/v1/chat/completions',
    headers: key === undefined ? headers : { ...headers, authorization: `Bearer ${key}` },
    agent,
    signal
  }
}

/** Sends a request; resolves with the head of its answer. */
function ask(crowd: Crowd, question: Question): Promise<IncomingMessage> {
  return new Promise((resolve, reject) => {
    request(toOptions(crowd, question), resolve)
      .on('error', reject)
      .end(question.body ?? toBody(question))
  })
}

async function expect(crowd: Crowd, status: number, question: Question = {}): Promise<void> {
  const answer = await ask(crowd, question)
  for await (const _ of answer);
  expectStatus(answer, status)
}

function expectStatus({ statusCode }: IncomingMessage, status: number): void {
  if (statusCode !== status) throw new Error(`status ${statusCode} in place of ${status}`)
}

async function readStream(crowd: Crowd): Promise<void> {
  const stream = { chunks: Math.round(between(2, 100)), intervalMs: 20 }
  const answer = await ask(crowd, { stream })
  let text = ''
  for await (const bytes of answer) text += bytes
  expectStatus(answer, 200)
  expectAll(text, stream.chunks)
}

function expectAll(text: string, chunks: number): void {
  const got = text.split(TIME_MARK).length - 1
  if (got !== chunks) throw new Error(`${got} chunks in place of ${chunks}`)
  if (!text.endsWith('data: [DONE]\n\n')) throw new Error('a stream without its end')
}

async function leaveStream(crowd: Crowd): Promise<void> {
  const answer = await ask(crowd, { stream: { chunks: 100, intervalMs: 20 } })
  expectStatus(answer, 200)
  let left = between(1, 20_000)
  for await (const bytes of answer) {
    left -= bytes.length
    if (left < 0) break
  }
}

/** Takes so little for a while that even the kernel's buffers (4 MB) fill, and then all the rest. */
async function readSlowly(crowd: Crowd): Promise<void> {
  const stream = { chunks: 20_000, intervalMs: 1 }
  const answer = await ask(crowd, { stream })
  let text = ''
  let pauses = between(3, 16)
  for await (const bytes of answer) {
    text += bytes
    if (--pauses > 0) await pause(between(1_000, 2_000), undefined, crowd)
  }
  expectStatus(answer, 200)
  expectAll(text, stream.chunks)
}

/** Mostly before the head of the answer comes; sometimes it is faster. */
function leaveEarly(crowd: Crowd): Promise<void> {
  const question = { stream: { chunks: 100, intervalMs: 20 } }
  const asked = request(toOptions(crowd, question), answer => answer.resume())
  const closed = new Promise<void>(resolve => asked.on('close', resolve))
  asked.on('error', () => {})
  asked.end(toBody(question), () => {
    setTimeout(() => asked.destroy(), between(0, 3))
  })
  return closed
}

/** Sends a part of the head or of the body, and a little later it hangs up, or is just gone. */
async function vanish({ target, signal }: Crowd): Promise<void> {
  const head = `POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\nauthorization: ${target.headers.authorization}\r\n`
  const body = 'content-type: application/json\r\ncontent-length: 5000\r\n\r\n{"model":"bench"'
  const socket = connect({ port: target.port, host: '127.0.0.1', signal })
  const closed = new Promise(resolve => socket.on('close', resolve))
  socket.on('error', () => {}).resume()
  socket.write(Math.random() < 0.5 ? head : head + body)
  await pause(between(0, 1_000), undefined, { signal })
  let isKept = false
  socket.setTimeout(HANG_UP_MS, () => {
    isKept = true
    socket.destroy()
  })
  if (Math.random() < 0.5) socket.end()
  else socket.resetAndDestroy()
  await closed
  if (isKept) throw new Error('the gateway has kept the connection')
}

/** What the clients have done, and what they have complained of; each how often. */
class Tally {
  readonly deeds = new Map<string, number>()
  readonly complaints = new Map<string, number>()

  add(to: Map<string, number>, what: string): void {
    to.set(what, (to.get(what) ?? 0) + 1)
  }
}

/** Lets clients do what they do until `watch` has ended, and sends them all away at once. */
async function load(target: Target, tally: Tally, watch: () => Promise<void>): Promise<void> {
  const leave = new AbortController()
  const { signal } = leave
  const crowd = { target, agent: new Agent({ keepAlive: true }), signal }
  const clients = Array.from({ length: CLIENTS }, async (_, index) => {
    await pause(index * 10)
    while (!signal.aborted) await doOne(crowd, tally)
  })
  try {
    await watch()
  } finally {
    leave.abort()
    await Promise.all(clients)
    crowd.agent.destroy()
  }
}

async function doOne(crowd: Crowd, tally: Tally): Promise<void> {
  const { name, act } = pick()
  try {
    await act(crowd)
    tally.add(tally.deeds, name)
  } catch (error) {
    if (crowd.signal.aborted) return
    tally.add(tally.complaints, `${name}: ${(error as Error).message}`)
    // If the gateway is gone nobody must spin.
    await pause(100)
  }
}

function pick(): Deed {
  let left = between(0, SHARES)
  for (const deed of DEEDS) {
    left -= deed.share
    if (left < 0) return deed
  }
  return DEEDS[0]!
}

function between(least: number, most: number): number {
  return least + Math.random() * (most - least)
}

interface Stage {
  backend: Helper
  sink: Helper
  gateway: Running
}

interface Sample {
  privateMb: number
  descriptors: number
  backendConnections: number
  inFlight: number
  backendInFlight: number
  webhookQueue: number
  /** What keeps the gateway's event loop alive, by type. */
  resources: Map<string, number>
}

async function look({ backend, gateway: { pid, target } }: Stage): Promise<Sample> {
  const metrics = await scrape(target)
  return {
    privateMb: memory(pid).private / 1024,
    descriptors: readdirSync(`/proc/${pid}/fd`).length,
    backendConnections: (await backend.ask({})).open as number,
    inFlight: sum(metrics, 'llmproxy_requests_in_flight'),
    backendInFlight: sum(metrics, 'llmproxy_backend_in_flight'),
    webhookQueue: sum(metrics, 'llmproxy_webhook_queue'),
    resources: new Map(
      metrics
        .filter(({ name }) => name === 'nodejs_active_resources')
        .map(({ labels, value }) => [/type="(.*?)"/.exec(labels)?.[1] ?? '', value])
    )
  }
}

interface Metric {
  name: string
  labels: string
  value: number
}

async function scrape({ port, headers }: Target): Promise<Metric[]> {
  const signal = AbortSignal.timeout(SAMPLE_MS)
  const response = await fetch(`http://127.0.0.1:${port}/metrics`, { headers, signal })
  if (!response.ok) throw new Error(`/metrics: status ${response.status}`)
  const lines = (await response.text()).matchAll(/^(\w+)(\S*) (\S+)$/gm)
  return Array.from(lines, ([, name, labels, value]) => ({
    name: name!,
    labels: labels!,
    value: Number(value)
  }))
}

function sum(metrics: Metric[], name: string, label = ''): number {
  const named = metrics.filter(each => each.name === name)
  if (named.length === 0) throw new Error(`/metrics has no ${name}`)
  return named
    .filter(({ labels }) => labels.includes(label))
    .reduce((total, { value }) => total + value, 0)
}

/** Waits until nothing is in flight and idle connections have had time to close. */
async function settle({ gateway }: Stage): Promise<void> {
  const startedAt = performance.now()
  while (performance.now() - startedAt < DRAIN_MS) {
    if (sum(await scrape(gateway.target), 'llmproxy_requests_in_flight') === 0) break
    await pause(500)
  }
  await pause(REST_MS)
}

interface Findings {
  tally: Tally
  before: Sample
  samples: Sample[]
  after: Sample
  /** Requests that reached the backend, as the gateway says, and usage events that arrived. */
  reached: number
  events: number
}

async function soak(stage: Stage): Promise<Findings> {
  const { target } = stage.gateway
  const tally = new Tally()
  say('warming up')
  await load(target, tally, () => pause(WARM_UP_MS))
  await settle(stage)
  const before = await look(stage)
  const samples: Sample[] = []
  await load(target, tally, async () => {
    const startedAt = performance.now()
    for (let at = SAMPLE_MS; at <= minutes * 60_000; at += SAMPLE_MS) {
      await pause(startedAt + at - performance.now())
      const sample = await look(stage)
      samples.push(sample)
      say(`${at / 1000} s: ${sample.privateMb.toFixed(1)} MB, ${sample.inFlight} in flight`)
    }
  })
  say('settling')
  await settle(stage)
  const after = await look(stage)
  const reached = sum(await scrape(target), 'llmproxy_requests_total', 'backend="bench"')
  const events = (await stage.sink.ask({})).events as number
  return { tally, before, samples, after, reached, events }
}

interface Check {
  isMet: boolean
  text: string
}

function check({ tally, before, samples, after, reached, events }: Findings): Check[] {
  const complaints = [...tally.complaints].map(([what, count]) => `${count} × ${what}`)
  const none = (what: string, count: number) => ({ isMet: count === 0, text: `${what}: ${count}` })
  const back = (what: string, now: number, then: number) => ({
    isMet: now <= then + TOLERANCE,
    text: `${what}: ${now}, after the warm-up ${then}`
  })
  const quarter = (number: number) => {
    const length = samples.length / 4
    const own = samples.slice(Math.floor(length * (number - 1)), Math.floor(length * number))
    return median(own.map(({ privateMb }) => privateMb))
  }
  const [second, last] = [quarter(2), quarter(4)]
  return [
    { isMet: complaints.length === 0, text: `complaints: ${complaints.join('; ') || 'none'}` },
    none('in flight at the end', after.inFlight),
    none('in flight at the backend at the end', after.backendInFlight),
    none('usage events not delivered at the end', after.webhookQueue),
    back('connections at the backend', after.backendConnections, before.backendConnections),
    back('file descriptors', after.descriptors, before.descriptors),
    { isMet: events === reached, text: `usage events: ${events} of ${reached}` },
    {
      isMet: last <= second * MAX_GROWTH,
      text: `private memory: ${last.toFixed(1)} MB in the last quarter, ${second.toFixed(1)} MB in the second`
    }
  ]
}

function toMarkdown({ tally, before, samples, after }: Findings, checks: Check[]): string {
  const types = [
    ...new Set([before, ...samples, after].flatMap(each => [...each.resources.keys()]))
  ]
  const row = (cells: (string | number)[]) => `| ${cells.join(' | ')} |\n`
  const cells = (sample: Sample) => [
    sample.privateMb.toFixed(1),
    sample.descriptors,
    sample.backendConnections,
    sample.inFlight,
    sample.backendInFlight,
    sample.webhookQueue,
    ...types.map(type => sample.resources.get(type) ?? 0)
  ]
  const names = ['private MB', 'descriptors', 'backend connections', 'in flight', 'at the backend']
  const head = ['minute', ...names, 'webhook queue', ...types]
  let table = row(head) + row(['---', ...head.slice(1).map(() => '---:')])
  table += row(['idle, before', ...cells(before)])
  for (const [at, sample] of samples.entries()) {
    if ((at + 1) % SAMPLES_PER_ROW === 0)
      table += row([(at + 1) / SAMPLES_PER_ROW, ...cells(sample)])
  }
  table += row(['idle, after', ...cells(after)])
  const deeds = DEEDS.map(({ name }) => `- ${name}: ${tally.deeds.get(name) ?? 0}\n`).join('')
  const verdict = checks
    .map(({ isMet, text }) => `- ${isMet ? 'ok' : 'FAILED'}: ${text}\n`)
    .join('')
  const date = new Date().toISOString().slice(0, 10)
  return `${minutes} minutes with ${CLIENTS} clients on ${date}, ${machine()}\n\n${table}\nDone:\n\n${deeds}\nVerdict:\n\n${verdict}`
}

function say(line: string): void {
  console.error(line)
}

const folder = mkdtempSync(join(tmpdir(), 'llmproxy-soak-'))
const [backend, sink] = await Promise.all([launch('backend.ts'), launch('sink.ts')])
const surroundings = { backendPort: backend.port, sinkPort: sink.port, folder }
const gateway = await start(ENTRANTS.find(({ name }) => name === 'llmproxy')!, surroundings)
try {
  const findings = await soak({ backend, sink, gateway })
  const checks = check(findings)
  const markdown = toMarkdown(findings, checks)
  console.log(markdown)
  if (options.save) {
    insert('../docs/performance.md', 'soak', markdown)
  }
  if (checks.some(({ isMet }) => !isMet)) {
    process.exitCode = 1
    say(`The gateway's log is in ${folder}`)
  } else rmSync(folder, { recursive: true })
} finally {
  await gateway.stop()
  for (const helper of [backend, sink]) helper.stop()
}
