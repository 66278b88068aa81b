import type { ServerResponse } from 'node:http'
import type { Answerer, SeenRequest } from './helper.ts'

/**
 * Answers as inference servers write them, event by event, and ways to cut them into writes. All
 * say the same: {@link TEXT}, or the {@link CALLS} where the caller brought tools, for the same
 * number of tokens.
 */

/** What of a request decides how it is answered. */
export interface Ask {
  stream?: boolean
  tools?: unknown[]
  stream_options?: { include_usage?: boolean }
  encoding_format?: string
}

/** One answer: the head, and the body as the pieces that mean something by themselves. */
export interface WireAnswer {
  status?: number
  headers: Record<string, string>
  events: string[]
}

export type Say = (ask: Ask, request: SeenRequest) => WireAnswer

export const PIECES = ['Grü', 'ße', ' aus', ' Zürich', ' 🦊', '!']
export const TEXT = PIECES.join('')
export const REASONING = 'Überlegen …'
export const PROMPT_TOKENS = 12
export const COMPLETION_TOKENS = 8
export const CALLS = [
  { id: 'call_1', name: 'get_weather', input: { city: 'Zürich', note: 'a "quote", a \\ and 🌧' } },
  { id: 'call_2', name: 'get_time', input: { zone: 'Europe/Zürich', data: '\n\ndata: [DONE]\n\n' } }
].map(call => ({ ...call, text: JSON.stringify(call.input) }))

/** How the body is cut into writes; each write is a chunk of its own for whoever reads. */
export const CUTS = {
  'event by event': (events: string[]) => events.map(event => Buffer.from(event)),
  'all at once': (events: string[]) => [Buffer.from(events.join(''))],
  // In the middle of every character, line end and member there is.
  'byte by byte': (events: string[]) =>
    Array.from(Buffer.from(events.join('')), byte => Buffer.of(byte))
}
export type Cut = keyof typeof CUTS
export const cuts = Object.keys(CUTS) as Cut[]

/** Answers what `say` says. */
export function speaks(say: Say, cut: Cut = 'event by event'): Answerer {
  return async (request, response) => {
    for (const part of CUTS[cut](begin(say, request, response))) {
      response.write(part)
      await pause(cut)
    }
    response.end()
  }
}

/**
 * Node joins what is written in one tick into one chunk. A tick later it is another chunk; a turn of
 * the loop later it is read by itself too, which would take too long for every byte.
 */
function pause(cut: Cut): Promise<void> {
  return new Promise(cut === 'byte by byte' ? process.nextTick : setImmediate)
}

/** Answers with the first events of what `say` says, and then dies. */
export function dies(say: Say, after: number): Answerer {
  return (request, response) => {
    const events = begin(say, request, response).slice(0, after)
    response.write(events.join(''), () => response.socket?.destroy())
  }
}

/** Answers with the first events of what `say` says, and then falls silent. */
export function stalls(say: Say, after: number): Answerer {
  return (request, response) => {
    response.write(begin(say, request, response).slice(0, after).join(''))
  }
}

function begin(say: Say, request: SeenRequest, response: ServerResponse): string[] {
  const { status, headers, events } = say(JSON.parse(request.body || '{}'), request)
  response.writeHead(status ?? 200, headers)
  return events
}

export function json(body: unknown, status = 200): WireAnswer {
  const headers = { 'content-type': 'application/json' }
  return { status, headers, events: [JSON.stringify(body)] }
}

const data = (event: object) => `data: ${JSON.stringify(event)}\n\n`
const typed = (type: string, more: object = {}) => `event: ${type}\n${data({ type, ...more })}`
const DONE = 'data: [DONE]\n\n'

/** Arguments as they are generated: some characters at a time. */
function pieces(text: string): string[] {
  return text.match(/.{1,7}/gsu) ?? []
}

const USAGE = {
  prompt_tokens: PROMPT_TOKENS,
  total_tokens: PROMPT_TOKENS + COMPLETION_TOKENS,
  completion_tokens: COMPLETION_TOKENS
}

const toolCalls = CALLS.map(({ id, name, text }) => ({
  id,
  type: 'function',
  function: { name, arguments: text }
}))

