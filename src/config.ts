import { createPrivateKey, X509Certificate } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { basename } from 'node:path'
import { getAsset, isSea } from 'node:sea'
import { fileURLToPath } from 'node:url'
import { type Static, Type } from 'typebox'
import { backendIssues, GatewayOptions, optionIssues } from './app.ts'
import { freeze } from './fragments.ts'
import { formatPath, type Issue } from './issues.ts'
import { isNetwork } from './keys/key.ts'
import { DEFAULT_STORE } from './keys/key-store.ts'
import { ADDRESS } from './listen.ts'
import { LogOptions } from './logs/log.ts'
import { AtStart, Duration, findIssues, NotBuilt, Section, Size } from './options.ts'
import { AdminOptions, adminIssues } from './plugins/admin.ts'
import { OverloadOptions } from './plugins/overload.ts'
import { AllowEngineControls } from './plugins/proxy.ts'
import { complaintsOf, readYaml } from './yaml.ts'

/**
 * The configuration file: YAML in the original's dialect, with `${ENV}` in its values, checked
 * strictly, with every error at its line and column.
 */

const text = (description: string) => Type.Optional(Type.String({ description }))
const texts = (description: string, fallback: string[] = []) =>
  Type.Array(Type.String(), { default: fallback, description })

const MAX_WORKERS = 128
/** Name of the default configuration inside the single binary, which has no files beside it. */
export const BUILT_IN = 'built-in llmproxy.yaml'
/** The configuration that applies where no file is named. */
export const DEFAULT_CONFIG = isSea()
  ? BUILT_IN
  : fileURLToPath(new URL('../config/llmproxy.yaml', import.meta.url))
/** Sections that must be right before it is asked whether they find what they name. */
const COMPARED = [
  'backends',
  'routing',
  'discovery',
  'auth',
  'rate_limit',
  'usage',
  'logging',
  'storage'
]

