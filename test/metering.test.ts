import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import fc from 'fast-check'
import { anthropic } from '../src/dialects/anthropic.ts'
import type { Dialect } from '../src/dialects/dialect.ts'
import { ollama } from '../src/dialects/ollama.ts'
import { openai } from '../src/dialects/openai.ts'
import { responses } from '../src/dialects/responses.ts'
import type { Framing } from '../src/http.ts'
import { Counts } from '../src/metering/counts.ts'
import { Meter } from '../src/metering/meter.ts'
import { characters } from '../src/metering/text.ts'
import { askForUsage, changed, type UsageField } from '../src/payload-edits.ts'
import { outlineOf } from '../src/wire/json-scanner.ts'
import {
  type Answerer,
  CHAT,
  chunk,
  DONE,
  eventually,
  fakeBackend,
  post,
  startGateway,
  USAGE_CHUNK
} from './helper.ts'

const data = (value: unknown) => `data: ${JSON.stringify(value)}\n\n`
const typed = (value: { type: string }) => `event: ${value.type}\n${data(value)}`
const chat = (delta: object, more: object = {}) =>
  data({ id: 'c', choices: [{ index: 0, delta, finish_reason: null }], ...more })
const last = (usage: unknown, more: object = {}) => data({ id: 'c', choices: [], usage, ...more })

interface Case {
  name: string
  framing: Framing
  dialect: Dialect
  text: string
  /** prompt, completion, total, cached */
  tokens: [number, number, number, number?] | undefined
  deltas: number
  /** What is left when the usage chunk is taken out; the whole text if left out. */
  kept?: string
}

const OPENAI_HEAD = chat({ role: 'assistant', content: '' }) + chat({ reasoning: 'Let me' })

const CASES: Case[] = [
  {
    name: 'vLLM, asked',
    framing: 'sse',
    dialect: openai,
    text: `${OPENAI_HEAD}${chat({ content: 'Hi' })}${last({ prompt_tokens: 12, total_tokens: 20, completion_tokens: 8 })}${DONE}`,
    tokens: [12, 8, 20],
    deltas: 2,
    kept: `${OPENAI_HEAD}${chat({ content: 'Hi' })}${DONE}`
  },
  {
    name: 'vLLM, not asked',
    framing: 'sse',
    dialect: openai,
    text: OPENAI_HEAD + chat({ content: 'Hi' }) + DONE,
    tokens: undefined,
    deltas: 2
  },
  {
    name: 'vLLM, continuous usage on every chunk',
    framing: 'sse',
    dialect: openai,
    text:
      chat(
        { content: 'a' },
        { usage: { prompt_tokens: 5, completion_tokens: 1, total_tokens: 6 } }
      ) +
      chat(
        { content: 'b' },
        { usage: { prompt_tokens: 5, completion_tokens: 2, total_tokens: 7 } }
      ) +
      DONE,
    tokens: [5, 2, 7],
    deltas: 2
  },
  {
    name: 'SGLang: nulls, an empty chunk that is not usage, cached tokens',
    framing: 'sse',
    dialect: openai,
    text:
      chat({ content: 'a', reasoning_content: null, tool_calls: null }, { usage: null }) +
      data({ id: 'c', choices: [], sglext: { x: 1 }, usage: null }) +
      last({
        prompt_tokens: 9,
        completion_tokens: 1,
        total_tokens: 10,
        prompt_tokens_details: { cached_tokens: 4 }
      }) +
      DONE,
    tokens: [9, 1, 10, 4],
    deltas: 1,
    kept:
      chat({ content: 'a', reasoning_content: null, tool_calls: null }, { usage: null }) +
      data({ id: 'c', choices: [], sglext: { x: 1 }, usage: null }) +
      DONE
  },
  {
    name: 'Ollama /v1/completions: zeros on every chunk, the numbers at the end',
    framing: 'sse',
    dialect: openai,
    text:
      data({
        choices: [{ text: 'a' }],
        usage: { prompt_tokens: 0, completion_tokens: 0, total_tokens: 0 }
      }) +
      last({ prompt_tokens: 3, completion_tokens: 1, total_tokens: 4 }) +
      DONE,
    tokens: [3, 1, 4],
    deltas: 1,
    kept:
      data({
        choices: [{ text: 'a' }],
        usage: { prompt_tokens: 0, completion_tokens: 0, total_tokens: 0 }
      }) + DONE
  },
  {
    name: 'usage inside the last chunk with text (TGI, llama.cpp completions)',
    framing: 'sse',
    dialect: openai,
    text:
      data({ choices: [{ text: 'a' }] }) +
      data({
        choices: [{ text: 'b' }],
        usage: { prompt_tokens: 2, completion_tokens: 2, total_tokens: 4 }
      }) +
      DONE,
    tokens: [2, 2, 4],
    deltas: 2
  },
  {
    name: 'tool calls in pieces',
    framing: 'sse',
    dialect: openai,
    text:
      chat({
        tool_calls: [
          { id: 't', type: 'function', index: 0, function: { name: 'f', arguments: '' } }
        ]
      }) +
      chat({ tool_calls: [{ index: 0, function: { arguments: '{"usage":' } }] }) +
      chat({ tool_calls: [{ index: 0, function: { arguments: '{"prompt_tokens":9}}' } }] }) +
      DONE,
    tokens: undefined,
    deltas: 2
  },
  {
    name: 'text that looks like usage',
    framing: 'sse',
    dialect: openai,
    text:
      chat({ content: '"usage":{"prompt_tokens":99,"completion_tokens":99}' }) +
      chat({ content: 'data: {"choices":[],"usage":{"prompt_tokens":99}}\n\n' }) +
      chat({ content: 'usage', usage: { prompt_tokens: 98 } }) +
      data({ choices: [{ delta: { content: 'x' }, usage: { prompt_tokens: 97 } }] }) +
      DONE,
    tokens: undefined,
    deltas: 4
  },
  {
    name: 'no space after the colon, comments, other fields, data in two lines',
    framing: 'sse',
    dialect: openai,
    text: `:\n\n: hello\n\nid: 1\nevent: x\nretry: 5\ndata:{"choices":[],\ndata: "usage":{"prompt_tokens":1,"completion_tokens":2}}\n\ndata:[DONE]\n\n`,
    tokens: [1, 2, 3],
    deltas: 0,
    kept: ':\n\n: hello\n\ndata:[DONE]\n\n'
  },
  {
    name: 'Responses',
    framing: 'sse',
    dialect: responses,
    text:
      typed({ type: 'response.created', response: { id: 'r', usage: null } } as never) +
      typed({ type: 'response.output_text.delta', delta: 'Hi' } as never) +
      typed({ type: 'response.function_call_arguments.delta', delta: '{' } as never) +
      typed({ type: 'response.output_text.done', text: 'Hi' } as never) +
      typed({
        type: 'response.completed',
        response: {
          id: 'r',
          output: [{ content: [{ text: 'x'.repeat(100_000) }] }],
          usage: {
            input_tokens: 36,
            input_tokens_details: { cached_tokens: 6 },
            output_tokens: 87,
            output_tokens_details: { reasoning_tokens: 7 },
            total_tokens: 123
          }
        }
      } as never),
    tokens: [36, 87, 123, 6],
    deltas: 2
  },
  {
    name: 'Anthropic, cached tokens beside the input',
    framing: 'sse',
    dialect: anthropic,
    text:
      typed({
        type: 'message_start',
        message: {
          id: 'm',
          content: [],
          usage: { input_tokens: 12, output_tokens: 1, cache_read_input_tokens: 100 }
        }
      } as never) +
      typed({
        type: 'content_block_start',
        index: 0,
        content_block: { type: 'text', text: '' }
      } as never) +
      typed({ type: 'ping' }) +
      typed({
        type: 'content_block_delta',
        index: 0,
        delta: { type: 'text_delta', text: 'Hi' }
      } as never) +
      typed({
        type: 'content_block_delta',
        index: 1,
        delta: { type: 'input_json_delta', partial_json: '{' }
      } as never) +
      typed({
        type: 'message_delta',
        delta: { stop_reason: 'end_turn' },
        usage: { output_tokens: 8 }
      } as never) +
      typed({ type: 'message_stop' }),
    tokens: [112, 8, 120, 100],
    deltas: 2
  },
  {
    name: 'Anthropic from Ollama: an estimate first, the numbers in message_delta',
    framing: 'sse',
    dialect: anthropic,
    text:
      typed({
        type: 'message_start',
        message: { usage: { input_tokens: 50, output_tokens: 0 } }
      } as never) +
      typed({ type: 'message_delta', usage: { input_tokens: 41, output_tokens: 8 } } as never) +
      typed({ type: 'message_stop' }),
    tokens: [41, 8, 49],
    deltas: 0
  },
  {
    name: 'Ollama native',
    framing: 'ndjson',
    dialect: ollama,
    text: `${JSON.stringify({ model: 'm', message: { role: 'assistant', content: 'Hi' }, done: false })}\n${JSON.stringify(
      { model: 'm', message: { content: '' }, done: true, prompt_eval_count: 26, eval_count: 298 }
    )}\n`,
    tokens: [26, 298, 324],
    deltas: 1
  },
  {
    name: 'Ollama generate, the prompt was cached (no prompt_eval_count)',
    framing: 'ndjson',
    dialect: ollama,
    text: '{"response":"Hi","done":false}\n{"response":"","done":true,"eval_count":7}\n',
    tokens: [0, 7, 7],
    deltas: 1
  },
  {
    name: 'Ollama, a tool call and no text',
    framing: 'ndjson',
    dialect: ollama,
    text: '{"message":{"content":"","tool_calls":[{"function":{"name":"f","arguments":{"a":1}}}]},"done":false}\n',
    tokens: undefined,
    deltas: 1
  },
  {
    name: 'a transcription, metered by its length and not by tokens',
    framing: 'json',
    dialect: openai,
    text: '{"text":"hello","usage":{"type":"duration","seconds":3}}',
    tokens: undefined,
    deltas: 1
  },
  {
    name: 'a whole chat answer',
    framing: 'json',
    dialect: openai,
    text: JSON.stringify(
      {
        id: 'c',
        choices: [{ message: { content: '{"usage":{"prompt_tokens":99}}' } }],
        usage: { prompt_tokens: 12, completion_tokens: 3, total_tokens: 15 }
      },
      null,
      2
    ),
    tokens: [12, 3, 15],
    deltas: 1
  },
  {
    name: 'embeddings',
    framing: 'json',
    dialect: openai,
    text: JSON.stringify({
      data: [{ embedding: Array.from({ length: 3000 }, (_, index) => index / 7) }],
      usage: { prompt_tokens: 8, total_tokens: 8 }
    }),
    tokens: [8, 0, 8],
    deltas: 0
  },
  {
    name: 'rerank',
    framing: 'json',
    dialect: openai,
    text: JSON.stringify({
      usage: { total_tokens: 56 },
      results: [{ document: { text: 'usage' } }]
    }),
    tokens: [56, 0, 56],
    deltas: 1
  },
  {
    name: 'a whole Messages answer',
    framing: 'json',
    dialect: anthropic,
    text: JSON.stringify({
      type: 'message',
      content: [{ type: 'text', text: 'Hi' }],
      usage: {
        input_tokens: 5,
        cache_creation_input_tokens: 3,
        cache_read_input_tokens: 0,
        output_tokens: 2
      }
    }),
    tokens: [8, 2, 10],
    deltas: 1
  },
  {
    name: 'Ollama embed',
    framing: 'json',
    dialect: ollama,
    text: '{"model":"m","embeddings":[[0.1,-2.5e-3]],"prompt_eval_count":4}',
    tokens: [4, 0, 4],
    deltas: 0
  }
]

