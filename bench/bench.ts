import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import {
  ENTRANTS,
  type Entrant,
  llmproxyRelaxed,
  llmproxyWithWorkers,
  type Running,
  type Surroundings,
  start
} from './entrants.ts'
import { count, delivered, expectAll, type Helper, job, launch, machine } from './helpers.ts'
import type { Job, RequestsResult, Spread, StreamsResult } from './load.ts'
import { cpuTime, memory } from './process.ts'
import { type Figures, insert, median, toMarkdown, toSvg, toTargets } from './report.ts'

/**
 * Measures the gateway beside its peers: the same backend, the same load, in turns.
 *
 * --save puts the result into the documentation.
 *
 *   node bench/bench.ts [--rounds 5] [--only llmproxy,nginx] [--figures streams,memory] [--save]
 *   node bench/bench.ts --smoke
 */

const { values: options } = parseArgs({
  options: {
    rounds: { type: 'string', default: '5' },
    only: { type: 'string' },
    figures: {
      type: 'string',
      default: 'start,streams,requests,ttft,blocking,memory,workers,durability'
    },
    save: { type: 'boolean', default: false },
    smoke: { type: 'boolean', default: false }
  }
})

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url))
const SETTLE_MS = 60_000
/** Time to settle down before the idle memory is read; the same for all. */
const IDLE_MS = 10_000

const SIZES = [
  { label: '2 KB', promptBytes: 2 * 1024, requests: 30_000 },
  { label: '64 KB', promptBytes: 64 * 1024, requests: 1_500 },
  { label: '1 MB', promptBytes: 1024 * 1024, requests: 150 }
]

/** An entrant that takes part, and what was measured of it. */
interface Participant {
  entrant: Entrant
  description: string
  running: Running | undefined
  figures: Figures
}

interface Stage {
  surroundings: Surroundings
  backend: Helper
  sink: Helper
  load: Helper
  participants: Participant[]
}

const smoke = options.smoke
const rounds = smoke ? 2 : Number(options.rounds)
const wanted = smoke ? ['streams', 'requests'] : options.figures.split(',')
const names = smoke ? ['llmproxy', 'reply-from'] : options.only?.split(',')

const folder = mkdtempSync(join(tmpdir(), 'llmproxy-bench-'))
const stage = await setUp()
try {
  await measure(stage)
} finally {
  for (const { running } of stage.participants) await running?.stop()
  for (const helper of [stage.backend, stage.sink, stage.load]) helper.stop()
}
rmSync(folder, { recursive: true, force: true })
report(stage)

async function setUp(): Promise<Stage> {
  const [backend, sink, load] = await Promise.all(
    ['backend.ts', 'sink.ts', 'load.ts'].map(file => launch(file))
  )
  const surroundings = { backendPort: backend!.port, sinkPort: sink!.port, folder }
  const participants: Participant[] = []
  for (const entrant of ENTRANTS) {
    if (names !== undefined && !names.includes(entrant.name)) continue
    const description = entrant.describe()
    if (description === undefined) say(`${entrant.name} is left out: it is not installed`)
    else participants.push({ entrant, description, running: undefined, figures: {} })
  }
  return { surroundings, backend: backend!, sink: sink!, load: load!, participants }
}

async function measure(stage: Stage): Promise<void> {
  if (wanted.includes('start')) await inTurns(stage, 'start', startUp)
  if (wanted.includes('memory')) await inTurns(stage, 'memory', holdStreams, 1)
  if (wanted.includes('workers')) await manyStreams(stage)
  if (wanted.includes('durability')) await durability(stage)
  const perRound = { streams, requests, ttft, blocking }
  for (const participant of stage.participants) await begin(stage, participant)
  await inTurns(stage, 'warm up', warmUp, 1)
  for (const [name, figure] of Object.entries(perRound)) {
    if (wanted.includes(name)) await inTurns(stage, name, figure)
  }
}

