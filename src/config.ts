import { readFile } from 'node:fs/promises'
import { basename } from 'node:path'
import { type Static, Type } from 'typebox'
import {
  type Document,
  isAlias,
  isMap,
  isScalar,
  isSeq,
  LineCounter,
  type Node,
  type Pair,
  parseDocument
} from 'yaml'
import { GatewayOptions } from './app.ts'
import { Duration, findIssues, formatPath, type Issue, NotBuilt, Section, Size } from './options.ts'

/**
 * The configuration file: YAML in the original's dialect, with `${ENV}` in its values, checked
 * strictly, with every error at its line and column.
 */

const text = (description: string) => Type.Optional(Type.String({ minLength: 1, description }))
const texts = (description: string, fallback: string[] = []) =>
  Type.Array(Type.String(), { default: fallback, description })

const ServerOptions = Section(
  {
    listen: Type.String({
      pattern: '^(\\[[0-9a-fA-F:.]+\\]|[^\\[\\]:/]*):\\d{1,5}$',
      default: ':8000',
      expects: 'an address such as :8000 or 127.0.0.1:8000',
      description: 'Address and port; without an address all of them'
    }),
    header_timeout: Duration('10s', 'How long a client may take for its headers'),
    read_timeout: Duration('30s', 'How long a client may take for its whole request'),
    write_timeout: Duration(
      '60s',
      'How long a client may take no byte while some wait; 0: for ever'
    ),
    idle_timeout: Duration('120s', 'How long an idle connection is kept'),
    max_header_bytes: Size('64KB', 'Size of all headers'),
    max_body_size: Size('64MB', 'Size of a request body'),
    trust_proxy: Type.Unsafe<boolean | string[]>({
      anyOf: [
        { type: 'boolean' },
        { type: 'array', items: { type: 'string' }, expects: 'a list of addresses' }
      ],
      default: false,
      description:
        'Whose X-Forwarded-For counts: nobody, everybody, or these addresses and networks'
    }),
    drain_timeout: Duration('30s', 'How long running answers may take after SIGTERM'),
    cors: Section(
      {
        enabled: Type.Boolean({ default: false, description: 'Answers browsers of other origins' }),
        allowed_origins: texts('Origins, or * for all'),
        allowed_methods: texts('Methods', ['GET', 'POST', 'PUT', 'DELETE', 'OPTIONS']),
        allowed_headers: texts('Request headers', ['Authorization', 'Content-Type', 'X-API-Key']),
        expose_headers: texts('Response headers that scripts may read'),
        allow_credentials: Type.Boolean({ default: false, description: 'Cookies and the like' }),
        max_age: Type.Integer({ minimum: 0, default: 0, description: 'Seconds; 0: not said' })
      },
      'Cross-origin requests'
    ),
    tls: Section(
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
  },
  'The listening side'
)

const LogOptions = Section(
  {
    level: Type.Enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'], {
      default: 'info',
      description: 'Least level that is written'
    }),
    format: Type.Enum(['auto', 'json', 'text'], {
      default: 'auto',
      description: 'auto: text on a terminal, json elsewhere'
    }),
    output: Type.Enum(['stdout', 'stderr', 'file'], { default: 'stdout', description: 'Where to' }),
    file: Section(
      {
        path: Type.String({
          minLength: 1,
          default: 'llmproxy.log',
          description: 'File, below the data directory if relative'
        }),
        rotate: NotBuilt('Rotation'),
        max_size: NotBuilt('Rotation'),
        max_age: NotBuilt('Rotation'),
        compress: NotBuilt('Rotation')
      },
      'For output: file'
    )
  },
  'The log'
)

const { proxy: _, drain_timeout: __, ...gatewaySections } = GatewayOptions.properties