/** Runs a text through a meter, cut at these places. */
function run({ framing, dialect, text }: Case, cuts: number[], takeOut: boolean) {
  const meter = new Meter({ framing, dialect, takeOut })
  const bytes = Buffer.from(text)
  const places = [...new Set([0, ...cuts.map(cut => cut % bytes.length), bytes.length])].sort(
    (a, b) => a - b
  )
  const out: Buffer[] = []
  for (const [index, place] of places.slice(0, -1).entries()) {
    const passed = meter.pass(bytes.subarray(place, places[index + 1]))
    if (passed !== undefined) out.push(passed)
  }
  const rest = meter.end()
  if (rest !== undefined) out.push(rest)
  return { meter, out: Buffer.concat(out).toString() }
}

function check(each: Case, { meter, out }: ReturnType<typeof run>, kept: string) {
  const { usage } = meter
  const tokens = usage && [usage.promptTokens, usage.completionTokens, usage.totalTokens]
  if (usage?.cachedTokens !== undefined) tokens!.push(usage.cachedTokens)
  assert.deepEqual(tokens, each.tokens)
  assert.equal(meter.deltas, each.deltas)
  assert.equal(out, kept)
}

for (const each of CASES) {
  test(`usage is read from: ${each.name}`, () => {
    check(each, run(each, [], false), each.text)
    check(each, run(each, [], true), each.kept ?? each.text)
  })
}

const ENDS = { LF: '\n', CRLF: '\r\n', CR: '\r' }

for (const [name, end] of Object.entries(ENDS)) {
  test(`usage is read, and taken out, over any split of the bytes, lines ending in ${name}`, () => {
    const cases = CASES.filter(({ framing }) => framing === 'sse' || end === '\n').map(each => ({
      ...each,
      text: each.text.replaceAll('\n', end),
      kept: (each.kept ?? each.text).replaceAll('\n', end)
    }))
    fc.assert(
      fc.property(
        fc.constantFrom(...cases),
        fc.array(fc.nat(200_000), { maxLength: 30 }),
        fc.boolean(),
        (each, cuts, takeOut) => {
          check(each, run(each, cuts, takeOut), takeOut ? each.kept : each.text)
        }
      ),
      { numRuns: 500 }
    )
  })
}

test('running usage is taken out of events, over any split of the bytes', () => {
  const usage = (at: number) => ({
    prompt_tokens: 5,
    completion_tokens: 70 + at,
    total_tokens: 75 + at
  })
  const events = (shows: boolean) =>
    ['many', ' "words"', ' \u4f60', ' in', ' {"usage":{}}', ' here', '\\', '', ' end', '.'].map(
      (content, at) => chat({ content }, shows ? { usage: usage(at) } : {})
    )
  const first = `data: {"usage": {"completion_tokens": 3} , "choices":[{"delta":{"content":"a"}}]}\n\n`
  const bare = `data: { "choices":[{"delta":{"content":"a"}}]}\n\n`
  const comment = ': keep-alive\n\n'
  const join = (shows: boolean) =>
    [
      shows ? first : bare,
      comment,
      ...events(shows),
      chat({ content: 'x' }),
      last(usage(9)),
      DONE
    ].join('')
  fc.assert(
    fc.property(
      fc.constantFrom(...Object.values(ENDS)),
      fc.array(fc.nat(5_000), { maxLength: 30 }),
      (end, cuts) => {
        const given = Buffer.from(join(true).replaceAll('\n', end))
        const places = [...new Set([0, ...cuts.map(cut => cut % given.length), given.length])]
        places.sort((a, b) => a - b)
        const meter = new Meter({ framing: 'sse', dialect: openai, takeOut: false, strips: true })
        const out: Buffer[] = []
        for (const [at, place] of places.slice(0, -1).entries()) {
          out.push(meter.pass(given.subarray(place, places[at + 1])) ?? Buffer.alloc(0))
        }
        out.push(meter.end() ?? Buffer.alloc(0))
        assert.equal(Buffer.concat(out).toString(), join(false).replaceAll('\n', end))
        assert.deepEqual([meter.deltas, meter.usage?.completionTokens], [11, 79])
      }
    ),
    { numRuns: 300 }
  )
})

test('running usage is the same whether events are compared or read', () => {
  const fragment = fc.constantFrom('a', '\\"', ' ', '"', '}', '{"usage":', '\n', 'é')
  const usages = fc.constantFrom(
    '{"completion_tokens":7}',
    '{"a":{"b":1}}',
    '{}',
    'null',
    '{"x":"}"}',
    '{},"error":{"message":"no"}'
  )
  const event = (text: string, usage: string) =>
    `data: {"id":"c","choices":[{"index":0,"delta":{"content":"${text}"},"finish_reason":null}],"usage":${usage}}\n\n`
  fc.assert(
    fc.property(
      fc.array(fc.tuple(fc.array(fragment, { maxLength: 4 }), usages, fc.boolean()), {
        maxLength: 12
      }),
      list => {
        const one = new Meter({ framing: 'sse', dialect: openai, takeOut: false, strips: true })
        const other = new Meter({ framing: 'sse', dialect: openai, takeOut: false, strips: true })
        const outs: [string, string] = ['', '']
        for (const [texts, usage, looks] of list) {
          const bytes = Buffer.from(event(texts.join(''), usage))
          outs[0] += one.pass(bytes) ?? ''
          for (const byte of bytes)
            outs[1] += (other.pass(Buffer.from([byte])) ?? '').toString('latin1')
          if (looks) assert.equal(one.counted.tokens, other.counted.tokens)
        }
        assert.deepEqual(
          [one.deltas, one.usage, one.failure],
          [other.deltas, other.usage, other.failure]
        )
        assert.equal(Buffer.from(outs[0]).toString('latin1'), outs[1])
      }
    ),
    { numRuns: 500 }
  )
})

test('every single byte alone', () => {
  for (const each of CASES.filter(({ text }) => text.length < 5000)) {
    const cuts = Array.from({ length: Buffer.byteLength(each.text) }, (_, index) => index)
    check(each, run(each, cuts, true), each.kept ?? each.text)
  }
})

test('bytes pass unchanged whatever they are', () => {
  fc.assert(
    fc.property(
      fc.array(fc.uint8Array({ minLength: 1, maxLength: 200 }), { maxLength: 20 }),
      fc.constantFrom<Framing>('sse', 'ndjson', 'json'),
      fc.boolean(),
      (pieces, framing, takeOut) => {
        const meter = new Meter({ framing, dialect: openai, takeOut })
        const out: Uint8Array[] = []
        for (const piece of pieces) {
          const passed = meter.pass(Buffer.from(piece))
          if (passed !== undefined) out.push(passed)
        }
        const rest = meter.end()
        if (rest !== undefined) out.push(rest)
        assert.deepEqual(Buffer.concat(out), Buffer.concat(pieces))
      }
    ),
    { numRuns: 500 }
  )
})

test('any JSON answer with usage gives it, wherever it stands', () => {
  fc.assert(
    fc.property(
      fc.array(fc.tuple(fc.string(), fc.jsonValue()), { maxLength: 8 }),
      fc.nat(8),
      fc.array(fc.nat(5000), { maxLength: 10 }),
      fc.boolean(),
      (members, place, cuts, spaced) => {
        const others = members.filter(
          ([name]) =>
            !['usage', 'prompt_eval_count', 'eval_count', 'message', 'response'].includes(name)
        )
        const usage = { prompt_tokens: 3, completion_tokens: 4, total_tokens: 7 }
        others.splice(place % (others.length + 1), 0, ['usage', usage])
        const text = JSON.stringify(Object.fromEntries(others), null, spaced ? 2 : 0)
        const { meter } = run({ framing: 'json', dialect: openai, text } as Case, cuts, false)
        assert.equal(meter.usage?.totalTokens, 7, text)
      }
    ),
    { numRuns: 500 }
  )
})