const ServerOptions = Section(
  {
    listen: Type.String({
      ...ADDRESS,
      default: ':8000',
      restart: true,
      description: 'Address and port; without an address all of them'
    }),
    workers: Type.Unsafe<number | 'auto'>({
      type: ['integer', 'string'],
      check: (workers: unknown) =>
        workers === 'auto' ||
        (Number.isInteger(workers) && Number(workers) >= 1 && Number(workers) <= MAX_WORKERS),
      expects: `a number of processes from 1 to ${MAX_WORKERS}, or auto`,
      default: 1,
      restart: true,
      description: 'Processes that serve; auto: one for each core'
    }),
    header_timeout: Duration('10s', 'How long a client may take for its headers'),
    read_timeout: Duration('5m', 'How long a client may take for its whole request'),
    write_timeout: Duration('60s', 'How long a client may let bytes wait; 0: for ever', 0),
    heartbeat: Duration(
      '15s',
      'How long a stream may be silent before the client gets a comment; before the response it gets 200 as well, and errors as events then; 0: for ever',
      0
    ),
    idle_timeout: Duration('120s', 'How long an idle connection is kept'),
    max_header_bytes: AtStart(Size('64KB', 'Size of all headers')),
    max_body_size: AtStart(Size('64MB', 'Size of a request body')),
    max_connections: Type.Unsafe<number | 'auto'>({
      type: ['integer', 'string'],
      check: (most: unknown) => most === 'auto' || (Number.isInteger(most) && Number(most) >= 1),
      expects: 'a number of connections of 1 or more, or auto',
      default: 'auto',
      description:
        'Maximum number of client connections, shared out to the workers; the gateway closes those beyond it. auto: half of the file descriptors (ulimit -n) of each process after 64 for files and databases; the other half is for connections to backends'
    }),
    max_connections_per_address: Type.Unsafe<number | 'auto'>({
      type: ['integer', 'string'],
      check: (most: unknown) => most === 'auto' || (Number.isInteger(most) && Number(most) >= 0),
      expects: 'a number of connections, 0 for no limit, or auto',
      default: 'auto',
      description:
        'Maximum number of connections from one address (IPv6: one /64 network), except from proxies in trust_proxy; 0: no limit; auto: half of max_connections'
    }),
    trust_proxy: Type.Unsafe<boolean | string[]>({
      anyOf: [{ type: 'boolean' }, { type: 'array', items: { type: 'string', check: isNetwork } }],
      expects: 'true, false, or a list of addresses and networks such as [10.0.0.0/8]',
      default: false,
      restart: true,
      description:
        'Whose X-Forwarded-For counts: nobody, everybody, or these addresses and networks'
    }),
    drain_delay: Duration(
      '0',
      'How long calls are still taken after SIGTERM, while /health/ready says that no more should come',
      0
    ),
    drain_timeout: Duration('30s', 'How long running answers may take after that', 0),
    overload: OverloadOptions,
    allow_engine_controls: AllowEngineControls,
    cors: AtStart(
      Section(
        {
          enabled: Type.Boolean({
            default: false,
            description: 'Answers browsers of other origins'
          }),
          allowed_origins: texts('Origins, or * for all'),
          allowed_methods: texts('Methods', ['GET', 'POST', 'PUT', 'DELETE', 'OPTIONS']),
          allowed_headers: texts('Request headers; an empty list: all that a browser asks for'),
          expose_headers: texts(
            'Response headers that scripts may read, beside those of ids, limits and retries'
          ),
          allow_credentials: Type.Boolean({ default: false, description: 'Cookies and the like' }),
          max_age: Type.Integer({
            minimum: 0,
            default: 0,
            description: 'Seconds a browser may remember the answer; 0: its own default'
          })
        },
        'Cross-origin requests'
      )
    ),
    tls: AtStart(
      Section(
        {
          enabled: Type.Boolean({ default: false, description: 'HTTPS instead of HTTP' }),
          cert_file: text('Certificate chain, PEM; read again when it changes'),
          key_file: text('Private key, PEM'),
          client_ca_file: text('Authority of client certificates, PEM'),
          client_auth: Type.Enum(['none', 'request', 'require'], {
            default: 'none',
            description: 'Whether clients show a certificate'
          })
        },
        'HTTPS'
      )
    )
  },
  'The listening side'
)

const {
  proxy: _,
  overload: ____,
  drain_delay: __,
  drain_timeout: ___,
  ...gatewaySections
} = GatewayOptions.properties

/** Everything a configuration file may hold. */
export const ConfigSchema = Type.Object(
  {
    server: ServerOptions,
    log: LogOptions,
    ...gatewaySections,
    admin: Section(
      { ...AdminOptions.properties, db_path: AtStart(text('Original name of auth.db_path')) },
      'The admin API'
    ),
    hooks: NotBuilt('Scripts')
  },
  { additionalProperties: false }
)
export type Config = Readonly<Static<typeof ConfigSchema>>

/** Thrown for a file that can't be used: one line for each error, all of them. */
export class ConfigError extends Error {
  override name = 'ConfigError'
}

/**
 * Reads and checks a configuration file.
 *
 * @throws {ConfigError} with lines such as
 *   `config.yaml:12:5 backends[0].weight: must be a positive integer (got "ten")`
 */
export async function loadConfig(file: string, env = process.env): Promise<Config> {
  let yaml: string
  try {
    yaml = file === BUILT_IN ? getAsset(file, 'utf8') : await readFile(file, 'utf8')
  } catch (error) {
    throw new ConfigError(`${file}: cannot be read (${(error as NodeJS.ErrnoException).code})`)
  }
  return parseConfig(yaml, basename(file), env)
}

/**
 * Checks the text of a configuration file and completes it with the defaults.
 *
 * @example
 * parseConfig('backends: [{url: "http://vllm:8000"}]', 'config.yaml', {}).server.listen // ':8000'
 */
