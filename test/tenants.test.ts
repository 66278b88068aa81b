import assert from 'node:assert/strict'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import fc from 'fast-check'
import { dropControls, ENGINE_CONTROLS } from '../src/engine-controls.ts'
import { refuseReferences } from '../src/references.ts'
import { StoredResponses } from '../src/routes/stored-responses.ts'
import { outlineOf } from '../src/wire/json-scanner.ts'
import { type Answerer, fakeBackend, post, startGateway } from './helper.ts'
import { folder } from './process.ts'

/** One caller learns nothing of another, and changes nothing for another. */

const KEYS = [{ key: 'all' }, { key: 'one', models: ['one'] }]

async function start(t: TestContext, answer: Answerer, backend: object = {}, more: object = {}) {
  const server = await fakeBackend(t, answer, { listsModels: true })
  const gateway = await startGateway(t, {
    backends: [{ name: 'b', url: server.url, ...backend }],
    auth: { enabled: true, keys: KEYS, skip_paths: ['/health', '/metrics'] },
    ...more
  })
  const get = async (path: string, key: string): Promise<string> => {
    const response = await fetch(gateway.url + path, { headers: { 'x-api-key': key } })
    assert.equal(response.status, 200, path)
    return response.text()
  }
  const last = () => server.requests.findLast(({ method }) => method === 'POST')!
  return { last, gateway, get }
}

const TAGS = {
  models: ['one', 'two:latest'].map(name => ({
    name,
    model: name,
    size: 5,
    digest: 'd',
    details: { format: 'gguf' },
    remote_host: 'https://secret'
  }))
}

test('Ollama’s lists have the models of the caller, by their public names', async t => {
  for (const path of ['/api/tags', '/api/ps']) {
    const ollama: Answerer = (_request, response) => response.end(JSON.stringify(TAGS))
    const plain = await start(t, ollama)
    const listed = JSON.parse(await plain.get(path, 'all'))
    const { remote_host, ...first } = TAGS.models[0]!
    assert.deepEqual(listed.models[0], first)
    assert.deepEqual(
      listed.models.map(({ name }: { name: string }) => name),
      ['one', 'two:latest']
    )
    assert.doesNotMatch(await plain.get(path, 'one'), /two|secret/)
    const aliased = await start(t, ollama, { models: [{ one: 'two' }, { fast: 'one' }] })
    const own = JSON.parse(await aliased.get(path, 'one'))
    assert.deepEqual(own.models, [{ ...first, name: 'one', model: 'one' }])
    assert.match(await aliased.get(path, 'all'), /"fast"/)
  }
})

test('a list that no one can read is a 502', async t => {
  const { gateway } = await start(t, (_request, response) => response.end('{"models":'))
  const response = await fetch(`${gateway.url}/api/tags`, { headers: { 'x-api-key': 'all' } })
  assert.equal(response.status, 502)
  assert.match(await response.text(), /cannot be read/)
})

const CARD = {
  id: 'one',
  object: 'model',
  created: 7,
  owned_by: 'llamacpp',
  max_model_len: 4096,
  root: '/models/secret',
  path: '/models/secret.gguf',
  meta: { n_ctx: 4096, n_params: 1, file: '/secret' },
  status: { value: 'loaded', args: ['--hf-token', 'secret'], preset: 'hf-token = secret' },
  permission: [{ id: 'secret' }],
  in_cache: true
}

test('callers see the harmless fields of a model, whether its backend is known or not', async t => {
  const shown = {
    id: 'one',
    object: 'model',
    created: 7,
    owned_by: 'llamacpp',
    max_model_len: 4096,
    meta: { n_ctx: 4096, n_params: 1 },
    status: { value: 'loaded' }
  }
  const list: Answerer = ({ url }, response) => {
    const isList = url.endsWith('/models')
    response.end(JSON.stringify(isList ? { object: 'list', data: [CARD] } : CARD))
  }
  const known = await start(t, list)
  await known.gateway.logged({ msg: 'backend lists models' })
  const unknown = await start(t, list, {}, { routing: { model_discovery: { enabled: false } } })
  for (const { get } of [known, unknown]) {
    for (const prefix of ['/v1', '']) {
      const { data } = JSON.parse(await get(`${prefix}/models`, 'all'))
      assert.deepEqual(data, [shown])
      assert.deepEqual(JSON.parse(await get(`${prefix}/models/one`, 'all')), shown)
    }
  }
  const aliased = await start(t, list, { models: [{ fast: 'one' }] })
  assert.doesNotMatch(await aliased.get('/v1/models', 'all'), /secret|one/)
})

