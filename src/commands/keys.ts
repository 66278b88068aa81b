import { existsSync } from 'node:fs'
import { type Config, loadConfig } from '../config.ts'
import { KeyStore, keyFile, type OnKeyChange } from '../keys/key-store.ts'
import { looksIntoStore } from '../keys/sources.ts'
import type { StoredKey } from '../keys/stored-key.ts'
import { Orders, toTold } from '../limits/orders.ts'
import { cacheOf } from '../limits/policy.ts'
import { OptionsError } from '../options.ts'
import { parseQuantity } from '../quantity.ts'
import { makeWhole } from '../store/copies.ts'
import { Redis } from '../store/redis.ts'
import { DatabaseError } from '../store/sql.ts'
import { CommandError, read, show } from './command.ts'
import { dropNull, FIELDS, type Fields, toChanges } from './key-fields.ts'

/** `llmproxy keys ...`: the keys of the embedded store, whether the gateway runs or not. */

const KEYS_HELP = `Usage
  llmproxy keys create [FIELDS]                  makes a key, and shows it this once
  llmproxy keys list [--user ID] [--limit N] [--offset N]
  llmproxy keys show ID
  llmproxy keys update ID [FIELDS]               changes what is named; '' takes a field away
  llmproxy keys revoke ID...                     for good
  llmproxy keys rotate ID [--grace TIME]         a new key under the same id; the old one stays valid that long

FIELDS
  --name TEXT  --user ID  --status active|disabled  --starts TIME  --expires TIME
  --models LIST  --allowed-ips LIST  --denied-ips LIST  --tag NAME=VALUE (several)
  --rps N  --rpm N  --burst N  --tpm N  --max-concurrent N
  --priority interactive|batch  --trace true|false
  --quota N  --quota-unit tokens|cost  --quota-period never|daily|weekly|monthly
  TIME is a date (2026-12-31), a time (2026-12-31T12:00:00Z), or how long from now (24h, 30d).
  LIST has commas.

--json        prints JSON instead of a table
--config FILE names the configuration, whose auth.db_path says where the store is
--db FILE     says it instead; other gateways are not told
The store is below LLMPROXY_DATA_DIR (default: ./data). A gateway that runs notices changes at once.
`

const text = { type: 'string' } as const

const WHERE = {
  config: { ...text, short: 'c' },
  db: text,
  json: { type: 'boolean', default: false }
} as const

/**
 * @param args what stands behind `llmproxy keys`
 * @param defaultConfig file where none is given
 * @returns the exit code
 * @throws {CommandError}
 */
export async function runKeys(
  [command, ...rest]: string[],
  dataDir: string,
  defaultConfig: string
): Promise<number> {
  if (command === undefined || /^(--help|-h|help)$/.test(command)) {
    process.stdout.write(KEYS_HELP)
    return command === undefined ? 2 : 0
  }
  const work = Object.hasOwn(COMMANDS, command) ? COMMANDS[command] : undefined
  if (work === undefined) throw new CommandError(`there is no command "keys ${command}"`)
  const { values, positionals } = read(rest, { ...WHERE, ...work.options })
  const ids = work.ids(positionals)
  const { file, config } = await findStore(values as Where, dataDir, defaultConfig)
  if (command !== 'create' && !existsSync(file)) {
    throw new CommandError(`there is no ${file}; is LLMPROXY_DATA_DIR right?`, 1)
  }
  const changes: Parameters<OnKeyChange>[] = []
  const store = new KeyStore(file, (...change) => changes.push(change))
  try {
    await work.run(store, ids, values as Values).finally(() => tellOthers(config, changes))
    return 0
  } catch (error) {
    if (error instanceof DatabaseError) throw new CommandError(`${file}: ${error.message}`, 1)
    if (!(error instanceof OptionsError)) throw error
    const wrong = error.issues.map(({ path, message }) => `${path.join('.')} ${message}`)
    throw new CommandError(wrong.join('; '))
  } finally {
    await store.close()
    await makeWhole(file)
  }
}

interface Where {
  config?: string
  db?: string
}
type Values = Fields & Where & { json: boolean; grace?: string; limit?: string; offset?: string }

interface Command {
  options: object
  ids(positionals: string[]): string[]
  run(store: KeyStore, ids: string[], values: Values): Promise<void>
}