export function parseConfig(yaml: string, name: string, env: NodeJS.ProcessEnv): Config {
  const file = readYaml(yaml, name, env)
  const { root, issues } = file
  if (file.errors.length > 0) throw new ConfigError(file.errors.join('\n'))
  if (typeof root !== 'object' || root === null || Array.isArray(root)) {
    throw new ConfigError(`${name}:1:1 must be a mapping of sections such as server and backends`)
  }
  const schema = ConfigSchema as SchemaNode
  retype(schema, root, [], file.fromEnv)
  completeUnits(schema, root)
  issues.push(...numbersWithoutUnit(schema, root, []))
  withoutFile(root as RootMapping)
  const given = Object.keys((root as RootMapping).server ?? {})
  const known = new Set(issues.map(issue => formatPath(issue.path)))
  issues.push(...findIssues(ConfigSchema, root).filter(({ path }) => !known.has(formatPath(path))))
  const isWrong = issues.some(({ path }) => COMPARED.includes(String(path[0])))
  if (!isWrong) issues.push(...optionIssues(root as Config))
  if (issues.length === 0) issues.push(...shareIssues(root as Config))
  const isUnclear = issues.some(({ path }) => path[0] === 'backends' || path[0] === 'discovery')
  if (!isUnclear) issues.push(...backendIssues(root as Config))
  completeTimeouts(root as Config, given)
  issues.push(...incomplete(root as Config), ...takeOverStore(root as Config))
  if (issues.length > 0) throw new ConfigError(complaintsOf(file, name).join('\n'))
  return freeze(root as Config)
}

/** How many processes the configuration asks for. */
export function workerCount({ server }: Config): number {
  return server.workers === 'auto' ? availableParallelism() : server.workers
}

/** Every worker must have a share of what a backend can take. */
function shareIssues(config: Config): Issue[] {
  const workers = workerCount(config)
  return config.backends.flatMap(({ max_concurrent }, at) => {
    if (max_concurrent === 0 || max_concurrent >= workers) return []
    const message = `must be at least as many as server.workers, which share it (got ${max_concurrent} for ${workers})`
    return [{ path: ['backends', at, 'max_concurrent'], message }]
  })
}

/** The original names the file of the store beside the API that changes it. */
function takeOverStore({ admin, auth }: Config): Issue[] {
  const path = admin?.db_path
  if (admin?.enabled !== true || typeof path !== 'string' || path === auth?.db_path) return []
  if (auth?.db_path !== DEFAULT_STORE) {
    const message = `must be the same as auth.db_path (got "${path}")`
    return [{ path: ['admin', 'db_path'], message }]
  }
  auth.db_path = path
  return []
}

/** A timeout that is set is more than the default of the other one. */
function completeTimeouts({ server }: Config, given: readonly string[]): void {
  if (!(server?.read_timeout < server?.header_timeout)) return
  if (!given.includes('header_timeout')) server.header_timeout = server.read_timeout
  else if (!given.includes('read_timeout')) server.read_timeout = server.header_timeout
}

/** Rules between members, which the schema can't say. */
function incomplete({ server, admin }: Config): Issue[] {
  const issues: Issue[] = []
  const tls = server?.tls
  if (typeof admin?.token === 'string') {
    const within = adminIssues(admin).map(({ path, message }) => ({
      path: ['admin', ...path],
      message
    }))
    issues.push(...within)
  }
  if (server?.read_timeout < server?.header_timeout) {
    const message = 'must not be shorter than header_timeout, which is part of it'
    issues.push({ path: ['server', 'read_timeout'], message })
  }
  const missing = (member: string, message: string) =>
    issues.push({ path: ['server', 'tls', member], message })
  if (tls?.enabled === true) {
    if (!tls.cert_file) missing('cert_file', 'is missing, but tls is enabled')
    if (!tls.key_file) missing('key_file', 'is missing, but tls is enabled')
    if (tls.client_auth !== 'none' && !tls.client_ca_file) {
      missing('client_ca_file', 'is missing, but client_auth asks for certificates')
    }
    for (const name of ['cert_file', 'key_file', 'client_ca_file'] as const) {
      const path = tls[name]
      if (!path) continue
      if (!existsSync(path)) missing(name, `must be a file that is there (got "${path}")`)
      else if (!isPem(name, path)) missing(name, `must be a file in PEM format (got "${path}")`)
    }
  }
  return issues
}

