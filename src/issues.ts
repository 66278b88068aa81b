import type { ErrorObject } from 'ajv'
import { closest, distance } from 'fastest-levenshtein'

/** What is wrong with options, in words: the member, what was expected, and what was there. */

/** One thing that is wrong. */
export interface Issue {
  path: (string | number)[]
  message: string
}

/** `['backends', 0, 'url']` as `backends[0].url:` */
export function formatPath(path: (string | number)[]): string {
  const text = path.reduce<string>(
    (all, part) =>
      typeof part === 'number' ? `${all}[${part}]` : all === '' ? part : `${all}.${part}`,
    ''
  )
  return text === '' ? '' : `${text}:`
}

/** Old and documented names of the original's dialect that this gateway knows under another name. */
const MOVED: Record<string, string> = {
  listen: 'server.listen',
  usage_hook: 'usage.reporters',
  api_keys: 'auth.keys',
  scripts: 'nothing (scripts are not supported)',
  'auth.storage': 'auth.pipeline',
  'auth.redis': 'auth.pipeline',
  'auth.defaults': 'auth.status_codes',
  'routing.load_balance_strategy': 'routing.load_balance',
  'routing.model_mapping': 'nothing (model mapping is not built yet)'
}

/** An error of the validator as a sentence about one member. */
export function toIssue(error: ErrorObject): Issue {
  const path = error.instancePath
    .split('/')
    .slice(1)
    .map(part => part.replaceAll('~1', '/').replaceAll('~0', '~'))
    .map(part => (/^\d+$/.test(part) ? Number(part) : part))
  const schema = (error.parentSchema ?? {}) as Described
  switch (error.keyword) {
    case 'additionalProperties':
      return unknownMember(path, error.params.additionalProperty, schema)
    case 'required':
      return { path: [...path, error.params.missingProperty], message: 'is missing' }
    case 'notBuilt':
      return {
        path,
        message: 'is not supported by this version yet; remove it or switch it off'
      }
    case 'uniqueNames':
      return { path, message: duplicates(schema, error.data) }
    default:
      return { path, message: `must be ${expected(schema)}${got(schema, error.data)}` }
  }
}

function unknownMember(path: Issue['path'], member: string, schema: Described): Issue {
  const whole = [...path, member]
  const moved = MOVED[whole.filter(part => typeof part === 'string').join('.')]
  if (moved !== undefined) {
    return { path: whole, message: `is an old name; use ${moved}` }
  }
  const known = Object.keys(schema.properties ?? {})
  const best = known.length === 0 ? '' : closest(member, known)
  const near = best !== '' && distance(member, best) <= Math.max(2, member.length / 3)
  return {
    path: whole,
    message: near ? `is not known; did you mean "${best}"?` : 'is not known'
  }
}

interface Described {
  type?: string | string[]
  unit?: 'ms' | 'bytes'
  secret?: true
  enum?: unknown[]
  minimum?: number
  maximum?: number
  exclusiveMinimum?: number
  minLength?: number
  minItems?: number
  anyOf?: Described[]
  const?: unknown
  format?: string
  expects?: string
  items?: Described
  shorthand?: string
  properties?: Record<string, Described>
  uniqueNames?: (item: unknown) => unknown
}

/** What a schema asks for, in words. */
export function expected(schema: Described): string {
  if (schema.expects !== undefined) return schema.expects
  if (schema.unit === 'ms') return 'a duration such as 500ms, 30s or 1m30s'
  if (schema.unit === 'bytes') return 'a size such as 64MB'
  if (schema.anyOf !== undefined) return schema.anyOf.map(expected).join(' or ')
  if (schema.enum !== undefined) return `one of ${schema.enum.join(', ')}`
  if (schema.const !== undefined) return JSON.stringify(schema.const)
  switch (schema.type) {
    case 'integer':
    case 'number':
      return expectedNumber(schema)
    case 'boolean':
      return 'true or false'
    case 'array':
      return schema.items?.type === 'string' ? 'a list of texts' : 'a list'
    case 'string':
      return schema.minLength === undefined ? 'text' : 'text that is not empty'
    default:
      return schema.shorthand === undefined ? 'a mapping' : 'text or a mapping'
  }
}

function expectedNumber(schema: Described): string {
  const noun = schema.type === 'integer' ? 'integer' : 'number'
  if (schema.minimum !== undefined && schema.maximum !== undefined) {
    return `a ${noun} from ${schema.minimum} to ${schema.maximum}`.replace('a i', 'an i')
  }
  if (schema.minimum === 1 || schema.exclusiveMinimum === 0) return `a positive ${noun}`
  if (schema.minimum === 0) return `a ${noun} of 0 or more`.replace('a i', 'an i')
  return noun === 'integer' ? 'an integer' : 'a number'
}

/** The value that was there, unless it may be a secret or is too long to help. */
function got(schema: Described, value: unknown): string {
  if (schema.secret || value === undefined) return ''
  if (value === null) return ' (got nothing)'
  if (typeof value === 'object') return ` (got a ${Array.isArray(value) ? 'list' : 'mapping'})`
  const text = JSON.stringify(value)
  return text.length > 80 ? '' : ` (got ${text})`
}

function duplicates(schema: Described, items: unknown): string {
  const names = repeated(items as unknown[], schema.uniqueNames!)
  return `has the name ${names.map(name => `"${name}"`).join(', ')} twice`
}

/** Names that more than one of the items has. */
export function repeated(items: unknown[], nameOf: (item: unknown) => unknown): unknown[] {
  const names = items
    .filter(item => typeof item === 'object' && item !== null)
    .map(nameOf)
    .filter(name => typeof name === 'string')
  return [...new Set(names.filter((name, at) => names.indexOf(name) !== at))]
}
