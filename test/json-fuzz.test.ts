import assert from 'node:assert/strict'
import { once } from 'node:events'
import { type ClientRequest, request } from 'node:http'
import { type TestContext, test } from 'node:test'
import { closing, fakeBackend } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'
import { type Random, randomizer } from './random.ts'

/** Random request bodies, valid and damaged, in random pieces: 10 minutes in `npm run test:long`. */

const LONG = process.env.LONG === '1'
const SECONDS = Number(process.env.FUZZ_SECONDS ?? (LONG ? 600 : 1))
/** Bodies that are sent however slow the machine is. */
const LEAST = 20
const MAX_BYTES = LONG ? 8 * 1024 * 1024 : 256 * 1024
/** Until V8 has compiled the code that is measured. */
const WARM_UP = 100
/**
 * CPU time (ms) that a turn of the event loop may take. V8's collections of the whole heap come rarely and take up to
 * 20 ms, so one turn in so many bodies may take longer than that, but not longer than `MAX_RARE_TURN`.
 */
const MAX_TURN = 20
const MAX_RARE_TURN = 50
const BODIES_PER_RARE_TURN = 5_000
const MAX_NODES = 1_000_000
const MAX_DEPTH = 128

const ELEMENTS = [
  '0',
  '-1.5e+10',
  '""',
  '"x"',
  '"\\n\\u00e9\\"ü"',
  `"${'text '.repeat(200)}"`,
  '{}',
  '[]',
  '[[[[[[[[]]]]]]]]',
  '{"role":"user","content":"Hi"}',
  '{"a":{"b":[1,2,{"c":null}]}}',
  'true',
  '{"id":"msg_1","type":"message","content":[{"type":"input_text","text":"x"}]}',
  '{"type":"tool_use","input":{"file_id":"x"}}',
  '"\\\\\\""',
  `${'['.repeat(120)}${']'.repeat(120)}`,
  `${'['.repeat(200)}${']'.repeat(200)}`
]
const ROUTES = [
  ...['/v1/embeddings', '/v1/chat/completions', '/v1/responses', '/v1/messages', '/v1/rerank'],
  ...['/v1/completions', '/api/chat', '/api/generate', '/api/embed']
]
const DAMAGE = '{}[],:"\\0 \n\t\u0001tfn-.eE'

function bodyOf(random: Random): string {
  const pick = <T>(list: ArrayLike<T>) => list[Math.floor(random() * list.length)]!
  const size = Math.exp(random() * Math.log(MAX_BYTES))
  const name = pick(['messages', 'input', 'prompt', 'tools', 'x'])
  const few = [pick(ELEMENTS), pick(ELEMENTS), pick(ELEMENTS)]
  const mixed = `${few.join(',')},`
  const elements = mixed.repeat(Math.ceil(size / mixed.length))
  let text = `{"model":"m","${name}":[${elements}0],"stream":false}`
  for (let times = Math.floor(random() * 3); times > 0 && random() < 0.5; times--) {
    const at = Math.floor(random() * text.length)
    text = text.slice(0, at) + pick(DAMAGE) + text.slice(at + Math.floor(random() * 2))
  }
  return text
}

/** Whether the gateway must accept a body. */
function isValid(text: string): boolean {
  let depth = 0
  let nodes = 0
  try {
    JSON.parse(text)
  } catch {
    return false
  }
  for (const [token] of text.matchAll(/"(?:[^"\\]|\\.)*"(?:\s*:)?|[{}[\]]/g)) {
    if (token === '{' || token === '[') {
      nodes++
      if (++depth > MAX_DEPTH) return false
    } else if (token === '}' || token === ']') depth--
    else if (token.endsWith(':')) nodes++
  }
  return nodes <= MAX_NODES
}

