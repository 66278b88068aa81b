import { connect, type Socket } from 'node:net'
import { MessageReader, now, TIME_MARK } from './http1.ts'

/** The clients of the bench: runs one job at a time and says what it saw. Times in microseconds. */

/** Where an entrant listens and what its requests need. */
export interface Target {
  port: number
  headers: Record<string, string>
}

export type Job =
  | { kind: 'streams'; target: Target; streams: number; chunks: number; interval: number }
  | {
      kind: 'requests'
      target: Target
      connections: number
      requests: number
      promptBytes: number
      /** As many as can be, where nothing is said. */
      perSecond?: number
    }
  | { kind: 'ttft'; targets: [Target, Target]; pairs: number }
  | { kind: 'blocking'; target: Target; requests: number; bytes: number; isHostile: boolean }
  | { kind: 'hold'; target: Target; streams: number; perSecond: number }
  | { kind: 'release' }

export interface Spread {
  p50: number
  p99: number
  max: number
}

export interface StreamsResult {
  chunks: number
  failed: number
  ms: number
  ttft: Spread
  delay: Spread
}

export interface RequestsResult {
  requests: number
  failed: number
  ms: number
  latency: Spread
}

const HOLD_MS = 2_000
const JOB_TIMEOUT = 300_000

/** One connection, used for one request after another. */
class Client {
  readonly #target: Target
  #socket: Socket | undefined
  #settle: ((complete: boolean) => void) | undefined
  #onBody: (bytes: Buffer) => void = () => {}
  #status = ''

  constructor(target: Target) {
    this.#target = target
  }

