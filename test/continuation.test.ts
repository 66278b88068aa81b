import assert from 'node:assert/strict'
import { describe, type TestContext, test } from 'node:test'
import { parseConfig } from '../src/config.ts'
import { changed } from '../src/payload-edits.ts'
import { changesForRest, openEnd } from '../src/pool/continuation.ts'
import { outlineOf } from '../src/wire/json-scanner.ts'
import {
  type Answerer,
  CHAT,
  closedPort,
  type FakeBackend,
  fakeBackend,
  post,
  rawClient,
  rawPost,
  startGateway,
  type TestGateway
} from './helper.ts'

/** A stream of text whose backend has died goes on from another one, and reads like one answer. */

const WORDS = ['Once', ' upon', ' a "time"', '\n', 'there', ' wäs', ' 🚀', ' and', ' so', ' on.']
const WHOLE = WORDS.join('')
const PROMPT_TOKENS = 7

/** What a backend does with its answer. */
interface Behaviour {
  id?: string
  /** Its connection breaks after so many bytes of the answer. */
  dies?: number
  /** What it sends behind so many words, in place of the rest. */
  turn?: { after: number; text: string; isEnd?: boolean }
  lineEnd?: string
}

/** Writes the text, or the rest of it: a word a token, as vLLM does. */
function model({ id = 'one', dies, turn, lineEnd = '\n' }: Behaviour): Answerer {
  return (request, response, raw) => {
    const body = JSON.parse(request.body)
    const isChat = body.messages !== undefined
    const last = body.messages?.at(-1)
    const begun: string = isChat
      ? last.role === 'assistant'
        ? last.content
        : ''
      : body.prompt.slice('Tell: '.length)
    let at = 0
    while (WORDS.slice(0, at).join('').length < begun.length) at++
    assert.equal(WORDS.slice(0, at).join(''), begun, 'it is asked for the rest of its text')
    const said = Math.min(WORDS.length, at + (body.max_tokens ?? 100))
    const event = (choices: unknown[], more = {}) => {
      const object = isChat ? 'chat.completion.chunk' : 'text_completion'
      const said = { id, object, created: at, model: body.model, choices, ...more }
      return `data: ${JSON.stringify(said)}${lineEnd}${lineEnd}`
    }
    const piece = (delta: { content: string; role?: string }, finish_reason: unknown = null) =>
      event([
        {
          index: 0,
          ...(isChat ? { delta } : { text: delta.content }),
          finish_reason,
          logprobs: null
        }
      ])
    const events = isChat ? [piece({ role: 'assistant', content: '' })] : []
    for (let word = at; word < said; word++) {
      if (turn !== undefined && word === turn.after) {
        events.push(turn.text)
        break
      }
      events.push(piece({ content: WORDS[word]! }))
    }
    if (turn === undefined) {
      events.push(piece({ content: '' }, said < WORDS.length ? 'length' : 'stop'))
      if (body.stream_options?.include_usage) {
        const [prompt_tokens, completion_tokens] = [PROMPT_TOKENS + at, said - at]
        const total_tokens = prompt_tokens + completion_tokens
        events.push(event([], { usage: { prompt_tokens, completion_tokens, total_tokens } }))
      }
      events.push(`data: [DONE]${lineEnd}${lineEnd}`)
    }
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    const bytes = Buffer.from(events.join(''))
    if (dies !== undefined) response.write(bytes.subarray(0, dies), () => raw.socket.destroy())
    else if (turn === undefined || turn.isEnd) response.end(bytes)
    else response.write(bytes)
  }
}

const STREAM = { ...CHAT, stream: true }

interface Pool {
  gateway: TestGateway
  backends: FakeBackend[]
  records: Record<string, unknown>[]
  recorded(): Promise<Record<string, unknown>>
}

async function pool(
  t: TestContext,
  answers: Answerer[],
  { each = {}, routing = {}, ...config }: Record<string, unknown> = {}
): Promise<Pool> {
  const backends = await Promise.all(answers.map(answer => fakeBackend(t, answer)))
  const records: Record<string, unknown>[] = []
  let wanted = 0
  let look = () => {}
  const sink = await fakeBackend(t, (request, response) => {
    const body = JSON.parse(request.body)
    records.push(...(Array.isArray(body) ? body : [body]))
    response.end()
    look()
  })
  const gateway = await startGateway(t, {
    backends: backends.map(({ url }, at) => ({
      name: 'abc'[at],
      url,
      priority: at,
      continuation: 'continue_final_message',
      ...(each as object)
    })),
    routing: {
      retry: { enabled: true, initial_wait: '1ms' },
      circuit_breaker: { enabled: false },
      ...(routing as object)
    },
    usage: {
      enabled: true,
      reporters: [{ type: 'webhook', webhook: { url: `${sink.url}/usage` } }]
    },
    ...config
  })
  return {
    gateway,
    backends,
    records,
    async recorded() {
      wanted++
      await new Promise<void>(resolve => {
        look = () => {
          if (records.length >= wanted) resolve()
        }
        look()
      })
      return records[wanted - 1]!
    }
  }
}