/** A B C A B C ...: what disturbs the machine disturbs all of them. */
async function inTurns(
  stage: Stage,
  name: string,
  figure: (stage: Stage, participant: Participant) => Promise<void>,
  times = rounds
): Promise<void> {
  for (let round = 1; round <= times; round++) {
    for (const participant of stage.participants) {
      say(`${name} ${round}/${times}: ${participant.entrant.name}`)
      await figure(stage, participant)
    }
  }
}

async function begin({ surroundings }: Stage, participant: Participant): Promise<Running> {
  participant.running = await start(participant.entrant, surroundings)
  return participant.running
}

/** Requests and streams in turns, for V8 goes back on what it has compiled for one kind when the other comes. */
async function warmUp({ load }: Stage, { running }: Participant): Promise<void> {
  const { target } = running!
  for (let turn = 1; turn <= (smoke ? 2 : 3); turn++) {
    await job(load, {
      kind: 'requests',
      target,
      connections: 32,
      requests: 10_000,
      promptBytes: 2048
    })
    await job(load, { kind: 'streams', target, streams: 200, chunks: 100, interval: 20 })
  }
}

async function startUp({ surroundings }: Stage, { entrant, figures }: Participant): Promise<void> {
  const running = await start(entrant, surroundings)
  add(figures, 'start ms', running.startMs)
  await running.stop()
}

/**
 * The same load twice, and the second counts: after the seconds in which it was the others' turn V8 compiles
 * anew what deals with sockets.
 */
async function streams(stage: Stage, { entrant, running, figures }: Participant): Promise<void> {
  const size = smoke ? { streams: 100, chunks: 50 } : { streams: 200, chunks: 100 }
  const load = { kind: 'streams', target: running!.target, ...size, interval: 20 } as const
  const first = await watched<StreamsResult>(stage, entrant, running!, size.streams, load)
  const { result, cpu } = await watched<StreamsResult>(stage, entrant, running!, size.streams, load)
  add(figures, 'cpu µs/chunk after idleness', first.cpu.entrant / first.result.chunks)
  expectAll(entrant.name, result.failed, result.chunks, size.streams * size.chunks)
  add(figures, 'cpu µs/chunk', cpu.entrant / result.chunks)
  add(figures, 'chunk delay p50 ms', result.delay.p50 / 1000)
  add(figures, 'chunk delay p99 ms', result.delay.p99 / 1000)
  add(figures, 'ttft of 200 streams p50 ms', result.ttft.p50 / 1000)
  add(figures, 'ttft of 200 streams p99 ms', result.ttft.p99 / 1000)
  add(figures, 'backend cpu % (streams)', cpu.backend / result.ms / 10)
  add(figures, 'load cpu % (streams)', cpu.load / result.ms / 10)
}

async function requests(stage: Stage, { entrant, running, figures }: Participant): Promise<void> {
  for (const { label, promptBytes, requests } of smoke ? SIZES.slice(0, 1) : SIZES) {
    const { result, cpu } = await watched<RequestsResult>(stage, entrant, running!, requests, {
      kind: 'requests',
      target: running!.target,
      connections: 32,
      requests,
      promptBytes
    })
    expectAll(entrant.name, result.failed, result.requests, requests)
    add(figures, `cpu µs/request ${label}`, cpu.entrant / result.requests)
    add(figures, `requests/s ${label}`, (result.requests / result.ms) * 1000)
    if (label !== '2 KB') continue
    add(figures, 'backend cpu % (requests)', cpu.backend / result.ms / 10)
    add(figures, 'load cpu % (requests)', cpu.load / result.ms / 10)
  }
}

async function ttft(stage: Stage, { entrant, running, figures }: Participant): Promise<void> {
  const pairs = 400
  const direct = { port: stage.surroundings.backendPort, headers: {} }
  const before = await count(stage.sink)
  const targets: [typeof direct, typeof direct] = [direct, running!.target]
  const [base, own] = await job<[Spread, Spread]>(stage.load, { kind: 'ttft', targets, pairs })
  if (entrant.reports) await delivered(stage.sink, before + pairs + 20)
  add(figures, 'added ttft p50 ms', (own.p50 - base.p50) / 1000)
  add(figures, 'added ttft p99 ms', (own.p99 - base.p99) / 1000)
}

