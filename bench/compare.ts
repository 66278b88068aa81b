import { mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { ENTRANTS, type Running, start } from './entrants.ts'
import { count, delivered, expectAll, job, launch } from './helpers.ts'
import type { RequestsResult, StreamsResult } from './load.ts'
import { cpuTime } from './process.ts'
import { median } from './report.ts'

/**
 * Compares the CPU time of this checkout with that of another one, in many short turns. Both gateways run all the
 * time, so that a change of the machine's speed affects both. The order of their start makes a difference of a few
 * percent, so both orders are measured.
 *
 *   node bench/compare.ts ../before [--pairs 24]
 *
 * The other checkout must be built: `npm ci && npm run build`.
 */

const { values, positionals } = parseArgs({
  options: { pairs: { type: 'string', default: '24' } },
  allowPositionals: true
})
if (positionals.length !== 1) throw new Error('usage: node bench/compare.ts DIRECTORY [--pairs N]')
const before = resolve(positionals[0]!)
const pairs = Number(values.pairs)
if (!Number.isInteger(pairs) || pairs < 1) throw new Error('--pairs must be a whole number above 0')

type Work =
  | { kind: 'requests'; connections: number; requests: number; promptBytes: number }
  | { kind: 'streams'; streams: number; chunks: number; interval: number }

const KINDS: Record<string, Work> = {
  'request 2 KB': whole(1_500, 2 * 1024),
  'request 64 KB': whole(300, 64 * 1024),
  'request 1 MB': whole(30, 1024 * 1024),
  chunk: { kind: 'streams', streams: 100, chunks: 100, interval: 10 }
}

const folder = mkdtempSync(join(tmpdir(), 'llmproxy-compare-'))
const [backend, sink, load] = await Promise.all(
  ['backend.ts', 'sink.ts', 'load.ts'].map(file => launch(file))
)
try {
  const first = await compare(['before', 'now'])
  const second = await compare(['now', 'before'])
  console.log(
    '| CPU µs | before | now | now / before, by order of start |\n| --- | ---: | ---: | ---: |'
  )
  for (const [at, { kind, old, now, ratio }] of first.entries()) {
    const other = second[at]!
    const ratios = `${ratio.toFixed(2)}, ${other.ratio.toFixed(2)}`
    const both = (a: number, b: number) => Math.round((a + b) / 2)
    console.log(`| ${kind} | ${both(old, other.old)} | ${both(now, other.now)} | ${ratios} |`)
  }
} finally {
  for (const helper of [backend!, sink!, load!]) helper.stop()
  rmSync(folder, { recursive: true, force: true })
}

/** Starts both in this order and returns the medians of each kind of work. */
async function compare(order: ('before' | 'now')[]) {
  const running = new Map<string, Running>()
  try {
    for (const which of order) running.set(which, await begin(which, order.join('-')))
    for (const each of running.values()) await warmUp(each)
    const old = running.get('before')!
    const now = running.get('now')!
    const results = []
    for (const [kind, work] of Object.entries(KINDS)) {
      results.push({ kind, ...(await inTurns(old, now, work)) })
    }
    return results
  } finally {
    for (const each of running.values()) await each.stop()
  }
}

/** Medians of the CPU times (µs), and of their ratios. */
async function inTurns(old: Running, now: Running, work: Work) {
  const times: { old: number; now: number }[] = []
  for (let pair = 0; pair < pairs; pair++) {
    const isEven = pair % 2 === 0
    const one = await cpuOf(isEven ? old : now, work)
    const other = await cpuOf(isEven ? now : old, work)
    times.push(isEven ? { old: one, now: other } : { old: other, now: one })
  }
  return {
    old: median(times.map(each => each.old)),
    now: median(times.map(each => each.now)),
    ratio: median(times.map(each => each.now / each.old))
  }
}

async function begin(which: 'before' | 'now', order: string): Promise<Running> {
  const url = pathToFileURL(join(before, 'bench/entrants.ts')).href
  const entrants = which === 'now' ? { ENTRANTS, start } : await import(url)
  const own = join(folder, `${order}-${which}`)
  mkdirSync(own)
  const llmproxy = entrants.ENTRANTS.find(({ name }: { name: string }) => name === 'llmproxy')
  const surroundings = { backendPort: backend!.port, sinkPort: sink!.port, folder: own }
  return entrants.start(llmproxy, surroundings)
}

async function warmUp(running: Running): Promise<void> {
  await cpuOf(running, whole(24_000, 2 * 1024))
  for (let turn = 0; turn < 3; turn++) {
    for (const work of Object.values(KINDS)) await cpuOf(running, work)
  }
}

/** CPU time (µs) for each request or chunk, with the delivery of every usage event. */
async function cpuOf({ pid, target }: Running, work: Work): Promise<number> {
  const events = await count(sink!)
  const before = cpuTime(pid)
  const done = await doAll({ ...work, target })
  await delivered(sink!, events + (work.kind === 'streams' ? work.streams : work.requests))
  return (cpuTime(pid) - before) / done
}

/** Returns the number of requests or chunks. */
async function doAll(work: Work & Pick<Running, 'target'>): Promise<number> {
  if (work.kind === 'streams') {
    const { chunks, failed } = await job<StreamsResult>(load!, work)
    expectAll('llmproxy', failed, chunks, work.streams * work.chunks)
    return chunks
  }
  const { requests, failed } = await job<RequestsResult>(load!, work)
  expectAll('llmproxy', failed, requests, work.requests)
  return requests
}

function whole(requests: number, promptBytes: number): Work {
  return { kind: 'requests', connections: 32, requests, promptBytes }
}