test('no request body makes the gateway crash, leak, block, or differ from JSON.parse', {
  timeout: (SECONDS + 60) * 1000
}, async t => {
  const { backend, gateway } = await startWatched(t)
  const seed = Number(process.env.FUZZ_SEED ?? Date.now())
  const random = randomizer(seed)
  const counts = { good: 0, bad: 0, aborted: 0 }
  const until = Date.now() + SECONDS * 1000
  let early = 0
  for (let count = 1; Date.now() < until || count <= LEAST; count++) {
    const text = bodyOf(random)
    const result = await send(gateway.port, Buffer.from(text), random)
    if (result === 'left') counts.aborted++
    else {
      const isExpected = isValid(text) === (result === 'accepted')
      assert.ok(isExpected, `seed ${seed}, body ${count}: ${result}: ${text.slice(0, 200)}`)
      counts[result === 'accepted' ? 'good' : 'bad']++
    }
    backend.requests.length = 0
    if (count === WARM_UP) {
      early = await external(gateway.url)
      await beginAnew(gateway)
    }
  }
  const longest = longestTurn(gateway)
  const rare = gateway.lines.filter(({ msg }) => msg === 'long turn').length
  t.diagnostic(
    `${JSON.stringify(counts)}, longest turn ${longest} ms, ${rare} above ${MAX_TURN} ms, seed ${seed}`
  )
  assert.ok(counts.good > 0 && counts.bad > 0)
  assert.equal(gateway.child.exitCode, null)
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text()
  assert.match(metrics, /^llmproxy_request_body_bytes 0$/m)
  if (!LONG) return
  assert.ok(longest < MAX_RARE_TURN, `a turn of the event loop took ${longest} ms`)
  const bodies = counts.good + counts.bad + counts.aborted
  assert.ok(rare <= bodies / BODIES_PER_RARE_TURN, `${rare} turns took more than ${MAX_TURN} ms`)
  const grown = (await external(gateway.url)) - early
  assert.ok(grown < 64 * 1024 * 1024, `${grown} bytes more outside the heap`)
})

const fill = (element: string, count = 16_000_000 / element.length) => element.repeat(count)
/** Bodies that cost each reader the most, about 16 MB large, and the largest that may come. */
const HOSTILE: [path: string, body: () => string][] = [
  ...['word and ', 'A', '\\u0041', '\\\\', '\\"', 'ü€𝄞'].flatMap(
    (text): [string, () => string][] => [
      [
        '/v1/chat/completions',
        () => `{"model":"m","stream":true,"messages":[{"content":"${fill(text)}"}]}`
      ],
      [
        '/v1/responses',
        () => `{"model":"m","stream":true,"input":[{"role":"user","content":"${fill(text)}"}]}`
      ]
    ]
  ),
  ...['"",', '1,', '{},', '{"id":"a","role":"user"},', '[[[[]]]],', '{"":"","":""},'].flatMap(
    (element): [string, () => string][] => [
      [
        '/v1/chat/completions',
        () => `{"model":"m","messages":[${fill(element, countOf(element))}0]}`
      ],
      ['/v1/chat/completions', () => `{"model":"m","tools":[${fill(element, countOf(element))}0]}`],
      ['/v1/responses', () => `{"model":"m","input":[${fill(element, countOf(element))}0]}`],
      ['/v1/responses', () => `{"model":"m","tools":[${fill(element, countOf(element))}0]}`]
    ]
  ),
  ...[17, 32, 63].map((mb): [string, () => string] => [
    '/v1/chat/completions',
    () => `{"model":"m","messages":[{"role":"user","content":"${fill('words ', (mb * 1e6) / 6)}"}]}`
  ]),
  ['/v1/chat/completions', () => `{"model":"m","messages":["${fill(`${'A'.repeat(254)} `)}"]}`],
  ['/v1/responses', () => `{"model":"m","input":["${fill('A')}"${fill(`,"${'A'.repeat(8000)}"`)}]}`]
]