async function blocking({ load }: Stage, { running, figures }: Participant): Promise<void> {
  const { target } = running!
  const mb = 1024 * 1024
  const prompts = { requests: 40, bytes: mb, isHostile: false }
  const late = await job<Spread>(load, { kind: 'blocking', target, ...prompts })
  add(figures, 'latest chunk beside a 1 MB prompt p50 ms', late.p50 / 1000)
  add(figures, 'latest chunk beside a 1 MB prompt max ms', late.max / 1000)
  const hostile = { requests: 20, bytes: 16 * mb, isHostile: true }
  const later = await job<Spread>(load, { kind: 'blocking', target, ...hostile })
  add(figures, 'latest chunk beside a hostile 16 MB body p50 ms', later.p50 / 1000)
  add(figures, 'latest chunk beside a hostile 16 MB body max ms', later.max / 1000)
}

async function holdStreams(stage: Stage, participant: Participant): Promise<void> {
  const { entrant, figures } = participant
  const running = await begin(stage, participant)
  await pause(IDLE_MS)
  const idle = memory(running.pid)
  for (const held of [1_000, 5_000]) {
    await hold(stage, entrant, running, held)
    const { private: kb, rss } = memory(running.pid)
    add(figures, `${held} streams private MB`, kb / 1024)
    add(figures, `${held} streams rss MB`, rss / 1024)
    if (held === 5_000) add(figures, 'KB per held stream', (kb - idle.private) / held)
    await job(stage.load, { kind: 'release' })
    await pause(held === 5_000 ? SETTLE_MS : 5_000)
  }
  const after = memory(running.pid)
  add(figures, 'idle private MB', idle.private / 1024)
  add(figures, 'idle rss MB', idle.rss / 1024)
  add(figures, '60 s later private MB', after.private / 1024)
  if (idle.private > 0) add(figures, '60 s later / idle', after.private / idle.private)
  await running.stop()
}

/** 10,000 streams on two worker processes. */
async function manyStreams(stage: Stage): Promise<void> {
  const participant = stage.participants.find(each => each.entrant.name === 'llmproxy')
  if (participant === undefined) return
  say('10,000 streams on 2 workers: llmproxy')
  const running = await start(llmproxyWithWorkers, stage.surroundings)
  await hold(stage, llmproxyWithWorkers, running, 10_000)
  add(
    participant.figures,
    '10,000 streams on 2 workers private MB',
    memory(running.pid).private / 1024
  )
  await job(stage.load, { kind: 'release' })
  await running.stop()
}

/** What an answer waits because its usage record must be on the disk first: beside one that does not wait. */
async function durability(stage: Stage): Promise<void> {
  const participant = stage.participants.find(each => each.entrant.name === 'llmproxy')
  if (participant === undefined) return
  const runs = await Promise.all(
    [participant.entrant, llmproxyRelaxed].map((entrant, index) => {
      const folder = join(stage.surroundings.folder, `durability-${index}`)
      mkdirSync(folder)
      return start(entrant, { ...stage.surroundings, folder })
    })
  )
  const [strict, relaxed] = runs.map(({ target }) => target) as [
    Running['target'],
    Running['target']
  ]
  for (const running of runs) await warmUp(stage, { ...participant, running })
  for (let round = 1; round <= rounds; round++) {
    say(`durability ${round}/${rounds}: llmproxy`)
    const targets: [typeof relaxed, typeof strict] = [relaxed, strict]
    const first = await job<Spread[]>(stage.load, { kind: 'ttft', targets, pairs: 400 })
    const load = { kind: 'requests', connections: 1, requests: 500, promptBytes: 2048 } as const
    const alone: Spread[] = []
    const paced: Spread[] = []
    for (const target of targets) {
      const one = await job<RequestsResult>(stage.load, { ...load, target })
      const many = { ...load, target, connections: 64, requests: 10_000, perSecond: 2_000 }
      const rush = await job<RequestsResult>(stage.load, many)
      alone.push(one.latency)
      paced.push(rush.latency)
      if (target === strict)
        add(participant.figures, 'strict: exchanges/s', (rush.requests / rush.ms) * 1000)
    }
    for (const [name, [base, own]] of Object.entries({
      'added ttft': first,
      'added to the end of an answer': alone,
      'added to the end of an answer at 2,000/s': paced
    })) {
      add(participant.figures, `strict: ${name} p50 ms`, (own!.p50 - base!.p50) / 1000)
      add(participant.figures, `strict: ${name} p99 ms`, (own!.p99 - base!.p99) / 1000)
    }
  }
  for (const running of runs) await running.stop()
}