/** vLLM, /v1/chat/completions. */
export function vllmChat({ stream, tools, stream_options }: Ask): WireAnswer {
  const head = { id: 'chatcmpl-abc', created: 1_700_000_000, model: 'm' }
  const finish_reason = tools ? 'tool_calls' : 'stop'
  if (!stream) {
    const message = {
      role: 'assistant',
      content: tools ? null : TEXT,
      refusal: null,
      annotations: null,
      audio: null,
      function_call: null,
      tool_calls: tools ? toolCalls : [],
      reasoning: tools ? null : REASONING
    }
    return json({
      ...head,
      object: 'chat.completion',
      choices: [{ index: 0, message, logprobs: null, finish_reason, stop_reason: null }],
      service_tier: null,
      system_fingerprint: 'vllm-1',
      usage: { ...USAGE, prompt_tokens_details: null },
      prompt_logprobs: null,
      kv_transfer_params: null
    })
  }
  const chunk = (delta: object, more: object = { finish_reason: null, token_ids: null }) =>
    data({
      ...head,
      object: 'chat.completion.chunk',
      choices: [{ index: 0, delta, logprobs: null, ...more }]
    })
  const role = { index: 0, delta: { role: 'assistant', content: '' }, logprobs: null }
  const events = [
    data({
      ...head,
      object: 'chat.completion.chunk',
      choices: [{ ...role, finish_reason: null }],
      prompt_token_ids: null
    })
  ]
  if (tools) {
    for (const [index, { id, name, text }] of CALLS.entries()) {
      events.push(chunk({ tool_calls: [{ id, type: 'function', index, function: { name } }] }))
      for (const piece of pieces(text)) {
        events.push(chunk({ tool_calls: [{ index, function: { arguments: piece } }] }))
      }
    }
  } else {
    events.push(chunk({ reasoning: REASONING }), ...PIECES.map(content => chunk({ content })))
  }
  events.push(chunk({ content: '' }, { finish_reason, stop_reason: null, token_ids: null }))
  if (stream_options?.include_usage) {
    const last = { ...head, object: 'chat.completion.chunk', choices: [], usage: USAGE }
    events.push(data({ ...last, system_fingerprint: 'vllm-1' }))
  }
  return { headers: VLLM, events: [...events, DONE] }
}
const VLLM = { 'content-type': 'text/event-stream; charset=utf-8' }

/** llama.cpp, /v1/chat/completions: no content in the role chunk, timings on the last chunk. */
export function llamacppChat({ stream, tools, stream_options }: Ask): WireAnswer {
  const head = {
    created: 1_700_000_000,
    id: 'chatcmpl-XYZ',
    model: 'm',
    system_fingerprint: 'b1234-abc'
  }
  const finish_reason = tools ? 'tool_calls' : 'stop'
  if (!stream) {
    const message = tools
      ? { role: 'assistant', content: null, tool_calls: toolCalls }
      : { role: 'assistant', content: TEXT, reasoning_content: REASONING }
    return json({
      choices: [{ finish_reason, index: 0, message }],
      ...head,
      object: 'chat.completion',
      usage: LLAMACPP_USAGE,
      timings: TIMINGS
    })
  }
  const chunk = (delta: object, finish: string | null = null, more: object = {}) =>
    data({
      choices: [{ finish_reason: finish, index: 0, delta }],
      ...head,
      object: 'chat.completion.chunk',
      ...more
    })
  const events = [chunk({ role: 'assistant', content: null })]
  if (tools) {
    for (const [index, { id, name, text }] of CALLS.entries()) {
      const opening = { index, id, type: 'function', function: { name, arguments: '' } }
      events.push(chunk({ tool_calls: [opening] }))
      for (const piece of pieces(text)) {
        events.push(chunk({ tool_calls: [{ index, function: { arguments: piece } }] }))
      }
    }
  } else {
    events.push(chunk({ reasoning_content: REASONING }))
    // A comment is what it sends while the prompt takes long.
    events.push(':\n\n', ...PIECES.map(content => chunk({ content })))
  }
  if (stream_options?.include_usage) {
    events.push(chunk({}, finish_reason))
    const last = { choices: [], ...head, object: 'chat.completion.chunk', usage: LLAMACPP_USAGE }
    events.push(data({ ...last, timings: TIMINGS }))
  } else events.push(chunk({}, finish_reason, { timings: TIMINGS }))
  return { headers: LLAMACPP, events: [...events, DONE] }
}
const LLAMACPP = { 'content-type': 'text/event-stream', 'x-accel-buffering': 'no' }
const LLAMACPP_USAGE = { ...USAGE, prompt_tokens_details: { cached_tokens: 4 } }
const TIMINGS = { cache_n: 4, prompt_n: 8, prompt_ms: 1.5, predicted_n: 8, predicted_ms: 20.25 }

