import { type TSchema, Type } from 'typebox'
import { formatPath } from '../issues.ts'
import { findIssues, isHttpUrl } from '../options.ts'
import { BackendOptions } from '../pool/policy.ts'

/** What a source says of one backend: members of `backends[]`, and `status`. Text is a URL. */
export type Entry = Record<string, unknown> | string

/** Backends that are taken from one source. */
export const MAX_BACKENDS = 1000

const Name = Type.String({
  pattern: '^[^\\x00-\\x1f\\x7f]{1,200}$',
  expects: 'text of at most 200 characters',
  description: 'Name in metrics and logs; host and port if left out'
})
const BaseUrl = Type.String({
  pattern: '^https?://\\S+$',
  check: isBaseUrl,
  expects: 'a URL such as http://host:8000',
  description: 'Base URL, with or without /v1'
})

/** Services without a port have 0 in Consul, and nobody listens there. */
function isBaseUrl(text: unknown): boolean {
  const url = isHttpUrl(text) ? new URL(String(text)) : undefined
  return url !== undefined && url.search === '' && url.port !== '0'
}

const Found = Type.Object({
  ...BackendOptions.properties,
  name: Type.Optional(Name),
  url: BaseUrl
})

const { name: _, url: __, max_idle_conns: ___, ...shared } = withoutDefaults()

/** What holds for all backends of a source, as far as it says nothing of its own of one. */
export const DefaultsOptions = Type.Unsafe<Partial<BackendOptions>>(
  Type.Object(shared, {
    additionalProperties: false,
    description: 'What its backends have that say nothing of their own'
  })
)
export type DefaultsOptions = Partial<BackendOptions>

/** A backend that stands in the configuration of a source. */
export const StaticBackend = Type.Unsafe<Partial<BackendOptions>>(
  Type.Object(
    { ...withoutDefaults(), name: Type.Optional(Name), url: BaseUrl },
    { additionalProperties: false, description: 'One inference server' }
  )
)

/** What is left out may be said elsewhere. */
function withoutDefaults(): Record<string, TSchema> {
  return Object.fromEntries(
    Object.entries<TSchema & { default?: unknown }>(BackendOptions.properties).map(
      ([name, { default: _, ...schema }]) => [name, Type.Optional(Type.Unsafe(schema))]
    )
  )
}

interface Described {
  type?: unknown
  unit?: 'ms'
}
const MEMBERS = Object.entries(Found.properties) as [string, Described][]

/**
 * The entries as backends, without those that are switched off by their `status`. Unknown members are
 * passed over. One that can't be used is left out, and the others hold.
 *
 * @param onBad hears which one can't be used, and why; neither holds a secret
 * @example
 * toBackends(['http://a:1', { url: 'http://b:1', status: 'disabled' }], {}, () => {}).length // 1
 */
export function toBackends(
  entries: readonly Entry[],
  defaults: DefaultsOptions,
  onBad: (entry: string, reason: string) => void
): BackendOptions[] {
  const backends: BackendOptions[] = []
  let taken = 0
  for (const [at, entry] of entries.entries()) {
    const said = typeof entry === 'string' ? { url: entry } : (entry ?? {})
    if (!isOn(said.status)) continue
    // A list of something else may be much longer, and each of its lines would be logged.
    if (++taken > MAX_BACKENDS) {
      onBad(`#${at + 1}`, `only ${MAX_BACKENDS} backends of a source are taken`)
      break
    }
    const members = membersOf(said)
    const { headers: own = {} } = members
    const headers = isMapping(own) ? { ...defaults.headers, ...own } : own
    const backend = { ...structuredClone(defaults), ...members, headers }
    const [issue] = findIssues(Found, backend)
    if (issue === undefined) backends.push(backend as BackendOptions)
    else {
      const called = typeof said.name === 'string' && said.name !== '' ? said.name : `#${at + 1}`
      // What was there instead may be a secret.
      const message = issue.message.replace(/ \(got .*\)/s, '')
      onBad(called.slice(0, 100), `${formatPath(issue.path)} ${message}`)
    }
  }
  return backends
}

/** `enabled` and `active` are the original's words. */
function isOn(status: unknown): boolean {
  if (status === undefined || status === null || status === '') return true
  return /^(enabled|active|true|1)$/i.test(String(status).trim())
}

function isMapping(value: unknown): value is object {
  return typeof value === 'object' && !Array.isArray(value)
}

/** Times as text: what a bare number is that a source says nobody knows. */
export function spelled(backend: Partial<BackendOptions>): Entry {
  const times = MEMBERS.filter(([, schema]) => schema.unit === 'ms').map(([name]) => name)
  return Object.fromEntries(
    Object.entries(backend).map(([name, value]) => [
      name,
      times.includes(name) ? `${value}ms` : value
    ])
  )
}

function membersOf(said: Record<string, unknown>): Record<string, unknown> {
  const there = MEMBERS.map(([name, schema]) => [name, read(said[name], schema, name)])
  return Object.fromEntries(there.filter(([, value]) => value !== undefined))
}

/** A member, also where a source has nothing but text, or a table no lists; undefined: not said. */
function read(given: unknown, { type, unit }: Described, name: string): unknown {
  // A column of a fixed width has spaces after its text.
  const value = typeof given === 'string' ? given.trim() : given
  if (value === undefined || value === null || value === '') return undefined
  if (unit === 'ms') return String(value)
  if (type === 'array' && typeof value === 'string') {
    return parseList(value)
  }
  if (type !== 'integer' && type !== 'number') return value
  const number = typeof value === 'string' ? Number(value) : value
  // Where the original says that a backend has no special weight.
  return name === 'weight' && typeof number === 'number' && number <= 0 ? 1 : number
}

/** A list as a table or a tag has it: `["a", "b"]`, or `a, b`. */
function parseList(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return text.split(',').map(each => each.trim())
  }
}