test('callers see the harmless fields of what Ollama shows of a model', async t => {
  const shown = {
    license: 'MIT',
    parameters: 'num_ctx 4096\nstop "x"',
    template: '{{ .Prompt }}',
    capabilities: ['completion', 'tools'],
    modified_at: '2026-01-01T00:00:00Z',
    details: {
      parent_model: '',
      format: 'gguf',
      family: 'llama',
      parameter_size: '8B',
      quantization_level: 'Q4'
    },
    model_info: {
      'general.architecture': 'llama',
      'general.basename': 'one',
      'llama.context_length': 8192,
      'tokenizer.ggml.add_bos_token': true
    },
    projector_info: { 'clip.vision.patch_size': 14 }
  }
  const { gateway } = await start(t, ({ method }, response) => {
    const all = {
      ...shown,
      modelfile: 'FROM /secret',
      system: 'secret',
      messages: [{ role: 'user', content: 'secret' }],
      remote_host: 'https://secret',
      remote_model: 'secret',
      tensors: [{ name: 'secret' }],
      added_later: 'secret',
      details: { ...shown.details, parent_model: '/secret' },
      model_info: {
        ...shown.model_info,
        'quantize.imatrix.file': '/secret',
        'tokenizer.ggml.tokens': ['secret'],
        'general.source.url': 'https://secret'
      }
    }
    response.setHeader('content-type', 'application/json')
    if (method === 'POST') return response.end(JSON.stringify(all))
    const model = { name: 'one', details: all.details }
    return response.end(JSON.stringify({ models: [model] }))
  })
  const headers = { 'x-api-key': 'all' }
  for (const body of [{ model: 'one' }, { name: 'one', verbose: true }]) {
    const response = await post(`${gateway.url}/api/show`, body, headers)
    assert.deepEqual(await response.json(), shown)
  }
  const tags = await fetch(`${gateway.url}/api/tags`, { headers })
  assert.doesNotMatch(await tags.text(), /secret/)
})

test('an error of /api/show passes', async t => {
  const { gateway } = await start(t, (_request, response) => {
    response.writeHead(404, { 'content-type': 'application/json' })
    response.end('{"error":"model not found"}')
  })
  const response = await post(`${gateway.url}/api/show`, { model: 'one' }, { 'x-api-key': 'all' })
  assert.equal(response.status, 404)
  assert.deepEqual(await response.json(), { error: 'model not found' })
})