/** Ollama, /v1/chat/completions: a tool call arrives whole, and calls share no chunk. */
export function ollamaChat({ stream, tools, stream_options }: Ask): WireAnswer {
  const head = { id: 'chatcmpl-123', created: 1, model: 'm', system_fingerprint: 'fp_ollama' }
  const finish_reason = tools ? 'tool_calls' : 'stop'
  if (!stream) {
    const message = tools
      ? { role: 'assistant', content: '', tool_calls: indexed() }
      : { role: 'assistant', content: TEXT, reasoning: REASONING }
    return json({
      ...head,
      object: 'chat.completion',
      choices: [{ index: 0, message, finish_reason }],
      usage: USAGE
    })
  }
  const chunk = (delta: object, finish: string | null = null) =>
    data({
      ...head,
      object: 'chat.completion.chunk',
      choices: [{ index: 0, delta, finish_reason: finish }]
    })
  const events = tools
    ? indexed().map(call => chunk({ role: 'assistant', content: '', tool_calls: [call] }))
    : [
        chunk({ role: 'assistant', content: '', reasoning: REASONING }),
        ...PIECES.map(content => chunk({ content }))
      ]
  events.push(chunk({}, finish_reason))
  if (stream_options?.include_usage) {
    events.push(data({ ...head, object: 'chat.completion.chunk', choices: [], usage: USAGE }))
  }
  return { headers: OLLAMA, events: [...events, DONE] }
}
const OLLAMA = { 'content-type': 'text/event-stream' }
const indexed = () => toolCalls.map((call, index) => ({ ...call, index }))

/** vLLM, /v1/completions. */
export function vllmCompletions({ stream, stream_options }: Ask): WireAnswer {
  const head = { id: 'cmpl-abc', object: 'text_completion', created: 1_700_000_000, model: 'm' }
  const choice = (text: string, finish_reason: string | null) => ({
    index: 0,
    text,
    logprobs: null,
    finish_reason,
    stop_reason: null
  })
  if (!stream) return json({ ...head, choices: [choice(TEXT, 'stop')], usage: USAGE })
  const events = PIECES.map((text, at) =>
    data({ ...head, choices: [choice(text, at === PIECES.length - 1 ? 'stop' : null)] })
  )
  if (stream_options?.include_usage) events.push(data({ ...head, choices: [], usage: USAGE }))
  return { headers: VLLM, events: [...events, DONE] }
}

/** llama.cpp, /v1/completions: usage always, in a chunk that has a choice. */
export function llamacppCompletions({ stream }: Ask): WireAnswer {
  const head = { created: 1_700_000_000, model: 'm', system_fingerprint: 'b1234-abc' }
  const chunk = (text: string, finish_reason: string | null, more: object) => ({
    choices: [{ text, index: 0, logprobs: null, finish_reason }],
    ...head,
    object: 'text_completion',
    ...more,
    id: 'cmpl-XYZ'
  })
  const last = { usage: LLAMACPP_USAGE, timings: TIMINGS }
  if (!stream) return json(chunk(TEXT, 'stop', last))
  const events = PIECES.map(text => data(chunk(text, null, {})))
  return { headers: LLAMACPP, events: [...events, data(chunk('', 'stop', last)), DONE] }
}

/** Ollama, /v1/completions: where usage was asked for, every chunk has one, of zeros. */
export function ollamaCompletions({ stream, stream_options }: Ask): WireAnswer {
  const head = { id: 'cmpl-123', object: 'text_completion', created: 1, model: 'm' }
  const asked = stream_options?.include_usage === true
  const zeros = { prompt_tokens: 0, completion_tokens: 0, total_tokens: 0 }
  const chunk = (text: string, finish_reason: string | null) => ({
    ...head,
    system_fingerprint: 'fp_ollama',
    choices: [{ text, index: 0, finish_reason }],
    ...(asked ? { usage: zeros } : {})
  })
  if (!stream) return json({ ...chunk(TEXT, 'stop'), usage: USAGE })
  const events = [...PIECES.map(text => data(chunk(text, null))), data(chunk('', 'stop'))]
  if (asked) events.push(data({ ...chunk('', null), choices: [], usage: USAGE }))
  return { headers: OLLAMA, events: [...events, DONE] }
}