interface Said {
  id: string
  created: number
  model: string
  choices: {
    delta?: { role?: string; content?: string }
    text?: string
    finish_reason: string | null
  }[]
  usage?: { prompt_tokens: number; completion_tokens: number; total_tokens: number }
  error?: { message: string; code: string }
}

/** Asks, and returns all that comes, also when the connection breaks then. */
async function ask(url: string, body: unknown): Promise<string> {
  const answer = await post(url, body)
  const decoder = new TextDecoder()
  let text = ''
  try {
    for await (const piece of answer.body!) text += decoder.decode(piece, { stream: true })
  } catch {
    assert.match(text, /"error"/)
  }
  return text
}

/** What a client makes of it. */
function read(stream: string) {
  const data = stream
    .split(/\r?\n/)
    .filter(line => line.startsWith('data: '))
    .map(line => line.slice(6))
  const said: Said[] = data.filter(each => /^\{.*\}$/.test(each)).map(each => JSON.parse(each))
  const answers = said.filter(each => !each.error && Array.isArray(each.choices))
  const choices = answers.flatMap(each => each.choices).filter(each => each !== null)
  return {
    text: choices.map(each => each.delta?.content ?? each.text ?? '').join(''),
    roles: choices.filter(each => each.delta?.role).length,
    ends: choices.map(each => each.finish_reason).filter(each => each !== null),
    heads: new Set(answers.map(({ id, created, model }) => `${id} ${created} ${model}`)),
    usage: said.find(each => each.usage)?.usage,
    error: said.find(each => each.error)?.error,
    isDone: data.at(-1) === '[DONE]',
    comments: stream.split('\n').filter(line => line.startsWith(':'))
  }
}

/** So many breaks are within the budget for retries of one gateway. */
const CUTS = 10

describe('wherever a backend breaks off another one goes on', { concurrency: true }, () => {
  for (const [what, more, lineEnd] of [
    ['a chat whose client asks for usage', { stream_options: { include_usage: true } }, '\n'],
    ['a chat with other line ends', {}, '\r\n'],
    ['a completion', { messages: undefined, prompt: 'Tell: ' }, '\n']
  ] as const) {
    test(what, { timeout: 30_000 }, async t => {
      const body = { ...STREAM, ...more }
      const isChat = !('prompt' in body)
      const path = isChat ? '/v1/chat/completions' : '/v1/completions'
      const whole = await fakeBackend(t, model({ lineEnd }))
      const asked = { ...body, stream_options: { include_usage: true } }
      const { byteLength } = await (await post(whole.url + path, asked)).arrayBuffer()
      let dies = 1
      let continued = 0
      while (dies < byteLength) {
        const { gateway, backends, recorded } = await pool(t, [
          (request, response, raw) => model({ dies, lineEnd })(request, response, raw),
          model({ id: 'another', lineEnd })
        ])
        let ofPool = 0
        for (let cut = 0; cut < CUTS && dies < byteLength; cut++, dies += 67) {
          const before = backends[1]!.requests.length
          const answer = read(await ask(gateway.url + path, body))
          const record = await recorded()
          const where = `after ${dies} bytes`
          assert.equal(answer.text, WHOLE, where)
          assert.deepEqual(answer.ends, ['stop'], where)
          assert.equal(answer.heads.size, 1, where)
          assert.equal(answer.roles, isChat ? 1 : 0, where)
          // All was written, and what is missing nobody else can say.
          if (answer.error !== undefined) {
            assert.equal(record.outcome, 'backend_failed', where)
            assert.equal(backends[1]!.requests.length, before)
            continue
          }
          assert.ok(answer.isDone, where)
          assert.equal(record.outcome, 'ok', where)
          const { prompt_tokens, completion_tokens, total_tokens } = record
          assert.equal(total_tokens, PROMPT_TOKENS + WORDS.length, where)
          const usage = { prompt_tokens, completion_tokens, total_tokens }
          assert.deepEqual(answer.usage, 'stream_options' in more ? usage : undefined, where)
          if (record.continuations === undefined) continue
          ofPool++
          assert.equal(record.continuations, 1)
          assert.equal(record.backend, 'b')
          assert.equal(record.attempts, 2)
          const { messages, prompt = '', ...rest } = JSON.parse(backends[1]!.requests.at(-1)!.body)
          const begun: string = isChat ? (messages.at(1)?.content ?? '') : prompt.slice(6)
          assert.ok(WHOLE.startsWith(begun))
          assert.equal(record.exactness, begun === '' ? 'exact' : 'counted')
          const isTold = isChat && begun !== ''
          assert.equal(rest.continue_final_message, isTold ? true : undefined)
          assert.equal(rest.add_generation_prompt, isTold ? false : undefined)
        }
        const labels = { result: 'continued' }
        assert.equal(await gateway.metric('llmproxy_continuations_total', labels), ofPool)
        assert.equal(gateway.control.exchanges.open.length, 0)
        continued += ofPool
      }
      assert.ok(continued > 20, `${continued} times`)
    })
  }
})

