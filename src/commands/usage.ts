import { existsSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { pino } from 'pino'
import { loadConfig } from '../config.ts'
import { usageFile } from '../plugins/usage.ts'
import { parseQuantity } from '../quantity.ts'
import { builtinFile } from '../reporters/builtin.ts'
import { toCsv } from '../reporters/csv.ts'
import { type DeadLetter, Ledger } from '../reporters/ledger.ts'
import type { UsageRecord } from '../reporters/record.ts'
import { type Reporter, recordJson } from '../reporters/reporter.ts'
import { toReporters } from '../reporters/reporters.ts'
import { type Dimension, openUsageStore, readSums } from '../reporters/usage-store.ts'
import { CommandError, read, show } from './command.ts'

/**
 * `llmproxy usage ...`: what can be done with the records on the disk, whether the gateway runs or not.
 */

const USAGE_HELP = `Usage
  llmproxy usage export --since TIME [--until TIME] [--format csv|jsonl]
      writes records to the standard output
  llmproxy usage replay --reporter NAME --since TIME [--until TIME] [--config FILE]
      reports records again, under the same ids
  llmproxy usage sums --by WHAT [--since TIME] [--until TIME] [--json]
      what was spent, from the builtin reporter, by whole days in UTC
  llmproxy usage dead-letters list [--reporter NAME] [--json]
  llmproxy usage dead-letters retry ID... | --all [--reporter NAME]
      has the gateway try again what was given up
  llmproxy usage dead-letters drop ID... | --all [--reporter NAME]
      deletes what was given up

WHAT is day, key, user, model, backend, tag, or tag: and a tag's name.
TIME is a date (2026-01-31), a time (2026-01-31T12:00:00Z), or how long ago (24h, 7d).
Records are below LLMPROXY_DATA_DIR (default: ./data).
`

/** How often a receiver that cannot be reached is asked, and how long (ms) it is left alone in between. */
const TRIES = 6
const FIRST_WAIT = 500
const MAX_WAIT = 10_000
const STATEMENT_TIMEOUT = 30_000
/** How far (ms) records of several workers may be from the order of their times. */
const OVERLAP = 1_000

/**
 * @param args what stands behind `llmproxy usage`
 * @param defaultConfig file where none is given
 * @returns the exit code
 * @throws {CommandError}
 */
export async function runUsage(
  args: string[],
  dataDir: string,
  defaultConfig: string
): Promise<number> {
  const [command, ...rest] = args
  if (command === 'export') return exportRecords(rest, dataDir)
  if (command === 'replay') return replay(rest, dataDir, defaultConfig)
  if (command === 'sums') return sums(rest, dataDir)
  if (command === 'dead-letters') return deadLetters(rest, dataDir)
  if (command !== undefined && !/^(--help|-h|help)$/.test(command)) {
    throw new CommandError(`there is no command "usage ${command}"`)
  }
  process.stdout.write(USAGE_HELP)
  return command === undefined ? 2 : 0
}

const PERIOD = { since: { type: 'string' }, until: { type: 'string' } } as const

/** All commands accept it; only a replay reads the file. */
const CONFIG = { config: { type: 'string', short: 'c' } } as const

async function exportRecords(args: string[], dataDir: string): Promise<number> {
  const { values } = read(args, {
    ...CONFIG,
    ...PERIOD,
    format: { type: 'string', default: 'jsonl' }
  })
  const { format } = values
  if (format !== 'csv' && format !== 'jsonl') {
    throw new CommandError(`--format must be csv or jsonl (got "${format}")`)
  }
  const period = toPeriod(values)
  const ledger = open(dataDir)
  if (format === 'csv') await print(toCsv(undefined))
  for (const entry of entries(ledger, period)) {
    const json = recordJson(entry, false)
    await print(format === 'csv' ? toCsv(JSON.parse(json)) : `${json}\n`)
  }
  ledger.close()
  return 0
}

async function replay(args: string[], dataDir: string, defaultConfig: string): Promise<number> {
  const { values } = read(args, {
    ...PERIOD,
    reporter: { type: 'string' },
    config: { type: 'string', short: 'c', default: defaultConfig }
  })
  const period = toPeriod(values)
  if (values.reporter === undefined) throw new CommandError('--reporter NAME is missing')
  const config = await loadConfig(values.config)
  const log = pino({ level: 'error' }, pino.destination(2))
  const reporters = await toReporters(config.usage, { storage: config.storage, dataDir, log })
  try {
    return await replayTo(reporters, values.reporter, period, dataDir)
  } finally {
    // Each of them may have a connection or a thread.
    await Promise.all(reporters.map(each => each.close()))
  }
}

async function replayTo(
  reporters: readonly Reporter[],
  wanted: string,
  period: Period,
  dataDir: string
): Promise<number> {
  const reporter = reporters.find(({ name }) => name === wanted)
  if (reporter === undefined) {
    const names = reporters.map(({ name }) => name).join(', ') || 'none'
    throw new CommandError(`there is no reporter "${wanted}"; there are: ${names}`)
  }
  const ledger = open(dataDir)
  const done = { sent: 0, refused: 0 }
  let batch: string[] = []
  for (const entry of entries(ledger, period)) {
    if (!reporter.accepts(entry)) continue
    batch.push(entry)
    if (batch.length < reporter.batch.max_events) continue
    await send(reporter, batch, done)
    batch = []
  }
  if (batch.length > 0) await send(reporter, batch, done)
  ledger.close()
  console.log(
    `${done.sent} records were reported to ${reporter.name}, ${done.refused} were refused`
  )
  return done.refused === 0 ? 0 : 1
}

/** @throws {CommandError} when nobody takes them, with the time from which to go on */
async function send(
  reporter: Reporter,
  batch: string[],
  done: { sent: number; refused: number }
): Promise<void> {
  const { signal } = new AbortController()
  for (let attempt = 1; ; attempt++) {
    const verdict = await reporter.send(batch, signal)
    if (verdict.kind === 'delivered') {
      done.sent += batch.length
      return
    }
    if (verdict.kind === 'refused') {
      if (batch.length === 1) {
        console.error(`record ${toRecord(batch[0]!).id} was refused: ${verdict.reason}`)
        done.refused++
      } else for (const one of batch) await send(reporter, [one], done)
      return
    }
    if (attempt === TRIES) {
      const since = new Date(Date.parse(toRecord(batch[0]!).timestamp) - OVERLAP).toISOString()
      throw new CommandError(
        `${reporter.name} cannot be reached (${verdict.reason}); ${done.sent} records were reported; go on with --since ${since}`,
        1
      )
    }
    const wait = Math.min(FIRST_WAIT * 2 ** (attempt - 1), MAX_WAIT)
    await sleep(Math.max(wait, verdict.retryAfter))
  }
}

async function sums(args: string[], dataDir: string): Promise<number> {
  const { values } = read(args, {
    ...CONFIG,
    ...PERIOD,
    by: { type: 'string' },
    json: { type: 'boolean', default: false }
  })
  const { by = '', since, until } = values
  if (!/^(day|key|user|model|backend|tag|tag:.+)$/.test(by)) {
    throw new CommandError('--by must be day, key, user, model, backend, tag, or such as tag:team')
  }
  const file = builtinFile(dataDir)
  if (!existsSync(file)) {
    throw new CommandError(`there is no ${file}; a reporter of type builtin makes it`, 1)
  }
  const db = openUsageStore(file, STATEMENT_TIMEOUT)
  const rows = await readSums(db, {
    by: by as Dimension,
    ...(since === undefined ? {} : { since: toDay(toTime('--since', since)) }),
    ...(until === undefined ? {} : { until: toDay(toTime('--until', until) - 1) })
  })
  await db.close()
  show(rows, values.json, 'Nothing was spent.')
  return 0
}

function deadLetters([command = 'list', ...rest]: string[], dataDir: string): number {
  if (!['list', 'retry', 'drop'].includes(command)) {
    throw new CommandError(`there is no command "usage dead-letters ${command}"`)
  }
  const { values, positionals } = read(rest, {
    ...CONFIG,
    reporter: { type: 'string' },
    json: { type: 'boolean', default: false },
    all: { type: 'boolean', default: false }
  })
  const ledger = open(dataDir)
  const letters = ledger
    .deadLetters()
    .filter(({ reporter }) => values.reporter === undefined || reporter === values.reporter)
  if (command === 'list') list(letters, values.json)
  else {
    const ids = values.all ? letters.map(({ id }) => id) : toIds(positionals, letters)
    if (command === 'retry') ledger.revive(ids)
    else ledger.drop(ids)
    console.log(`${ids.length} ${command === 'retry' ? 'will be tried again' : 'deleted'}`)
  }
  ledger.close()
  return 0
}

function list(letters: DeadLetter[], asJson: boolean): void {
  const rows = letters.map(({ id, reporter, at, reason, entry }) => {
    const { id: record, timestamp, caller, model, total_tokens } = toRecord(entry)
    const given_up = new Date(at).toISOString()
    return { id, reporter, given_up, reason, record, timestamp, caller, model, total_tokens }
  })
  show(rows, asJson, 'There are no dead letters.')
}

function toIds(positionals: string[], letters: DeadLetter[]): number[] {
  if (positionals.length === 0) throw new CommandError('which ones? give their ids, or --all')
  return positionals.map(text => {
    const letter = letters.find(({ id }) => String(id) === text)
    if (letter === undefined) throw new CommandError(`there is no dead letter ${text}`)
    return letter.id
  })
}

interface Period {
  since: number
  until: number
}

function* entries(ledger: Ledger, { since, until }: Period): Generator<string> {
  // A record is written down a moment after its time.
  for (const entry of ledger.entries(since)) {
    const time = Date.parse(toRecord(entry).timestamp)
    if (time >= since && time < until) yield entry
  }
}

function toRecord(entry: string): UsageRecord {
  return JSON.parse(recordJson(entry, false))
}

function toPeriod({ since, until }: { since?: string; until?: string }): Period {
  if (since === undefined) throw new CommandError('--since TIME is missing')
  return {
    since: toTime('--since', since),
    until: until === undefined ? Number.POSITIVE_INFINITY : toTime('--until', until)
  }
}

/** Unix ms. */
function toTime(name: string, text: string): number {
  const ago = parseQuantity(text, 'ms')
  const time = ago === undefined ? Date.parse(text) : Date.now() - ago
  if (Number.isNaN(time)) {
    throw new CommandError(`${name} must be a time such as 2026-01-31 or 24h (got "${text}")`)
  }
  return time
}

function toDay(time: number): string {
  return new Date(time).toISOString().slice(0, 10)
}

function open(dataDir: string): Ledger {
  const file = usageFile(dataDir)
  if (!existsSync(file))
    throw new CommandError(`there is no ${file}; is LLMPROXY_DATA_DIR right?`, 1)
  return new Ledger(file)
}

/** Resolves when more can be taken. */
async function print(text: string): Promise<void> {
  if (process.stdout.write(text)) return
  await new Promise<void>(resolve => process.stdout.once('drain', resolve))
}