/** vLLM, /v1/embeddings: vectors as base64 where that is asked for. */
export function vllmEmbeddings(vectors: number[][]): Say {
  return ({ encoding_format }) =>
    json({
      id: 'embd-abc',
      object: 'list',
      created: 1_700_000_000,
      model: 'm',
      data: vectors.map((vector, index) => ({
        index,
        object: 'embedding',
        embedding:
          encoding_format === 'base64'
            ? Buffer.from(new Float32Array(vector).buffer).toString('base64')
            : vector
      })),
      usage: {
        prompt_tokens: PROMPT_TOKENS,
        total_tokens: PROMPT_TOKENS,
        completion_tokens: 0,
        prompt_tokens_details: null
      }
    })
}

/** Counts at the beginning and the end of a Messages stream, as the servers give them. */
export const MESSAGES_USAGE = {
  vllm: {
    start: { input_tokens: 12, output_tokens: 0 },
    end: { input_tokens: 12, output_tokens: 8 }
  },
  'llama.cpp': { start: { input_tokens: 12, output_tokens: 0 }, end: { output_tokens: 8 } },
  sglang: {
    start: { input_tokens: 0, output_tokens: 0 },
    end: { input_tokens: 8, output_tokens: 8, cache_read_input_tokens: 4 }
  },
  // What it says first is only an estimate.
  ollama: {
    start: { input_tokens: 30, output_tokens: 0 },
    end: { input_tokens: 12, output_tokens: 8 }
  }
}

/** The Messages API, /v1/messages. */
export function messages(server: keyof typeof MESSAGES_USAGE = 'vllm'): Say {
  return ({ stream, tools }) => {
    const { start, end } = MESSAGES_USAGE[server]
    const head = { id: 'msg_1', type: 'message', role: 'assistant', model: 'm' }
    const stop = { stop_reason: tools ? 'tool_use' : 'end_turn', stop_sequence: null }
    if (!stream) {
      const content = [
        { type: 'text', text: TEXT },
        ...(tools
          ? CALLS.map(({ id, name, input }) => ({ type: 'tool_use', id, name, input }))
          : [])
      ]
      return json({ ...head, content, ...stop, usage: { ...start, ...end } })
    }
    const block = (index: number, content_block: object, deltas: object[]) => [
      typed('content_block_start', { index, content_block }),
      ...deltas.map(delta => typed('content_block_delta', { index, delta })),
      typed('content_block_stop', { index })
    ]
    const calls = tools ? CALLS : []
    const nothing = { content: [], stop_reason: null, stop_sequence: null }
    const texts = PIECES.map(text => ({ type: 'text_delta', text }))
    const events = [
      typed('message_start', { message: { ...head, ...nothing, usage: start } }),
      ...block(0, { type: 'text', text: '' }, texts),
      typed('ping'),
      ...calls.flatMap(({ id, name, text }, at) =>
        block(
          at + 1,
          { type: 'tool_use', id, name, input: {} },
          pieces(text).map(partial_json => ({ type: 'input_json_delta', partial_json }))
        )
      ),
      typed('message_delta', { delta: stop, usage: end }),
      typed('message_stop')
    ]
    return { headers: VLLM, events }
  }
}