describe('what else is a break', () => {
  const SILENT = 'a backend that falls silent'
  const cases: Record<string, [Answerer, object?]> = {
    'an error in the stream, as of an engine that has died': [
      model({
        turn: {
          after: 4,
          text: 'data: {"error":{"message":"EngineCore encountered an issue","type":"InternalServerError","code":500}}\n\ndata: [DONE]\n\n',
          isEnd: true
        }
      })
    ],
    'a stream that ends without its end': [model({ turn: { after: 4, text: '', isEnd: true } })],
    'a stream that ends in the middle of an event': [
      model({ turn: { after: 4, text: 'data: {"id":"one","choices":[{"ind', isEnd: true } })
    ],
    [SILENT]: [
      model({ turn: { after: 4, text: '' } }),
      { routing: { idle_timeout: '100ms', retry: { enabled: true } } }
    ]
  }
  for (const [what, [answer, config]] of Object.entries(cases)) {
    test(what, async t => {
      const { gateway, backends, recorded } = await pool(t, [answer, model({ id: 'b' })], {
        ...config
      })
      const said = read(await ask(`${gateway.url}/v1/chat/completions`, STREAM))
      assert.equal(said.text, WHOLE)
      assert.equal(said.error, undefined)
      assert.deepEqual(said.comments, [': goes on from another backend'])
      assert.equal((await recorded()).outcome, 'ok')
      if (what === SILENT) await backends[0]!.requests[0]!.closed
    })
  }
})

test('from a third one, and never from one that has broken off', async t => {
  const { gateway, backends, recorded } = await pool(t, [
    model({ id: 'a', dies: 700 }),
    model({ id: 'b', dies: 500 }),
    model({ id: 'c' })
  ])
  const body = { ...STREAM, max_tokens: 50, stream_options: { include_usage: true } }
  const said = read(await ask(`${gateway.url}/v1/chat/completions`, body))
  assert.equal(said.text, WHOLE)
  assert.equal(said.heads.size, 1)
  assert.deepEqual(
    backends.map(each => each.requests.length),
    [1, 1, 1]
  )
  const [, b, c] = backends.map(each => JSON.parse(each.requests[0]!.body))
  assert.ok(b.messages[1].content.length < c.messages[1].content.length)
  assert.ok(50 > b.max_tokens && b.max_tokens > c.max_tokens)
  const record = await recorded()
  assert.equal(record.continuations, 2)
  assert.equal(record.attempts, 3)
  assert.equal(record.total_tokens, PROMPT_TOKENS + WORDS.length)
  assert.equal(said.usage?.completion_tokens, record.completion_tokens)
})

test('the model keeps the name that its caller knows', async t => {
  const { gateway, backends, recorded } = await pool(t, [model({ dies: 700 }), model({})], {
    each: { models: [{ public: 'own' }] }
  })
  const body = { ...STREAM, model: 'public' }
  const said = read(await ask(`${gateway.url}/v1/chat/completions`, body))
  assert.equal(said.text, WHOLE)
  assert.deepEqual([...said.heads], ['one 0 public'])
  assert.equal(JSON.parse(backends[1]!.requests[0]!.body).model, 'own')
  assert.equal((await recorded()).model, 'own')
})

test('a backend that goes on of its own accord gets no members that it does not know', async t => {
  const { gateway, backends, recorded } = await pool(t, [model({ dies: 700 }), model({})], {
    each: { continuation: 'assistant_prefill' }
  })
  const said = read(await ask(`${gateway.url}/v1/chat/completions`, STREAM))
  assert.equal(said.text, WHOLE)
  const { messages, ...rest } = JSON.parse(backends[1]!.requests[0]!.body)
  assert.equal(messages.length, 2)
  assert.deepEqual(Object.keys(rest).sort(), ['model', 'stream', 'stream_options'])
  assert.equal((await recorded()).continuations, 1)
})

