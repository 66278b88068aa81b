import { stat } from 'node:fs/promises'
import { batchesOf } from './batches.ts'
import { type Change, type Changes, compare, takeOver } from './changes.ts'
import { type Config, ConfigSchema, loadConfig } from './config.ts'
import { Assembly, type Fragment, freeze } from './fragments.ts'
import { andMore } from './issues.ts'

/** The configuration file of a gateway that is running, read again without blocking the event loop. */

/** The configuration to run with, and how it differs from the running one. */
export interface Reread extends Differences {
  config: Config
}

interface Differences {
  /** `config` as JSON. */
  json: Json
  /** Changes as JSON, as `POST /admin/reload` shows them. */
  changes: string
  /** Paths of the first changes. */
  changed: string[]
  restart_needed: string[]
}

/** JSON in memory that threads share: none of them has to copy it. */
export type Json = Uint8Array<SharedArrayBuffer>

/** Input of the thread. */
export interface Given {
  file: string
  /** The configuration that is running. */
  running: Json
}

/** Maximum size (bytes) of a file that is read without a thread: that takes a few milliseconds. */
const SMALL = 8 * 1024
/** The same for a configuration, which has all defaults. */
const SMALL_JSON = 32 * 1024
/** Maximum number of paths that are named. */
const MAX_NAMED = 50
/** Maximum number of changes of each kind that are shown, and maximum length of a value in them (characters of JSON). */
const MAX_SHOWN = 200
const MAX_VALUE = 4_000

/**
 * Reads a configuration file again.
 *
 * @param before what is running
 * @throws {ConfigError}
 */
export async function reread(file: string, before: Config, running: Json): Promise<Reread> {
  const { size } = await stat(file).catch(() => ({ size: 0 }))
  if (size <= SMALL && running.length <= SMALL_JSON) {
    const reread = toReread(await loadConfig(file), running)
    return { ...reread, config: freeze(reread.config) }
  }
  const given: Given = { file, running }
  const assembly = new Assembly(before)
  let config: Config | undefined
  let differences: Differences | undefined
  for await (const each of batchesOf<Fragment | Differences>('config-thread', { data: given })) {
    if ('json' in each) differences = each
    else config = assembly.add(each)
  }
  return { config: config!, ...differences! }
}

/** Compares the configuration of a file with the one that is running. */
export function toReread(wanted: Config, running: Json): Reread {
  const before: Config = JSON.parse(Buffer.from(running.buffer).toString())
  const changes = compare(ConfigSchema, before, wanted)
  const config = takeOver(ConfigSchema, before, wanted)
  return {
    config,
    json: toJson(config),
    changes: JSON.stringify(shown(changes)),
    changed: namesOf(changes.changed),
    restart_needed: namesOf(changes.restart_needed)
  }
}

export function toJson(config: Config): Json {
  const text = JSON.stringify(config)
  const json = new Uint8Array(new SharedArrayBuffer(Buffer.byteLength(text)))
  Buffer.from(json.buffer).write(text)
  return json
}

/** Changes as the admin API shows them. */
function shown({ changed, restart_needed }: Changes): Changes {
  const omitted =
    Math.max(0, changed.length - MAX_SHOWN) + Math.max(0, restart_needed.length - MAX_SHOWN)
  return {
    changed: changed.slice(0, MAX_SHOWN).map(withShortValues),
    restart_needed: restart_needed.slice(0, MAX_SHOWN).map(withShortValues),
    ...(omitted > 0 ? { omitted } : {})
  }
}

function withShortValues(change: Change): Change {
  const short = { ...change }
  for (const side of ['before', 'after'] as const) {
    const length = JSON.stringify(change[side])?.length ?? 0
    if (length > MAX_VALUE) short[side] = `too long to show: ${length} characters`
  }
  return short
}

function namesOf(changes: readonly Change[]): string[] {
  return andMore(
    changes.slice(0, MAX_NAMED).map(({ path }) => path),
    changes.length
  )
}
