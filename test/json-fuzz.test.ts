import assert from 'node:assert/strict'
import { once } from 'node:events'
import { type ClientRequest, request } from 'node:http'
import { test } from 'node:test'
import { closing, fakeBackend } from './helper.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/** Random request bodies, valid and damaged, in random pieces: 10 minutes in `npm run test:long`. */

const LONG = process.env.LONG === '1'
const SECONDS = Number(process.env.FUZZ_SECONDS ?? (LONG ? 600 : 1))
const MAX_BYTES = LONG ? 8 * 1024 * 1024 : 256 * 1024
/** Until V8 has compiled the code that is measured. */
const WARM_UP = 100
/** CPU time (ms) that one turn of the event loop may take. */
const MAX_TURN = 20
const MAX_NODES = 1_000_000
const MAX_DEPTH = 128

/** Numbers from 0 to 1 that can be repeated (mulberry32). */
function randomizer(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

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
  `${'['.repeat(120)}${']'.repeat(120)}`,
  `${'['.repeat(200)}${']'.repeat(200)}`
]
const DAMAGE = '{}[],:"\\0 \n\t\u0001tfn-.eE'

function bodyOf(random: () => number): string {
  const pick = <T>(list: ArrayLike<T>) => list[Math.floor(random() * list.length)]!
  const size = Math.exp(random() * Math.log(MAX_BYTES))
  const name = pick(['messages', 'prompt', 'tools', 'x'])
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
  const backend = await fakeBackend(t, (_request, response) => response.end('{}'))
  const dataDir = folder(t)
  const config = writeConfig(`${dataDir}/config.json`, {
    server: { listen: '127.0.0.1:0' },
    backends: [{ url: backend.url }]
  })
  const watch = new URL('./loop-watch.mjs', import.meta.url).href
  const gateway = await start(t, [CLI, '--config', config], {
    LLMPROXY_DATA_DIR: dataDir,
    NODE_OPTIONS: `--max-old-space-size=96 --import ${watch}`
  })
  const seed = Number(process.env.FUZZ_SEED ?? Date.now())
  const random = randomizer(seed)
  const counts = { good: 0, bad: 0, aborted: 0 }
  const until = Date.now() + SECONDS * 1000
  let early = 0
  for (let count = 1; Date.now() < until; count++) {
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
      gateway.lines.length = 0
      gateway.child.kill('SIGWINCH')
    }
  }
  const longest = Math.max(0, ...gateway.lines.map(({ ms }) => Number(ms ?? 0)))
  t.diagnostic(`${JSON.stringify(counts)}, longest turn ${longest} ms, seed ${seed}`)
  assert.ok(counts.good > 0 && counts.bad > 0)
  assert.equal(gateway.child.exitCode, null)
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text()
  assert.match(metrics, /^llmproxy_request_body_bytes 0$/m)
  if (!LONG) return
  assert.ok(longest < MAX_TURN, `a turn of the event loop took ${longest} ms`)
  const grown = (await external(gateway.url)) - early
  assert.ok(grown < 64 * 1024 * 1024, `${grown} bytes more outside the heap`)
})

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
  random: () => number
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
    path: '/v1/embeddings',
    headers: { 'content-type': 'application/json', ...length }
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
  for await (const chunk of response) text += chunk
  // Valid JSON may have a field that is not valid.
  return text.includes('"invalid_json"') ? 'rejected' : 'accepted'
}

function drained(sent: ClientRequest): Promise<void> {
  return new Promise(resolve => sent.removeAllListeners('drain').once('drain', resolve))
}