function isPem(name: 'cert_file' | 'key_file' | 'client_ca_file', path: string): boolean {
  try {
    const text = readFileSync(path)
    if (name === 'key_file') createPrivateKey(text)
    else new X509Certificate(text)
    return true
  } catch {
    return false
  }
}

interface Outlet {
  output?: unknown
  file?: unknown
}
interface RootMapping {
  server?: object | null
  log?: Outlet | null
  logging?: { access?: Outlet | null } | null
}

/** Settings of a log file say nothing where the log goes elsewhere. */
function withoutFile({ log, logging }: RootMapping): void {
  for (const outlet of [log, logging?.access]) {
    if (typeof outlet === 'object' && outlet !== null && outlet.output !== 'file') {
      delete outlet.file
    }
  }
}

/** Some numbers of the original's dialect mean megabytes, and some days. */
function completeUnits(schema: SchemaNode, value: unknown): void {
  if (typeof value !== 'object' || value === null) return
  const members = value as Record<string, unknown>
  for (const [name, member] of Object.entries(members)) {
    const inner = (Array.isArray(value) ? schema.items : schema.properties?.[name]) ?? {}
    if (inner.bare !== undefined && typeof member === 'number') members[name] = member + inner.bare
    else completeUnits(inner, member)
  }
}

/** In a file a number without a unit could be anything: seconds, or the original's nanoseconds. */
function numbersWithoutUnit(schema: SchemaNode, value: unknown, path: Issue['path']): Issue[] {
  if (schema.unit !== undefined && typeof value === 'number') {
    // A size without a unit is bytes everywhere.
    if (schema.unit === 'bytes' || value === 0) return []
    // The original read a bare number as nanoseconds.
    const likely = value >= 1e6 && value % 1e6 === 0 ? `${value / 1e6}ms` : `${value}s`
    return [{ path, message: `must have a unit, such as ${likely} (got ${value})` }]
  }
  if (Array.isArray(value)) {
    return value.flatMap((item, at) => numbersWithoutUnit(schema.items ?? {}, item, [...path, at]))
  }
  if (typeof value !== 'object' || value === null) return []
  return Object.entries(value).flatMap(([name, member]) =>
    numbersWithoutUnit(schema.properties?.[name] ?? {}, member, [...path, name])
  )
}

/** The environment holds text only: where a number or a truth value is wanted it is read as one. */
function retype(
  schema: SchemaNode,
  value: unknown,
  path: Issue['path'],
  fromEnv: Set<string>
): void {
  if (typeof value !== 'object' || value === null) return
  const members = value as Record<string, unknown>
  for (const [name, member] of Object.entries(members)) {
    const isList = Array.isArray(value)
    const inner = (isList ? schema.items : schema.properties?.[name]) ?? {}
    const innerPath = [...path, isList ? Number(name) : name]
    if (!fromEnv.has(formatPath(innerPath))) retype(inner, member, innerPath, fromEnv)
    else if (inner.type === 'boolean' && /^(true|false)$/i.test(String(member))) {
      members[name] = String(member).toLowerCase() === 'true'
    } else if (
      /\b(integer|number)\b/.test(String(inner.type)) &&
      /^-?\d+(\.\d+)?$/.test(String(member))
    ) {
      members[name] = Number(member)
    }
  }
}

interface SchemaNode {
  type?: string | string[]
  unit?: 'ms' | 'bytes'
  bare?: 'MB' | 'd'
  items?: SchemaNode
  properties?: Record<string, SchemaNode>
}