test('an event too long to be held back goes on, and usage after it is read', () => {
  const text =
    chat({ content: 'x'.repeat(200_000) }) + last({ prompt_tokens: 1, completion_tokens: 1 }) + DONE
  const meter = new Meter({ framing: 'sse', dialect: openai, takeOut: true })
  const bytes = Buffer.from(text)
  let heldMost = 0
  let seen = 0
  let passed = 0
  for (let at = 0; at < bytes.length; at += 1000) {
    const piece = bytes.subarray(at, at + 1000)
    seen += piece.length
    passed += meter.pass(piece)?.length ?? 0
    heldMost = Math.max(heldMost, seen - passed)
  }
  assert.ok(heldMost <= 64 * 1024 + 1000)
  assert.equal(meter.usage?.totalTokens, 2)
})

/** The same for both fields. */
const RUNNING_QUESTIONS: [string, string][] = [
  [
    '{"stream":true}',
    '{"stream_options":{"include_usage":true,"continuous_usage_stats":true},"stream":true}'
  ],
  [
    '{"stream_options":{"include_usage": false , "y":2}}',
    '{"stream_options":{"continuous_usage_stats":true,"include_usage": true , "y":2}}'
  ],
  [
    '{"stream_options":{"continuous_usage_stats":0,"include_usage":true}}',
    '{"stream_options":{"continuous_usage_stats":true,"include_usage":true}}'
  ]
]

const QUESTIONS: [string, string][] = [
  ['{"stream":true}', '{"stream_options":{"include_usage":true},"stream":true}'],
  ['  { "stream" : true }', '  {"stream_options":{"include_usage":true}, "stream" : true }'],
  ['{"a":1,"stream_options":null}', '{"a":1,"stream_options":{"include_usage":true}}'],
  ['{"stream_options": {} ,"a":1}', '{"stream_options": {"include_usage":true} ,"a":1}'],
  [
    '{"stream_options":{"x":[1,{"include_usage":false}]}}',
    '{"stream_options":{"include_usage":true,"x":[1,{"include_usage":false}]}}'
  ],
  [
    '{"stream_options":{"include_usage": false , "y":2},"b":"\\"}"}',
    '{"stream_options":{"include_usage": true , "y":2},"b":"\\"}"}'
  ],
  [
    '{"messages":[{"content":"stream_options"}],"stream":true}',
    '{"stream_options":{"include_usage":true},"messages":[{"content":"stream_options"}],"stream":true}'
  ]
]

function asked(text: string, fields: UsageField[] = ['include_usage']): string {
  const bytes = Buffer.from(text)
  const body = { bytes, ...outlineOf(bytes) }
  return String(changed(body, askForUsage(body, fields)))
}

test('the question for usage changes that part of the body and no other', () => {
  for (const [before, after] of QUESTIONS) {
    assert.equal(asked(before), after)
  }
  for (const [before, after] of RUNNING_QUESTIONS) {
    assert.equal(asked(before, ['include_usage', 'continuous_usage_stats']), after)
  }
})

test('a body with any members keeps them all, byte for byte', () => {
  fc.assert(
    fc.property(
      fc.dictionary(fc.string(), fc.jsonValue()),
      fc.constantFrom(
        undefined,
        null,
        {},
        { include_usage: false },
        { include_usage: null, a: [1] }
      ),
      fc.boolean(),
      (members, options, spaced) => {
        const body = {
          ...members,
          stream: true,
          ...(options === undefined ? {} : { stream_options: options })
        }
        const text = JSON.stringify(body, null, spaced ? 1 : 0)
        const { stream_options, ...rest } = JSON.parse(asked(text))
        assert.equal(stream_options.include_usage, true)
        const { stream_options: _b, ...expected } = JSON.parse(text)
        assert.deepEqual(rest, expected)
      }
    )
  )
})

