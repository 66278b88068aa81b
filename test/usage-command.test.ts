import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { type TestContext, test } from 'node:test'
import { runUsage } from '../src/commands/usage.ts'
import { Ledger } from '../src/reporters/ledger.ts'
import { openUsageStore } from '../src/reporters/usage-store.ts'
import { runCommand, runProgram } from './command.ts'
import { answerChat, CHAT, fakeBackend, post } from './helper.ts'
import { CLI, commandLine, folder, start, writeConfig } from './process.ts'

/** Runs `llmproxy usage ...` in this process, beside the gateway's. */
function usage(dataDir: string, ...args: string[]) {
  return runCommand(() => runUsage(args, dataDir, ''))
}

/** Runs it as a process of its own. */
function usageProgram(dataDir: string, ...args: string[]) {
  return runProgram(['usage', ...args], { LLMPROXY_DATA_DIR: dataDir })
}

/** A receiver that answers with the status it is told, and remembers what it took. */
async function receiver(t: TestContext) {
  const state = { status: 200, ids: [] as string[] }
  const took = new Set<() => void>()
  const server = await fakeBackend(t, (request, response) => {
    response.statusCode = state.status
    response.end()
    if (state.status === 200) {
      for (const { id } of [JSON.parse(request.body)].flat()) state.ids.push(id)
      for (const look of took) look()
    }
  })
  return {
    state,
    url: server.url,
    /** Resolves when so many have been taken. */
    taken: (count: number) =>
      new Promise<void>(resolve => {
        const look = () => {
          if (state.ids.length >= count) resolve()
        }
        took.add(look)
        look()
      })
  }
}

const HOUR = 3_600_000

function recordAt(id: string, time: number, more: object = {}): string {
  return JSON.stringify({
    id,
    timestamp: new Date(time).toISOString(),
    model: 'm',
    caller: 'ann',
    input_tokens: 3,
    output_tokens: 4,
    total_tokens: 7,
    ...more
  })
}

/** A folder with the records of three hours. */
function filled(t: TestContext): string {
  const dataDir = folder(t)
  const ledger = new Ledger(`${dataDir}/usage.db`)
  const now = Date.now()
  ledger.append([recordAt('old', now - 3 * HOUR)], now - 3 * HOUR)
  ledger.append(
    [
      recordAt('a', now - 2 * HOUR, { model: '=HYPERLINK("x")', tags: { team: 'a "b"' } }),
      `${recordAt('b', now - HOUR)}\0{"messages":["secret prompt"]}`
    ],
    now - HOUR
  )
  ledger.append([recordAt('c', now)], now)
  ledger.close()
  return dataDir
}