const COMMANDS: Record<string, Command> = {
  create: {
    options: FIELDS,
    ids: none,
    async run(store, _ids, values) {
      const { key, record } = await store.create(dropNull(toChanges(values)))
      showNew(key, record, values.json)
    }
  },
  list: {
    options: { user: text, limit: text, offset: text },
    ids: none,
    async run(store, _ids, { user, limit = '100', offset = '0', json }) {
      const page = { limit: toCount('--limit', limit), offset: toCount('--offset', offset) }
      const { keys, total } = await store.list({ ...page, user_id: user })
      show(json ? keys : keys.map(toLine), json, 'There are no keys.')
      const rest = total - page.offset - keys.length
      if (!json && rest > 0) console.log(`${rest} more: --offset ${page.offset + keys.length}`)
    }
  },
  show: {
    options: {},
    ids: one,
    async run(store, [id], { json }) {
      showKey(there(await store.get(id!), id!), json)
    }
  },
  update: {
    options: FIELDS,
    ids: one,
    async run(store, [id], values) {
      const changes = toChanges(values)
      if (Object.keys(changes).length === 0) throw new CommandError('nothing to change was given')
      showKey(there(await store.update(id!, changes), id!), values.json)
    }
  },
  revoke: {
    options: {},
    ids: some,
    async run(store, ids, { json }) {
      for (const id of ids) {
        const revoked = there(await store.revoke(id), id)
        if (json) console.log(JSON.stringify(revoked))
        else console.log(`${id} is revoked`)
      }
    }
  },
  rotate: {
    options: { grace: text },
    ids: one,
    async run(store, [id], { grace = '0', json }) {
      const time = parseQuantity(grace, 'ms')
      if (time === undefined) throw new CommandError(`--grace must be such as 24h (got "${grace}")`)
      const before = there(await store.get(id!), id!)
      if (before.status === 'revoked') throw new CommandError(`${id} is revoked`, 1)
      const { key, record } = there(await store.rotate(id!, { grace: time }), id!)
      showNew(key, record, json)
    }
  }
}

function none(positionals: string[]): string[] {
  if (positionals.length > 0) throw new CommandError(`too many arguments: ${positionals.join(' ')}`)
  return []
}

function one(positionals: string[]): string[] {
  if (positionals.length !== 1) throw new CommandError('which key? give its id')
  return positionals
}

function some(positionals: string[]): string[] {
  if (positionals.length === 0) throw new CommandError('which keys? give their ids')
  return positionals
}

function there<T>(found: T | undefined, id: string): T {
  if (found === undefined) throw new CommandError(`there is no key ${id}`, 1)
  return found
}

async function findStore({ config, db }: Where, dataDir: string, defaultConfig: string) {
  if (db !== undefined) return { file: keyFile(process.cwd(), db) }
  const loaded = await loadConfig(config ?? defaultConfig)
  const { auth } = loaded
  if (!looksIntoStore(auth)) {
    console.error(
      'llmproxy: a gateway with this configuration does not look into the store (auth.enabled, auth.pipeline)'
    )
  }
  return { file: keyFile(dataDir, auth.db_path), config: loaded }
}

/** The gateway that has the store notices by itself; those that share its limits do not. */
async function tellOthers(config: Config | undefined, changes: Parameters<OnKeyChange>[]) {
  const cache = config && cacheOf(config.rate_limit, config.storage.caches)
  if (cache === undefined || changes.length === 0) return
  const redis = new Redis(cache)
  try {
    const orders = new Orders(redis, config!.rate_limit.redis_prefix, '')
    for (const [hashes = [], validFor] of changes) {
      await orders.ask('tell', [], toTold(hashes, validFor))
    }
  } catch (error) {
    const reason = (error as Error).message
    console.error(`llmproxy: other gateways could not be told, and admit the key still: ${reason}`)
  } finally {
    await redis.close()
  }
}

function toCount(name: string, value: string): number {
  if (!/^\d{1,9}$/.test(value)) {
    throw new CommandError(`${name} must be a number from 0 to 999999999 (got "${value}")`)
  }
  return Number(value)
}

function showNew(key: string, record: StoredKey, asJson: boolean): void {
  if (asJson) return console.log(JSON.stringify({ ...record, key }))
  console.log(`${key}\n`)
  showKey(record, false)
  console.log('\nThe key in the first line is not shown again.')
}

function showKey(record: StoredKey, asJson: boolean): void {
  if (asJson) return console.log(JSON.stringify(record))
  for (const [name, value] of Object.entries(record)) {
    console.log(`${name.padEnd(20)}${typeof value === 'object' ? JSON.stringify(value) : value}`)
  }
}

/** What fits into a line of the table. */
function toLine({ id, key, name, user_id, status, expires_at, models, limits }: StoredKey) {
  const isOver = status === 'active' && Date.parse(String(expires_at)) <= Date.now()
  return {
    id,
    key,
    name,
    user: user_id,
    status: isOver ? 'expired' : status,
    expires: expires_at,
    models: models?.join(','),
    limits: limits && JSON.stringify(limits)
  }
}