/** The Responses API, /v1/responses. */
export function responses({ stream, tools }: Ask): WireAnswer {
  const head = { id: 'resp_1', object: 'response', created_at: 1_700_000_000, model: 'm' }
  const rest = {
    error: null,
    incomplete_details: null,
    instructions: null,
    metadata: null,
    parallel_tool_calls: true,
    temperature: 1,
    tool_choice: 'auto',
    tools: tools ?? [],
    top_p: 1
  }
  const usage = {
    input_tokens: PROMPT_TOKENS,
    input_tokens_details: { cached_tokens: 4 },
    output_tokens: COMPLETION_TOKENS,
    output_tokens_details: { reasoning_tokens: 2 },
    total_tokens: PROMPT_TOKENS + COMPLETION_TOKENS
  }
  const part = (text: string) => ({ type: 'output_text', text, annotations: [], logprobs: [] })
  const item = (status: string, content: object[]) => ({
    id: 'item_0',
    type: 'message',
    role: 'assistant',
    status,
    content
  })
  const call = (at: number, status: string, text: string) => ({
    id: `item_${at + 1}`,
    type: 'function_call',
    call_id: CALLS[at]!.id,
    name: CALLS[at]!.name,
    arguments: text,
    status
  })
  const calls = tools ? CALLS : []
  const output = [
    item('completed', [part(TEXT)]),
    ...calls.map(({ text }, at) => call(at, 'completed', text))
  ]
  const whole = { ...head, ...rest, status: 'completed', output, usage }
  if (!stream) return json(whole)

  const events: string[] = []
  const say = (type: string, more: object) => {
    events.push(typed(type, { sequence_number: events.length, ...more }))
  }
  const empty = { ...head, ...rest, status: 'in_progress', output: [], usage: null }
  say('response.created', { response: empty })
  say('response.in_progress', { response: empty })
  say('response.output_item.added', { output_index: 0, item: item('in_progress', []) })
  const place = { output_index: 0, item_id: 'item_0', content_index: 0 }
  say('response.content_part.added', { ...place, part: part('') })
  for (const delta of PIECES) say('response.output_text.delta', { ...place, delta, logprobs: [] })
  say('response.output_text.done', { ...place, text: TEXT, logprobs: [] })
  say('response.content_part.done', { ...place, part: part(TEXT) })
  say('response.output_item.done', { output_index: 0, item: output[0] })
  for (const [at, { text }] of calls.entries()) {
    const output_index = at + 1
    const where = { output_index, item_id: `item_${output_index}` }
    say('response.output_item.added', { output_index, item: call(at, 'in_progress', '') })
    for (const delta of pieces(text)) {
      say('response.function_call_arguments.delta', { ...where, delta })
    }
    say('response.function_call_arguments.done', { ...where, arguments: text })
    say('response.output_item.done', { output_index, item: output[output_index] })
  }
  say('response.completed', { response: whole })
  return { headers: VLLM, events }
}

/** Ollama, /api/chat: JSON lines, and a tool call whole with its arguments as an object. */
export function nativeChat({ stream, tools }: Ask): WireAnswer {
  const calls = CALLS.map(({ name, input }) => ({ function: { name, arguments: input } }))
  return native(
    stream,
    tools
      ? [{ message: { role: 'assistant', content: '', tool_calls: calls } }]
      : PIECES.map(content => ({ message: { role: 'assistant', content } })),
    { message: { role: 'assistant', content: '' } },
    {
      message: {
        role: 'assistant',
        ...(tools ? { content: '', tool_calls: calls } : { content: TEXT })
      }
    }
  )
}

/** Ollama, /api/generate. */
export function nativeGenerate({ stream }: Ask): WireAnswer {
  const context = [1, 2, 3]
  return native(
    stream,
    PIECES.map(response => ({ response })),
    { response: '', context },
    { response: TEXT, context }
  )
}

function native(stream = true, parts: object[], last: object, whole: object): WireAnswer {
  const head = { model: 'm', created_at: '2026-11-24T01:00:00.123456789Z' }
  const end = {
    done: true,
    done_reason: 'stop',
    total_duration: 5_191_566_416,
    load_duration: 2_154_458,
    prompt_eval_count: PROMPT_TOKENS,
    prompt_eval_duration: 383_809_000,
    eval_count: COMPLETION_TOKENS,
    eval_duration: 4_799_921_000
  }
  if (!stream) {
    const answer = json({ ...head, ...whole, ...end })
    return { ...answer, headers: { 'content-type': 'application/json; charset=utf-8' } }
  }
  const lines = [
    ...parts.map(part => ({ ...head, ...part, done: false })),
    { ...head, ...last, ...end }
  ]
  return {
    headers: { 'content-type': 'application/x-ndjson' },
    events: lines.map(line => `${JSON.stringify(line)}\n`)
  }
}