describe('what nobody goes on with', { concurrency: true }, () => {
  const toolCall =
    '{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]},"finish_reason":null}'
  const thought = '{"index":0,"delta":{"reasoning_content":"Hm"},"finish_reason":null}'
  const event = (choice: string) => `data: {"id":"one","choices":[${choice}]}\n\n`
  const dying = model({ dies: 700 })
  const cases: Record<string, { body?: object; answer?: Answerer; config?: object }> = {
    'a request with tools': { body: { tools: [{ type: 'function' }] } },
    'one for JSON': { body: { response_format: { type: 'json_object' } } },
    'one with members that only its backend knows': { body: { guided_regex: 'a*' } },
    'one that ends with the beginning of its answer': {
      body: {
        messages: [
          { role: 'user', content: 'Hello' },
          { role: 'assistant', content: 'Once' }
        ]
      }
    },
    'an answer with a tool call': {
      answer: model({ turn: { after: 3, text: event(toolCall), isEnd: true } })
    },
    'an answer with thoughts': {
      answer: model({ turn: { after: 3, text: event(thought), isEnd: true } })
    },
    'backends that cannot': { config: { each: { continuation: undefined } } },
    'when routing.enabled is false': {
      config: { routing: { enabled: false, fallback: [] } }
    },
    'an answer that has taken too long': {
      answer: model({ turn: { after: 3, text: '' } }),
      config: { routing: { total_timeout: '400ms' } }
    },
    'another model in its place': {
      config: {
        backends: undefined,
        routing: { model_fallbacks: { m: ['n'] } }
      }
    }
  }
  for (const [what, { body = {}, answer = dying, config = {} }] of Object.entries(cases)) {
    test(what, async t => {
      const other = await fakeBackend(t, model({ id: 'b' }))
      const first = await fakeBackend(t, answer)
      const isOtherModel = 'backends' in config
      const backends = [first, other].map(({ url }, at) => ({
        name: 'ab'[at],
        url,
        priority: at,
        continuation: 'continue_final_message',
        ...(isOtherModel ? { models: ['mn'[at]] } : {}),
        ...('each' in config ? (config.each as object) : {})
      }))
      const { each: _, routing = {}, ...rest } = config as { each?: object; routing?: object }
      const gateway = await startGateway(t, { ...rest, backends, routing })
      const url = `${gateway.url}/v1/chat/completions`
      const said = read(await ask(url, { ...STREAM, ...body }))
      assert.match(said.error!.message, /broke off|longer than it may/)
      assert.ok(WHOLE.includes(said.text) && said.text !== WHOLE, said.text)
      assert.equal(other.requests.length, 0)
      const line = await gateway.logged({ msg: 'exchange' })
      assert.notEqual(line.outcome, 'ok')
    })
  }
})

describe('when nobody can go on after all the client hears why the first one broke off', {
  concurrency: true
}, () => {
  const error: Answerer = (_request, response) => {
    response.writeHead(400, { 'content-type': 'application/json' })
    response.end('{"error":{"message":"continue_final_message?"}}')
  }
  const cases: Record<string, Answerer> = {
    'it does not know how': error,
    'it fails': (_request, response) => response.writeHead(500).end(),
    'it gives a whole answer': (_request, response) => {
      response.writeHead(200, { 'content-type': 'application/json' })
      response.end('{"choices":[]}')
    },
    'it begins with an error': (_request, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      response.end('data: {"error":{"message":"queue full","code":503}}\n\ndata: [DONE]\n\n')
    },
    'it breaks off at once': (_request, _response, raw) => raw.socket.destroy()
  }
  for (const [what, answer] of Object.entries(cases)) {
    test(what, async t => {
      const { gateway, backends, recorded } = await pool(t, [model({ dies: 700 }), answer])
      const said = read(await ask(`${gateway.url}/v1/chat/completions`, STREAM))
      assert.equal(said.error?.message, 'The backend broke off in the middle of its answer.')
      assert.ok(said.text !== '' && WHOLE.startsWith(said.text))
      // A connection that is cut at once may be one that had been closed before.
      assert.ok(backends[1]!.requests.length <= (what === 'it breaks off at once' ? 2 : 1))
      const record = await recorded()
      assert.equal(record.outcome, 'backend_failed')
      assert.equal(record.continuations, undefined)
      const failed = await gateway.metric('llmproxy_continuations_total', { result: 'failed' })
      assert.equal(failed, 1)
      assert.equal(gateway.control.exchanges.open.length, 0)
    })
  }

  test('it cannot be reached', async t => {
    const a = await fakeBackend(t, model({ dies: 700 }))
    const gone = `http://127.0.0.1:${await closedPort()}`
    const gateway = await startGateway(t, {
      backends: [a.url, gone].map((url, priority) => ({
        url,
        priority,
        continuation: 'assistant_prefill'
      }))
    })
    const said = read(await ask(`${gateway.url}/v1/chat/completions`, STREAM))
    assert.equal(said.error?.message, 'The backend broke off in the middle of its answer.')
  })

  test('it does something else', async t => {
    const { gateway, recorded, backends } = await pool(t, [
      model({ dies: 700 }),
      (_request, response) => {
        response.writeHead(200, { 'content-type': 'text/event-stream' })
        const delta = { tool_calls: [{ index: 0, function: { name: 'f', arguments: '{' } }] }
        response.write(
          `data: ${JSON.stringify({ id: 'b', choices: [{ index: 0, delta, finish_reason: null }] })}\n\n`
        )
      }
    ])
    const said = read(await ask(`${gateway.url}/v1/chat/completions`, STREAM))
    assert.match(said.error!.message, /broke off/)
    assert.equal((await recorded()).outcome, 'backend_failed')
    await backends[1]!.requests[0]!.closed
  })
})