const STEERING = {
  priority: -9,
  request_id: 'other',
  kv_transfer_params: { do_remote_decode: true },
  ec_transfer_params: { x: 1 },
  disaggregated_params: { x: 1 },
  lora_request: { x: 1 },
  litellm_params: { x: 1 },
  cache_salt: 'x',
  Keep_Alive: 0,
  keep_alive: '24h',
  lora_path: 'other',
  id_slot: 0,
  custom_logit_processor: 'code',
  ttl: 1,
  verbose: true,
  draft_model: 'other',
  adapter_id: 'other',
  models: ['other'],
  fallbacks: [{ one: ['other'] }],
  route: 'fallback',
  preset: 'other',
  model_list: [{ model_name: 'one', litellm_params: { model: 'other' } }],
  api_base: 'http://169.254.169.254',
  extra_body: { models: ['other'] }
}
const HEADERS = {
  x_api_key: 'guess',
  'x-gateway-inference-objective': 'first',
  'x-llm-d-host-port': 'a:1',
  'x-worker-instance-id': '1',
  'x-encoder-hosts-ports': 'a:1',
  serve_multiplexed_model_id: 'other',
  'x-auth-request-user': 'root',
  'cf-access-authenticated-user-email': 'root@example.com',
  x_request_id: 'guess',
  x_forwarded_for: '1.2.3.4',
  'x-original-url': '/pause',
  'x-http-method-override': 'DELETE',
  via: '1.1 x',
  'x-vllm-priority': '-9',
  'x-data-parallel-rank': '1',
  x_conversation_id: 'c',
  'true-client-ip': '1.2.3.4',
  'x-original-uri': '/pause',
  x_original_uri: '/pause',
  'x-original-remote-addr': '1.2.3.4',
  'x-envoy-original-path': '/pause',
  'x-envoy-upstream-rq-timeout-ms': '1',
  'x-envoy-retry-on': '5xx',
  'x-forwarded': '1.2.3.4',
  'x-original-forwarded-for': '1.2.3.4',
  'fastly-client-ip': '1.2.3.4',
  'x-azure-clientip': '1.2.3.4',
  'x-azure-socketip': '1.2.3.4',
  'cf-connecting-ipv6': '::1',
  'cf-pseudo-ipv4': '1.2.3.4',
  'x-remote-addr': '1.2.3.4',
  'x-remote-ip': '1.2.3.4',
  'x-smg-routing-key': 'r',
  'x-smg-other': 'r'
}
const ROUTES = [
  '/v1/chat/completions',
  '/v1/messages',
  '/v1/responses',
  '/api/chat',
  '/v1/embeddings'
]

test('what steers an engine does not reach it, in any place of a request', async t => {
  const { last, gateway } = await start(t, (_request, response) => response.end('{}'))
  const rest = {
    model: 'one',
    user: 'priority',
    options: { num_ctx: 9 },
    metadata: { priority: 1 }
  }
  for (const route of ROUTES) {
    for (const body of [
      { ...STEERING, ...rest },
      { ...rest, ...STEERING, options: { num_gpu: 0, num_ctx: 9, use_mmap: false } },
      { parameters: { adapter_id: 'other', top_k: 1 }, ...rest },
      { priority: 1, ...rest, keep_alive: 0 }
    ]) {
      const headers = { 'x-api-key': 'all', ...HEADERS, 'x-mine': 'y' }
      const response = await post(gateway.url + route, body, headers)
      assert.equal(response.status, 200)
      const seen = last()
      const { parameters, ...others } = JSON.parse(seen.body)
      assert.deepEqual(others, rest, route)
      assert.deepEqual(parameters, 'parameters' in body ? { top_k: 1 } : undefined)
      for (const name of Object.keys(HEADERS)) assert.equal(seen.headers[name], undefined, name)
      assert.equal(seen.headers['x-mine'], 'y')
    }
  }
})

test('an operator can allow what steers an engine', async t => {
  const { last, gateway } = await start(
    t,
    (_request, response) => response.end('{}'),
    {},
    { server: { allow_engine_controls: ['priority', 'keep_alive', 'num_gpu', 'via'] } }
  )
  const body = {
    model: 'one',
    priority: 1,
    keep_alive: 0,
    id_slot: 1,
    options: { num_gpu: 1, numa: 1 }
  }
  await post(`${gateway.url}/api/chat`, body, { 'x-api-key': 'all', ...HEADERS })
  const seen = last()
  assert.deepEqual(JSON.parse(seen.body), {
    model: 'one',
    priority: 1,
    keep_alive: 0,
    options: { num_gpu: 1 }
  })
  assert.equal(seen.headers.via, '1.1 x')
  assert.equal(seen.headers.x_api_key, undefined)
  assert.equal(seen.headers.x_forwarded_for, undefined)
})

