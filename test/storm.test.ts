import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { createServer as reservePort } from 'node:net'
import { type TestContext, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import { isRefusal, NOTHING } from '../src/limits/store.ts'
import { chunk, fakeBackend } from './helper.ts'
import { account, joinRedis } from './limit-stores.ts'
import { CLI, folder, start, writeConfig } from './process.ts'

/**
 * Three gateways on one Redis, many callers, gateways that are killed and clients that leave: what reaches
 * the backend keeps to the limits. LONG=1: a minute of it, for the documentation.
 */

const LASTS = process.env.LONG ? 60_000 : 1_000
const GATEWAYS = 3
const CALLERS = process.env.LONG ? 200 : 20
const KEYS = Array.from({ length: 5 }, (_, at) => `key-${at}`)
const PER_MINUTE = process.env.LONG ? 400 : 40
const TOKENS_PER_MINUTE = process.env.LONG ? 12_000 : 1_200
const SLOTS = 8
/** A minute, less the time that calls may take from the limit to the backend while all cores are busy. */
const WINDOW = 59_000
const PROMPT = 5
const MAX_TOKENS = 40
const SERVER = ['/usr/bin/redis-server', '/usr/local/bin/redis-server'].find(existsSync)
const skip = SERVER === undefined && 'redis-server is not installed'
if (skip && process.env.CI === 'true') throw new Error(skip)

interface Served {
  key: string
  /** The process that it came through. */
  gateway: number
  begin: number
  end: number
  tokens: number
}

for (const redisDies of [false, true]) {
  const name = redisDies ? ', and Redis is killed in the middle' : ''
  test(`a storm of ${CALLERS} callers for ${LASTS / 1000} s on ${GATEWAYS} gateways that are killed${name}`, {
    skip:
      skip ||
      (!redisDies && !process.env.LONG && 'LONG=1: the storm with a dying Redis has all of it'),
    timeout: LASTS + 60_000
  }, async t => {
    const served: Served[] = []
    const backend = await fakeBackend(t, async (request, response) => {
      const { model: key } = JSON.parse(request.body)
      const call: Served = {
        key,
        gateway: Number(/\d+/.exec(request.url)![0]),
        begin: performance.now(),
        end: Number.POSITIVE_INFINITY,
        tokens: PROMPT
      }
      served.push(call)
      response.on('close', () => {
        call.end = Math.min(call.end, performance.now())
      })
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      const length = 1 + Math.floor(Math.random() * MAX_TOKENS)
      for (let at = 0; at < length && !response.destroyed; at++) {
        call.tokens++
        response.write(chunk('x'))
        await sleep(5 + Math.random() * 10)
      }
      // The gateway may let the next one through as soon as it has this.
      call.end = performance.now()
      const usage = {
        prompt_tokens: PROMPT,
        completion_tokens: length,
        total_tokens: PROMPT + length
      }
      response.end(`data: ${JSON.stringify({ choices: [], usage })}\n\ndata: [DONE]\n\n`)
    })

    const redisPort = await freePort()
    let redis = await startRedis(t, redisPort)
    const dir = folder(t)
    const limits = {
      requests_per_minute: PER_MINUTE,
      tokens_per_minute: TOKENS_PER_MINUTE,
      max_concurrent: SLOTS
    }
    let started = 0
    const begin = async (at: number) => {
      const number = started++
      const file = writeConfig(`${dir}/${number}.json`, {
        server: { listen: '127.0.0.1:0' },
        backends: [{ url: `${backend.url}/${number}` }],
        auth: { enabled: true, keys: KEYS.map(key => ({ key, name: key })) },
        storage: { caches: [{ name: 'default', driver: 'redis', addr: `127.0.0.1:${redisPort}` }] },
        rate_limit: { enabled: true, storage: 'redis', per_key: limits }
      })
      const env = { LLMPROXY_DATA_DIR: `${dir}/data-${at}` }
      return { ...(await start(t, [CLI, '--config', file], env)), number }
    }
    const gateways = await Promise.all(Array.from({ length: GATEWAYS }, (_, at) => begin(at)))
    /** Processes whose part of the count died with them and Redis. */
    const forgotten = new Set<number>()
    let isForgetting = redisDies
    const startedAt = performance.now()
    const isOver = () => performance.now() - startedAt > LASTS
    const callers = new Worker(new URL('./storm-callers.ts', import.meta.url), {
      workerData: { callers: CALLERS, keys: KEYS, maxTokens: MAX_TOKENS }
    })
    t.after(() => callers.terminate())
    const tellUrls = () => callers.postMessage(gateways.map(({ url }) => url))
    tellUrls()
    let kills = 0
    const killer = async () => {
      while (!isOver()) {
        await sleep(1_000 + Math.random() * 1_000)
        const at = Math.floor(Math.random() * GATEWAYS)
        const { child, number } = gateways[at]!
        child.kill('SIGKILL')
        if (isForgetting) forgotten.add(number)
        kills++
        gateways[at] = await begin(at)
        tellUrls()
      }
    }
    const redisKiller = async () => {
      if (!redisDies) return
      await sleep(LASTS / 3)
      redis.kill('SIGKILL')
      await sleep(LASTS / 6)
      redis = await startRedis(t, redisPort)
      isForgetting = false
    }
    await Promise.all([killer(), redisKiller()])
    const over = once(callers, 'message')
    callers.postMessage('stop')
    const [seen] = await over

    const most = KEYS.map(key => {
      const own = served.filter(each => each.key === key && !forgotten.has(each.gateway))
      const inWindow = (weight: (call: Served) => number) =>
        Math.max(
          ...own.map(({ begin }) =>
            own
              .filter(each => each.begin > begin - WINDOW && each.begin <= begin)
              .reduce((sum, each) => sum + weight(each), 0)
          )
        )
      return {
        requests: inWindow(() => 1),
        tokens: inWindow(each => each.tokens),
        slots: Math.max(
          ...own.map(
            ({ begin }) => own.filter(each => each.begin <= begin && each.end > begin).length
          )
        )
      }
    })
    const top = (name: 'requests' | 'tokens' | 'slots') => Math.max(...most.map(each => each[name]))
    t.diagnostic(
      `${JSON.stringify(seen)}, ${kills} kills; of a key at most ${top('requests')} requests (limit ${PER_MINUTE}), ${top('tokens')} tokens (${TOKENS_PER_MINUTE}), ${top('slots')} at once (${SLOTS})`
    )
    assert.equal(seen.other, 0, 'an error of the gateway')
    assert.ok(top('requests') >= PER_MINUTE * 0.8, 'the storm was too weak')
    // In the minute in which Redis goes away each process has its share beside what it had taken.
    const mostOf = (limit: number) => (redisDies ? limit * (2 - 1 / GATEWAYS) : limit)
    assert.ok(top('requests') <= mostOf(PER_MINUTE))
    assert.ok(top('tokens') <= mostOf(TOKENS_PER_MINUTE))
    // A connection that is being closed reaches the backend a moment later.
    assert.ok(top('slots') <= mostOf(SLOTS) + 2)
    await everySlotIsFree(t, redisPort)
    for (const { child } of gateways) child.kill('SIGTERM')
    await Promise.all(gateways.map(each => each.exit))
  })
}

/** Another process that shares the limits gets every slot, once the killed ones are known to be dead. */
async function everySlotIsFree(t: TestContext, port: number): Promise<void> {
  const store = await joinRedis(t, { host: '127.0.0.1', port }, 'llmproxy')
  for (const id of KEYS) {
    const call = {
      accounts: [account({ max_concurrent: SLOTS }, id)],
      hold: NOTHING,
      least: NOTHING
    }
    const deadline = performance.now() + 10_000
    for (let slot = 0; slot < SLOTS; ) {
      if (!isRefusal(await store.reserve(call))) slot++
      else {
        assert.ok(performance.now() < deadline, `${id} has only ${slot} slots 10 s later`)
        await sleep(100)
      }
    }
    assert.ok(isRefusal(await store.reserve(call)))
  }
}

async function startRedis(t: TestContext, port: number): Promise<ChildProcess> {
  const args = ['--port', String(port), '--save', '', '--appendonly', 'no', '--bind', '127.0.0.1']
  const child = spawn(SERVER!, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  t.after(() => child.kill('SIGKILL'))
  await new Promise<void>(resolve => {
    child.stdout!.on('data', data => {
      if (String(data).includes('Ready to accept connections')) resolve()
    })
  })
  return child
}

async function freePort(): Promise<number> {
  const server = reservePort().listen(0, '127.0.0.1')
  await new Promise(resolve => server.once('listening', resolve))
  const { port } = server.address() as { port: number }
  await new Promise(resolve => server.close(resolve))
  return port
}