test('a client that leaves meanwhile stops whoever was to go on', async t => {
  const { gateway, backends, recorded } = await pool(t, [model({ dies: 700 }), () => {}], {
    server: { heartbeat: '20ms' }
  })
  const body = JSON.stringify(STREAM)
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  const { closed } = await backends[1]!.request()
  await client.until(/\n:\n/)
  client.socket.destroy()
  await closed
  const record = await recorded()
  assert.equal(record.outcome, 'client_gone')
  assert.equal(record.exactness, 'counted')
  assert.ok((record.completion_tokens as number) > 0)
})

test('who goes on may have to be waited for', async t => {
  const held: (() => void)[] = []
  const b = model({ id: 'b' })
  const { gateway, backends, recorded } = await pool(
    t,
    [
      model({ dies: 700 }),
      (request, response, raw) => {
        if (!request.body.includes('first')) return b(request, response, raw)
        return void held.push(() => b(request, response, raw))
      }
    ],
    {
      each: { max_concurrent: 1, continuation: 'continue_final_message' },
      routing: { fallback: [{ models: ['n'], primary: 'b', fallback: [] }] },
      server: { heartbeat: '20ms' }
    }
  )
  const url = `${gateway.url}/v1/chat/completions`
  const first = post(url, { ...STREAM, model: 'n', user: 'first' })
  await backends[1]!.request()
  const body = JSON.stringify(STREAM)
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/: position 1 in the queue/)
  held[0]!()
  await (await first).text()
  const stream = await client.until(/\[DONE\]/)
  assert.ok(Buffer.from(stream, 'latin1').toString().includes('"content":" on."'))
  await recorded()
  assert.equal((await recorded()).continuations, 1)
})

function bodyOf(text: string) {
  const bytes = Buffer.from(text)
  return { bytes, ...outlineOf(bytes) }
}

test('the request for the rest is the request, but for what must change', () => {
  const rest = (text: string, tokens = 3) => {
    const body = bodyOf(text)
    return String(changed(body, changesForRest(body, 'A "b"', tokens, 'continue_final_message')))
  }
  assert.equal(
    rest(
      '{ "model":"m","messages" : [ {"role":"user","content":"x"} ],"seed":12345678901234567890}'
    ),
    '{"continue_final_message":true,"add_generation_prompt":false, "model":"m","messages" : [ {"role":"user","content":"x"} ,{"role":"assistant","content":"A \\"b\\""}],"seed":12345678901234567890}'
  )
  assert.equal(
    rest('{"prompt":"x ","max_tokens":10,"stream":true}'),
    '{"prompt":"x A \\"b\\"","max_tokens":7,"stream":true}'
  )
  assert.equal(rest('{"prompt":"","max_tokens":2}'), '{"prompt":"A \\"b\\"","max_tokens":1}')
  assert.equal(
    rest('{"max_tokens":null,"prompt":"x"}'),
    '{"max_tokens":null,"prompt":"xA \\"b\\""}'
  )
  const untouched = bodyOf('{"messages":[{"role":"user"}]}')
  assert.deepEqual(changesForRest(untouched, '', 0, 'continue_final_message'), [])
})

test('which requests ask for text alone, and leave its end open', () => {
  const endOf = (text: string) => openEnd(bodyOf(text))?.name
  const isOpen = (body: object) => endOf(JSON.stringify(body)) !== undefined
  const chat = { model: 'm', messages: [{ role: 'user', content: 'x' }], stream: true, stop: ['a'] }
  assert.ok(isOpen(chat))
  assert.ok(isOpen({ ...chat, n: 1, tools: null, functions: [], logprobs: false }))
  assert.ok(isOpen({ ...chat, tool_choice: 'none', response_format: { type: 'text' } }))
  assert.equal(endOf('{ "messages" : [ {"role":"assistant"} , {"role":"user"} ] }'), 'messages')
  assert.equal(endOf('{"prompt":""}'), 'prompt')
  for (const more of [
    { n: 2 },
    { tools: [{}] },
    { logprobs: true },
    { response_format: { type: 'json_schema' } },
    { suffix: 'x' },
    { continue_final_message: false },
    { add_generation_prompt: true },
    { audio: { voice: 'a' } },
    { prompt: '' },
    { messages: [] },
    { messages: 'x' },
    { messages: ['x'] },
    { messages: [{ content: 'x' }] },
    { messages: undefined },
    { messages: [{ role: 'user' }, { content: [{}, '],'], role: 'assistant' }] }
  ])
    assert.ok(!isOpen({ ...chat, ...more }), JSON.stringify(more))
  for (const prompt of [['a', 'b'], [1, 2], null]) assert.ok(!isOpen({ prompt }))
})