/** As many elements as one body may have. */
function countOf(element: string): number {
  const nodes = element.match(/[{[:]/g)?.length ?? 1
  return Math.min(16_000_000 / element.length, 900_000 / nodes)
}

test('no body blocks the event loop for 20 ms, with keys, limits, prices and references', {
  skip: !LONG && 'LONG=1',
  timeout: 300_000
}, async t => {
  const { gateway } = await startWatched(t)
  const small = '{"model":"m","messages":[{"role":"user","content":"x"}]}'
  for (let warm = 0; warm < 30; warm++)
    await whole(gateway.port, ROUTES[warm % ROUTES.length]!, small)
  for (const round of ['compiles', 'is measured']) {
    for (const [path, body] of HOSTILE) {
      const bytes = Buffer.from(body())
      await beginAnew(gateway)
      const response = await whole(gateway.port, path, bytes)
      const ms = longestTurn(gateway)
      const what = `${path} ${bytes.toString('latin1', 0, 80)}: ${response}: ${ms} ms`
      if (ms > 10) t.diagnostic(`${round}: ${what}`)
      if (round === 'is measured') assert.ok(ms < MAX_TURN, what)
    }
  }
})

/** Sends a body and returns the status. */
async function whole(port: number, path: string, body: string | Buffer): Promise<number> {
  const response = await fetch(`http://127.0.0.1:${port}${path}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: 'Bearer a' },
    body: body as BodyInit
  })
  // The backend's response is no stream.
  await response.arrayBuffer().catch(() => {})
  return response.status
}

/** A gateway that reports its longest turns, and does all that it can do with a body. */
async function startWatched(t: TestContext) {
  const backend = await fakeBackend(t, (_request, response) => {
    backend.requests.length = 0
    response.end('{}')
  })
  const dataDir = folder(t)
  const most = 1e12
  const prices = Array.from({ length: 1_000 }, (_, at) => ({
    model: `x-${at}*`,
    input: 1,
    output: 1
  }))
  const config = writeConfig(`${dataDir}/config.json`, {
    server: { listen: '127.0.0.1:0' },
    backends: [{ url: backend.url, models: ['m'] }],
    auth: { enabled: true, keys: [{ key: 'a', name: 'a' }], skip_paths: ['/metrics'] },
    rate_limit: { enabled: true, per_key: { tokens_per_minute: most, max_concurrent: 100 } },
    usage: { prices }
  })
  const watch = new URL('./loop-watch.mjs', import.meta.url).href
  const gateway = await start(t, [CLI, '--config', config], {
    LLMPROXY_DATA_DIR: dataDir,
    NODE_OPTIONS: `--import ${watch}`
  })
  return { backend, gateway }
}

/** Forgets the turns so far, and collects garbage. */
async function beginAnew({ lines, child, logged }: Watched): Promise<void> {
  lines.length = 0
  child.kill('SIGWINCH')
  await logged('heap')
}

type Watched = Awaited<ReturnType<typeof startWatched>>['gateway']

/** CPU time (ms) of the longest turn of the event loop since then. */
function longestTurn({ lines }: Watched): number {
  return Math.max(0, ...lines.map(({ ms }) => Number(ms ?? 0)))
}

async function external(url: string): Promise<number> {
  const metrics = await (await fetch(`${url}/metrics`)).text()
  return Number(/^nodejs_external_memory_bytes (\S+)$/m.exec(metrics)![1])
}

/**
 * Sends a body in random pieces. `left`: it has not sent all; `cut`: the connection was closed before the response
 * could be read, as for large bodies that are rejected.
 */
async function send(
  port: number,
  body: Buffer,
  random: Random
): Promise<'accepted' | 'rejected' | 'left' | 'cut'> {
  const isChunked = random() < 0.5
  const leavesAt = random() < 0.1 ? random() * body.length : Number.POSITIVE_INFINITY
  const length = isChunked ? {} : { 'content-length': body.length }
  const sent = request({
    port,
    host: '127.0.0.1',
    // A connection of its own: one that is kept may be closed just as it is used again.
    agent: false,
    method: 'POST',
    path: ROUTES[Math.floor(random() * ROUTES.length)]!,
    headers: { 'content-type': 'application/json', authorization: 'Bearer a', ...length }
  })
  const responded = once(sent, 'response').catch(() => undefined)
  const closed = closing(sent)
  sent.on('error', () => {})
  const piece = Math.ceil(Math.exp(random() * Math.log(body.length)) + body.length / 50)
  for (let at = 0; at < body.length && !sent.destroyed; at += piece) {
    if (at > leavesAt) {
      sent.destroy()
      await closed
      return 'left'
    }
    if (!sent.write(body.subarray(at, at + piece))) {
      await Promise.race([drained(sent), closed, responded])
    }
  }
  sent.end()
  const [response] = (await responded) ?? []
  if (response === undefined) return 'cut'
  let text = ''
  try {
    for await (const chunk of response) text += chunk
  } catch {
    // What the backend responds is no whole stream of Ollama's API, which streams by default.
    return response.statusCode === 200 ? 'accepted' : 'cut'
  }
  // Valid JSON may have a field that is not valid.
  return text.includes('is not a valid JSON object') ? 'rejected' : 'accepted'
}

function drained(sent: ClientRequest): Promise<void> {
  return new Promise(resolve => sent.removeAllListeners('drain').once('drain', resolve))
}