async function hold(stage: Stage, entrant: Entrant, { target }: Running, streams: number) {
  const result = await job<{ open: number; failed: number }>(stage.load, {
    kind: 'hold',
    target,
    streams,
    perSecond: 400
  })
  expectAll(entrant.name, result.failed, result.open, streams)
}

/** Runs a job and says what CPU time it took, with the delivery of every usage event. */
async function watched<Result>(
  { backend, sink, load }: Stage,
  entrant: Entrant,
  { pid }: Running,
  exchanges: number,
  work: Job
): Promise<{ result: Result; cpu: { entrant: number; backend: number; load: number } }> {
  const events = await count(sink)
  const read = () => (pid === 0 ? 0 : cpuTime(pid))
  const before = { entrant: read(), backend: cpuTime(backend.pid), load: cpuTime(load.pid) }
  const result = await job<Result>(load, work)
  const helpers = { backend: cpuTime(backend.pid), load: cpuTime(load.pid) }
  if (entrant.reports) await delivered(sink, events + exchanges)
  return {
    result,
    cpu: {
      entrant: read() - before.entrant,
      backend: helpers.backend - before.backend,
      load: helpers.load - before.load
    }
  }
}

function add(figures: Figures, name: string, value: number): void {
  figures[name] = [...(figures[name] ?? []), value]
}

function report({ participants }: Stage): void {
  const results = {
    date: new Date().toISOString().slice(0, 10),
    machine: machine(),
    rounds,
    command: 'npm run bench',
    entrants: participants.map(({ entrant, description, figures }) => ({
      name: entrant.name,
      description,
      figures
    }))
  }
  const markdown = toMarkdown(results)
  console.log(markdown)
  if (smoke) return check(participants)
  if (!options.save) return
  writeFileSync(here('../docs/bench.json'), `${JSON.stringify(results, null, 2)}\n`)
  writeFileSync(here('../docs/bench.svg'), toSvg(results))
  insert('../docs/performance.md', 'bench', markdown)
  insert('../docs/performance.md', 'targets', toTargets(results))
  insert('../README.md', 'bench', toMarkdown(results, 'main'))
}

/**
 * Gross regressions, as ratios to a bare reply-from app in the same run: about twice what they are,
 * since a short run on a busy machine scatters.
 */
function check(participants: Participant[]): void {
  const of = (name: string) => participants.find(each => each.entrant.name === name)!.figures
  let isFine = true
  for (const [figure, most] of [
    ['cpu µs/chunk', 3.5],
    ['cpu µs/request 2 KB', 6]
  ] as const) {
    const ratio = median(of('llmproxy')[figure]!) / median(of('reply-from')[figure]!)
    const verdict = ratio <= most ? 'ok' : 'TOO SLOW'
    if (ratio > most) isFine = false
    console.log(
      `${figure}: ${ratio.toFixed(2)} times bare reply-from (at most ${most}): ${verdict}`
    )
  }
  if (!isFine) process.exitCode = 1
}

function say(line: string): void {
  console.error(line)
}

function pause(ms: number): Promise<void> {
  return new Promise(resolve => setTimeout(resolve, ms))
}