/** A backend that sends these events and then breaks off, ends, or waits. */
function says(events: string[], then: 'breaks' | 'ends' | 'waits' = 'ends'): Answerer {
  return (_request, response, raw) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    if (then === 'ends') response.end(events.join(''))
    else {
      response.write(events.join(''), () => {
        if (then === 'breaks') raw.socket.destroy()
      })
    }
  }
}

const said = (choice: unknown, more: object = {}) =>
  `data: ${JSON.stringify({ id: 'one', created: 1, model: 'm', choices: [choice], ...more })}\n\n`
const piece = (content: string, finish_reason: string | null = null) =>
  said({ index: 0, delta: { content }, finish_reason })
const END = `${piece('', 'stop')}data: [DONE]\n\n`

describe('what backends may say', { concurrency: true }, () => {
  const url = '/v1/chat/completions'
  const cases: Record<
    string,
    { answers: Answerer[]; text: string; error?: RegExp; outcome?: string }
  > = {
    'two end without their end': {
      answers: [says([piece('A')], 'breaks'), says([piece('B')])],
      text: 'AB',
      error: /broke off/
    },
    'the last event lacks its blank line': {
      answers: [says([piece('A'), piece('B', 'stop').slice(0, -1)]), says([piece('C'), END])],
      text: 'AB'
    },
    'no delta in a short answer': {
      answers: [says([piece('A'), said({ delta: null, finish_reason: 'stop' })]), says([END])],
      text: 'A'
    },
    'choices that are none': {
      answers: [
        says([piece('A'), 'data: {"choices":{}}\n\n', 'data: {"choices":[null]}\n\n', END]),
        says([END])
      ],
      text: 'A'
    },
    'empty data, and odd events behind the end': {
      answers: [
        says([piece('A')], 'breaks'),
        says(['data:\n\n', piece('B'), piece('', 'stop'), 'data: odd\n\n', 'data: [DONE]\n\n'])
      ],
      text: 'AB'
    },
    'an introduction before the first choice': {
      answers: [
        says(['data: {"id":"","choices":[],"created":0,"model":""}\n\n', piece('A')], 'breaks'),
        says([piece('B').replace('one', 'two'), END])
      ],
      text: 'AB'
    },
    'an error in its flat form, in two pieces': {
      answers: [
        (request, response, raw) => {
          says([piece('A'), 'data: {"object":"error",'], 'waits')(request, response, raw)
          setImmediate(() =>
            response.end('"message":"engine dead","code":500}\n\ndata: [DONE]\n\n')
          )
        },
        says([piece('B'), END])
      ],
      text: 'AB'
    },
    'an abort': {
      answers: [says([piece('A'), piece('', 'abort')]), says([piece('B'), END])],
      text: 'AB'
    },
    'an abort of the last one': {
      answers: [says([piece('A')], 'breaks'), says([piece('B'), piece('', 'abort')])],
      text: 'AB',
      outcome: 'backend_failed'
    },
    'an error that nobody can mend': {
      answers: [
        says([piece('A')], 'breaks'),
        says([piece('B'), 'data: {"error":{"message":"dead","code":500}}\n\n'])
      ],
      text: 'AB',
      error: /dead/
    },
    'pieces that are alike, and escaped ones': {
      answers: [
        says(
          [piece('A'), piece('B'), piece('\\'), piece('"C"'), piece('\nD'), piece('é')],
          'breaks'
        ),
        says([piece('E'), END])
      ],
      text: 'AB\\"C"\nDéE'
    },
    'the next one can not, the one after it can': {
      answers: [
        says([piece('A')], 'breaks'),
        (_request, response) => response.writeHead(400).end('{}'),
        says([piece('B'), END])
      ],
      text: 'AB'
    },
    'the next one thinks, the one after it does not': {
      answers: [
        says([piece('A')], 'breaks'),
        says([piece('B'), said({ index: 0, delta: { reasoning_content: 'Hm' } })], 'waits'),
        says([piece('C'), END])
      ],
      text: 'ABC'
    },
    'an event without an end': {
      answers: [
        says([piece('A')], 'breaks'),
        says([`data: ${'x'.repeat(100_000)}`], 'waits'),
        says([piece('B'), END])
      ],
      text: 'AB'
    },
    'an error that is null': {
      answers: [
        says([said({ delta: { content: 'A' } }, { error: null })], 'breaks'),
        says([said({ delta: { content: 'B' } }, { error: null, id: 'two' }), END])
      ],
      text: 'AB'
    },
    'an empty extra member': {
      answers: [
        says([said({ delta: { content: 'A', provider_specific_fields: {} } })], 'breaks'),
        says([piece('B'), END])
      ],
      text: 'AB'
    }
  }
  for (const [what, { answers, text, error, outcome }] of Object.entries(cases)) {
    test(what, async t => {
      const { gateway, backends, recorded } = await pool(t, answers)
      const answer = read(await ask(gateway.url + url, STREAM))
      assert.equal(answer.text, text)
      if (error === undefined) assert.equal(answer.error, undefined)
      else assert.match(answer.error!.message, error)
      const record = await recorded()
      assert.equal(record.outcome, outcome ?? (error === undefined ? 'ok' : 'backend_failed'))
      const last = backends.findLast(each => each.requests.length > 0)!
      if (last !== backends[0]) {
        const { messages } = JSON.parse(last.requests[0]!.body)
        assert.equal(messages[1].content, text.slice(0, messages[1].content.length))
        assert.equal([...answer.heads].at(-1), 'one 1 m')
      }
      assert.equal(gateway.control.exchanges.open.length, 0)
      for (const backend of ['a', 'b']) {
        assert.equal(await gateway.metric('llmproxy_backend_in_flight', { backend }), 0)
      }
    })
  }
})