test('dropping fields leaves every other one as it was', () => {
  const name = fc.oneof(fc.constantFrom(...ENGINE_CONTROLS), fc.string())
  fc.assert(
    fc.property(fc.dictionary(name, fc.jsonValue()), fc.boolean(), (given, spaced) => {
      const text = JSON.stringify(given, null, spaced ? 2 : 0)
      const bytes = Buffer.from(text)
      const body = { bytes, ...outlineOf(bytes) }
      dropControls(body, new Set())
      const left = JSON.parse(String(bytes))
      assert.equal(bytes.length, Buffer.byteLength(text))
      assert.deepEqual(
        body.members.map(member => member.name),
        Object.keys(left)
      )
      for (const [key, value] of Object.entries(JSON.parse(text))) {
        if (key === 'options' || key === 'parameters') continue
        if (Object.hasOwn(left, key)) assert.deepEqual(left[key], value)
        else assert.ok(ENGINE_CONTROLS.includes(key.toLowerCase()), key)
      }
    })
  )
})

test('each API key has a part of its own of the prefix cache where a backend salts it', async t => {
  const { last, gateway } = await start(t, (_request, response) => response.end('{}'), {
    cache_salt: 'per_key'
  })
  const salts = new Set<string>()
  for (const key of ['all', 'one', 'all']) {
    for (const body of [{ model: 'one' }, { cache_salt: 'guess', model: 'one' }]) {
      const response = await post(`${gateway.url}/v1/chat/completions`, body, { 'x-api-key': key })
      assert.equal(response.status, 200)
      const { cache_salt, ...rest } = JSON.parse(last().body)
      assert.deepEqual(rest, { model: 'one' })
      assert.match(cache_salt, /^[\w-]{43}$/)
      salts.add(cache_salt)
    }
  }
  assert.equal(salts.size, 2)
  await post(`${gateway.url}/v1/embeddings`, { model: 'one' }, { 'x-api-key': 'all' })
  assert.deepEqual(JSON.parse(last().body), { model: 'one' })
})

const RESPONSES: Answerer = (request, response) => {
  const id = `resp_${request.headers['x-request-id']}`
  response.setHeader('content-type', 'application/json')
  response.end(JSON.stringify({ id, status: 'completed', output: [] }))
}

/** Makes a response; returns its id. */
async function makeResponse(url: string, key: string): Promise<string> {
  const body = { model: 'one', input: 'x' }
  const response = await post(`${url}/v1/responses`, body, { 'x-api-key': key })
  return ((await response.json()) as { id: string }).id
}

/** What a caller gets who knows the id of a response, on each route that takes one. */
async function statuses(url: string, id: string, key: string): Promise<number[]> {
  const headers = { 'x-api-key': key }
  const one = `${url}/v1/responses/${id}`
  const follow = { model: 'one', input: 'x', previous_response_id: id }
  const all = [
    await fetch(one, { headers }),
    await fetch(`${one}/input_items`, { headers }),
    await post(`${one}/cancel`, '', headers),
    await post(`${one}/later`, {}, headers),
    await post(`${url}/v1/responses`, follow, headers),
    await fetch(one, { method: 'DELETE', headers })
  ]
  return all.map(({ status }) => status)
}

const OWN = Array(6).fill(200)
const FOREIGN = Array(6).fill(404)

test('a stored response belongs to its caller, over a restart and on other gateways', async t => {
  const backend = await fakeBackend(t, RESPONSES)
  const config = {
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: ['a', 'b'] }
  }
  const dataDir = folder(t)
  const first = await startGateway(t, config, {}, dataDir)
  const id = await makeResponse(first.url, 'a')
  assert.deepEqual(await statuses(first.url, id, 'b'), FOREIGN)
  assert.deepEqual(await statuses(first.url, id, 'a'), OWN)
  await first.fastify.close()
  const again = await startGateway(t, config, {}, dataDir)
  assert.deepEqual(await statuses(again.url, id, 'b'), FOREIGN)
  assert.deepEqual(await statuses(again.url, id, 'a'), OWN)
  const other = await startGateway(t, config, {}, folder(t))
  const before = backend.requests.length
  for (const key of ['a', 'b']) assert.deepEqual(await statuses(other.url, id, key), FOREIGN)
  assert.equal(backend.requests.length, before)
})

