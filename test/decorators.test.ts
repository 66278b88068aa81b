import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import Fastify, { type FastifyInstance } from 'fastify'
import gateway from '../src/app.ts'
import auth from '../src/plugins/auth.ts'
import backends from '../src/plugins/backends.ts'
import discovery from '../src/plugins/discovery.ts'
import limits from '../src/plugins/limits.ts'
import logging from '../src/plugins/logging.ts'
import metering from '../src/plugins/metering.ts'
import metrics from '../src/plugins/metrics.ts'
import payload from '../src/plugins/payload.ts'
import proxy from '../src/plugins/proxy.ts'
import usage from '../src/plugins/usage.ts'

/** Names that a gateway and its parts decorate Fastify with. */

const POOL = { backends: [{ url: 'http://127.0.0.1:1' }] }
type Register = (fastify: FastifyInstance) => PromiseLike<unknown>
const PARTS: Record<string, { register: Register; names: string[] }> = {
  auth: { register: f => f.register(auth, { enabled: false }), names: ['keys', 'exchanges'] },
  payload: { register: f => f.register(payload), names: ['exchanges'] },
  limits: { register: f => f.register(limits), names: ['limits', 'rateLimit', 'createRateLimit'] },
  backends: { register: f => f.register(backends, POOL), names: ['backends'] },
  discovery: { register: f => f.register(discovery, { enabled: false }), names: ['discovery'] },
  proxy: { register: f => f.register(proxy), names: ['proxy', 'answerHooks'] },
  metering: { register: f => f.register(metering), names: ['tokens'] },
  usage: { register: f => f.register(usage), names: ['usage'] },
  metrics: { register: f => f.register(metrics), names: ['metricsRegistry', 'routeMetrics'] },
  logging: { register: f => f.register(logging), names: ['logging'] }
}
const NEEDS: Record<string, string[]> = {
  discovery: ['backends'],
  proxy: ['backends'],
  metering: ['backends', 'proxy']
}

/** The error of a host whose server was prepared so, when it registers a part after those it needs. */
async function errorOf(
  part: string,
  prepare: (fastify: FastifyInstance) => unknown
): Promise<string> {
  const fastify = Fastify()
  try {
    for (const needed of NEEDS[part] ?? []) await PARTS[needed]!.register(fastify)
    await prepare(fastify)
    await PARTS[part]!.register(fastify)
    return 'none'
  } catch (error) {
    return (error as Error).message
  } finally {
    await fastify.close()
  }
}

const present = (part: string, name: string) =>
  `llmproxy/${part}: its scope already has a decorator "${name}". Register the part once, in a scope of its own.`

for (const [part, { names, register }] of Object.entries(PARTS)) {
  test(`${part}: a decorator that the scope already has is one clear error`, async () => {
    for (const name of names.filter(each => each !== 'exchanges' || NEEDS[part] === undefined)) {
      const error = await errorOf(part, fastify => fastify.decorate(name as never, 1 as never))
      assert.equal(error, present(part, name))
      // An outer scope may have it.
      const fastify = Fastify()
      fastify.decorate(name as never, 1 as never)
      await fastify.register(async scope => {
        for (const needed of NEEDS[part] ?? []) await PARTS[needed]!.register(scope)
        await register(scope)
      })
      await fastify.ready()
      await fastify.close()
    }
  })
}

test('a part that is registered twice in a scope is one clear error', async () => {
  assert.equal(await errorOf('usage', PARTS.usage!.register), present('usage', 'usage'))
})

test('a part before the one that it needs is one clear error', async () => {
  const fastify = Fastify()
  fastify.decorate('backends', 1 as never)
  const message = 'llmproxy/discovery: register llmproxy/backends before it.'
  await assert.rejects(async () => PARTS.discovery!.register(fastify), { message })
  await assert.rejects(async () => Fastify().register(metering), {
    message: 'llmproxy/metering: register llmproxy/proxy before it.'
  })
})

test('a decorator of replies that the scope already has is one clear error', async () => {
  for (const name of ['forward', 'from']) {
    const error = await errorOf('proxy', fastify =>
      fastify.decorateReply(name as never, (() => 1) as never)
    )
    assert.equal(error, present('proxy', name))
    const fastify = Fastify()
    fastify.decorateReply(name as never, null as never)
    fastify.register(gateway, POOL)
    await assert.rejects(async () => fastify.ready(), { message: present('proxy', name) })
    await fastify.close()
  }
})

test('the documentation names every decorator', async t => {
  const fastify = Fastify()
  t.after(() => fastify.close())
  const set = { instance: new Set<string>(), request: new Set<string>(), reply: new Set<string>() }
  const methods = {
    instance: 'decorate',
    request: 'decorateRequest',
    reply: 'decorateReply'
  } as const
  for (const on of ['instance', 'request', 'reply'] as const) {
    const decorate = fastify[methods[on]] as (...given: unknown[]) => unknown
    fastify[methods[on]] = function note(this: unknown, ...given: unknown[]) {
      if (typeof given[0] === 'string') set[on].add(given[0])
      return decorate.apply(this, given)
    } as never
  }
  await fastify.register(gateway, { ...POOL, peers: undefined as never })
  const page = readFileSync(new URL('../docs/embedding.md', import.meta.url), 'utf8')
  const table = page.slice(page.indexOf('| on | decorators | set by |'))
  let on = ''
  const named: Record<string, Set<string>> = {}
  for (const [, first, names] of table.split('\n\n')[0]!.matchAll(/^\| (\w*) ?\| (`.*?) \|/gm)) {
    on = first || on
    named[on] ??= new Set()
    for (const [, name] of names!.matchAll(/`(\w+)`/g)) named[on]!.add(name!)
  }
  // Of workers alone.
  set.instance.add('peers')
  assert.deepEqual(named, set)
})