test('a server that repeats the text so far does not write it twice', async t => {
  const [one, two] = ['Once upon', ' a time']
  for (const first of [`${one}${two}`, one]) {
    const rest = first === one ? [piece(two)] : []
    const { gateway, recorded } = await pool(
      t,
      [
        says([piece('Once'), piece(' upon')], 'breaks'),
        says([piece(first), ...rest, piece('.'), END])
      ],
      { each: { continuation: 'assistant_prefill' } }
    )
    assert.equal(
      read(await ask(`${gateway.url}/v1/chat/completions`, STREAM)).text,
      `${one}${two}.`
    )
    assert.equal((await recorded()).outcome, 'ok')
  }
})

test('a model may begin to go on with the words it has begun with', async t => {
  for (const continuation of ['continue_final_message', 'assistant_prefill']) {
    const second = continuation === 'assistant_prefill' ? [piece('Ha'), piece('ha')] : [piece('Ha')]
    const { gateway, recorded } = await pool(
      t,
      [says([piece('Ha')], 'breaks'), says([...second, piece('!'), END])],
      { each: { continuation } }
    )
    const expected = continuation === 'assistant_prefill' ? 'Haha!' : 'HaHa!'
    assert.equal(read(await ask(`${gateway.url}/v1/chat/completions`, STREAM)).text, expected)
    await recorded()
  }
})

test('the tokens of a first continuation are divided, and max_tokens is lowered by what was written', async t => {
  const words = ['Once', ' upon', ' a', ' time', ' there', ' was']
  const usage = { prompt_tokens: 12 + words.length, completion_tokens: 1, total_tokens: 19 }
  const { gateway, backends, recorded } = await pool(t, [
    says(
      words.map(word => piece(word)),
      'breaks'
    ),
    says([piece('.', 'stop'), `data: ${JSON.stringify({ choices: [], usage })}\n\n`, END])
  ])
  const body = { ...STREAM, max_tokens: 50, stream_options: { include_usage: true } }
  const said = read(await ask(`${gateway.url}/v1/chat/completions`, body))
  assert.equal(JSON.parse(backends[1]!.requests[0]!.body).max_tokens, 50 - words.length)
  const { prompt_tokens, completion_tokens, total_tokens } = said.usage!
  assert.equal(total_tokens, 19)
  assert.ok(prompt_tokens >= 6 && prompt_tokens <= 16, String(prompt_tokens))
  assert.equal(completion_tokens, 19 - prompt_tokens)
  await recorded()
})

test('a request for nothing brings nobody down', async t => {
  const { gateway, backends, recorded } = await pool(t, [says([piece('A')], 'breaks'), says([END])])
  const answer = await ask(`${gateway.url}/v1/chat/completions`, { model: 'm', stream: true })
  assert.match(read(answer).error!.message, /broke off/)
  assert.equal(backends[1]!.requests.length, 0)
  await recorded()
})

