import assert from 'node:assert/strict'
import { once } from 'node:events'
import { Agent, request, type ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { type TestContext, test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import * as zlib from 'node:zlib'
import { Renamed } from '../src/pool/renamed.ts'
import { EventReader, type StreamFraming } from '../src/wire/event-reader.ts'
import { type Answerer, fakeBackend, writable } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'
import { type Random, randomizer } from './random.ts'

/**
 * Random streams, whole and damaged, in random pieces, through each reader of responses: 10 minutes each in `npm run
 * test:long`. `FUZZ_SEED=... FUZZ_SECONDS=0` begins with the input that failed.
 */

const LONG = process.env.LONG === '1'
const SECONDS = Number(process.env.FUZZ_SECONDS ?? (LONG ? 600 : 0.1))
const TIMEOUT = { timeout: (SECONDS + 60) * 1000 }
/** CPU time (ms) that one turn of the event loop may take. */
const MAX_TURN = 20
/** Growth (bytes) of the heap after collections that a long run may show. */
const MAX_GROWTH = 16 * 1024 * 1024
const MB = 1024 * 1024
/** Maximum size (bytes) of what a socket delivers in one turn. */
const MAX_CHUNK = 64 * 1024
/** Pieces of a response that a backend sends: each takes a turn of its event loop. */
const MAX_PIECES = 100

setFlagsFromString('--expose-gc')
const gc = runInNewContext('gc') as () => void

/** Texts that readers of streams could take for something else. */
const TEXTS = [
  ...['', 'a', ' word', 'ü', '漢字', '🙂', '"', '\\', '\\"', '\n', '\r\n\r\n', '\u0001', '\u2028'],
  ...['"model":"m"', '{"model":"old"}', 'data: x', '[DONE]', '}', ']', ',', '"finish_reason"'],
  'text '.repeat(300)
]

/** Compares two texts; a difference is shown, not the texts. */
function same(actual: string, expected: string, what: string): void {
  if (actual === expected) return
  let at = 0
  while (at < actual.length && actual[at] === expected[at]) at++
  const near = (text: string) => JSON.stringify(text.slice(Math.max(0, at - 60), at + 40))
  assert.fail(`${what}, character ${at}: ${near(actual)}, expected ${near(expected)}`)
}

interface Result {
  bytes: number
  /** CPU time (ms) of the longest turn. */
  ms?: number
}

/** Runs inputs until the time is over, and at least `least` of them; reports the seed of one that fails. */
async function fuzz(
  t: TestContext,
  least: number,
  run: (random: Random, count: number, seed: number) => Result | Promise<Result>,
  lanes = 1
): Promise<{ inputs: number; ms: number }> {
  const first = Number(process.env.FUZZ_SEED ?? Date.now() % 1e9)
  const until = performance.now() + SECONDS * 1000
  let inputs = 0
  let bytes = 0
  let ms = 0
  const lane = async () => {
    while (performance.now() < until || inputs < least) {
      const count = inputs++
      try {
        const result = await run(randomizer(first + count), count, first + count)
        bytes += result.bytes
        ms = Math.max(ms, result.ms ?? 0)
      } catch (error) {
        t.diagnostic(`FUZZ_SEED=${first + count}`)
        throw error
      }
    }
  }
  await Promise.all(Array.from({ length: lanes }, lane))
  t.diagnostic(`${inputs} inputs, ${(bytes / MB).toFixed(1)} MB`)
  return { inputs, ms }
}

/** The same for code that runs in this process: its heap must not grow, and no turn may be long. */
async function fuzzHere(t: TestContext, least: number, run: (random: Random) => Result) {
  const heap = () => {
    gc()
    return process.memoryUsage().heapUsed
  }
  // V8 compiles meanwhile.
  for (let warm = 0; warm < least; warm++) run(randomizer(warm))
  const before = heap()
  const { ms } = await fuzz(t, least, (random, _count, seed) => {
    const result = run(random)
    // A collection of what the test itself has left behind is not repeated.
    return result.ms! < MAX_TURN ? result : run(randomizer(seed))
  })
  const grown = heap() - before
  t.diagnostic(`longest turn ${ms.toFixed(1)} ms, heap ${(grown / MB).toFixed(1)} MB larger`)
  if (!LONG) return
  assert.ok(ms < MAX_TURN, `a turn took ${ms} ms`)
  assert.ok(grown < MAX_GROWTH, `${grown} bytes more on the heap`)
}

/** CPU time (ms) that a call takes: wall time would count other processes. */
function cpuOf(call: () => void): number {
  const before = process.threadCpuUsage()
  call()
  const { user, system } = process.threadCpuUsage(before)
  return (user + system) / 1000
}

const upTo = (random: Random, most: number) => Math.floor(random() * (most + 1))
const pick = <T>(random: Random, list: ArrayLike<T>) => list[upTo(random, list.length - 1)]!
const times = <T>(count: number, make: (at: number) => T) =>
  Array.from({ length: count }, (_, at) => make(at))
const textOf = (random: Random) => times(upTo(random, 3), () => pick(random, TEXTS)).join('')

/** Cuts bytes into pieces: each byte, few large ones, or any; some are empty. */
function piecesOf(random: Random, bytes: Buffer, count = 5_000): Buffer[] {
  const most = pick(random, [1, 3, 20, 500, MAX_CHUNK])
  const pieces: Buffer[] = []
  // Not many pieces of a large input, which would take as long as all others together.
  const least = Math.floor(bytes.length / count)
  for (let at = 0; at < bytes.length; ) {
    const size = Math.min(MAX_CHUNK, least + upTo(random, most))
    pieces.push(bytes.subarray(at, at + size))
    at += size
  }
  return pieces
}

/** Changes, removes or adds up to three bytes. */
function damaged(random: Random, bytes: Buffer): Buffer {
  let all = bytes
  for (let left = 1 + upTo(random, 2); left > 0; left--) {
    const at = upTo(random, all.length)
    const added = Buffer.from(times(upTo(random, 2), () => upTo(random, 255)))
    all = Buffer.concat([all.subarray(0, at), added, all.subarray(at + upTo(random, 2))])
  }
  return all
}

interface Event {
  data: string | undefined
  isError: boolean
  /** Bytes of the stream up to the end of the event; undefined: only the end of the stream ended it, or it is a line. */
  end: number | undefined
}

const BOM = '\xef\xbb\xbf'
/** A byte order mark, or its beginning alone, which is no UTF-8. */
const MARK = /^(\xef(\xbb\xbf?)?)?/
const LINE_ENDS = ['\n', '\r\n', '\r']

/**
 * The events of a stream (bytes as Latin-1) as https://html.spec.whatwg.org/multipage/server-sent-events.html has them,
 * with the two differences that {@link EventReader} documents.
 */
function specified(stream: string, framing: StreamFraming): Event[] {
  const begin = MARK.exec(stream)![0].length
  const events: Event[] = []
  let data: string[] = []
  let name = ''
  const dispatch = (end: number | undefined) => {
    events.push({
      data: data.length > 0 ? data.join('\n') : undefined,
      isError: name === 'error',
      end
    })
    data = []
    name = ''
  }
  for (const { 0: all, 1: line = '', 2: lineEnd, index } of stream
    .slice(begin)
    .matchAll(/([^\r\n]*)(\r\n|\r|\n|$)/g)) {
    if (all === '') continue
    const end = lineEnd === '' ? undefined : begin + index + all.length
    if (framing === 'ndjson') {
      if (line !== '') events.push({ data: line, isError: false, end: undefined })
    } else if (line === '') dispatch(end)
    else {
      const [field, value = ''] = line.split(/:(.*)/s)
      const content = value.replace(/^ /, '')
      if (field === 'data') data.push(content)
      else if (field === 'error') data.push(`{"error":${content}}`)
      else if (field === 'event') name = content
    }
  }
  if (data.length > 0) dispatch(undefined)
  return events
}

/** What the reader makes of it, and the CPU time (ms) of its longest turn. */
function read(pieces: readonly Buffer[], framing: StreamFraming) {
  const reader = new EventReader(framing)
  const events: Event[] = []
  let data = ''
  let before = 0
  let ms = 0
  const take = (isStreamEnd: boolean) => {
    for (let next = reader.next(); next !== undefined; next = reader.next()) {
      if (next === 'data') data += reader.data.toString('latin1')
      else {
        const { hasData, isError, to } = reader
        const end = isStreamEnd || framing === 'ndjson' ? undefined : before + to
        events.push({ data: hasData ? data : undefined, isError, end })
        data = ''
      }
    }
  }
  for (const piece of pieces) {
    const cpu = cpuOf(() => {
      if (reader.feed(piece) > 0 && framing === 'sse') events.at(-1)!.end = before + 1
      take(false)
    })
    ms = Math.max(ms, cpu)
    before += piece.length
    const isMid = events.at(-1)?.end !== before && data !== ''
    if (isMid) assert.equal(reader.isBetweenEvents, false)
  }
  reader.feedEnd()
  take(true)
  // The end of the stream ends events that nothing is in.
  return { events: events.filter(({ data, end }) => data !== undefined || end !== undefined), ms }
}

const LINES = [
  ...['data: {"n":1}', 'data:', 'data', 'data:  x', ' data: x', 'datas: x', 'dat: x', 'data: a:b'],
  ...['event: error', 'event:error', 'event: errors', 'event: x', 'event', 'event:  error'],
  ...['error: {"code":500}', 'error:', 'error', 'errors: 1', ': comment', ':', 'id: 1', 'retry: 5'],
  ...['{"a":1}', ' ', 'x'.repeat(10), '\xef\xbb\xbf', '\xef\xbb', '\xef', '\0', 'data: \xc3']
]

function streamOf(random: Random): Buffer {
  const ends = random() < 0.5 ? [pick(random, LINE_ENDS)] : LINE_ENDS
  const most = pick(random, [5, 50, 500])
  const line = () => {
    if (random() < 0.4) return pick(random, LINES)
    if (random() < 0.2) return ''
    return `data: {"text":${JSON.stringify(textOf(random))}}`
  }
  const parts = times(
    upTo(random, most),
    () => line() + (random() < 0.97 ? pick(random, ends) : '')
  )
  if (random() < 0.1) parts.push(`data: ${'x'.repeat(upTo(random, MB))}`)
  const mark = random() < 0.2 ? pick(random, [BOM, '\xef\xbb', '\xef', BOM + BOM]) : ''
  const bytes = Buffer.concat([
    Buffer.from(mark, 'latin1'),
    ...parts.map(each => Buffer.from(each))
  ])
  return random() < 0.3 ? damaged(random, bytes) : bytes
}

test('the reader finds the events that the specification has, in any pieces', TIMEOUT, async t => {
  await fuzzHere(t, LONG ? 200 : 30, random => {
    const bytes = streamOf(random)
    const framing = random() < 0.8 ? 'sse' : 'ndjson'
    const expected = specified(bytes.toString('latin1'), framing)
    same(JSON.stringify(read([bytes], framing).events), JSON.stringify(expected), 'events')
    const { events, ms } = read(piecesOf(random, bytes), framing)
    same(JSON.stringify(events), JSON.stringify(expected), 'events of pieces')
    return { bytes: bytes.length, ms }
  })
})

/** Stands where the name of a model is that must be replaced. */
const MODEL = '\ue000'
const HEADS = ['message', 'response']
const KEYS = [
  ...['id', 'object', 'model', 'models', 'mode', '"model"', 'mod\\el', 'choices', 'delta', 'usage'],
  ...['', 'ü', ...HEADS]
]

/** A JSON text with {@link MODEL} in place of each name. */
function jsonOf(random: Random, space: string[], depth = 0, isNear = true): string {
  const gap = () => (random() < 0.2 ? pick(random, space) : '')
  const value = (key: string, isRoot: boolean): string => {
    const kind = random()
    // A string here would be a name, too.
    if (isNear && key === 'model')
      return kind < 0.7 ? MODEL : pick(random, ['null', '0', '[]', '{}'])
    if (depth < 5 && kind < 0.4) {
      return jsonOf(random, space, depth + 1, isRoot && HEADS.includes(key))
    }
    if (depth < 5 && kind < 0.5) {
      const elements = times(upTo(random, 3), () => gap() + value('', false) + gap())
      return `[${elements.join(',')}]`
    }
    if (kind < 0.6) return pick(random, ['null', 'true', '0', '-1.5e+10', '[]', '{}', '"model"'])
    return JSON.stringify(textOf(random))
  }
  const keys = new Set(times(upTo(random, 5), () => pick(random, KEYS)))
  const members = Array.from(keys, key => {
    return `${gap()}${JSON.stringify(key)}${gap()}:${gap()}${value(key, depth === 0)}${gap()}`
  })
  return `{${members.join(',')}}`
}

/** A response in one of the framings, with {@link MODEL} in place of each name. */
function responseOf(random: Random, framing: 'sse' | 'ndjson' | 'json'): string {
  if (framing === 'json') return jsonOf(random, [' ', '\n', '\t', '\r\n'])
  const lineEnd = pick(random, LINE_ENDS)
  if (framing === 'ndjson') {
    return times(upTo(random, 20), () => jsonOf(random, [' ', '\t']) + lineEnd).join('')
  }
  const event = () => {
    const kind = random()
    if (kind < 0.1) return `: {"model":"old"}${lineEnd}`
    if (kind < 0.2) return `data: [DONE]${lineEnd}${lineEnd}`
    const name = kind < 0.4 ? `event: {"model":"old"}${lineEnd}` : ''
    const space = [' ', '\t', `${lineEnd}data: `, `${lineEnd}data:`]
    return `${name}data: ${jsonOf(random, space)}${lineEnd}${lineEnd}`
  }
  const last = random() < 0.1 ? `data: ${jsonOf(random, [' '])}` : ''
  return times(upTo(random, 20), event).join('') + last
}

/** A JSON text, parsed, whose model has another name. */
function renamedJson(text: string, name: string): unknown {
  const json = JSON.parse(text)
  for (const near of [json, ...HEADS.map(head => json[head])]) {
    if (typeof near !== 'object' || near === null || Array.isArray(near)) continue
    if (typeof near.model === 'string') near.model = name
  }
  return json
}

function rename(pieces: Buffer[], framing: 'sse' | 'ndjson' | 'json', name: string) {
  const renamed = new Renamed(undefined, framing, name)
  const parts: Buffer[] = []
  let ms = 0
  for (const piece of pieces) {
    ms = Math.max(
      ms,
      cpuOf(() => parts.push(renamed.pass(piece) ?? Buffer.alloc(0)))
    )
  }
  parts.push(renamed.end() ?? Buffer.alloc(0))
  return { bytes: Buffer.concat(parts), ms }
}

test(
  'a renamed response differs by the name of its model alone, in any pieces',
  TIMEOUT,
  async t => {
    await fuzzHere(t, LONG ? 200 : 30, random => {
      const framing = pick(random, ['sse', 'ndjson', 'json'] as const)
      const name = textOf(random)
      const old = JSON.stringify(textOf(random))
      const response = responseOf(random, framing)
      // A whole response has one name.
      const replaced =
        framing === 'json'
          ? response.replace(MODEL, () => JSON.stringify(name))
          : response.replaceAll(MODEL, () => JSON.stringify(name))
      const expected = replaced.replaceAll(MODEL, () => old)
      const given = response.replaceAll(MODEL, () => old)
      const isWhole = random() < 0.7
      const bytes = isWhole ? Buffer.from(given) : damaged(random, Buffer.from(given))
      const once = rename([bytes], framing, name).bytes.toString()
      const { bytes: parts, ms } = rename(piecesOf(random, bytes), framing, name)
      same(parts.toString(), once, `${framing} in pieces`)
      if (isWhole) {
        same(once, expected, framing)
        const texts = (stream: string) =>
          framing === 'json'
            ? [stream]
            : specified(stream, framing).flatMap(({ data = '' }) =>
                data.startsWith('{') ? data : []
              )
        if (framing !== 'json') {
          assert.deepEqual(
            texts(once).map(text => JSON.parse(text)),
            texts(given).map(text => renamedJson(text, name))
          )
        }
      }
      return { bytes: bytes.length, ms }
    })
  }
)

/** A gateway as a process of its own, whose longest turns and heap are watched. */
async function startWatched(t: TestContext, config: object) {
  const dataDir = folder(t)
  const file = writeConfig(`${dataDir}/config.json`, {
    server: { listen: '127.0.0.1:0', heartbeat: 0 },
    ...config
  })
  const watch = new URL('./loop-watch.mjs', import.meta.url).href
  const gateway = await start(t, [CLI, '--config', file], {
    LLMPROXY_DATA_DIR: dataDir,
    NODE_OPTIONS: `--max-semi-space-size=8 --import ${watch}`
  })
  const agent = new Agent({ keepAlive: true })
  t.after(() => agent.destroy())
  return { gateway, agent }
}
type Watched = Awaited<ReturnType<typeof startWatched>>

/** Sends inputs to a gateway, four at a time: its heap must not grow, and no turn may be long. */
async function fuzzThere(
  t: TestContext,
  least: number,
  { gateway }: Watched,
  run: (random: Random, count: number) => Promise<number>
) {
  const { child, lines } = gateway
  /** Begins the measurement anew. Returns the size (bytes) of the heap. */
  const heap = async () => {
    lines.length = 0
    child.kill('SIGWINCH')
    return Number((await gateway.logged('heap')).bytes)
  }
  const turn = () => {
    const ms = Math.max(
      0,
      ...lines.map(line => (line.msg === 'longest turn' ? Number(line.ms) : 0))
    )
    lines.length = 0
    return ms
  }
  // V8 compiles meanwhile.
  for (let warm = 0; warm < least; warm++) await run(randomizer(warm), -1 - warm)
  const before = await heap()
  const each = async (random: Random, count: number, seed: number) => {
    const bytes = await run(random, count)
    const ms = turn()
    if (ms < MAX_TURN) return { bytes, ms }
    // A collection of garbage is not repeated.
    t.diagnostic(`a turn took ${ms} ms`)
    await heap()
    await run(randomizer(seed), count)
    return { bytes, ms: turn() }
  }
  const { ms } = await fuzz(t, least, each, 4)
  const grown = (await heap()) - before
  t.diagnostic(`longest turn ${ms.toFixed(1)} ms, heap ${(grown / MB).toFixed(1)} MB larger`)
  assert.equal(child.exitCode, null)
  if (!LONG) return
  assert.ok(ms < MAX_TURN, `a turn took ${ms} ms`)
  assert.ok(grown < MAX_GROWTH, `${grown} bytes more on the heap`)
}

/** Sends a body and reads all of the response, as far as it comes. */
async function ask({ gateway, agent }: Watched, path: string, body: object) {
  const headers = { 'content-type': 'application/json' }
  const sent = request({
    host: '127.0.0.1',
    port: gateway.port,
    method: 'POST',
    path,
    agent,
    headers
  })
  sent.end(JSON.stringify(body))
  const [response] = await once(sent, 'response')
  const parts: Buffer[] = []
  let isWhole = true
  try {
    for await (const part of response) parts.push(part)
  } catch {
    isWhole = false
  }
  return { status: Number(response.statusCode), bytes: Buffer.concat(parts), isWhole }
}

/** A backend that responds to the request whose prompt is a number. */
function casesOf(respond: (count: number, body: Body) => Parameters<typeof send>[1]): Answerer {
  return async ({ body }, response, raw) => {
    const json: Body = JSON.parse(body)
    const count = Number(json.input ?? json.messages![0]!.content)
    await send(response, respond(count, json), raw.socket)
  }
}

interface Body {
  input?: string
  messages?: { role: string; content: string }[]
}

/** Sends a response in pieces; `isCut`: the connection breaks behind them. */
async function send(
  response: ServerResponse,
  { pieces, headers, isCut }: { pieces: Buffer[]; headers: Record<string, string>; isCut: boolean },
  socket: Socket
): Promise<void> {
  response.writeHead(200, headers)
  for (const piece of pieces) {
    if (response.destroyed) return
    if (!response.write(piece)) await writable(response)
    // The gateway reads them one by one.
    await nextTurn()
  }
  if (!isCut) response.end()
  else if (pieces.length === 0) socket.destroy()
  else response.write('', () => socket.destroy())
}

type Coder = [
  encode: (bytes: Buffer) => Buffer,
  decode: (bytes: Buffer) => { buffer: Buffer; engine: zlib.Zlib }
]
const INFO = { info: true } as const
const gzip: Coder = [zlib.gzipSync, bytes => zlib.gunzipSync(bytes, INFO) as never]
const CODERS: Record<string, Coder> = {
  gzip,
  'x-gzip': gzip,
  deflate: [zlib.deflateSync, bytes => zlib.inflateSync(bytes, INFO) as never],
  br: [
    bytes =>
      zlib.brotliCompressSync(bytes, { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 2 } }),
    bytes => zlib.brotliDecompressSync(bytes, INFO) as never
  ],
  zstd: [zlib.zstdCompressSync, bytes => zlib.zstdDecompressSync(bytes, INFO) as never]
}

/** Undoes codings with functions of node:zlib that get all bytes; undefined: they fail, or leave bytes. */
function decoded(bytes: Buffer, codings: readonly string[]): Buffer | undefined {
  let rest = bytes
  try {
    for (const coding of codings.toReversed()) {
      const { buffer, engine } = CODERS[coding]![1](rest)
      if (engine.bytesWritten < rest.length) return undefined
      rest = buffer
    }
  } catch {
    return undefined
  }
  return rest
}

test(
  'a response is decoded as node:zlib decodes it at once, or does not look complete',
  TIMEOUT,
  async t => {
    const cases = new Map<number, Parameters<typeof send>[1]>()
    const backend = await fakeBackend(
      t,
      casesOf(count => cases.get(count)!)
    )
    const watched = await startWatched(t, {
      backends: [{ url: backend.url }],
      routing: { circuit_breaker: { enabled: false } }
    })
    await fuzzThere(t, LONG ? 500 : 20, watched, async (random, count) => {
      const dense = times(upTo(random, pick(random, [1, 1_000, 20_000])), () => upTo(random, 255))
      const data = textOf(random).repeat(upTo(random, 20)) + Buffer.from(dense).toString('base64')
      const plain = Buffer.from(JSON.stringify({ data }))
      const codings = times(1 + Math.floor(random() ** 3 * 3), () =>
        pick(random, Object.keys(CODERS))
      )
      let bytes: Buffer = plain
      for (const coding of codings) {
        const [encode] = CODERS[coding]!
        bytes = encode(bytes)
      }
      const kind = random()
      if (kind < 0.2) bytes = damaged(random, bytes)
      else if (kind < 0.3) bytes = bytes.subarray(0, upTo(random, bytes.length))
      else if (kind < 0.4)
        bytes = Buffer.concat([
          bytes,
          pick(random, [bytes, Buffer.alloc(1 + upTo(random, 20)), plain])
        ])
      const isCut = kind > 0.9
      const headers = { 'content-type': 'application/json', 'content-encoding': codings.join(', ') }
      cases.set(count, { pieces: piecesOf(random, bytes, MAX_PIECES), headers, isCut })
      const response = await ask(watched, '/v1/embeddings', { model: 'm', input: String(count) })
      cases.delete(count)
      backend.requests.length = 0
      // An empty body has no coding.
      const expected = bytes.length === 0 ? bytes : decoded(bytes, codings)
      const isGood = expected !== undefined && !isCut
      const what = `${codings} of ${bytes.length} bytes, kind ${kind.toFixed(2)}`
      assert.equal(
        response.status === 200 && response.isWhole,
        isGood,
        `${what}: ${response.status} ${response.isWhole}`
      )
      if (isGood) same(response.bytes.toString('latin1'), expected.toString('latin1'), what)
      return bytes.length
    })
  }
)

interface Chat {
  bytes: Buffer
  /** Numbers of bytes up to the ends of the events that write the text. */
  ends: number[]
  lineEnd: string
  usage: string
}

/** A stream that writes a text. `at`: how many backends have written some of it. */
function chatOf(random: Random, text: string, at: number): Chat {
  const lineEnd = pick(random, LINE_ENDS)
  const event = (more: object) => {
    const head = { id: `chat-${at}`, object: 'chat.completion.chunk', created: at, model: 'm' }
    return `data: ${JSON.stringify({ ...head, ...more })}${lineEnd}${lineEnd}`
  }
  const ends: number[] = []
  const parts: Buffer[] = []
  const write = (delta: object, finish_reason: string | null = null) => {
    const comment = random() < 0.05 ? `: ping${lineEnd}${lineEnd}` : ''
    const part = Buffer.from(comment + event({ choices: [{ index: 0, delta, finish_reason }] }))
    parts.push(part)
    ends.push((ends.at(-1) ?? 0) + part.length)
  }
  const most = pick(random, [3, 20, 500])
  const letters = Array.from(text)
  write({ role: 'assistant', content: '' })
  for (let from = 0; from < letters.length; ) {
    const to = from + upTo(random, most)
    write({ content: letters.slice(from, to).join('') })
    from = to
  }
  write({}, 'stop')
  const tokens = { prompt_tokens: 7 + letters.length, completion_tokens: 3 }
  const usage = event({ choices: [], usage: tokens })
  const last = Buffer.from(`${usage}data: [DONE]${lineEnd}${lineEnd}`)
  return { bytes: Buffer.concat([...parts, last]), ends, lineEnd, usage }
}

/** Where a stream breaks off. One whose last event lacks but its line ends has that event. */
function cutOf(random: Random, { bytes, ends, lineEnd }: Chat): number {
  const cut = upTo(random, bytes.length)
  const lineEnds = 2 * lineEnd.length
  return [...ends, bytes.length].find(end => cut < end && cut >= end - lineEnds) ?? cut
}

// biome-ignore lint/suspicious/noExplicitAny: the events of a chat.
function parsed(text: string): any {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

/** Size (bytes) of `[DONE]` and of the line ends before and behind it, at most. */
const LAST_BYTES = Buffer.byteLength('\r\n\r\ndata: [DONE]\r\n\r\n')

const FAILED = 'data: {"error":{"message":"EngineCore encountered an issue","code":500}}\n\n'

test('a stream that goes on from other backends has the text of one', TIMEOUT, async t => {
  interface Case {
    random: Random
    text: string
    /** How many backends break off. */
    breaks: number
    /** What they have sent: of the last, `cut` bytes. */
    chats: Chat[]
    cut: number
  }
  const cases = new Map<number, Case>()
  const answer = casesOf((count, { messages }) => {
    const current = cases.get(count)!
    const { random, text, breaks, chats } = current
    const begun = messages!.length > 1 ? messages!.at(-1)!.content : ''
    same(begun, text.slice(0, begun.length), 'the beginning of the text')
    const chat = chatOf(random, text.slice(begun.length), chats.length)
    const headers = { 'content-type': 'text/event-stream' }
    const isBroken = chats.push(chat) <= breaks
    current.cut = chat.bytes.length
    if (!isBroken)
      return { pieces: piecesOf(random, chat.bytes, MAX_PIECES), headers, isCut: false }
    const isError = random() < 0.3
    current.cut = isError ? pick(random, chat.ends) : cutOf(random, chat)
    const pieces = piecesOf(random, chat.bytes.subarray(0, current.cut), MAX_PIECES)
    if (isError) pieces.push(Buffer.from(FAILED))
    // One that ends without its end is broken, too. The end of the text is an end.
    const isEnded = current.cut >= chat.ends.at(-1)!
    return { pieces, headers, isCut: !isError && (isEnded || random() < 0.5) }
  })
  const backends = await Promise.all(times(3, () => fakeBackend(t, answer)))
  const watched = await startWatched(t, {
    backends: backends.map(({ url }, at) => ({
      url,
      priority: at,
      continuation: 'continue_final_message'
    })),
    routing: { retry: { enabled: true, initial_wait: '1ms' }, circuit_breaker: { enabled: false } }
  })
  let continued = 0
  await fuzzThere(t, LONG ? 500 : 20, watched, async (random, count) => {
    const text = times(upTo(random, 8), () => textOf(random)).join('')
    // Well below the budget for retries, a fifth of the requests: a run of breaks must not use it up.
    const breaks = random() < 0.1 ? 1 + Math.floor(random() * 1.2) : 0
    const current: Case = { random, text, breaks, chats: [], cut: 0 }
    cases.set(count, current)
    const isAsked = random() < 0.5
    const response = await ask(watched, '/v1/chat/completions', {
      model: 'm',
      stream: true,
      messages: [{ role: 'user', content: String(count) }],
      ...(isAsked ? { stream_options: { include_usage: true } } : {})
    })
    cases.delete(count)
    for (const { requests } of backends) requests.length = 0
    const { chats, cut } = current
    const { bytes, ends, usage } = chats.at(-1)!
    const what = `${breaks} breaks, ${chats.length} backends, ${cut} of ${bytes.length} bytes`
    if (breaks === 0) {
      const expected = isAsked ? bytes.toString() : bytes.toString().replace(usage, '')
      same(response.bytes.toString(), expected, what)
      return bytes.length
    }
    const events = specified(response.bytes.toString('latin1'), 'sse')
    const datas = events.flatMap(({ data = '' }) => data || [])
    const texts = datas.filter(data => data !== '[DONE]')
    const jsons = texts.flatMap(text => parsed(Buffer.from(text, 'latin1').toString()) ?? [])
    const answers = jsons.filter(json => json.choices)
    const choices = answers.flatMap(json => json.choices)
    // No other backend can tell what follows the end of the text.
    const isLost = cut >= ends.at(-1)! && cut < bytes.length
    const isTold = jsons.some(json => json.error)
    // What follows the text passes as it comes.
    assert.ok(texts.length - jsons.length <= (isLost ? 1 : 0), what)
    same(choices.map(({ delta }) => delta.content ?? '').join(''), text, what)
    assert.equal(choices.filter(({ delta }) => delta.role).length, 1, what)
    assert.equal(choices.filter(each => each.finish_reason).length, 1, what)
    assert.equal(new Set(answers.map(({ id, created }) => `${id} ${created}`)).size, 1, what)
    const isDone = datas.at(-1) === '[DONE]'
    // A stream whose usage has come may count as complete without its last event.
    const isCounted = isLost && cut >= bytes.length - LAST_BYTES
    if (!isCounted) assert.deepEqual([isTold, isDone], [isLost, !isLost], what)
    if (!isLost) assert.equal(answers.filter(each => each.usage).length, isAsked ? 1 : 0, what)
    if (chats.length > 1) continued++
    return chats.reduce((sum, each) => sum + each.bytes.length, 0)
  })
  t.diagnostic(`${continued} continued`)
})
