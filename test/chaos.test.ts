import assert from 'node:assert/strict'
import { describe, type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  type Answerer,
  CHAT,
  chunk,
  closedPort,
  DONE,
  type FakeBackend,
  fakeBackend,
  post,
  startGateway,
  type TestGateway
} from './helper.ts'

/**
 * A backend that fails in every way there is, beside one that is well: what clients see is honest, nothing is
 * left over, and the healthy one serves whatever can still be served. LONG=1: more of it.
 */

const CALLS = process.env.LONG ? 400 : 20
const CALLERS = 4
const WORDS = ['one ', 'two ', 'three']
const STREAM = [...WORDS.map(word => chunk(word)), chunk('', { finish_reason: 'stop' }), DONE].join(
  ''
)
const WHOLE = JSON.stringify({ object: 'chat.completion', choices: [{ message: WORDS.join('') }] })
const BACKENDS_OWN = 'no'
const PART = chunk(WORDS[0]!)

/** How a call may end for its client. `broken`: with an error event, and without the end of the stream. */
type End = 'complete' | 'broken' | 'cut' | 'refused' | 'limited' | `error ${number}`

interface Chaos {
  answer: Answerer | 'refuses'
  /** What clients of a stream may see, and those of a whole answer; what else they see is a lie. */
  stream: End[]
  whole: End[]
}

const isStream = (body: string) => JSON.parse(body).stream === true

const healthy: Answerer = ({ body }, response) => {
  response.setHeader('content-type', isStream(body) ? 'text/event-stream' : 'application/json')
  response.end(isStream(body) ? STREAM : WHOLE)
}

/** Says the head and the beginning of an answer, and then does something else. */
const begins =
  (then: (...of: Parameters<Answerer>) => unknown): Answerer =>
  async (request, response, raw) => {
    const type = isStream(request.body) ? 'text/event-stream' : 'application/json'
    response.writeHead(200, { 'content-type': type })
    const part = isStream(request.body) ? PART : WHOLE.slice(0, 10)
    await new Promise(resolve => response.write(part, resolve))
    await then(request, response, raw)
  }
const status =
  (code: number, headers: Record<string, string> = {}): Answerer =>
  (_request, response) => {
    response.writeHead(code, { 'content-type': 'application/json', ...headers })
    response.end(JSON.stringify({ error: { message: BACKENDS_OWN } }))
  }

// Before the first byte of an answer another backend takes over; after it, nothing may look complete.
const served = { stream: ['complete'], whole: ['complete'] } satisfies Partial<Chaos>
const broken = { stream: ['broken'], whole: ['cut'] } satisfies Partial<Chaos>

const CHAOS: Record<string, Chaos> = {
  'refuses connections': { answer: 'refuses', ...served },
  'hangs before its head': { answer: () => {}, ...served },
  'hangs after its head': {
    answer: (_request, response) => void response.writeHead(200).flushHeaders(),
    ...served
  },
  'hangs in the middle': { answer: begins(() => {}), ...broken },
  'resets the connection': { answer: (_, __, raw) => raw.socket.resetAndDestroy(), ...served },
  'resets it in the middle': {
    answer: begins((_, __, raw) => raw.socket.resetAndDestroy()),
    ...broken
  },
  'answers 500': { answer: status(500), ...served },
  'answers 503': { answer: status(503, { 'retry-after': '1' }), ...served },
  // It is no failure, so the circuit stays closed, and the budget for retries may run out.
  'answers 429': {
    answer: status(429),
    stream: ['complete', 'error 429'],
    whole: ['complete', 'error 429']
  },
  trickles: {
    async answer({ body }, response) {
      response.setHeader('content-type', isStream(body) ? 'text/event-stream' : 'application/json')
      for (const byte of Buffer.from(isStream(body) ? STREAM : WHOLE)) {
        response.write(Buffer.of(byte))
        if (byte === 0x22) await sleep(1)
      }
      response.end()
    },
    ...served
  },
  'dies in the middle of a chunk': {
    answer(_request, response, raw) {
      response.writeHead(200, { 'content-type': 'text/event-stream' }).flushHeaders()
      raw.socket.write(`1000\r\n${PART}`, () => raw.socket.destroy())
    },
    stream: ['broken'],
    whole: ['broken']
  },
  'promises more bytes than it sends': {
    answer: begins((_, response, raw) => raw.socket.end(() => response.destroy())),
    ...broken
  },
  'says that a stream is shorter than it is': {
    answer({ body }, response, raw) {
      const text = isStream(body) ? STREAM : WHOLE
      const length = isStream(body) ? PART.length : text.length
      raw.socket.end(
        `HTTP/1.1 200 OK\r\ncontent-type: ${isStream(body) ? 'text/event-stream' : 'application/json'}\r\ncontent-length: ${length}\r\n\r\n${text}`
      )
      response.destroy()
    },
    stream: ['broken'],
    whole: ['complete']
  },
  'begins a stream with an error': {
    answer({ body }, response) {
      if (!isStream(body)) return void status(500)({ body } as never, response, {} as never)
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      response.end('data: {"error":{"code":500}}\n\n')
    },
    ...served
  },
  'speaks no HTTP': { answer: (_, __, raw) => raw.socket.end('SSH-2.0-OpenSSH_9.2\r\n'), ...served }
}