/** Everything a configuration file may hold. */
export const ConfigSchema = Type.Object(
  {
    server: ServerOptions,
    log: LogOptions,
    ...gatewaySections,
    storage: NotBuilt('Databases and caches'),
    discovery: NotBuilt('Backends that are found'),
    admin: NotBuilt('The admin API'),
    logging: NotBuilt('Request and access logs'),
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
    yaml = await readFile(file, 'utf8')
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
  const lines = new LineCounter()
  const document = parseDocument(yaml, { lineCounter: lines, prettyErrors: false })
  const place = (offset: number) => {
    const { line, col } = lines.linePos(offset)
    return `${name}:${line}:${col}`
  }
  if (document.errors.length > 0) {
    throw new ConfigError(
      document.errors.map(({ pos, message }) => `${place(pos[0])} ${message}`).join('\n')
    )
  }
  const reading: Reading = { document, env, issues: [], fromEnv: new Set() }
  const { issues } = reading
  const root = toPlain(document.contents as Node | null, [], reading) ?? {}
  if (typeof root !== 'object' || Array.isArray(root)) {
    throw new ConfigError(`${name}:1:1 must be a mapping of sections such as server and backends`)
  }
  const failed = new Set(issues.map(issue => formatPath(issue.path)))
  const schema = ConfigSchema as SchemaNode
  retype(schema, root, [], reading.fromEnv)
  issues.push(...numbersWithoutUnit(schema, root, []))
  for (const issue of findIssues(ConfigSchema, root)) {
    if (!failed.has(formatPath(issue.path))) issues.push(issue)
  }
  issues.push(...incomplete(root as Config))
  if (issues.length > 0) {
    const found = issues.map(issue => ({ issue, offset: offsetOf(document.contents, issue.path) }))
    found.sort((a, b) => a.offset - b.offset)
    throw new ConfigError(
      found
        .map(({ issue: { path, message }, offset }) => {
          // What came from the environment may be a secret.
          const shown = reading.fromEnv.has(formatPath(path))
            ? message.replace(/ \(got .*\)$/s, ' (got the value of an environment variable)')
            : message
          return `${place(offset)} ${formatPath(path)} ${shown}`
        })
        .join('\n')
    )
  }
  return freeze(root) as Config
}

/** Rules between members, which the schema can't say. */
function incomplete({ server }: Config): Issue[] {
  const issues: Issue[] = []
  const tls = server?.tls
  const missing = (member: string, message: string) =>
    issues.push({ path: ['server', 'tls', member], message })
  if (tls?.enabled === true) {
    if (tls.cert_file === undefined) missing('cert_file', 'is missing, but tls is enabled')
    if (tls.key_file === undefined) missing('key_file', 'is missing, but tls is enabled')
    if (tls.client_auth !== 'none' && tls.client_ca_file === undefined) {
      missing('client_ca_file', 'is missing, but client_auth asks for certificates')
    }
  }
  return issues
}

/** In a file a number without a unit could be anything: seconds, or the original's nanoseconds. */
function numbersWithoutUnit(schema: SchemaNode, value: unknown, path: Issue['path']): Issue[] {
  if (schema.unit !== undefined && typeof value === 'number') {
    // A size without a unit is bytes everywhere.
    if (schema.unit === 'bytes' || value === 0) return []
    return [{ path, message: `must have a unit, such as ${value}s or ${value}ms (got ${value})` }]
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
      /^(integer|number)$/.test(String(inner.type)) &&
      /^-?\d+(\.\d+)?$/.test(String(member))
    ) {
      members[name] = Number(member)
    }
  }
}

interface SchemaNode {
  type?: string | string[]
  unit?: 'ms' | 'bytes'
  items?: SchemaNode
  properties?: Record<string, SchemaNode>
}

/** A document that is being read, and what turned up. */
interface Reading {
  document: Document
  env: NodeJS.ProcessEnv
  issues: Issue[]
  /** Paths whose values came from the environment. */
  fromEnv: Set<string>
}

/** The document as plain values, with the environment put in. Members without a value are left out. */
function toPlain(node: Node | null | undefined, path: Issue['path'], reading: Reading): unknown {
  if (isAlias(node)) return toPlain(node.resolve(reading.document), path, reading)
  if (isSeq(node)) {
    return node.items.map((item, at) => toPlain(item as Node, [...path, at], reading))
  }
  if (isMap(node)) {
    const entries = node.items.flatMap(({ key, value }) => {
      const name = String(isScalar(key) ? key.value : key)
      const isMerge = name === '<<'
      const plain = toPlain(value as Node, isMerge ? path : [...path, name], reading)
      if (plain === null || plain === undefined) return []
      return isMerge ? Object.entries(plain) : [[name, plain]]
    })
    return Object.fromEntries(entries)
  }
  if (!isScalar(node)) return undefined
  if (typeof node.value !== 'string' || !node.value.includes('${')) return node.value
  const missing: string[] = []
  const filled = substitute(node.value, reading.env, missing)
  if (missing.length > 0) {
    const names = missing.map(name => `\${${name}}`).join(', ')
    const message = `needs the environment variable ${names}, which is not set`
    reading.issues.push({ path, message })
    return undefined
  }
  reading.fromEnv.add(formatPath(path))
  return filled
}

const VARIABLE = /\$\$\{|\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}/g

/**
 * Puts the environment into a text: `${NAME}`, `${NAME:-default}`; `$${` stands for `${`.
 * A variable that is empty takes the default, as in a shell.
 */
export function substitute(value: string, env: NodeJS.ProcessEnv, missing: string[]): string {
  return value.replace(
    VARIABLE,
    (whole, name: string | undefined, fallback: string | undefined) => {
      if (name === undefined) return whole.slice(1)
      const found = env[name]
      if (found !== undefined && (found !== '' || fallback === undefined)) return found
      if (fallback === undefined) missing.push(name)
      return fallback ?? ''
    }
  )
}

/** Where in the file a path stands: at its name, or as near to it as the file goes. */
function offsetOf(node: unknown, path: Issue['path']): number {
  let offset = (node as Node | null)?.range?.[0] ?? 0
  let at = node
  for (const part of path) {
    if (isMap(at)) {
      const pair: Pair | undefined = at.items.find(
        ({ key }) => String(isScalar(key) ? key.value : key) === String(part)
      )
      if (pair === undefined) return offset
      offset = (pair.key as Node).range?.[0] ?? offset
      at = pair.value
    } else if (isSeq(at)) {
      at = at.items[Number(part)]
      offset = (at as Node | undefined)?.range?.[0] ?? offset
    } else return offset
  }
  return offset
}

function freeze(value: unknown): unknown {
  if (typeof value === 'object' && value !== null && !Object.isFrozen(value)) {
    Object.values(value).forEach(freeze)
    Object.freeze(value)
  }
  return value
}