test('export: a period, as JSON lines and as CSV, without prompts and without formulas', async t => {
  const dataDir = filled(t)
  const lines = await usage(dataDir, 'export', '--since', '150m', '--until', '30m')
  assert.equal(lines.stderr, '')
  const ids = lines.stdout
    .trim()
    .split('\n')
    .map(line => JSON.parse(line).id)
  assert.deepEqual(ids, ['a', 'b'])
  const csv = await usageProgram(dataDir, 'export', '--since', '2026-01-01', '--format', 'csv')
  assert.equal(csv.status, 0)
  const rows = csv.stdout.split('\r\n')
  assert.equal(rows.length, 6)
  assert.match(rows[0]!, /^id,timestamp,user_id,.*,input_tokens,/)
  assert.match(rows[2]!, /^a,.*,"'=HYPERLINK\(""x""\)",3,4,7,.*"\{""team"":""a \\""b\\""""\}"/)
  assert.ok(!`${csv.stdout}${lines.stdout}`.includes('secret prompt'))
})

test('export: who reads may stop, and what cannot be is said', async t => {
  const dataDir = folder(t)
  const none = await usage(dataDir, 'export', '--since', '1d')
  assert.equal(none.status, 1)
  assert.match(none.stderr, /^llmproxy: there is no .*usage\.db; is LLMPROXY_DATA_DIR right\?\n$/)
  const ledger = new Ledger(`${dataDir}/usage.db`)
  for (let page = 0; page < 50; page++) {
    ledger.append(
      Array.from({ length: 1000 }, (_, each) => recordAt(`${page}-${each}`, Date.now()))
    )
  }
  ledger.close()
  const child = spawn(...commandLine([CLI, 'usage', 'export', '--since', '1d']), {
    env: { ...process.env, LLMPROXY_CONFIG: '', LLMPROXY_DATA_DIR: dataDir },
    stdio: ['ignore', 'pipe', 'pipe']
  })
  let errors = ''
  child.stderr.on('data', data => {
    errors += data
  })
  await once(child.stdout, 'data')
  child.stdout.destroy()
  assert.deepEqual(await once(child, 'close'), [0, null])
  assert.equal(errors, '')
  for (const [args, message] of [
    [['export'], /--since TIME is missing/],
    [['export', '--since', 'yesterday'], /--since must be a time such as 2026-01-31 or 24h/],
    [['export', '--since', '1d', '--format', 'xml'], /--format must be csv or jsonl \(got "xml"\)/],
    [['fly'], /no command "usage fly"/],
    [['dead-letters', 'fly'], /no command "usage dead-letters fly"/],
    [['dead-letters', 'drop'], /which ones\? give their ids, or --all/],
    [['dead-letters', 'drop', '7'], /there is no dead letter 7/]
  ] as const) {
    const result = await usage(dataDir, ...args)
    assert.equal(result.status, 2)
    assert.match(result.stderr, message)
  }
})

test('replay: the records of a period go to one reporter again, past its filter and under their ids', async t => {
  const dataDir = filled(t)
  const { state, url } = await receiver(t)
  const reporters = [
    { name: 'one', type: 'webhook', webhook: { url } },
    {
      name: 'some',
      type: 'webhook',
      filter: { models: ['m'] },
      webhook: { url, batch: { max_events: 2 } }
    }
  ]
  const config = writeConfig(`${dataDir}/config.json`, {
    backends: [{ url: 'http://127.0.0.1:1' }],
    usage: { enabled: true, reporters }
  })
  const replay = (...args: string[]) => usage(dataDir, 'replay', '--config', config, ...args)
  const args = ['--config', config, '--reporter', 'one', '--since', '1d']
  const all = await usageProgram(dataDir, 'replay', ...args)
  assert.deepEqual(all, {
    status: 0,
    stdout: '4 records were reported to one, 0 were refused\n',
    stderr: ''
  })
  assert.deepEqual(state.ids, ['old', 'a', 'b', 'c'])
  await replay('--reporter', 'some', '--since', '150m')
  assert.deepEqual(state.ids.slice(4), ['b', 'c'])
  state.status = 400
  const refused = await replay('--reporter', 'some', '--since', '150m')
  assert.equal(refused.status, 1)
  assert.match(refused.stdout, /0 records were reported to some, 2 were refused/)
  assert.match(refused.stderr, /record b was refused: status 400\n/)
  const unknown = await replay('--reporter', 'none', '--since', '1d')
  assert.equal(unknown.status, 2)
  assert.match(unknown.stderr, /there is no reporter "none"; there are: one, some/)
})

test('sums: what the builtin reporter has, by what is asked for', async t => {
  const dataDir = filled(t)
  const config = writeConfig(`${dataDir}/config.json`, {
    backends: [{ url: 'http://127.0.0.1:1' }],
    usage: { enabled: true, reporters: [{ type: 'builtin', builtin: {} }] }
  })
  const none = await usage(dataDir, 'sums', '--by', 'model')
  assert.equal(none.status, 1)
  assert.match(none.stderr, /no .*usage-builtin\.db; a reporter of type builtin makes it/)
  await usage(dataDir, 'replay', '--config', config, '--reporter', 'builtin', '--since', '1d')
  const sums = async (...args: string[]) => {
    const { stdout } = await usage(dataDir, 'sums', '--json', ...args)
    return stdout
      .split('\n')
      .filter(line => line !== '')
      .map(line => JSON.parse(line))
  }
  const [first, second] = await sums('--by', 'model')
  assert.deepEqual([first.value, first.requests, first.output_tokens], ['=HYPERLINK("x")', 1, 4])
  assert.deepEqual([second.value, second.requests, second.output_tokens], ['m', 3, 12])
  assert.equal((await sums('--by', 'tag:team'))[0].value, 'a "b"')
  assert.deepEqual(await sums('--by', 'day', '--until', '2026-01-01'), [])
  assert.equal((await usageProgram(dataDir, 'sums', '--by', 'moon')).status, 2)
})

test('the commands of the documentation', async t => {
  const dataDir = filled(t)
  const { state, url } = await receiver(t)
  const ledger = new Ledger(`${dataDir}/usage.db`)
  for (let id = 1; id <= 17; id++) ledger.bury('billing', 'status 400', [recordAt(`dead-${id}`, 1)])
  ledger.close()
  const config = writeConfig(`${dataDir}/config.json`, {
    backends: [{ url: 'http://127.0.0.1:1' }],
    usage: { enabled: true, reporters: [{ name: 'billing', type: 'webhook', webhook: { url } }] }
  })
  const page = readFileSync(new URL('../docs/metering.md', import.meta.url), 'utf8')
  const commands = page.match(/^llmproxy usage .*$/gm)!
  assert.equal(commands.length, 6)
  const db = openUsageStore(`${dataDir}/usage-builtin.db`)
  await db.run('SELECT 1', [])
  await db.close()
  for (const command of commands) {
    const result = await usage(dataDir, ...command.split(' ').slice(2), ...configFor(command))
    assert.deepEqual([result.status, result.stderr], [0, ''], command)
  }
  assert.equal(state.ids.length, 4)
  function configFor(command: string): string[] {
    return command.includes('replay') ? ['--config', config] : []
  }
})

test('dead letters of a running gateway: listed, tried again, deleted', async t => {
  const dataDir = folder(t)
  const { state, url, taken } = await receiver(t)
  const backend = await fakeBackend(t, answerChat)
  state.status = 400
  const config = writeConfig(`${dataDir}/config.json`, {
    server: { listen: '127.0.0.1:0' },
    backends: [{ url: backend.url }],
    usage: {
      enabled: true,
      reporters: [{ name: 'billing', type: 'webhook', max_age: '1ms', webhook: { url } }]
    }
  })
  const gateway = await start(t, [CLI, '--config', config], { LLMPROXY_DATA_DIR: dataDir })
  for (let call = 0; call < 3; call++) {
    await (await post(`${gateway.url}/v1/chat/completions`, CHAT)).text()
  }
  // A record that is refused before it is a millisecond old is put aside first.
  const letters = async () => {
    const { stdout } = await usage(dataDir, 'dead-letters', 'list', '--json')
    return stdout
      .split('\n')
      .filter(line => line !== '')
      .map(line => JSON.parse(line))
  }
  let found = await letters()
  while (found.length < 3) {
    // The receiver is in this process.
    await new Promise(setImmediate)
    found = await letters()
  }
  assert.equal(found[0].reporter, 'billing')
  assert.equal(found[0].reason, 'status 400')
  const table = await usage(dataDir, 'dead-letters', 'list')
  assert.ok(table.stdout.includes(found[0].record), table.stdout)
  const dropped = await usage(dataDir, 'dead-letters', 'drop', String(found[0].id))
  assert.equal(dropped.stdout, '1 deleted\n')
  state.status = 200
  const retried = await usage(dataDir, 'dead-letters', 'retry', '--all')
  assert.equal(retried.stdout, '2 will be tried again\n')
  await taken(2)
  assert.deepEqual(state.ids.sort(), [found[1].record, found[2].record].sort())
  const rest = await usage(dataDir, 'dead-letters')
  assert.equal(rest.stdout, 'There are no dead letters.\n')
})

test('replay to one of several reporters ends; every command accepts --config', async t => {
  const dataDir = filled(t)
  const config = writeConfig(`${dataDir}/config.json`, {
    backends: [{ url: 'demo://' }],
    usage: { reporters: [{ type: 'builtin' }, { type: 'file', file: { path: 'usage.jsonl' } }] }
  })
  const replay = ['replay', '--reporter', 'file', '--since', '1d', '--config', config]
  const replayed = await usageProgram(dataDir, ...replay)
  assert.deepEqual([replayed.status, replayed.stderr], [0, ''])
  assert.match(replayed.stdout, /records were reported to file, 0 were refused/)
  for (const args of [
    ['export', '--since', '1d'],
    ['dead-letters', 'list']
  ]) {
    const { status, stderr } = await usage(dataDir, ...args, '--config', config)
    assert.deepEqual([status, stderr], [0, ''], args.join(' '))
  }
  const sums = await usage(dataDir, 'sums', '--by', 'day', '--config', config)
  assert.deepEqual([sums.status, sums.stderr], [0, ''])
})