test('where no keys are checked an unknown response is passed on', async t => {
  const backend = await fakeBackend(t, RESPONSES)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  assert.deepEqual(await statuses(gateway.url, 'resp_other', ''), OWN)
})

test('an encoded slash in the id of a response is a 400', async t => {
  const backend = await fakeBackend(t, RESPONSES)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  for (const path of ['resp_0%2Finput_items', 'resp_0%2finput_items', 'resp_0%5cx', 'x/y%2Fz']) {
    const response = await fetch(`${gateway.url}/v1/responses/${path}`)
    assert.equal(response.status, 400, path)
    assert.match(await response.text(), /invalid_path/)
  }
  assert.equal(backend.requests.length, 0)
})

const REFERENCES: Record<string, object> = {
  'an item': { input: [{ type: 'item_reference', id: 'msg_1' }] },
  'an item behind others': {
    input: [
      { role: 'user', content: 'x' },
      { type: 'item_reference', id: 'msg_1' }
    ]
  },
  'an item without a type': { input: [{ id: 'msg_1' }] },
  'an item whose type is null': { input: [{ id: 'msg_1', type: null }] },
  'an item without a list': { input: { id: 'msg_1' } },
  'an item with an empty type': { input: [{ id: 'msg_1', type: '' }] },
  'an item with an empty role': { input: [{ id: 'msg_1', role: '' }] },
  'an item of an unknown type': { input: [{ id: 'msg_1', type: 'unknown', role: 'user' }] },
  'an item with a Type': { input: [{ id: 'msg_1', Type: 'message' }] },
  'an image that was generated': { input: [{ type: 'image_generation_call', id: 'ig_1' }] },
  'an image with an empty result': {
    input: [{ type: 'image_generation_call', id: 'ig_1', result: '', encrypted_content: 'x' }]
  },
  'a compaction': { input: [{ type: 'compaction', id: 'cmp_1' }] },
  'a vector store in a choice': { tool_choice: { type: 'x', vector_store_ids: ['vs_1'] } },
  'a prompt': { prompt: { id: 'pmpt_1' } },
  'a large prompt': { prompt: { id: 'pmpt_1', variables: { x: 'x'.repeat(70_000) } } },
  'a file': {
    input: [{ role: 'user', content: [{ type: 'input_file', file_id: 'file_1' }] }]
  },
  'an image': {
    input: [{ role: 'user', content: [{ type: 'input_image', file_id: 'file_1' }] }]
  },
  'a screenshot': {
    input: [{ type: 'computer_call_output', output: { type: 'x', file_id: 'file_1' } }]
  },
  'a file of another case': { input: [{ role: 'user', content: [{ FILE_ID: 'file_1' }] }] },
  'a vector store': { tools: [{ type: 'file_search', vector_store_ids: ['vs_1'] }] },
  'a container': { tools: [{ type: 'code_interpreter', container: 'cntr_1' }] },
  'files of a container': {
    tools: [{ type: 'code_interpreter', container: { type: 'auto', file_ids: ['file_1'] } }]
  },
  'a conversation': { conversation: { id: 'conv_1', x: 'x'.repeat(70_000) } }
}

