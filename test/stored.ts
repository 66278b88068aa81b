import assert from 'node:assert/strict'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import type { TestContext } from 'node:test'
import { fakeBackend, post, startGateway } from './helper.ts'
import { folder } from './process.ts'

/** A backend with a stored response, and a gateway that has left one unread. */

export const USAGE = {
  input_tokens: 30,
  input_tokens_details: { cached_tokens: 10 },
  output_tokens: 1000,
  total_tokens: 1030
}
export const json = JSON.stringify
export const typed = (value: { type: string; [name: string]: unknown }) =>
  `event: ${value.type}\ndata: ${json(value)}\n\n`
export const response = (status: string, more: object = {}) => ({
  id: 'resp_1',
  object: 'response',
  background: true,
  model: 'm',
  status,
  error: null,
  usage: null,
  output: [],
  ...more
})
export const DONE = response('completed', { usage: USAGE })
export const EVENTS = [
  typed({ type: 'response.created', response: response('queued') }),
  ...['One', ' two', ' three'].map(delta => typed({ type: 'response.output_text.delta', delta })),
  typed({ type: 'response.completed', response: DONE })
]

/** A backend with one stored response, which is as the test says, and the records of its gateway. */
export async function setUp(t: TestContext, more: object = {}) {
  const state = {
    shown: response('queued') as object,
    events: [...EVENTS],
    hasEnd: true,
    status: 200,
    /** What a read waits for. */
    wait: undefined as (() => Promise<unknown>) | undefined
  }
  const backend = await fakeBackend(t, async (request, reply) => {
    if (request.method === 'GET') await state.wait?.()
    const isStream = request.url.includes('stream=true') || request.body.includes('"stream":true')
    if (isStream) {
      reply.writeHead(200, { 'content-type': 'text/event-stream' })
      reply.write(state.events.join(''))
      return state.hasEnd ? reply.end() : undefined
    }
    reply.writeHead(state.status, { 'content-type': 'application/json' })
    return reply.end(json(state.shown))
  })
  const hook = await fakeBackend(t, (_request, reply) => reply.end())
  const config = {
    backends: [{ name: 'gpu', url: backend.url, models: [{ public: 'm' }] }],
    auth: { enabled: true, keys: [{ key: 'sk-1', name: 'ann' }], skip_paths: ['/metrics'] },
    usage: {
      enabled: true,
      reporters: [{ name: 'hook', type: 'webhook', webhook: { url: hook.url } }]
    },
    ...more
  }
  let next = 0
  const record = async () => JSON.parse((await hook.request(next++)).body)
  return { state, backend, config, hook, record }
}

export const KEY = { authorization: 'Bearer sk-1' }
export const BODY = { model: 'public', input: 'Count to three.', background: true }
export const spent = (record: Record<string, unknown>) => [
  record.input_tokens,
  record.output_tokens,
  record.exactness
]
export const NOTHING = [0, 0, null]

/** Lets the gateway ask for all unread responses now, as if so much time (ms) had passed. */
export function passTime(dir: string, age = 0): void {
  const db = new DatabaseSync(join(dir, 'responses.db'))
  db.prepare('UPDATE responses SET due = 0, made = made - ? WHERE due IS NOT NULL').run(age)
  db.close()
}

export function rowOf(dir: string): Record<string, unknown> {
  const db = new DatabaseSync(join(dir, 'responses.db'))
  const row = db.prepare('SELECT unbilled, due, billed FROM responses').get()
  db.close()
  return row as Record<string, unknown>
}

/** A gateway that has made a background response, and is gone. */
export async function leaveUnread(t: TestContext, more: object = {}) {
  const dataDir = folder(t)
  const set = await setUp(t, more)
  const first = await startGateway(t, set.config, {}, dataDir)
  await (await post(`${first.url}/v1/responses`, BODY, KEY)).text()
  assert.deepEqual(spent(await set.record()), NOTHING)
  await first.fastify.close()
  return { ...set, dataDir, again: () => startGateway(t, set.config, {}, dataDir) }
}