test('a caller who said include_usage: false is not given usage', async t => {
  const backend = await fakeBackend(t, (request, response) => {
    assert.equal(JSON.parse(request.body).stream_options.include_usage, true)
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(chunk('Hi') + USAGE_CHUNK + DONE)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const body = { ...CHAT, stream: true, stream_options: { include_usage: false } }
  const response = await post(`${gateway.url}/v1/chat/completions`, body)
  assert.equal(await response.text(), chunk('Hi') + DONE)
  assert.equal((await gateway.logged({ msg: 'exchange' })).totalTokens, undefined)
  assert.equal(await gateway.metric('llmproxy_usage_tokens_total', { type: 'prompt' }), 12)
})

test('answers of 400 and above, GET and HEAD cost no tokens, whatever they say', async t => {
  const body = JSON.stringify({
    usage: { prompt_tokens: 5, completion_tokens: 5, total_tokens: 10 }
  })
  const backend = await fakeBackend(t, (request, response) => {
    response.writeHead(request.method === 'POST' ? 404 : 200, {
      'content-type': 'application/json'
    })
    response.end(body)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  await (await fetch(`${gateway.url}/v1/models`)).text()
  await fetch(`${gateway.url}/v1/models`, { method: 'HEAD' })
  await gateway.logged({ msg: 'exchange', method: 'HEAD' })
  assert.equal(await gateway.metric('llmproxy_usage_tokens_total'), 0)
})

test('an error that the backend reports inside its stream passes, and is no success', async t => {
  const text = `${chunk('Hi')}data: {"error":{"message":"engine died","code":500}}\n\n${DONE}`
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.end(text)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  assert.equal(await response.text(), text)
  const line = await gateway.logged({ msg: 'exchange' })
  assert.deepEqual(
    [line.outcome, line.completionTokens, line.exactness],
    ['backend_failed', 1, 'counted']
  )
})

test('Ollama’s native routes stream when stream is absent, and the log says so', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/x-ndjson' })
    response.end('{"message":{"content":"Hi"},"done":true,"eval_count":2,"prompt_eval_count":3}\n')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  await (await post(`${gateway.url}/api/chat`, CHAT)).text()
  const line = await gateway.logged({ msg: 'exchange' })
  assert.deepEqual([line.stream, line.promptTokens, line.completionTokens], [true, 3, 2])
  assert.ok(Number(line.ttftMs) > 0)
  assert.equal(backend.requests[0]!.body, JSON.stringify(CHAT))
})

test('usage behind anything nested deeply is found all the same', () => {
  const deep = `${'['.repeat(300)}{"a":"]"}${']'.repeat(300)}`
  const text = `{"tools":${deep},"x":{"y":${'{"z":'.repeat(200)}1${'}'.repeat(200)}},"usage":{"prompt_tokens":3,"completion_tokens":4,"details":[{"a":[1]}]}}`
  const each = { framing: 'json', dialect: openai, text } as Case
  for (const cuts of [[], Array.from({ length: text.length }, (_, index) => index)]) {
    assert.equal(run(each, cuts, false).meter.usage?.totalTokens, 7)
  }
})

test('cached tokens are within prompt_tokens, also when they go by Anthropic’s name', () => {
  const text =
    '{"usage":{"prompt_tokens":1000,"completion_tokens":1,"cache_read_input_tokens":900}}'
  const { meter } = run({ framing: 'json', dialect: openai, text } as Case, [], false)
  assert.deepEqual(
    [meter.usage?.promptTokens, meter.usage?.cachedTokens, meter.usage?.totalTokens],
    [1000, 900, 1001]
  )
})

test('more cached tokens than the prompt has do not make a call cheaper than nothing', () => {
  const text =
    '{"usage":{"prompt_tokens":10,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":64}}}'
  const { meter } = run({ framing: 'json', dialect: openai, text } as Case, [], false)
  assert.deepEqual([meter.usage?.promptTokens, meter.usage?.cachedTokens], [10, 10])
})

test('/api/generate streams by default too, and time per token is in seconds', async t => {
  const backend = await fakeBackend(t, async (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/x-ndjson' })
    for (const word of ['a', 'b', 'c']) {
      response.write(`{"response":"${word}","done":false}\n`)
      await new Promise(resolve => setTimeout(resolve, 100))
    }
    response.end('{"response":"","done":true,"eval_count":3,"prompt_eval_count":3}\n')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  await (await post(`${gateway.url}/api/generate`, { model: 'm', prompt: 'x' })).text()
  assert.equal((await gateway.logged({ msg: 'exchange' })).stream, true)
  const seconds = await gateway.metric('llmproxy_time_per_output_token_seconds_sum')
  // About 0.1, and less where the first one came late.
  assert.ok(seconds >= 0.01 && seconds < 5, String(seconds))
})

/** Texts of about 40 tokens. */
const SAYS = 'The harbour was quiet in the morning, and the boats lay still. '.repeat(3)
const WORDS = SAYS.match(/\S+ /g)!
const ARGUMENTS = { city: 'Vienna', days: [1, 2, 3], units: { temperature: 'celsius' } }

/** The same text as each API has it. */
const ASKED = {
  model: 'm',
  messages: [{ role: 'user', content: SAYS }],
  prompt: SAYS,
  input: SAYS,
  query: SAYS,
  documents: []
}

interface Unsaid {
  name: string
  path: string
  type: string
  body: string
  /** What it comes to, roughly. */
  tokens: [number, number]
}

const json = JSON.stringify
const JSON_TYPE = 'application/json'
const SSE_TYPE = 'text/event-stream'
const UNSAID: Unsaid[] = [
  {
    name: 'a streamed chat',
    path: '/v1/chat/completions',
    type: SSE_TYPE,
    body: WORDS.map(content => chat({ content })).join('') + DONE,
    tokens: [34, 46]
  },
  {
    name: 'a whole chat',
    path: '/v1/chat/completions',
    type: JSON_TYPE,
    body: json({ id: 'c', choices: [{ message: { role: 'assistant', content: SAYS } }] }),
    tokens: [34, 46]
  },
  {
    name: 'a whole chat with a tool call',
    path: '/v1/chat/completions',
    type: JSON_TYPE,
    body: json({
      choices: [
        { message: { content: null, tool_calls: [{ function: { arguments: json(ARGUMENTS) } }] } }
      ]
    }),
    tokens: [15, 32]
  },
  {
    name: 'a whole completion',
    path: '/v1/completions',
    type: JSON_TYPE,
    body: json({ choices: [{ text: SAYS }] }),
    tokens: [34, 46]
  },
  {
    name: 'a whole message',
    path: '/v1/messages',
    type: JSON_TYPE,
    body: json({ type: 'message', content: [{ type: 'text', text: SAYS }] }),
    tokens: [34, 46]
  },
  {
    name: 'a whole message with a tool call',
    path: '/v1/messages',
    type: JSON_TYPE,
    body: json({ type: 'message', content: [{ type: 'tool_use', name: 'f', input: ARGUMENTS }] }),
    tokens: [15, 32]
  },
  {
    name: 'a streamed message',
    path: '/v1/messages',
    type: SSE_TYPE,
    body:
      WORDS.map(text =>
        typed({
          type: 'content_block_delta',
          index: 0,
          delta: { type: 'text_delta', text }
        } as never)
      ).join('') + typed({ type: 'message_stop' }),
    tokens: [34, 46]
  },
  {
    name: 'a whole response, which repeats its settings',
    path: '/v1/responses',
    type: JSON_TYPE,
    body: json({
      object: 'response',
      text: { format: { type: 'json_schema', schema: { description: SAYS.repeat(9) } } },
      output: [{ type: 'message', content: [{ type: 'output_text', text: SAYS }] }]
    }),
    tokens: [34, 46]
  },
  {
    name: 'an Ollama chat, line by line',
    path: '/api/chat',
    type: 'application/x-ndjson',
    body: `${WORDS.map(content => `${json({ message: { content }, done: false })}\n`).join('')}{"done":true}\n`,
    tokens: [34, 46]
  },
  {
    name: 'an Ollama tool call, whose arguments are an object',
    path: '/api/chat',
    type: JSON_TYPE,
    body: json({
      message: { content: '', tool_calls: [{ function: { arguments: ARGUMENTS } }] },
      done: true
    }),
    tokens: [15, 32]
  },
  {
    name: 'a whole Ollama generation',
    path: '/api/generate',
    type: JSON_TYPE,
    body: json({ response: SAYS, done: true }),
    tokens: [34, 46]
  },
  {
    name: 'embeddings',
    path: '/v1/embeddings',
    type: JSON_TYPE,
    body: json({ data: [{ embedding: [0.1, 0.2] }] }),
    tokens: [0, 0]
  },
  {
    name: 'a ranking with its documents',
    path: '/v1/rerank',
    type: JSON_TYPE,
    body: json({ results: [{ document: { text: SAYS }, relevance_score: 0.5 }] }),
    tokens: [0, 0]
  }
]

for (const { name, path, type, body, tokens } of UNSAID) {
  test(`what the backend does not say is estimated: ${name}`, async t => {
    const backend = await fakeBackend(t, (_request, response) => {
      response.writeHead(200, { 'content-type': type })
      response.end(body)
    })
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    await (await post(gateway.url + path, { ...ASKED, stream: type !== JSON_TYPE })).text()
    const line = await gateway.logged({ msg: 'exchange' })
    const [least, most] = tokens
    const completionTokens = Number(line.completionTokens)
    assert.equal(line.exactness, 'estimated', JSON.stringify(line))
    assert.ok(completionTokens >= least && completionTokens <= most, String(completionTokens))
    const promptTokens = Number(line.promptTokens)
    assert.ok(promptTokens > 40 && promptTokens < 110, String(promptTokens))
  })
}

test('calls that spend no tokens are given none', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json' })
    response.end(json({ input_tokens: 9, text: SAYS, content: SAYS }))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  for (const route of [
    '/tokenize',
    '/detokenize',
    '/v1/messages/count_tokens',
    '/v1/responses/input_tokens',
    '/v1/images/generations',
    '/api/show'
  ]) {
    await (await post(gateway.url + route, CHAT)).text()
    const line = await gateway.logged({ msg: 'exchange', route })
    assert.deepEqual([line.promptTokens, line.exactness], [undefined, undefined], route)
  }
})

test('streams that are cut are counted as the model’s whole answers have taught', async t => {
  /** Every delta is of three words, and the tokenizer is a strange one: a word is two tokens. */
  const deltas = WORDS.join('').match(/\S+ \S+ \S+ /g)!
  const usage = { prompt_tokens: 500, completion_tokens: 6 * deltas.length, total_tokens: 0 }
  const backend = await fakeBackend(t, (request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    const isCut = request.body.includes('cut')
    for (const content of isCut ? deltas.slice(0, 6) : deltas) response.write(chat({ content }))
    if (!isCut) response.end(last(usage) + DONE)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const url = `${gateway.url}/v1/chat/completions`
  for (let call = 0; call < 40; call++) await (await post(url, { ...CHAT, stream: true })).text()
  const abort = new AbortController()
  const cut = await post(url, { ...CHAT, user: 'cut', stream: true }, {}, abort.signal)
  let seen = ''
  for await (const chunk of cut.body!.pipeThrough(new TextDecoderStream())) {
    seen += chunk
    if (seen.split('data: ').length > 6) break
  }
  abort.abort()
  const line = await gateway.logged({ msg: 'exchange', outcome: 'client_gone' })
  assert.equal(line.exactness, 'counted')
  assert.ok(Math.abs(Number(line.completionTokens) - 36) <= 2, String(line.completionTokens))
  assert.ok(Math.abs(Number(line.promptTokens) - 500) <= 25, String(line.promptTokens))
})

test('usage on the way is exact up to there', () => {
  const meter = new Meter({ framing: 'sse', dialect: openai, takeOut: false })
  const usage = { prompt_tokens: 5, completion_tokens: 70, total_tokens: 75 }
  for (const content of ['many', ' words']) meter.pass(Buffer.from(chat({ content })))
  meter.pass(Buffer.from(chat({ content: ' in here' }, { usage })))
  meter.pass(Buffer.from(chat({ content: ' end' })))
  const { tokens, since } = meter.counted
  assert.deepEqual([tokens, since.deltas, characters(since.text)], [70, 1, 4])
})

test('the text of the deltas is counted, over any split of the bytes', () => {
  fc.assert(
    fc.property(
      fc.constantFrom(...CASES.filter(({ framing }) => framing !== 'json')),
      fc.array(fc.nat(200_000), { maxLength: 30 }),
      (each, cuts) => {
        const whole = characters(run(each, [], false).meter.passed(true).text)
        const split = characters(run(each, cuts, false).meter.passed(true).text)
        // An escape that is split may count as its letters.
        assert.ok(Math.abs(split - whole) <= 5 * cuts.length)
        if (!each.text.includes('\\')) assert.equal(split, whole)
      }
    )
  )
})

test('a media type is read whatever its case', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'Text/Event-Stream; Charset=UTF-8' })
    response.end(chunk('Hi') + USAGE_CHUNK + DONE)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const answer = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
  assert.equal(await answer.text(), chunk('Hi') + DONE)
  const line = await gateway.logged({ msg: 'exchange' })
  assert.deepEqual([line.promptTokens, line.exactness], [12, 'exact'])
})

test('events that are alike are counted, and read when they only seem to be', () => {
  const event = (text: string, more = '') =>
    `data: {"id":"c","choices":[{"index":0,"delta":{"content":"${text}"},"finish_reason":null}]${more}}\n\n`
  const usage = ',"usage":{"prompt_tokens":5,"completion_tokens":9}'
  const fragment = fc.constantFrom('a', '\\"', '\\\\', ' ', '"', '\\', '{"usage":', '\n', '\r', 'é')
  fc.assert(
    fc.property(fc.array(fc.array(fragment, { maxLength: 6 }), { maxLength: 12 }), texts => {
      const pieces = [...texts.map(text => event(text.join(''))), event('x', usage), DONE]
      const one = new Meter({ framing: 'sse', dialect: openai, takeOut: false })
      for (const piece of pieces) one.pass(Buffer.from(piece))
      const other = new Meter({ framing: 'sse', dialect: openai, takeOut: false })
      for (const byte of Buffer.from(pieces.join(''))) other.pass(Buffer.from([byte]))
      assert.deepEqual([one.deltas, one.usage], [other.deltas, other.usage])
      assert.equal(one.finished, other.finished)
    }),
    { numRuns: 1000 }
  )
})

for (const [name, members] of Object.entries({
  'null choices': '"choices":null,',
  'no choices': ''
})) {
  test(`a usage chunk with ${name} is taken out too`, () => {
    const usage = `data: {"id":"c",${members}"usage":{"prompt_tokens":5,"completion_tokens":9}}\n\n`
    const meter = new Meter({ framing: 'sse', dialect: openai, takeOut: true })
    assert.equal(String(meter.pass(Buffer.from(chunk('Hi') + usage + DONE))), chunk('Hi'))
    assert.equal(String(meter.release()), DONE)
    assert.equal(meter.usage?.totalTokens, 14)
  })
}

test('a last event without its blank line is read', () => {
  const text = chunk('Hi') + USAGE_CHUNK.trimEnd()
  for (const takeOut of [true, false]) {
    const meter = new Meter({ framing: 'sse', dialect: openai, takeOut })
    const out = [meter.pass(Buffer.from(text)), meter.end()].filter(each => each !== undefined)
    assert.equal(Buffer.concat(out).toString(), takeOut ? chunk('Hi') : text)
    assert.equal(meter.usage?.totalTokens, 15)
  }
})

/** Responses of each API to a prompt of about 60 tokens, with these counts (JSON) of prompt and output. */
const COUNTED: [string, string, (prompt: string, output: string) => string][] = [
  [
    '/v1/chat/completions',
    SSE_TYPE,
    (prompt, output) =>
      `${WORDS.map(content => chat({ content })).join('')}data: {"choices":[],"usage":{"prompt_tokens":${prompt},"completion_tokens":${output}}}\n\n${DONE}`
  ],
  [
    '/v1/chat/completions',
    JSON_TYPE,
    (prompt, output) =>
      `{"choices":[{"message":{"content":"${SAYS}"}}],"usage":{"prompt_tokens":${prompt},"completion_tokens":${output}}}`
  ],
  [
    '/v1/responses',
    SSE_TYPE,
    (prompt, output) =>
      `${typed({ type: 'response.output_text.delta', delta: SAYS } as never)}data: {"type":"response.completed","response":{"usage":{"input_tokens":${prompt},"output_tokens":${output}}}}\n\n`
  ],
  [
    '/v1/messages',
    SSE_TYPE,
    (prompt, output) =>
      `data: {"type":"message_start","message":{"usage":{"input_tokens":${prompt},"output_tokens":0}}}\n\n${typed({ type: 'content_block_delta', delta: { type: 'text_delta', text: SAYS } } as never)}data: {"type":"message_delta","usage":{"output_tokens":${output}}}\n\n${typed({ type: 'message_stop' })}`
  ],
  [
    '/v1/messages',
    JSON_TYPE,
    (prompt, output) =>
      `{"type":"message","content":[{"type":"text","text":"${SAYS}"}],"usage":{"input_tokens":${prompt},"output_tokens":${output}}}`
  ],
  [
    '/api/chat',
    'application/x-ndjson',
    (prompt, output) =>
      `${json({ message: { content: SAYS }, done: false })}\n{"message":{"content":""},"done":true,"prompt_eval_count":${prompt},"eval_count":${output}}\n`
  ],
  [
    '/api/generate',
    JSON_TYPE,
    (prompt, output) =>
      `{"response":"${SAYS}","done":true,"prompt_eval_count":${prompt},"eval_count":${output}}`
  ]
]
/** What is no count of tokens, or of more than there can be. */
const NO_COUNTS = ['1e308', '1e999', '-5', '1.5', '"12"', 'true', '1e9', '50000000', '0', 'null']

for (const [path, type, body] of COUNTED) {
  test(`${path}, ${type}: what is no count of tokens is estimated`, async t => {
    let text = ''
    const backend = await fakeBackend(t, (_request, response) => {
      response.writeHead(200, { 'content-type': type })
      response.end(text)
    })
    const gateway = await startGateway(t, {
      backends: [{ url: backend.url }],
      rate_limit: { enabled: true, global: { tokens_per_minute: 1_000_000 } }
    })
    const ask = async (prompt: string, output: string) => {
      text = body(prompt, output)
      const request = { ...ASKED, stream: type !== JSON_TYPE }
      const response = await post(gateway.url + path, request)
      assert.equal(response.status, 200)
      await response.text()
      const requestId = response.headers.get('x-llmproxy-request-id')
      const line = await gateway.logged({ msg: 'exchange', requestId })
      return [Number(line.promptTokens), Number(line.completionTokens), line.exactness] as const
    }
    for (const wrong of NO_COUNTS) {
      const [prompt, output, exactness] = await ask('60', wrong)
      assert.equal(exactness, 'estimated', `${wrong} for the output`)
      // The rest of it may be right, unless it is far too much.
      assert.ok(prompt > 40 && prompt < 120, `${prompt} for a prompt beside ${wrong}`)
      assert.ok(output > 30 && output < 60, `${output} for ${wrong}`)
    }
    for (const wrong of NO_COUNTS) {
      const [prompt, output, exactness] = await ask(wrong, '44')
      assert.equal(exactness, 'estimated', `${wrong} for the prompt`)
      assert.ok(prompt > 40 && prompt < 120, `${prompt} for ${wrong}`)
      assert.ok(output > 30 && output < 60, `${output} for an output beside ${wrong}`)
    }
    assert.deepEqual(await ask('60', '44'), [60, 44, 'exact'])
    assert.ok((await gateway.metric('llmproxy_usage_tokens_total', { type: 'prompt' })) < 2500)
  })
}

test('a fully cached prompt, which Ollama does not count, is estimated, and the output is its own', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/x-ndjson' })
    response.end('{"response":"Hi","done":false}\n{"response":"","done":true,"eval_count":7}\n')
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  await (await post(`${gateway.url}/api/generate`, { model: 'm', prompt: SAYS })).text()
  const line = await gateway.logged({ msg: 'exchange' })
  assert.deepEqual([line.completionTokens, line.exactness], [7, 'estimated'])
  assert.ok(Number(line.promptTokens) > 30 && Number(line.promptTokens) < 120)
})

for (const [path, answer] of [
  ['/v1/embeddings', { data: [], usage: { prompt_tokens: 0, total_tokens: 0 } }],
  ['/v1/rerank', { results: [], usage: { total_tokens: 0 } }],
  ['/api/embed', { embeddings: [] }]
] as const) {
  test(`${path}: a prompt of 0 tokens is estimated`, async t => {
    const backend = await fakeBackend(t, (_request, response) => {
      response.writeHead(200, { 'content-type': JSON_TYPE })
      response.end(json(answer))
    })
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    await (await post(gateway.url + path, { model: 'm', input: SAYS })).text()
    const line = await gateway.logged({ msg: 'exchange' })
    assert.deepEqual([line.completionTokens, line.exactness], [0, 'estimated'])
    assert.ok(Number(line.promptTokens) > 30)
  })
}

const HELLO = { messages: [{ role: 'user', content: 'Hello' }] }
const IMAGE = [{ type: 'image_url', image_url: { url: 'https://example.org/a.png' } }]
const SEARCH = { input: 'Hello', tools: [{ type: 'web_search' }] }

/** What is asked, of which API; what is reported: tokens of prompt and output, and whether that can be true. */
type Report = [prompt: number, output: number, isTrue: boolean]
const REPORTS: [string, object, Report[], path?: string, text?: string][] = [
  [
    'a limit of 5 tokens',
    { ...HELLO, max_tokens: 5 },
    [
      [10, 5, true],
      [10, 6, true],
      [10, 100, false],
      [10, 999_999, false]
    ]
  ],
  [
    'several choices',
    { ...HELLO, max_tokens: 50, n: 4 },
    [
      [10, 200, true],
      [10, 400, false]
    ]
  ],
  [
    'hidden reasoning',
    { ...HELLO, max_tokens: 4000 },
    [
      [10, 4000, true],
      [10, 5000, false]
    ]
  ],
  [
    'no limit',
    HELLO,
    [
      [10, 90_000, true],
      [10, 2_000_000, false]
    ]
  ],
  [
    'no limit, and a context of 8,192',
    { ...HELLO, model: 'small' },
    [
      [10, 8000, true],
      [10, 9000, false]
    ]
  ],
  [
    'a limit above the context',
    { ...HELLO, model: 'small', max_tokens: 1e6 },
    [
      [10, 8000, true],
      [10, 9000, false]
    ]
  ],
  [
    'a backend that knows no limit',
    { ...HELLO, max_tokens: 1 },
    [[10, 300, true]],
    '/v1/chat/completions',
    'word '.repeat(300)
  ],
  [
    'a short prompt',
    HELLO,
    [
      [9000, 1, true],
      [100_000, 1, false],
      [9_999_999, 1, false]
    ]
  ],
  [
    'a long prompt',
    { messages: [{ role: 'user', content: 'ü'.repeat(60_000) }] },
    [
      [120_000, 1, true],
      [9_999_999, 1, false]
    ]
  ],
  [
    'an image',
    { messages: [{ role: 'user', content: IMAGE }] },
    [
      [100_000, 1, true],
      [20_000_000, 1, false]
    ]
  ],
  [
    'an image, and a context of 8,192',
    { model: 'small', messages: [{ role: 'user', content: IMAGE }] },
    [
      [8000, 1, true],
      [20_000, 1, false]
    ]
  ],
  [
    'a file',
    { messages: [{ role: 'user', content: [{ type: 'file', file: { file_data: 'JVBERi0=' } }] }] },
    [[100_000, 1, true]]
  ],
  [
    'an address in the text',
    { messages: [{ role: 'user', content: 'What is at https://example.org/file?url=a' }] },
    [[100_000, 1, false]]
  ],
  [
    'an earlier response',
    { input: 'Hello', previous_response_id: 'resp_1' },
    [[100_000, 1, true]],
    '/v1/responses'
  ],
  [
    'tools of the backend',
    { ...SEARCH, max_output_tokens: 5 },
    [[500_000, 50, true]],
    '/v1/responses'
  ],
  [
    'embeddings',
    { input: 'Hello' },
    [
      [2, 0, true],
      [2, 5000, false]
    ],
    '/v1/embeddings'
  ],
  ['a ranking', { query: 'Hello', documents: ['a', 'b'] }, [[100_000, 0, true]], '/v1/rerank']
]

test('usage that the request, its model and what has passed cannot have had is estimated', async t => {
  let usage: object = {}
  let content = 'Hi'
  const answer: Answerer = ({ url }, response) => {
    response.writeHead(200, { 'content-type': JSON_TYPE })
    const models = [{ id: 'm' }, { id: 'small', max_model_len: 8192 }]
    const choices = [{ index: 0, message: { content }, finish_reason: 'stop' }]
    response.end(json(url === '/v1/models' ? { data: models } : { choices, usage }))
  }
  const backend = await fakeBackend(t, answer, { listsModels: true })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  await gateway.logged({ msg: 'backend lists models' })
  for (const [name, request, reports, path = '/v1/chat/completions', text = 'Hi'] of REPORTS) {
    for (const [prompt, output, isTrue] of reports) {
      content = text
      const names =
        path === '/v1/responses'
          ? ['input_tokens', 'output_tokens']
          : ['prompt_tokens', 'completion_tokens']
      usage = { [names[0]!]: prompt, [names[1]!]: output, total_tokens: 999_999 }
      const response = await post(gateway.url + path, { model: 'm', ...request })
      await response.text()
      const requestId = response.headers.get('x-llmproxy-request-id')
      const line = await gateway.logged({ msg: 'exchange', requestId })
      const what = `${name}: ${prompt} and ${output}`
      assert.equal(line.exactness, isTrue ? 'exact' : 'estimated', what)
      if (isTrue)
        assert.deepEqual([line.promptTokens, line.completionTokens], [prompt, output], what)
      else assert.ok(Number(line.promptTokens) + Number(line.completionTokens) < 70_000, what)
    }
  }
})

test('a total that a backend reports beside its parts counts nothing', () => {
  const counts = new Counts()
  counts.add('{"prompt_tokens":2,"completion_tokens":1,"total_tokens":999999}')
  assert.equal(counts.toUsage()!.totalTokens, 3)
})

test('a stream that is cut is not billed the running usage that it cannot have had', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    const usage = { prompt_tokens: 12, completion_tokens: 999_999, total_tokens: 1_000_011 }
    response.write(data({ choices: [{ index: 0, delta: { content: 'Hi' } }], usage }), () =>
      response.destroy()
    )
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const request = { ...HELLO, model: 'm', stream: true, max_tokens: 5 }
  await (await post(`${gateway.url}/v1/chat/completions`, request)).text().catch(() => {})
  const line = await gateway.logged({ msg: 'exchange' })
  assert.ok(Number(line.completionTokens) < 20, String(line.completionTokens))
  assert.equal(line.exactness, 'counted')
})

/** A choice of so many words (tokens), and its usage as llama.cpp reports it, with `timings`. */
const LLAMA_PROMPT = 12
const ofChoice = (tokens: number, prompt = LLAMA_PROMPT) => ({
  usage: { prompt_tokens: prompt, completion_tokens: tokens, total_tokens: prompt + tokens },
  timings: { cache_n: 0, prompt_n: prompt, predicted_n: tokens }
})
const words = (count: number) => Array.from({ length: count }, (_, at) => WORDS[at % WORDS.length]!)
const streamed = (index: number, content: string, finish_reason: string | null = null) =>
  data({ id: 'c', choices: [{ index, delta: { content }, finish_reason }] })
const deltasOf = (index: number, count: number) =>
  words(count).map(content => streamed(index, content))
const chatOf = (choices: number[], ends: (tokens: number, index: number) => string) =>
  choices.map((tokens, at) => deltasOf(at, tokens).join('') + ends(tokens, at)).join('') + DONE
/** Events of the choices by turns. */
const byTurns = (lists: string[][]) =>
  words(Math.max(...lists.map(each => each.length)))
    .flatMap((_, at) => lists.map(each => each[at] ?? ''))
    .join('')
const wholeOf = (choices: number[], more: object, piece = 'message') =>
  json({
    choices: choices.map((tokens, index) => {
      const text = words(tokens).join('')
      return {
        index,
        [piece]: piece === 'message' ? { content: text } : text,
        finish_reason: 'stop'
      }
    }),
    ...more
  })
const runningOf = (index: number, count: number) =>
  words(count).map((content, at) =>
    data({
      choices: [{ index, delta: { content }, finish_reason: at === count - 1 ? 'stop' : null }],
      usage: { prompt_tokens: LLAMA_PROMPT, completion_tokens: at + 1 }
    })
  )

interface Several {
  name: string
  path?: string
  request: object
  body: string
  prompt: number
  output: number
  exactness: 'exact' | 'estimated'
}

const SEVERAL: Several[] = [
  {
    name: 'llama.cpp, chat: a usage chunk for each choice',
    request: { n: 2, stream: true },
    body: chatOf(
      [40, 35],
      (tokens, at) => streamed(at, '', 'stop') + data({ choices: [], ...ofChoice(tokens) })
    ),
    prompt: LLAMA_PROMPT,
    output: 75,
    exactness: 'exact'
  },
  {
    name: 'llama.cpp, chat, by its own name of n',
    request: { n_cmpl: 3, stream: true },
    body: chatOf(
      [40, 3, 20],
      (tokens, at) => streamed(at, '', 'stop') + data({ choices: [], ...ofChoice(tokens) })
    ),
    prompt: LLAMA_PROMPT,
    output: 63,
    exactness: 'exact'
  },
  {
    name: 'llama.cpp, chat, the shorter choice ends in the middle of the other',
    request: { n: 2, stream: true },
    body:
      byTurns([
        [...deltasOf(0, 10), streamed(0, '', 'stop'), data({ choices: [], ...ofChoice(10) })],
        [...deltasOf(1, 60), streamed(1, '', 'stop'), data({ choices: [], ...ofChoice(60) })]
      ]) + DONE,
    prompt: LLAMA_PROMPT,
    output: 70,
    exactness: 'exact'
  },
  {
    name: 'several usage chunks without timings',
    request: { n: 2, stream: true },
    body: chatOf([40, 35], (tokens, at) => streamed(at, '', 'stop') + last(ofChoice(tokens).usage)),
    prompt: LLAMA_PROMPT,
    output: 75,
    exactness: 'exact'
  },
  {
    name: 'the sum of all choices, twice',
    request: { n: 2, stream: true },
    body: chatOf([40, 35], (_, at) => (at === 0 ? '' : last(ofChoice(75).usage).repeat(2))),
    prompt: LLAMA_PROMPT,
    output: 75,
    exactness: 'exact'
  },
  {
    name: 'llama.cpp, completions: usage in each choice’s last event, of two prompts',
    path: '/v1/completions',
    request: { prompt: [SAYS, SAYS], stream: true },
    body:
      [24, 24]
        .map((tokens, index) => {
          const pieces = words(tokens).map(text =>
            data({ choices: [{ index, text, finish_reason: null }] })
          )
          const end = {
            choices: [{ index, text: '', finish_reason: 'length' }],
            ...ofChoice(tokens, 40 + index)
          }
          return pieces.join('') + data(end)
        })
        .join('') + DONE,
    prompt: 81,
    output: 48,
    exactness: 'exact'
  },
  {
    name: 'two choices for each of two prompts',
    path: '/v1/completions',
    request: { prompt: [SAYS, SAYS], n: 2, stream: true },
    body:
      [24, 20, 10, 30]
        .map((tokens, index) => {
          const pieces = words(tokens).map(text =>
            data({ choices: [{ index, text, finish_reason: null }] })
          )
          const end = {
            choices: [{ index, text: '', finish_reason: 'length' }],
            ...ofChoice(tokens, index < 2 ? 40 : 41)
          }
          return pieces.join('') + data(end)
        })
        .join('') + DONE,
    prompt: 81,
    output: 84,
    exactness: 'exact'
  },
  {
    name: 'llama.cpp, whole: the first choice alone',
    request: { n: 2 },
    body: wholeOf([40, 30], ofChoice(40)),
    prompt: LLAMA_PROMPT,
    output: 70,
    exactness: 'estimated'
  },
  {
    name: 'llama.cpp, whole: two prompts, the first alone',
    path: '/v1/completions',
    request: { prompt: [SAYS, SAYS] },
    body: wholeOf([24, 24], ofChoice(24, 40), 'text'),
    prompt: 80,
    output: 48,
    exactness: 'estimated'
  },
  {
    name: 'whole, the first choice alone, without timings',
    request: { n: 3 },
    body: wholeOf([40, 30, 30], { usage: ofChoice(40).usage }),
    prompt: LLAMA_PROMPT,
    output: 100,
    exactness: 'estimated'
  },
  {
    name: 'vLLM: the sum in one chunk',
    request: { n: 2, stream: true },
    body: chatOf([40, 35], (_, at) => (at === 0 ? '' : last(ofChoice(75).usage))),
    prompt: LLAMA_PROMPT,
    output: 75,
    exactness: 'exact'
  },
  {
    name: 'vLLM: running numbers of each choice, then the sum',
    request: { n: 2, stream: true },
    body: byTurns([runningOf(0, 40), runningOf(1, 35)]) + last(ofChoice(75).usage) + DONE,
    prompt: LLAMA_PROMPT,
    output: 75,
    exactness: 'exact'
  },
  {
    name: 'SGLang: running numbers of each choice, and no sum',
    request: { n: 2, stream: true },
    body: byTurns([runningOf(0, 40), runningOf(1, 35)]) + DONE,
    prompt: LLAMA_PROMPT,
    output: 75,
    exactness: 'exact'
  },
  {
    name: 'running numbers of one choice, whose index is no number',
    request: { stream: true },
    body: runningOf(0, 40).join('').replaceAll('"index":0', '"index":true') + DONE,
    prompt: LLAMA_PROMPT,
    output: 40,
    exactness: 'exact'
  },
  {
    name: 'vLLM, whole: the sum',
    request: { n: 2 },
    body: wholeOf([40, 30], { usage: ofChoice(70).usage }),
    prompt: LLAMA_PROMPT,
    output: 70,
    exactness: 'exact'
  },
  {
    name: 'a server that ignores n',
    request: { n: 4 },
    body: wholeOf([40], ofChoice(40)),
    prompt: LLAMA_PROMPT,
    output: 40,
    exactness: 'exact'
  },
  {
    name: 'a response that repeats its prompts',
    path: '/v1/completions',
    request: { prompt: [SAYS, SAYS], echo: true, max_tokens: 1 },
    body: wholeOf([42, 42], { usage: ofChoice(2, 80).usage }, 'text'),
    prompt: 80,
    output: 2,
    exactness: 'exact'
  }
]

test('the usage of several choices and prompts is their sum, however a server reports it', async t => {
  let said: Several
  const backend = await fakeBackend(t, (_request, response) => {
    const isStream = said.body.startsWith('data:')
    response.writeHead(200, { 'content-type': isStream ? SSE_TYPE : JSON_TYPE })
    response.end(said.body)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  for (const each of SEVERAL) {
    said = each
    const { path = '/v1/chat/completions', request, prompt, output, exactness } = each
    const asked = 'prompt' in request ? { model: 'm' } : CHAT
    const response = await post(gateway.url + path, { ...asked, ...request })
    await response.text()
    const requestId = response.headers.get('x-llmproxy-request-id')
    const line = await gateway.logged({ msg: 'exchange', requestId })
    const most = exactness === 'exact' ? 0 : 0.25
    const isNear = (found: unknown, right: number) => Math.abs(Number(found) / right - 1) <= most
    const found = `${each.name}: ${line.promptTokens}, ${line.completionTokens}, ${line.exactness}`
    assert.equal(line.exactness, exactness, found)
    assert.ok(isNear(line.promptTokens, prompt) && isNear(line.completionTokens, output), found)
  }
})

test('vLLM’s sum of several choices is billed as it is, whatever the text looks like', async t => {
  const choices = [0, 1].map(index => ({
    index,
    message: { content: 'SELECT A FROM B WHERE C = D; '.repeat(100) }
  }))
  const backend = await fakeBackend(
    t,
    ({ url }, response) => {
      response.writeHead(200, { 'content-type': JSON_TYPE })
      const data = [{ id: 'm', owned_by: 'vllm' }]
      const { usage } = ofChoice(440)
      response.end(json(url === '/v1/models' ? { data } : { choices, usage }))
    },
    { listsModels: true }
  )
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  await gateway.logged({ msg: 'backend lists models' })
  await (await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, n: 2 })).text()
  const line = await gateway.logged({ msg: 'exchange' })
  assert.deepEqual([line.completionTokens, line.exactness], [440, 'exact'])
})

test('responses with several choices teach nothing about one', async t => {
  const whole = chatOf([40], () => last(ofChoice(40).usage))
  // A server that counts one of two choices, in a way of its own.
  const odd = chatOf([40, 40], (_, at) => (at === 0 ? '' : last(ofChoice(60).usage)))
  const backend = await fakeBackend(t, (request, response) => {
    const { n, user } = JSON.parse(request.body)
    response.writeHead(200, { 'content-type': SSE_TYPE })
    if (user === 'cut') response.write(deltasOf(0, 30).join(''))
    else response.end(n === 2 ? odd : whole)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const url = `${gateway.url}/v1/chat/completions`
  for (let at = 0; at < 30; at++) {
    await (await post(url, { ...CHAT, stream: true, ...(at % 4 === 0 ? { n: 2 } : {}) })).text()
  }
  const abort = new AbortController()
  const cut = await post(url, { ...CHAT, user: 'cut', stream: true }, {}, abort.signal)
  await untilSeen(cut, deltasOf(0, 30).length)
  abort.abort()
  const line = await gateway.logged({ msg: 'exchange', outcome: 'client_gone' })
  assert.equal(line.completionTokens, 30)
})

test('hidden reasoning that is not counted by itself teaches nothing, and no estimate exceeds max_tokens', async t => {
  const whole = chatOf([100], () => last(ofChoice(400).usage))
  const backend = await fakeBackend(t, (request, response) => {
    response.writeHead(200, { 'content-type': SSE_TYPE })
    if (request.body.includes('cut')) response.write(deltasOf(0, 60).join(''))
    else response.end(whole)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const url = `${gateway.url}/v1/chat/completions`
  const cutTokens = async (user: string, more: object = {}) => {
    const abort = new AbortController()
    const body = { ...CHAT, user: `cut ${user}`, stream: true, ...more }
    const cut = await post(url, body, {}, abort.signal)
    await untilSeen(cut, 60)
    abort.abort()
    const requestId = cut.headers.get('x-llmproxy-request-id')
    return Number((await gateway.logged({ msg: 'exchange', requestId })).completionTokens)
  }
  for (let at = 0; at < 30; at++) {
    await (await post(url, { ...CHAT, stream: true, include_reasoning: false })).text()
  }
  assert.equal(await cutTokens('one'), 60)
  for (let at = 0; at < 30; at++) await (await post(url, { ...CHAT, stream: true })).text()
  assert.ok((await cutTokens('two')) > 100)
  assert.equal(await cutTokens('three', { max_tokens: 70 }), 70)
})

test('a response in a form in which no usage is read costs its prompt', async t => {
  const backend = await fakeBackend(t, ({ body }, response) => {
    response.writeHead(200, {
      'content-type': body.includes('base') ? 'text/html' : 'application/octet-stream'
    })
    response.end(Buffer.from([0, 1, 2, 255]))
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const text = 'some words and more. '.repeat(300)
  for (const [path, body] of [
    ['/v1/embeddings', { model: 'm', input: text, encoding_format: 'bytes' }],
    ['/v1/embeddings', { model: 'base', input: text }],
    ['/v1/rerank', { model: 'm', query: 'q', documents: [text] }]
  ] as const) {
    const response = await post(gateway.url + path, body)
    assert.deepEqual([...new Uint8Array(await response.arrayBuffer())], [0, 1, 2, 255])
    const requestId = response.headers.get('x-llmproxy-request-id')
    const { promptTokens } = await gateway.logged({ msg: 'exchange', requestId })
    assert.ok(Number(promptTokens) > 1_000, `${path}: ${promptTokens}`)
  }
})

test('a stream of several choices is only over when all of them have ended', async t => {
  const beginning = byTurns([
    [...deltasOf(0, 10), streamed(0, '', 'stop'), data({ choices: [], ...ofChoice(10) })],
    deltasOf(1, 20)
  ])
  const backend = await fakeBackend(t, (request, response) => {
    response.writeHead(200, { 'content-type': SSE_TYPE })
    if (request.body.includes('cut')) response.end(beginning)
    else response.write(beginning)
  })
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const url = `${gateway.url}/v1/chat/completions`
  await (await post(url, { ...CHAT, n: 2, user: 'cut', stream: true })).text().catch(() => {})
  const broken = await gateway.logged({ msg: 'exchange' })
  assert.deepEqual(
    [broken.outcome, broken.completionTokens, broken.exactness],
    ['backend_failed', 30, 'counted']
  )
  const abort = new AbortController()
  const left = await post(url, { ...CHAT, n: 2, stream: true }, {}, abort.signal)
  await untilSeen(left, 31)
  abort.abort()
  const line = await gateway.logged({ msg: 'exchange', outcome: 'client_gone' })
  assert.deepEqual([line.completionTokens, line.exactness], [30, 'counted'])
})

/** A backend that says how many tokens a prompt has, unless `cut` stands in it: then it says nothing at all. */
async function promptCounter(
  t: TestContext,
  tokensOf: (body: Record<string, unknown>, url: string) => number
) {
  const backend = await fakeBackend(t, (request, response) => {
    if (request.body.includes('cut')) return
    const usage = {
      prompt_tokens: tokensOf(JSON.parse(request.body), request.url),
      completion_tokens: 1
    }
    response.writeHead(200, { 'content-type': JSON_TYPE })
    response.end(json({ choices: [{ index: 0, message: { content: 'Hi' } }], usage }))
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    auth: {
      enabled: true,
      keys: [
        { key: 'alice', name: 'alice' },
        { key: 'bob', name: 'bob', limits: { tokens_per_minute: 1_000 } }
      ],
      skip_paths: ['/metrics']
    }
  })
  const ask = (path: string, body: object, key: string, signal?: AbortSignal) =>
    post(gateway.url + path, { model: 'm', ...body }, { authorization: `Bearer ${key}` }, signal)
  let cuts = 0
  const whole = async (path: string, body: object, key = 'alice') => {
    const response = await ask(path, body, key)
    await response.text()
    return response.status
  }
  /** Leaves before there is a response, and returns the tokens that are recorded of the prompt. */
  const cut = async (path: string, body: object, key = 'alice') => {
    const asked = backend.requests.length
    const abort = new AbortController()
    const response = ask(path, { ...body, user: 'cut' }, key, abort.signal).catch(() => {})
    await backend.request(asked)
    abort.abort()
    await response
    const lines = () => gateway.lines.filter(line => line.outcome === 'client_gone')
    const before = cuts++
    await eventually(() => lines().length > before)
    const line = lines()[before]!
    assert.equal(line.exactness, 'counted')
    return Number(line.promptTokens)
  }
  return { whole, cut }
}

test('odd prompts of one caller change nothing for another', async t => {
  const isOdd = (body: object) => json(body).includes('odd')
  const { whole } = await promptCounter(t, body => (isOdd(body) ? 1900 : 20))
  const messages = (content: string) => ({ messages: [{ role: 'user', content }] })
  for (let at = 0; at < 100; at++) {
    await whole('/v1/chat/completions', messages(`Something odd, ${at}`), 'alice')
  }
  for (let at = 0; at < 3; at++) {
    const status = await whole('/v1/chat/completions', messages('A few plain words'), 'bob')
    assert.equal(status, 200)
  }
})

test('a field that no model reads teaches nothing about prompts', async t => {
  const { whole, cut } = await promptCounter(t, () => 40)
  const messages = [{ role: 'user', content: WORDS.join('') }]
  for (let at = 0; at < 60; at++) {
    const padding = 'many words that no model ever reads '.repeat(20)
    await whole('/v1/chat/completions', { messages, metadata: { padding }, padding: [padding] })
  }
  const content = WORDS.join('').repeat(100)
  const tokens = await cut('/v1/chat/completions', { messages: [{ role: 'user', content }] })
  assert.ok(tokens > 3000 && tokens < 6000, String(tokens))
})

test('a chat template is no part of a completion, and instructions for tools only of a chat with tools', async t => {
  const parameters = { type: 'object', properties: { city: { type: 'string' } } }
  const tools = [{ type: 'function', function: { name: 'weather', parameters } }]
  const { whole, cut } = await promptCounter(t, (body, url) => {
    if (url.endsWith('/v1/completions')) return Math.ceil(String(body.prompt).split(' ').length)
    const text = json(body.messages).split(' ').length
    return text + 26 + (body.tools === undefined ? 0 : 140)
  })
  const chat = '/v1/chat/completions'
  const messages = (count: number) => [{ role: 'user', content: WORDS.slice(0, count).join('') }]
  for (let at = 1; at <= 16; at++) {
    await whole(chat, { messages: messages(at) })
    if (at % 2 === 0) await whole(chat, { messages: messages(at), tools })
  }
  const completion = await cut('/v1/completions', { prompt: 'Two words' })
  assert.ok(completion <= 6, `${completion} for a completion of 2 tokens`)
  const plain = await cut(chat, { messages: messages(10) })
  assert.ok(Math.abs(plain / 36 - 1) < 0.15, `${plain} for a chat of 36 tokens`)
  const withTools = await cut(chat, { messages: messages(10), tools })
  assert.ok(Math.abs(withTools / 176 - 1) < 0.15, `${withTools} for one with tools, of 176`)
})

/** An API with reasoning: its stream of words, reasoning and the counts of both. */
const REASONERS: [
  string,
  (words: string[], reasoning: string[], counted?: [number, number]) => string
][] = [
  [
    '/v1/chat/completions',
    (words, reasoning, counted) =>
      reasoning.map(reasoning_content => chat({ reasoning_content })).join('') +
      words.map(content => chat({ content })).join('') +
      (counted === undefined
        ? ''
        : last({
            prompt_tokens: LLAMA_PROMPT,
            completion_tokens: counted[0],
            completion_tokens_details: { reasoning_tokens: counted[1] }
          }) + DONE)
  ],
  [
    '/v1/responses',
    (words, reasoning, counted) =>
      reasoning
        .map(delta => typed({ type: 'response.reasoning_text.delta', delta } as never))
        .join('') +
      words.map(delta => typed({ type: 'response.output_text.delta', delta } as never)).join('') +
      (counted === undefined
        ? ''
        : typed({
            type: 'response.completed',
            response: {
              usage: {
                input_tokens: LLAMA_PROMPT,
                output_tokens: counted[0],
                output_tokens_details: { reasoning_tokens: counted[1] }
              }
            }
          } as never))
  ]
]

for (const [path, body] of REASONERS) {
  test(`${path}: reasoning that is not shown teaches nothing about text`, async t => {
    /** Words and reasoning of the lessons, and their counts; the stream that is cut has 60 words. */
    let lesson: [string[], string[], [number, number]]
    const backend = await fakeBackend(t, (request, response) => {
      response.writeHead(200, { 'content-type': SSE_TYPE })
      if (request.body.includes('cut')) response.write(body(words(60), []))
      else response.end(body(...lesson))
    })
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    const ask = (model: string, user: string, signal?: AbortSignal) =>
      post(gateway.url + path, { ...CHAT, input: 'Hi', model, user, stream: true }, {}, signal)
    const lessons = {
      hidden: [words(100), [], [500, 400]],
      'not even counted': [words(100), [], [2000, 0]],
      summarized: [words(100), words(20), [500, 400]],
      shown: [words(100), words(200), [300, 200]]
    } satisfies Record<string, typeof lesson>
    for (const [model, each] of Object.entries(lessons)) {
      lesson = each as typeof lesson
      for (let at = 0; at < 30; at++) await (await ask(model, 'whole')).text()
      const abort = new AbortController()
      await untilSeen(await ask(model, 'cut', abort.signal), 60)
      abort.abort()
      const line = await gateway.logged({ msg: 'exchange', outcome: 'client_gone', model })
      assert.ok(
        Math.abs(Number(line.completionTokens) - 60) <= 2,
        `${model}: ${line.completionTokens}`
      )
    }
    // What is shown does teach: 1.3 tokens for each delta.
    lesson = [words(100), words(200), [390, 260]]
    for (let at = 0; at < 30; at++) await (await ask('other', 'whole')).text()
    const abort = new AbortController()
    await untilSeen(await ask('other', 'cut', abort.signal), 60)
    abort.abort()
    const line = await gateway.logged({ msg: 'exchange', outcome: 'client_gone', model: 'other' })
    assert.ok(Math.abs(Number(line.completionTokens) - 78) <= 4, String(line.completionTokens))
  })
}

/** An engine that hides 5,000 tokens of reasoning, and reports the tokens so far if it is asked and can. */
const HIDDEN = 5_000
const usageAfter = (deltas: number) => ({
  prompt_tokens: LLAMA_PROMPT,
  completion_tokens: HIDDEN + deltas,
  total_tokens: LLAMA_PROMPT + HIDDEN + deltas
})

function hidingEngine(t: TestContext, owned_by: string, refuses: string[] = []) {
  return fakeBackend(
    t,
    (request, response) => {
      if (request.url === '/v1/models') {
        response.writeHead(200, { 'content-type': JSON_TYPE })
        return void response.end(json({ data: [{ id: 'm', owned_by }] }))
      }
      const { stream_options: options = {}, user } = JSON.parse(request.body)
      const refused = refuses.find(field => field in options)
      if (refused !== undefined) {
        response.writeHead(400, { 'content-type': JSON_TYPE })
        return void response.end(json({ error: { message: `stream_options.${refused}: unknown` } }))
      }
      const isRunning = options.include_usage && options.continuous_usage_stats
      response.writeHead(200, { 'content-type': SSE_TYPE })
      response.write(hidingStream(isRunning, false))
      if (user === 'cut') return
      response.end((options.include_usage ? last(lastUsage) : '') + DONE)
    },
    { listsModels: true }
  )
}
const lastUsage = {
  ...usageAfter(100),
  completion_tokens_details: { reasoning_tokens: HIDDEN }
}
const hidingStream = (isRunning: boolean, hasUsage: boolean) =>
  words(100)
    .map((content, at) => chat({ content }, isRunning ? { usage: usageAfter(at + 1) } : {}))
    .join('') + (hasUsage ? last(lastUsage) : '')

const OPTIONS = {
  'no options': {},
  'usage at the end': { stream_options: { include_usage: true } },
  'usage so far': { stream_options: { include_usage: true, continuous_usage_stats: true } }
}

test('hidden tokens are counted when the client closes early, where the backend reports them', async t => {
  for (const owner of ['vllm', 'sglang']) {
    const backend = await hidingEngine(t, owner)
    const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
    await gateway.logged({ msg: 'backend lists models' })
    const url = `${gateway.url}/v1/chat/completions`
    for (const [name, options] of Object.entries(OPTIONS)) {
      const whole = await post(url, { ...CHAT, ...options, stream: true })
      const shows = { running: name === 'usage so far', usage: name !== 'no options' }
      // The client gets what it has asked for, byte for byte.
      assert.equal(await whole.text(), hidingStream(shows.running, shows.usage) + DONE, name)
      const abort = new AbortController()
      const cut = await post(
        url,
        { ...CHAT, ...options, user: 'cut', stream: true },
        {},
        abort.signal
      )
      const requestId = cut.headers.get('x-llmproxy-request-id')
      await untilSeen(cut, 100)
      abort.abort()
      const line = await gateway.logged({ msg: 'exchange', requestId })
      assert.deepEqual(
        [line.promptTokens, line.completionTokens, line.exactness],
        [LLAMA_PROMPT, HIDDEN + 100, 'counted'],
        name
      )
    }
  }
})

test('a count that may lack hidden tokens says so', async t => {
  const backend = await hidingEngine(t, 'llamacpp')
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  const url = `${gateway.url}/v1/chat/completions`
  const cut = async (more: object) => {
    const abort = new AbortController()
    const body = { ...CHAT, ...more, user: 'cut', stream: true }
    const response = await post(url, body, {}, abort.signal)
    const requestId = response.headers.get('x-llmproxy-request-id')
    await untilSeen(response, 100)
    abort.abort()
    const line = await gateway.logged({ msg: 'exchange', requestId })
    return [line.completionTokens, line.exactness]
  }
  assert.deepEqual(await cut({}), [100, 'counted'])
  assert.deepEqual(await cut({ include_reasoning: false }), [100, 'at_least'])
  await (await post(url, { ...CHAT, stream: true })).text()
  assert.deepEqual(await cut({}), [100, 'at_least'])
  assert.ok(backend.requests.every(({ body }) => !body.includes('continuous_usage_stats')))
})

test('a backend that does not know running usage is asked without it, and remembered', async t => {
  const backend = await hidingEngine(t, 'vllm', ['continuous_usage_stats'])
  const url = { url: backend.url, continuous_usage: true }
  const gateway = await startGateway(t, { backends: [url] })
  for (let at = 0; at < 2; at++) {
    const response = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream: true })
    assert.equal(await response.text(), hidingStream(false, false) + DONE)
    const requestId = response.headers.get('x-llmproxy-request-id')
    const line = await gateway.logged({ msg: 'exchange', requestId })
    assert.deepEqual([line.completionTokens, line.exactness], [HIDDEN + 100, 'exact'])
  }
  const asked = backend.requests.filter(({ url }) => url.endsWith('completions'))
  assert.deepEqual(
    asked.map(({ body }) => JSON.parse(body).stream_options),
    [
      { include_usage: true, continuous_usage_stats: true },
      { include_usage: true },
      { include_usage: true }
    ]
  )
})

/** Reads a stream until this many events have come. */
async function untilSeen(response: Response, events: number): Promise<void> {
  let seen = ''
  for await (const chunk of response.body!.pipeThrough(new TextDecoderStream())) {
    seen += chunk
    if (seen.split('data: ').length > events) return
  }
}
