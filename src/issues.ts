import type { ErrorObject } from 'ajv'
import { closest, distance } from 'fastest-levenshtein'
import { maskedUrl } from './masked.ts'

/** What is wrong with options, in words: the member, what was expected, and what was there. */

/** One thing that is wrong. */
export interface Issue {
  path: (string | number)[]
  message: string
}

/** Maximum number of issues that an error names. */
export const MAX_NAMED = 20

/**
 * Returns a line for each of the first items, and one with the number of the others.
 *
 * @example
 * firstOf(['a', 'b'], each => `${each} is wrong`) // ['a is wrong', 'b is wrong']
 */
export function firstOf<T>(all: readonly T[], toLine: (each: T) => string): string[] {
  return andMore(all.slice(0, MAX_NAMED).map(toLine), all.length)
}

/** Adds a line with the number of items that have none. */
export function andMore(lines: string[], count: number): string[] {
  return lines.length === count ? lines : [...lines, `and ${count - lines.length} more`]
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
  'auth.storage': 'auth.pipeline',
  'auth.redis': 'auth.pipeline',
  'auth.defaults': 'auth.status_codes',
  'routing.load_balance_strategy': 'routing.load_balance',
  'log.file.max_size_mb': 'log.file.max_size',
  'log.file.max_backups': 'log.file.max_files',
  'logging.access.file.max_size_mb': 'logging.access.file.max_size',
  'logging.access.file.max_backups': 'logging.access.file.max_files'
}

/** Names of the original's documents that never did anything, and do nothing here. */
const UNSUPPORTED = new Set([
  'scripts',
  'routing.model_mapping',
  'backends.id',
  'backends.paths',
  'auth.pipeline.lua_script',
  'auth.pipeline.lua_script_file'
])

/** A rule that no two items of a list have the same. */
export interface Distinct {
  by(item: Record<string, unknown> | string): unknown
  /** What it is, in words. */
  what: string
}

/** Index of the first item that repeats one before it, and the index of that one. */
export function findRepeated(items: unknown[], { by }: Distinct): [number, number] | undefined {
  const seen = new Map<unknown, number>()
  for (const [at, item] of items.entries()) {
    const isItem = typeof item === 'string' || (typeof item === 'object' && item !== null)
    const value = isItem ? by(item as Record<string, unknown> | string) : undefined
    if (value === undefined) continue
    const before = seen.get(value)
    if (before !== undefined) return [at, before]
    seen.set(value, at)
  }
  return undefined
}

/** An error of the validator as a sentence about one member. */
export function toIssue(error: ErrorObject, root: object): Issue {
  const path = error.instancePath
    .split('/')
    .slice(1)
    .map(part => part.replaceAll('~1', '/').replaceAll('~0', '~'))
    .map(part => (/^\d+$/.test(part) ? Number(part) : part))
  const schema = (error.parentSchema ?? {}) as Described
  const isSecret = isInsideSecret(error.schemaPath, root)
  switch (error.keyword) {
    case 'additionalProperties':
      return unknownMember(path, error.params.additionalProperty, schema, isSecret)
    case 'required':
      return { path: [...path, error.params.missingProperty], message: 'is missing' }
    case 'notBuilt':
      return {
        path,
        message: 'is not supported by this version yet; remove it or switch it off'
      }
    case 'distinct':
      return duplicate(path, schema, error.data as unknown[])
    case 'partOfType':
      return { path: [...path, (error.data as { type: string }).type], message: 'is missing' }
    case 'minItems':
      return { path, message: `must be ${expected(schema)}` }
    default:
      return {
        path,
        message: `must be ${expected(schema)}${bound(schema, error.data)}${got(schema, error.data, isSecret)}`
      }
  }
}

/** Is one of the schemas on the way to the error marked as secret? */
function isInsideSecret(schemaPath: string, root: object): boolean {
  let at: unknown = root
  for (const part of schemaPath.split('/').slice(1)) {
    if ((at as Described | undefined)?.secret) return true
    at = (at as Record<string, unknown> | undefined)?.[part.replaceAll('~1', '/')]
  }
  return false
}

function unknownMember(
  path: Issue['path'],
  member: string,
  schema: Described,
  isSecret: boolean
): Issue {
  const whole = [...path, member]
  const name = whole.filter(part => typeof part === 'string').join('.')
  const known = Object.keys(schema.properties ?? {})
  // A key may stand where a name belongs.
  if (isSecret) return { path, message: `has an unknown member; known are ${known.join(', ')}` }
  if (Object.hasOwn(MOVED, name)) {
    return { path: whole, message: `is an old name; use ${MOVED[name]}` }
  }
  if (UNSUPPORTED.has(name)) return { path: whole, message: 'is not supported; remove it' }
  return { path: whole, message: `is not known${didYouMean(member, known)}` }
}

interface Described {
  type?: string | string[]
  unit?: 'ms' | 'bytes'
  most?: number
  secret?: true
  secretPath?: true
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
  distinct?: Distinct[]
  later?: readonly string[]
}

const DAY = 24 * 60 * 60 * 1000

/** What a schema asks for, in words. */
export function expected(schema: Described): string {
  if (schema.expects !== undefined) return schema.expects
  if (schema.unit === 'ms') return 'a duration such as 500ms, 30s or 1m30s'
  if (schema.unit === 'bytes') return 'a size such as 64MB'
  if (schema.later !== undefined) {
    const now =
      schema.enum!.length > 2 ? `one of ${schema.enum!.join(', ')}` : schema.enum!.join(' or ')
    return `${now} (${schema.later.join(', ')}: not supported by this version yet)`
  }
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

/** The longest duration that is possible, where the value is beyond it. */
function bound({ unit, most = Number.POSITIVE_INFINITY }: Described, value: unknown): string {
  return unit === 'ms' && Number(value) > most ? `, at most ${Math.floor(most / DAY)}d` : ''
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
function got(schema: Described, value: unknown, isSecret: boolean): string {
  if (isSecret || schema.secret || value === undefined) return ''
  if (value === null) return ' (got nothing)'
  if (typeof value === 'object') return ` (got a ${Array.isArray(value) ? 'list' : 'mapping'})`
  if (typeof value === 'string' && value.includes('@')) {
    return ', without a user or a password (use api_key or headers)'
  }
  const text = JSON.stringify(
    typeof value === 'string' ? maskedUrl(value, schema.secretPath) : value
  )
  return text.length > 80 ? '' : ` (got ${text})${suggestion(schema, value)}`
}

/** The allowed value that was probably meant. */
function suggestion(schema: Described, value: unknown): string {
  const texts = (schema.enum ?? []).filter(each => typeof each === 'string')
  return typeof value === 'string' ? didYouMean(value, texts) : ''
}

/** Says what was probably meant: the same letters, the beginning, or all but a third of the text. */
export function didYouMean(text: string, known: string[]): string {
  if (text === '' || known.length === 0) return ''
  const best = known.find(each => each.startsWith(text)) ?? closest(text, known)
  const near =
    distance(text, best) <= text.length / 3 ||
    best.startsWith(text) ||
    sorted(best) === sorted(text)
  return near ? `; did you mean "${best}"?` : ''
}

function sorted(text: string): string {
  return [...text].sort().join('')
}

function duplicate(path: Issue['path'], { distinct }: Described, items: unknown[]): Issue {
  for (const rule of distinct!) {
    const found = findRepeated(items, rule)
    if (found === undefined) continue
    const [at, before] = found
    return {
      path: [...path, at],
      message: `has the same ${rule.what} as ${formatPath([...path, before]).slice(0, -1)}`
    }
  }
  return { path, message: 'has the same item twice' }
}
