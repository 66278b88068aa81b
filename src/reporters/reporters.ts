import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import type { Issue } from '../issues.ts'
import { matchesModel } from '../keys/key.ts'
import { Duration, LONGEST_AGE, NotBuilt } from '../options.ts'
import { Redis } from '../store/redis.ts'
import { openDatabase, type StorageOptions, storageIssues } from '../store/storage.ts'
import { Builtin, BuiltinOptions, builtinFile } from './builtin.ts'
import { DatabaseReporter, DatabaseReporterOptions } from './database.ts'
import { FileReporter, FileReporterOptions } from './file.ts'
import type { UsageRecord } from './record.ts'
import { RedisReporter, RedisReporterOptions } from './redis.ts'
import { type Receiver, type Reporter, recordJson } from './reporter.ts'
import { Webhook, WebhookOptions } from './webhook.ts'

/** The reporters that the options ask for. */

const OUTCOMES = ['ok', 'client_gone', 'backend_failed', 'timed_out'] as const

const Names = (description: string) =>
  Type.Array(Type.String({ minLength: 1 }), { default: [], description })

const Filter = Type.Object(
  {
    models: Names('Models, * as a wildcard; none: all'),
    callers: Names('Names or ids of API keys; none: all'),
    outcomes: Type.Array(Type.Enum([...OUTCOMES]), {
      default: [],
      description: 'How exchanges ended; none: all'
    })
  },
  { additionalProperties: false, default: {}, description: 'Which records it gets' }
)
type Filter = Static<typeof Filter>

export const ReporterOptions = Type.Object(
  {
    name: Type.Optional(
      Type.String({
        minLength: 1,
        description: 'Name in logs and metrics, and of its place in the outbox'
      })
    ),
    type: Type.Enum(['webhook', 'database', 'redis', 'builtin', 'file'], {
      description: 'What it is'
    }),
    enabled: Type.Boolean({ default: true, description: 'Switches it on' }),
    filter: Filter,
    max_age: Duration(
      '7d',
      'How old a record may be that is still tried; then it is a dead letter',
      1,
      LONGEST_AGE
    ),
    webhook: Type.Optional(WebhookOptions),
    database: Type.Optional(DatabaseReporterOptions),
    redis: Type.Optional(RedisReporterOptions),
    builtin: Type.Optional(BuiltinOptions),
    file: Type.Optional(FileReporterOptions),
    script: NotBuilt('Script that reports')
  },
  {
    additionalProperties: false,
    partOfType: true
  }
)
type ReporterOptions = Static<typeof ReporterOptions>

interface Reporting {
  enabled: boolean
  reporters: ReporterOptions[]
}

/** Why reporters can't use what they name of the storage. */
export function reporterIssues(reporting: Reporting, storage: StorageOptions): Issue[] {
  return reporting.reporters.flatMap(({ enabled, type, database, redis }, at) => {
    if (!reporting.enabled || !enabled) return []
    const path = ['reporters', at, type, 'storage']
    if (type === 'database') return storageIssues(storage, 'databases', database!.storage, path)
    return type === 'redis' ? storageIssues(storage, 'caches', redis!.storage, path) : []
  })
}

/** What reporters need beside their own options. */
export interface Surroundings {
  storage: StorageOptions
  dataDir: string | undefined
  log: FastifyBaseLogger
}

/**
 * The reporters that are switched on.
 *
 * @throws {NewerFormatError} when a newer version has written the embedded store
 */
export async function toReporters(
  { enabled, reporters }: Reporting,
  around: Surroundings
): Promise<Reporter[]> {
  if (!enabled) return []
  const names = new Set<string>()
  const isOn = reporters.filter(each => each.enabled)
  return Promise.all(isOn.map(each => toReporter(each, names, around)))
}

async function toReporter(
  options: ReporterOptions,
  names: Set<string>,
  around: Surroundings
): Promise<Reporter> {
  const { type, filter, max_age } = options
  let name = options.name ?? type
  for (let count = 2; names.has(name); count++) name = `${type}-${count}`
  names.add(name)
  const receiver = toReceiver(options, around)
  await receiver.open?.()
  return {
    name,
    maxAge: max_age,
    wantsBody: receiver.wantsBody,
    concurrency: receiver.concurrency,
    batch: receiver.batch,
    accepts: entry => isWanted(entry, filter),
    send: (entries, signal) => receiver.send(entries, signal),
    close: () => receiver.close()
  }
}

function toReceiver(options: ReporterOptions, { storage, dataDir, log }: Surroundings): Receiver {
  const { type, webhook, database, redis, builtin, file } = options
  switch (type) {
    case 'webhook':
      return new Webhook(webhook!)
    case 'database': {
      const found = storage.databases.find(({ name }) => name === database!.storage)!
      return new DatabaseReporter(openDatabase(found, dataDir, database!.timeout), database!)
    }
    case 'redis': {
      const found = storage.caches.find(({ name }) => name === redis!.storage)!
      return new RedisReporter(new Redis(found), redis!)
    }
    case 'builtin':
      return new Builtin(builtinFile(dataDir), builtin!, log)
    case 'file':
      return new FileReporter(file!, dataDir)
  }
}

function isWanted(entry: string, { models, callers, outcomes }: Filter): boolean {
  if (models.length + callers.length + outcomes.length === 0) return true
  const record: UsageRecord = JSON.parse(recordJson(entry, false))
  const names = [record.model, record.requested_model]
  return (
    (models.length === 0 || names.some(name => matchesModel(models, name ?? ''))) &&
    (callers.length === 0 ||
      callers.some(each => each === record.caller || each === record.api_key_id)) &&
    (outcomes.length === 0 || outcomes.some(each => each === record.outcome))
  )
}