for (const [what, reference] of Object.entries(REFERENCES)) {
  test(`a reference to what a backend may store for another caller is a 400: ${what}`, async t => {
    const { gateway } = await start(t, RESPONSES)
    const [field] = Object.keys(reference) as [string]
    const body = JSON.stringify({ model: 'one', ...reference })
    const escaped = body.replaceAll(/(?<=")(item_ref|file_id|type|vector|cont|id)/g, name =>
      [...name].map(c => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`).join('')
    )
    for (const path of ['/v1/responses', '/v1/responses/input_tokens', '/v1/responses/compact']) {
      for (const sent of [body, escaped]) {
        const response = await post(gateway.url + path, sent, { 'x-api-key': 'all' })
        assert.equal(response.status, 400, `${path} ${sent.slice(0, 200)}`)
        assert.match(await response.text(), new RegExp(`"${field}: `))
      }
    }
  })
}

const CHAT_FILE = { type: 'file', file: { file_id: 'file-1' } }
const FILE_SOURCE = { type: 'file', file_id: 'file-1' }
const ELSEWHERE: [path: string, body: object][] = [
  ['/v1/chat/completions', { messages: [{ role: 'user', content: [CHAT_FILE] }] }],
  ['/v1/chat/completions', { messages: [{ role: 'assistant', audio: { id: 'audio_1' } }] }],
  ['/v1/chat/completions', { audio: { voice: { id: 'voice_1' } } }],
  ['/v1/messages', { messages: [{ content: [{ type: 'document', source: FILE_SOURCE }] }] }],
  ['/v1/messages', { system: [{ type: 'document', source: FILE_SOURCE }] }],
  ['/v1/messages/count_tokens', { messages: [{ content: [{ source: FILE_SOURCE }] }] }],
  ['/v1/messages', { container: 'container_1' }],
  ['/v1/messages', { container: { id: 'container_1' } }],
  ['/v1/messages', { container: { skills: [{ type: 'custom', skill_id: 'skill_1' }] } }]
]

test('references of other APIs are a 400 as well', async t => {
  const { gateway, last } = await start(t, RESPONSES)
  for (const [path, body] of ELSEWHERE) {
    const response = await post(
      gateway.url + path,
      { model: 'one', ...body },
      { 'x-api-key': 'all' }
    )
    assert.equal(response.status, 400, JSON.stringify(body))
    assert.match(await response.text(), /is not supported; send the content itself/)
  }
  const schema = { properties: { file_id: { default: 'x' } }, default: { file_id: 'x' } }
  const call = { type: 'tool_use', id: 'toolu_1', name: 'open', input: { file_id: 'x' } }
  const harmless: typeof ELSEWHERE = [
    ['/v1/messages', { messages: [{ role: 'assistant', content: [call] }], container: null }],
    [
      '/v1/messages',
      { tools: [{ name: 'open', input_schema: schema }], metadata: { user_id: 'x' } }
    ],
    ['/v1/chat/completions', { tools: [{ type: 'function', function: { parameters: schema } }] }],
    ['/v1/chat/completions', { messages: [{ tool_calls: [{ id: 'call_1', type: 'function' }] }] }]
  ]
  for (const [path, body] of harmless) {
    const sent = { model: 'one', ...body }
    const response = await post(gateway.url + path, sent, { 'x-api-key': 'all' })
    assert.equal(response.status, 200, await response.text())
    assert.deepEqual(JSON.parse(last().body), sent)
  }
})

test('a type or role that is repeated makes no id harmless', async t => {
  const { gateway } = await start(t, RESPONSES)
  for (const twice of ['"type":"message","type":null', '"role":"user","role":""']) {
    const body = `{"model":"one","input":[{"id":"msg_1",${twice}}]}`
    const response = await post(`${gateway.url}/v1/responses`, body, { 'x-api-key': 'all' })
    assert.equal(response.status, 400, twice)
  }
})

test('what refers to nothing passes', async t => {
  const { gateway, last } = await start(t, RESPONSES)
  const body = {
    model: 'one',
    prompt: null,
    conversation: null,
    input: [
      { role: 'user', content: 'item_reference file_id "file_id": "x" \\"' },
      {
        type: 'message',
        id: 'msg_1',
        role: 'assistant',
        content: [
          {
            type: 'output_text',
            text: 'x',
            annotations: [{ type: 'file_citation', file_id: 'f' }]
          },
          { type: 'input_image', image_url: 'data:', file_id: null }
        ]
      },
      { type: 'reasoning', id: 'rs_1', summary: [] },
      { type: 'function_call', id: 'fc_1', arguments: '{"file_id":"x"}', name: 'file_id' },
      { type: 'file_search_call', id: 'fs_1', results: [{ file_id: 'f', text: 'x' }] },
      { type: 'image_generation_call', id: 'ig_1', result: 'iVBORw0KGgo=' },
      { type: 'compaction', id: 'cmp_1', encrypted_content: 'x' },
      { role: 'assistant', id: 'msg_2', content: 'x' }
    ],
    tools: [
      {
        type: 'function',
        name: 'open',
        parameters: {
          properties: { file_id: { type: 'string', default: 'x' } },
          required: ['file_id'],
          default: { file_id: 'x' }
        }
      },
      { type: 'code_interpreter', container: { type: 'auto' } }
    ],
    metadata: { file_id: 'x' }
  }
  const response = await post(`${gateway.url}/v1/responses`, body, { 'x-api-key': 'all' })
  assert.equal(response.status, 200, await response.text())
  assert.deepEqual(JSON.parse(last().body), body)
  const text = await post(
    `${gateway.url}/v1/responses`,
    { model: 'one', input: 'item_reference' },
    { 'x-api-key': 'all' }
  )
  assert.equal(text.status, 200)
})

test('without keys there is no other caller, and references pass', async t => {
  const { gateway } = await start(t, RESPONSES, {}, { auth: { enabled: false } })
  for (const reference of [REFERENCES['an item'], REFERENCES['a prompt']]) {
    const response = await post(`${gateway.url}/v1/responses`, { model: 'one', ...reference })
    assert.equal(response.status, 200)
  }
})

test('references are looked for in slices', async () => {
  const times = process.env.LONG ? 8_000_000 : 1_000_000
  for (const input of [
    `["${'\\"'.repeat(times)}"]`,
    `["${'\\\\'.repeat(times)}"]`,
    `[${'{"a":"b"},'.repeat(times / 8)}1]`,
    `[${'"a",'.repeat(times / 3)}1]`
  ]) {
    const bytes = Buffer.from(`{"input":${input}}`)
    const member = { name: 'input', from: 1, start: 9, end: bytes.length - 1, elements: 0, last: 0 }
    let turns = 0
    let longest = 0
    let before = process.threadCpuUsage()
    let turn: NodeJS.Immediate
    const count = () => {
      turns++
      const { user, system } = process.threadCpuUsage(before)
      longest = Math.max(longest, (user + system) / 1000)
      before = process.threadCpuUsage()
      turn = setImmediate(count)
    }
    count()
    await refuseReferences(bytes, [member], 'responses')
    clearImmediate(turn!)
    assert.ok(turns > bytes.length / (300 * 1024), `${turns} turns`)
    if (process.env.LONG) assert.ok(longest < 20, `a turn of the event loop took ${longest} ms`)
  }
})

test('an id that a backend gives twice stays with its first owner', async t => {
  const backend = await fakeBackend(t, (_request, response) => {
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify({ id: 'resp_1', status: 'completed', output: [] }))
  })
  const gateway = await startGateway(t, {
    backends: [{ url: backend.url }],
    auth: { enabled: true, keys: ['a', 'b'] }
  })
  for (const key of ['a', 'b']) await makeResponse(gateway.url, key)
  assert.deepEqual(await statuses(gateway.url, 'resp_1', 'b'), FOREIGN)
  assert.deepEqual(await statuses(gateway.url, 'resp_1', 'a'), OWN)
  await gateway.logged({ msg: 'a backend gave the id of a response of another caller' })
})

test('many responses of one caller push out none of another', async t => {
  const responses = new StoredResponses(
    join(folder(t), 'responses.db'),
    { warn() {}, error() {} },
    { maxOfCaller: 50 }
  )
  responses.add({ id: 'mine', backend: 'b', model: undefined, caller: 'a' })
  for (let count = 1; count <= 10_200; count++) {
    const other = { id: `other_${count}`, backend: 'b', model: 'm', caller: 'b' }
    if (count <= 10_000) responses.hear(other)
    else responses.add(other)
  }
  // Reads do not wait for writes; this does.
  await responses.open()
  assert.deepEqual(await responses.find('mine'), {
    id: 'mine',
    backend: 'b',
    model: undefined,
    caller: 'a'
  })
  await responses.close()
  const again = new StoredResponses(join(folder(t), 'none.db'), { warn() {}, error() {} })
  assert.equal(await again.find('other_1'), undefined)
  await again.close()
})
