import { existsSync } from 'node:fs'
import { type Static, Type } from 'typebox'
import type { Distinct, Issue } from '../issues.ts'
import { Duration, NotBuilt, Section } from '../options.ts'
import { openDatabase, type StorageOptions, storageIssues } from '../store/storage.ts'
import { ConsulOptions, watchConsul } from './consul.ts'
import { DatabaseOptions, watchDatabase } from './database.ts'
import { DnsOptions, watchDns } from './dns.ts'
import { DefaultsOptions, StaticBackend, spelled } from './entry.ts'
import { EtcdOptions, watchEtcd } from './etcd.ts'
import { HttpOptions, watchHttp } from './http.ts'
import { KubernetesOptions, watchKubernetes } from './kubernetes.ts'
import type { Watch } from './source.ts'

/** Where backends are found, as the options have it. */

const SourceOptions = Type.Object(
  {
    name: Type.Optional(
      Type.String({ minLength: 1, description: 'Name in metrics and logs; its type if left out' })
    ),
    type: Type.Enum(['static', 'http', 'database', 'consul', 'kubernetes', 'etcd', 'dns'], {
      description: 'What it is'
    }),
    enabled: Type.Boolean({ default: true, description: 'Switches it on' }),
    backend: Type.Optional(DefaultsOptions),
    static: Type.Optional(
      Type.Object(
        { backends: Type.Array(StaticBackend, { description: 'The inference servers' }) },
        { additionalProperties: false, description: 'Backends in this file' }
      )
    ),
    http: Type.Optional(HttpOptions),
    database: Type.Optional(DatabaseOptions),
    consul: Type.Optional(ConsulOptions),
    kubernetes: Type.Optional(KubernetesOptions),
    etcd: Type.Optional(EtcdOptions),
    dns: Type.Optional(DnsOptions),
    script: NotBuilt('Script that finds backends')
  },
  { additionalProperties: false, partOfType: true }
)
export type SourceOptions = Static<typeof SourceOptions>

export const DiscoveryOptions = Section(
  {
    enabled: Type.Boolean({
      default: false,
      description: 'Adds discovered backends; if left out, true where sources are listed'
    }),
    mode: Type.Enum(['merge', 'first'], {
      default: 'merge',
      description:
        'merge: the backends of all sources; first: those of the first source that has any'
    }),
    interval: Duration(
      '30s',
      'Time between two questions, for sources that tell nothing by themselves'
    ),
    sources: Type.Array(SourceOptions, {
      default: [],
      distinct: [
        { by: each => nameOfSource(each as SourceOptions), what: 'name' }
      ] satisfies Distinct[],
      description: 'Where backends are found'
    })
  },
  'Backends that are found while running',
  ['sources']
)
export type DiscoveryOptions = Static<typeof DiscoveryOptions>

export function nameOfSource({ name, type }: Pick<SourceOptions, 'name' | 'type'>): string {
  return name ?? type
}

/** Why sources can't be used as they are. */
export function discoveryIssues(options: DiscoveryOptions, storage: StorageOptions): Issue[] {
  if (!options.enabled) return []
  if (!options.sources.some(each => each.enabled)) {
    return [{ path: ['sources'], message: 'must have at least one that is enabled' }]
  }
  return options.sources.flatMap((each, at) => {
    if (!each.enabled) return []
    const path = ['sources', at, each.type]
    if (each.type === 'database') {
      return storageIssues(storage, 'databases', each.database!.storage, [...path, 'storage'])
    }
    const { tls = {} } = (each[each.type] ?? {}) as { tls?: Record<string, string> }
    return Object.entries(tls).flatMap(([name, file]) => {
      const message = `must be a file that is there (got "${file}")`
      return existsSync(file) ? [] : [{ path: [...path, 'tls', name], message }]
    })
  })
}

/**
 * @param interval where the source has none of its own (ms)
 * @param dataDir where the files of databases are
 */
export function toWatch(
  options: SourceOptions,
  interval: number,
  storage: StorageOptions,
  dataDir: string | undefined
): Watch {
  const { type, http, database, consul, kubernetes, etcd, dns } = options
  switch (type) {
    case 'static':
      return async (say, signal) => {
        say(options.static!.backends.map(spelled))
        await new Promise(resolve => signal.addEventListener('abort', resolve, { once: true }))
      }
    case 'http':
      return watchHttp(http!, http!.interval ?? interval)
    case 'database': {
      const found = storage.databases.find(each => each.name === database!.storage)!
      return watchDatabase(database!, database!.interval ?? interval, () =>
        openDatabase(found, dataDir, database!.timeout)
      )
    }
    case 'consul':
      return watchConsul(consul!, consul!.interval ?? interval)
    case 'kubernetes':
      return watchKubernetes(kubernetes!)
    case 'etcd':
      return watchEtcd(etcd!)
    case 'dns':
      return watchDns(dns!, dns!.interval ?? interval)
  }
}