/** A gateway with limits on what is under way, so that what is left over shows. */
function gatewayBefore(
  t: TestContext,
  backends: Record<string, { url: string }>,
  most: number,
  heartbeat = '15s'
) {
  return startGateway(t, {
    server: { heartbeat },
    backends: Object.entries(backends).map(([name, { url }]) => ({
      name,
      url,
      max_concurrent: 3,
      // The machine may have much else to do.
      ...(name === 'good' ? { timeout: '10s', idle_timeout: '10s' } : {})
    })),
    rate_limit: { enabled: true, global: { max_concurrent: most } },
    routing: {
      timeout: '150ms',
      idle_timeout: '150ms',
      hedge: { enabled: true },
      retry: { enabled: true, retry_on: ['connect_failure', 'timeout', '5xx', '429'] }
    }
  })
}

async function endOf(url: string, stream: boolean, signal?: AbortSignal): Promise<End> {
  try {
    const response = await post(`${url}/v1/chat/completions`, { ...CHAT, stream }, {}, signal)
    if (response.status !== 200) {
      const { error } = (await response.json()) as { error: { message: string } }
      if (response.status === 429 && error.message !== BACKENDS_OWN) return 'limited'
      return `error ${response.status}`
    }
    let text = ''
    try {
      for await (const part of response.body!.pipeThrough(new TextDecoderStream())) text += part
    } catch {
      assert.ok(!text.includes(DONE))
      return /^data: .*"error"/m.test(text) ? 'broken' : 'cut'
    }
    text = text.replace(/^(:[^\n]*\n\n)+/, '')
    // A backend's own words pass when there is nobody else.
    if (stream && /^data: .*"error"/m.test(text) && !text.includes(DONE)) return 'broken'
    assert.equal(text, stream ? STREAM : WHOLE, 'an answer that ended as if it were complete')
    return 'complete'
  } catch (error) {
    if (error instanceof assert.AssertionError) throw error
    return 'refused'
  }
}

/** Streams and whole answers in turn, {@link CALLERS} at a time: there is a budget for retries. */
async function callsOf(url: string): Promise<End[]> {
  const ends: End[] = []
  let next = 0
  const caller = async () => {
    while (next < CALLS) {
      const at = next++
      ends[at] = await endOf(url, at % 2 === 0)
    }
  }
  await Promise.all(Array.from({ length: CALLERS }, caller))
  return ends
}

/** Nothing is under way any more: no exchange, nothing in flight, every slot free. */
async function assertNothingLeft(gateway: TestGateway, names: string[]): Promise<void> {
  await gateway.control.exchanges.drained()
  for (const backend of names) {
    assert.equal(await gateway.metric('llmproxy_backend_in_flight', { backend }), 0, backend)
  }
}

async function start(t: TestContext, answer: Answerer | 'refuses'): Promise<{ url: string }> {
  if (answer === 'refuses') return { url: `http://127.0.0.1:${await closedPort()}` }
  return fakeBackend(t, answer)
}

describe('one bad backend and a good one', { concurrency: 4 }, () => {
  for (const [what, { answer, stream, whole }] of Object.entries(CHAOS)) {
    test(`a backend that ${what}`, async t => {
      const bad = await start(t, answer)
      const good = await fakeBackend(t, healthy)
      const gateway = await gatewayBefore(t, { bad, good }, CALLERS)
      const ends = await callsOf(gateway.url)
      for (const [at, end] of ends.entries()) {
        const allowed: End[] = at % 2 === 0 ? stream : whole
        assert.ok(end === 'complete' || allowed.includes(end), `${end} at call ${at}`)
      }
      assert.ok(ends.filter(end => end === 'complete').length >= CALLS / 2)
      await assertNothingLeft(gateway, ['bad', 'good'])
      const again = await callsOf(gateway.url)
      assert.ok(!again.includes('limited'), 'a slot was left over')
    })
  }
})

for (const heartbeat of ['15s', '10ms']) {
  test(`all of them at once, and clients that leave, with a heartbeat of ${heartbeat}`, async t => {
    const backends: Record<string, { url: string }> = {}
    for (const [what, { answer }] of Object.entries(CHAOS)) backends[what] = await start(t, answer)
    const good: FakeBackend = await fakeBackend(t, healthy)
    backends.good = good
    const gateway = await gatewayBefore(t, backends, CALLS, heartbeat)
    const allowed = new Set<End>(
      Object.values(CHAOS).flatMap(({ stream, whole }) => [...stream, ...whole])
    )
    const counts = new Map<End, number>()
    for (let round = 0; round < 3; round++) {
      await Promise.all(
        Array.from({ length: CALLS }, async (_, at) => {
          const leaves = at % 5 === 0
          const signal = leaves ? AbortSignal.timeout(at) : undefined
          const end = await endOf(gateway.url, at % 2 === 0, signal)
          counts.set(end, (counts.get(end) ?? 0) + 1)
          assert.ok(leaves || allowed.has(end) || /^error (429|50[0234])$/.test(end), end)
        })
      )
    }
    assert.ok(counts.get('complete')! > CALLS / 4, JSON.stringify([...counts]))
    for (const priority of ['interactive', 'batch']) {
      assert.equal(await gateway.metric('llmproxy_queue_waiting', { priority }), 0)
    }
    const heard = await gateway.metric('llmproxy_heartbeat_streams_total')
    assert.equal(heard > 0, heartbeat === '10ms')
    await assertNothingLeft(gateway, Object.keys(backends))
  })
}
