import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import { DatabaseSync } from 'node:sqlite'
import { type TestContext, test } from 'node:test'
import { answerChat, CHAT, fakeBackend, post } from './helper.ts'
import { CLI, folder, type Process, start, writeConfig } from './process.ts'

/**
 * The process is killed at random moments under load: whoever got the end of an answer has been, or will
 * be, reported. LONG=1: the full number, for the documentation.
 */

const KILLS = process.env.LONG ? 100 : 1
const CLIENTS = 8
const LATEST_KILL = 400

/** Records by id as JSON, how many came again, and those that came again as something else. */
async function countingSink(t: TestContext) {
  const seen = new Map<string, string>()
  const twice = new Set<string>()
  const changed: string[] = []
  const sink = createServer((request, response) => {
    let body = ''
    request.on('data', data => {
      body += data
    })
    request.on('end', () => {
      for (const record of JSON.parse(body)) {
        const before = seen.get(record.request_id)
        const json = JSON.stringify(record)
        if (before !== undefined) twice.add(record.request_id)
        if (before !== undefined && before !== json) changed.push(before, json)
        seen.set(record.request_id, json)
      }
      // Now and then it answers late, so that a kill meets deliveries, too.
      setTimeout(() => response.end(), Math.random() < 0.1 ? 50 : 0)
    })
  })
  await new Promise<void>(resolve => sink.listen(0, '127.0.0.1', resolve))
  t.after(() => {
    sink.closeAllConnections()
    sink.close()
  })
  return {
    seen,
    twice,
    changed,
    url: `http://127.0.0.1:${(sink.address() as { port: number }).port}`
  }
}

/** Calls the gateway until it is gone, at a random moment after its first answer; returns the ids of the answers that came to their end. */
async function load(gateway: Process): Promise<string[]> {
  const complete: string[] = []
  let isDoomed = false
  const client = async (index: number) => {
    for (let call = 0; ; call++) {
      const stream = (index + call) % 2 === 0
      try {
        const answer = await post(
          `${gateway.url}/v1/chat/completions`,
          { ...CHAT, stream },
          { authorization: 'Bearer sk-alice' }
        )
        const text = await answer.text()
        assert.match(text, stream ? /data: \[DONE\]\n\n$/ : /\}$/)
        complete.push(answer.headers.get('x-llmproxy-request-id')!)
        // A slow machine may take longer for its first answer than it has until it is killed.
        if (!isDoomed) setTimeout(() => gateway.child.kill('SIGKILL'), Math.random() * LATEST_KILL)
        isDoomed = true
      } catch (error) {
        if (error instanceof assert.AssertionError) throw error
        return
      }
    }
  }
  await Promise.all(Array.from({ length: CLIENTS }, (_, index) => client(index)))
  return complete
}

for (const workers of [1, 2]) {
  const name = workers === 1 ? 'one process' : 'two workers'
  test(`${name}, killed at ${KILLS} random moments: no complete answer goes unreported`, {
    skip: workers === 1 && !process.env.LONG && 'LONG=1: two workers show the same',
    timeout: KILLS * 40_000
  }, async t => {
    const backend = await fakeBackend(t, answerChat)
    const sink = await countingSink(t)
    const dataDir = folder(t)
    const webhook = { url: sink.url, batch: { max_events: 20, max_wait: '20ms' } }
    const file = writeConfig(`${dataDir}/config.json`, {
      server: { listen: '127.0.0.1:0', workers },
      backends: [{ url: backend.url }],
      auth: { enabled: true, keys: [{ key: 'sk-alice', name: 'alice', total_quota: 1e9 }] },
      usage: { enabled: true, reporters: [{ type: 'webhook', webhook }] }
    })
    const begin = () => start(t, [CLI, '--config', file], { LLMPROXY_DATA_DIR: dataDir })
    const complete: string[] = []
    for (let kill = 0; kill < KILLS; kill++) {
      const gateway = await begin()
      for (const id of await load(gateway)) complete.push(id)
    }
    const last = await begin()
    const missing = () => complete.filter(id => !sink.seen.has(id))
    const deadline = performance.now() + 10_000
    while (missing().length > 0 && performance.now() < deadline) {
      await new Promise(resolve => setTimeout(resolve, 20))
    }
    last.child.kill('SIGTERM')
    await last.exit
    t.diagnostic(
      `${KILLS} kills, ${name}: ${complete.length} complete answers, ${missing().length} of them not reported; ${sink.seen.size} records, ${sink.twice.size} of them delivered more than once`
    )
    assert.ok(complete.length > 0)
    assert.deepEqual(missing(), [])
    assert.deepEqual(sink.changed, [], 'what comes again is the same record')
    const reported = [...sink.seen.values()].map(each => JSON.parse(each).total_tokens)
    const db = new DatabaseSync(`${dataDir}/limits.db`)
    const { tokens } = db
      .prepare("SELECT tokens FROM quotas WHERE account = 'per_key:alice'")
      .get()!
    db.close()
    const sum = reported.reduce((sum, each) => sum + each, 0)
    assert.ok(Number(tokens) >= sum, `${tokens} tokens of the quota are spent, ${sum} are reported`)
    for (const id of complete) {
      const { outcome, exactness, total_tokens } = JSON.parse(sink.seen.get(id)!)
      assert.deepEqual([outcome, exactness, total_tokens], ['ok', 'exact', 15])
    }
  })
}