test('tokens that only the first backend has told are not those of the whole answer', async t => {
  const usage = (tokens: number) => ({
    usage: { prompt_tokens: 7, completion_tokens: tokens, total_tokens: 7 + tokens }
  })
  const first = ['A', ' B'].map((content, at) => said({ delta: { content } }, usage(at + 1)))
  const { gateway, recorded } = await pool(t, [
    says(first, 'breaks'),
    says([piece(' C'), piece(' D'), piece(' E'), piece(' F'), END])
  ])
  const body = { ...STREAM, stream_options: { include_usage: true, continuous_usage_stats: true } }
  await ask(`${gateway.url}/v1/chat/completions`, body)
  const record = await recorded()
  assert.equal(record.prompt_tokens, 7)
  assert.ok((record.completion_tokens as number) >= 4, String(record.completion_tokens))
  assert.equal(record.exactness, 'counted')
})

test('no more is written than was asked for', async t => {
  const { gateway, backends, recorded } = await pool(t, [
    says([piece('A'), piece('B')], 'breaks'),
    says([piece('C'), END])
  ])
  const answer = await ask(`${gateway.url}/v1/chat/completions`, { ...STREAM, max_tokens: 2 })
  assert.equal(read(answer).text, 'AB')
  assert.equal(backends[1]!.requests.length, 0)
  await recorded()
})

test('who becomes available meanwhile must be able to go on, too', async t => {
  const token = 'a'.repeat(40)
  const asked = Promise.withResolvers<() => void>()
  const backends = await Promise.all(
    [
      says([piece('A')], 'breaks'),
      ((_request, response) =>
        asked.resolve(() => response.writeHead(500).end())) satisfies Answerer,
      says([piece('C'), END])
    ].map(answer => fakeBackend(t, answer))
  )
  const gateway = await startGateway(t, {
    backends: backends.map(({ url }, at) => ({
      name: 'abc'[at],
      url,
      priority: at,
      ...(at < 2 ? { continuation: 'continue_final_message' } : {})
    })),
    admin: { enabled: true, token }
  })
  const admin = (what: string) =>
    fetch(`${gateway.url}/admin/backends/c/${what}`, {
      method: 'POST',
      headers: { 'x-admin-token': token }
    })
  await admin('drain')
  const answer = ask(`${gateway.url}/v1/chat/completions`, STREAM)
  const fail = await asked.promise
  await admin('undrain')
  fail()
  assert.match(read(await answer).error!.message, /broke off/)
  assert.equal(backends[2]!.requests.length, 0)
  const line = await gateway.logged({ msg: 'exchange', route: '/v1/chat/completions' })
  assert.equal(line.backend, 'a', 'who has written it')
})

test('one that was slower than another may go on with what that one has begun', async t => {
  let late = 0
  const seen: string[] = []
  const answer =
    (name: string): Answerer =>
    (request, response, raw) => {
      if (!request.body.includes('"late"')) return says([piece('A'), END])(request, response, raw)
      seen.push(name)
      if (request.body.includes('continue_final_message')) {
        return says([piece('C'), END])(request, response, raw)
      }
      return late++ > 0
        ? says([piece('A'), piece('B')], 'breaks')(request, response, raw)
        : undefined
    }
  const backends = await Promise.all([answer('a'), answer('b')].map(each => fakeBackend(t, each)))
  const gateway = await startGateway(t, {
    backends: backends.map(({ url }) => ({ url, continuation: 'continue_final_message' })),
    routing: { hedge: { enabled: true } }
  })
  const url = `${gateway.url}/v1/chat/completions`
  for (let call = 0; call < 49; call++) await ask(url, { ...STREAM, user: 'fast' })
  assert.equal(read(await ask(url, { ...STREAM, user: 'late' })).text, 'ABC')
  const [first, second, third] = seen
  assert.ok(first !== second && first === third, seen.join())
})

test('backends that a reload has brought go on', async t => {
  const broken = Promise.withResolvers<() => void>()
  const first = await fakeBackend(t, (request, response, raw) => {
    says([piece('A')], 'waits')(request, response, raw)
    broken.resolve(() => raw.socket.destroy())
  })
  const second = await fakeBackend(t, says([piece('B'), END]))
  const third = await fakeBackend(t, says([piece('C'), END]))
  const config = (...backends: FakeBackend[]) => ({
    backends: backends.map(({ url }) => ({ url, continuation: 'assistant_prefill' })),
    routing: { load_balance: 'round_robin' }
  })
  const gateway = await startGateway(t, config(first, second))
  const body = JSON.stringify(STREAM)
  const client = await rawClient(t, gateway.port, rawPost('/v1/chat/completions', body))
  await client.until(/"content":"A"/)
  await gateway.control.reload(parseConfig(JSON.stringify(config(third)), 'x', {}) as never)
  ;(await broken.promise)()
  assert.match(await client.until(/\[DONE\]/), /"content":"C"/)
  assert.equal(second.requests.length, 0)
})