  /** Sends one request; resolves with whether a complete answer of status 200 came. */
  async request(body: Buffer, onBody: (bytes: Buffer) => void, onSent = () => {}) {
    this.#socket ??= await this.#open()
    const socket = this.#socket
    this.#onBody = onBody
    const { port, headers } = this.#target
    const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`)
    const head = `POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:${port}\r\ncontent-type: application/json\r\n${lines.join('')}content-length: ${body.length}\r\n\r\n`
    return new Promise<boolean>(resolve => {
      this.#settle = resolve
      onSent()
      socket.cork()
      socket.write(head)
      socket.write(body)
      socket.uncork()
      if (socket.destroyed) this.#lost()
    })
  }

  close(): void {
    this.#socket?.destroy()
  }

  #open(): Promise<Socket> {
    return new Promise(resolve => {
      const socket = connect({ port: this.#target.port, host: '127.0.0.1', noDelay: true })
      const reader = new MessageReader({
        onHead: head => {
          this.#status = head.slice(9, 12)
        },
        onBody: bytes => this.#onBody(bytes),
        onEnd: () => this.#settle?.(this.#status === '200')
      })
      socket.on('data', bytes => reader.read(bytes as Buffer))
      socket.on('connect', () => resolve(socket))
      socket.on('error', () => resolve(socket))
      socket.on('close', () => this.#lost())
    })
  }

  #lost(): void {
    this.#socket = undefined
    this.#settle?.(false)
  }
}

/** Reads the events of one stream, in whatever pieces they come. */
function eventReader(onEvent: (sentAt: number) => void): (bytes: Buffer) => void {
  let rest = ''
  return bytes => {
    const text = rest + bytes.toString('latin1')
    let at = 0
    for (let end = text.indexOf('\n\n'); end !== -1; end = text.indexOf('\n\n', at)) {
      const mark = text.lastIndexOf(TIME_MARK, end)
      if (mark > at)
        onEvent(Number(text.slice(mark + TIME_MARK.length, mark + TIME_MARK.length + 16)))
      at = end + 2
    }
    rest = text.slice(at)
  }
}

function prompt(bytes: number, bench: string): Buffer {
  const wish = bench === '' ? '' : `"stream":true,"user":"bench ${bench}",`
  const text = 'What is a gateway? '
    .repeat(Math.ceil(bytes / 19))
    .slice(0, Math.max(0, bytes - 100))
  return Buffer.from(
    `{${wish}"model":"bench","messages":[{"role":"user","content":${JSON.stringify(text)}}]}`
  )
}

/** Streams that begin evenly spread over a second, and run beside each other. */
async function streams(job: Extract<Job, { kind: 'streams' }>): Promise<StreamsResult> {
  const body = prompt(2048, `${job.chunks},${job.interval}`)
  const delays: number[] = []
  const ttfts: number[] = []
  let failed = 0
  const startedAt = now()
  await Promise.all(
    Array.from({ length: job.streams }, async (_, index) => {
      await sleep((index * 1000) / job.streams)
      const client = new Client(job.target)
      let sent = 0
      let first = true
      const read = eventReader(sentAt => {
        const time = now()
        if (first) ttfts.push(time - sent)
        first = false
        delays.push(time - sentAt)
      })
      const complete = await client.request(body, read, () => {
        sent = now()
      })
      if (!complete) failed++
      client.close()
    })
  )
  const ms = (now() - startedAt) / 1000
  return { chunks: delays.length, failed, ms, ttft: spread(ttfts), delay: spread(delays) }
}

/** Whole answers, one after another on each connection. */
async function requests(job: Extract<Job, { kind: 'requests' }>): Promise<RequestsResult> {
  const body = prompt(job.promptBytes, '')
  const times: number[] = []
  let failed = 0
  let begun = 0
  const startedAt = now()
  await Promise.all(
    Array.from({ length: job.connections }, async () => {
      const client = new Client(job.target)
      while (begun < job.requests) {
        const due =
          ((begun++ / (job.perSecond ?? Number.POSITIVE_INFINITY)) * 1e6 + startedAt) / 1000
        const wait = due - now() / 1000
        if (wait > 0) await sleep(wait)
        const sent = now()
        if (!(await client.request(body, () => {}))) failed++
        times.push(now() - sent)
      }
      client.close()
    })
  )
  const ms = (now() - startedAt) / 1000
  return { requests: times.length, failed, ms, latency: spread(times) }
}

/** Time to the first event, in turns over both targets, one stream at a time. */
async function ttft({ targets, pairs }: Extract<Job, { kind: 'ttft' }>): Promise<Spread[]> {
  const body = prompt(2048, '2,1')
  const clients = targets.map(target => new Client(target))
  const times: number[][] = targets.map(() => [])
  for (let pair = 0; pair < pairs + 20; pair++) {
    for (const [index, client] of clients.entries()) {
      let sent = 0
      let first = 0
      await client.request(
        body,
        () => {
          first ||= now()
        },
        () => {
          sent = now()
        }
      )
      if (pair >= 20) times[index]!.push(first - sent)
    }
  }
  for (const client of clients) client.close()
  return times.map(spread)
}

/** JSON that costs a reader as much as JSON of that size (bytes) can, the last one beyond the gateway's bounds. */
function hostile(bytes: number): Buffer[] {
  return ['0,', '"",', '[[[[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]]]],', '"\\n\\u00e9",', '{},'].map(
    element =>
      Buffer.from(
        `{"model":"bench","messages":[${element.repeat(Math.ceil(bytes / element.length))}0]}`
      )
  )
}

/** How late the worst chunk of other streams comes while one large prompt passes. */
async function blocking(job: Extract<Job, { kind: 'blocking' }>): Promise<Spread> {
  const bodies = job.isHostile ? hostile(job.bytes) : [prompt(job.bytes, '')]
  const small = prompt(512, '100000,2')
  let worst = 0
  const watchers = Array.from({ length: 8 }, () => new Client(job.target))
  for (const watcher of watchers) {
    const read = eventReader(sentAt => {
      worst = Math.max(worst, now() - sentAt)
    })
    void watcher.request(small, read)
    await sleep(3)
  }
  const client = new Client(job.target)
  const late: number[] = []
  for (let count = 0; count < job.requests + 5; count++) {
    await sleep(50)
    worst = 0
    await client.request(bodies[count % bodies.length]!, () => {})
    await sleep(20)
    if (count >= 5) late.push(worst)
  }
  for (const each of [client, ...watchers]) each.close()
  return spread(late)
}

const held: Client[] = []

/** Opens streams that stay; each gets a chunk every 2 s. Resolves once all have had two. */
async function hold(
  job: Extract<Job, { kind: 'hold' }>
): Promise<{ open: number; failed: number }> {
  const body = prompt(2048, `1000000,${HOLD_MS}`)
  let failed = 0
  let open = 0
  const startedAt = performance.now()
  await Promise.all(
    Array.from({ length: job.streams }, async (_, index) => {
      await sleep((index * 1000) / job.perSecond - (performance.now() - startedAt))
      const client = new Client(job.target)
      held.push(client)
      await new Promise<void>(resolve => {
        let events = 0
        const read = eventReader(() => {
          if (++events !== 2) return
          open++
          resolve()
        })
        void client.request(body, read).then(() => {
          if (events < 2) failed++
          else open--
          resolve()
        })
      })
    })
  )
  return { open, failed }
}

function release(): void {
  for (const client of held.splice(0)) client.close()
}

function spread(values: number[]): Spread {
  const sorted = values.sort((a, b) => a - b)
  const at = (share: number) =>
    sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]
  return { p50: at(0.5) ?? 0, p99: at(0.99) ?? 0, max: sorted.at(-1) ?? 0 }
}

function sleep(ms: number): Promise<void> {
  return ms <= 0 ? Promise.resolve() : new Promise(resolve => setTimeout(resolve, ms))
}

async function run(job: Job): Promise<unknown> {
  switch (job.kind) {
    case 'streams':
      return streams(job)
    case 'requests':
      return requests(job)
    case 'ttft':
      return ttft(job)
    case 'blocking':
      return blocking(job)
    case 'hold':
      return hold(job)
    case 'release':
      return release()
  }
}

process.on('message', async (job: Job) => {
  const late = setTimeout(() => process.exit(1), JOB_TIMEOUT)
  process.send!({ result: await run(job) })
  clearTimeout(late)
})
process.on('disconnect', () => process.exit())
process.send!({ port: 0 })
