import { validateHeaderName, validateHeaderValue } from 'node:http'
import { Ajv, type ErrorObject, type FuncKeywordDefinition, type ValidateFunction } from 'ajv'
import { type Static, type TSchema, type TUnsafe, Type } from 'typebox'
import { completeEmpty } from './defaults.ts'
import { addImplied } from './implied.ts'
import { type Distinct, findRepeated, firstOf, formatPath, type Issue, toIssue } from './issues.ts'
import { dropSwitchedOff, isSwitchedOn, type SchemaNode } from './not-built.ts'
import { parseQuantity } from './quantity.ts'

/**
 * Options are described once, as JSON Schema made with TypeBox: the type, the check, the defaults,
 * the editor's schema and the reference manual all come from it. A few keywords of our own say what
 * JSON Schema can't: `unit` (text such as `30s` or `64MB`), `bare` (what a number without one is in a file), `notBuilt` and `later` (parts and values
 * that this version doesn't have), `shorthand` (text that stands for an object with that one member),
 * `distinct`, `partOfType`, `enabledBy`, `check` (a function) with `expects` (what it wants, in words), `hashed`,
 * `secret` (never shown, nor anything inside), `secretPath` (a URL whose path is not shown either), and `restart` (a running gateway cannot take over another value, nor
 * anything inside; see `changes.ts`).
 */

/** The longest time (ms) that a timer can take: 24 days. */
export const LONGEST = 2 ** 31 - 1
/** The longest age (ms): it is compared with a clock, so no timer has to take it. */
export const LONGEST_AGE = 365 * 24 * 60 * 60 * 1000

/**
 * A length of time: text with a unit in a file (`100ms`, `30s`, `1m30s`), milliseconds in code.
 * `least` is 0 where 0 has a meaning of its own; `most` is {@link LONGEST_AGE} where no timer is set.
 */
export function Duration(
  defaultValue: string | undefined,
  description: string,
  least: 0 | 1 = 1,
  most: typeof LONGEST | typeof LONGEST_AGE = LONGEST
): TUnsafe<number> {
  return Type.Unsafe<number>({
    type: ['string', 'number'],
    unit: 'ms',
    least,
    most,
    description,
    ...(defaultValue === undefined ? {} : { default: defaultValue })
  })
}

/**
 * How long something is kept: as a {@link Duration}, but no timer has to take it, and a bare number in a file
 * is days.
 */
export function Age(defaultValue: string, description: string): TUnsafe<number> {
  return Type.Unsafe<number>({
    type: ['string', 'number'],
    unit: 'ms',
    bare: 'd',
    least: 0,
    most: Number.MAX_SAFE_INTEGER,
    description,
    default: defaultValue
  })
}

/**
 * A size in bytes: text with a unit (`64MB`, 1 KB = 1024 bytes) or a number of bytes. `bare`: what a bare
 * number in a file is, where the original counts in something else.
 */
export function Size(
  defaultValue: string | undefined,
  description: string,
  bare?: 'MB'
): TUnsafe<number> {
  return Type.Unsafe<number>({
    type: ['string', 'number'],
    unit: 'bytes',
    ...(bare === undefined ? {} : { bare }),
    least: 1,
    most: Number.MAX_SAFE_INTEGER,
    description,
    ...(defaultValue === undefined ? {} : { default: defaultValue })
  })
}

/** An http or https URL; `secretPath`: whoever knows its path may use it, as with many webhooks. */
export function Url(description: string, more: { secretPath?: true } = {}) {
  return Type.String({
    ...more,
    pattern: '^https?://',
    check: isHttpUrl,
    expects: 'a URL such as http://host:8000',
    description
  })
}

/** Names that undici and HTTP itself take care of. */
const FRAMING = new Set(['host', 'content-length', 'transfer-encoding', 'connection', 'expect'])

/** The name of a request header that a client may send. */
export const HeaderName = Type.String({
  check: isHeaderName,
  expects: 'the name of a header such as X-API-Key',
  description: 'Header'
})

/** Headers that are sent along. Their values may be secret. */
export const HeadersToSend = Type.Record(Type.String(), Type.String(), {
  default: {},
  secret: true,
  check: areHeaders,
  expects: 'a mapping of header names to texts, without host, connection and the like',
  description: 'Headers to send'
})

function isHeaderName(name: unknown): boolean {
  try {
    validateHeaderName(String(name))
    return !FRAMING.has(String(name).toLowerCase())
  } catch {
    return false
  }
}

function areHeaders(headers: unknown): boolean {
  try {
    for (const [name, text] of Object.entries(headers as Record<string, string>)) {
      validateHeaderValue(name, text)
      if (!isHeaderName(name)) return false
    }
    return true
  } catch {
    return false
  }
}

/** A part of the original dialect that this version doesn't have: refused when it is switched on. */
export function NotBuilt(description: string) {
  return Type.Optional(Type.Unsafe<unknown>({ notBuilt: true, description }))
}

/** What a running gateway cannot take over: another value needs a restart. */
export function AtStart<T extends TSchema>(schema: T): T {
  return Object.assign(schema, { restart: true })
}

/** Options as they may be given: what has a default may be left out, a quantity may be text. */
export type Given<T> = T extends number
  ? number | string
  : T extends readonly (infer Item)[]
    ? readonly Given<Item>[]
    : T extends object
      ? { readonly [Name in keyof T]?: Given<T[Name]> }
      : T

/**
 * An object whose unknown members are refused, and which is there with its defaults if left out.
 *
 * @param enabledBy fields that enable the section if one of them has content and `enabled` is left out
 */
export function Section<T extends Record<string, TSchema>>(
  properties: T,
  description: string,
  enabledBy: readonly string[] = []
) {
  return Type.Object(properties, {
    additionalProperties: false,
    default: {},
    description,
    ...(enabledBy.length === 0 ? {} : { enabledBy })
  })
}

/** Thrown by {@link checkOptions}: all that is wrong, a line each. */
export class OptionsError extends Error {
  readonly issues: Issue[]

  constructor(issues: Issue[], name = 'options') {
    super(
      firstOf(issues, ({ path, message }) => `${name}: ${formatPath(path)} ${message}`).join('\n')
    )
    this.name = 'OptionsError'
    this.issues = issues
  }
}

const keywords: FuncKeywordDefinition[] = [
  {
    keyword: 'shorthand',
    modifying: true,
    errors: false,
    validate: (member: string, value: unknown, _schema?: unknown, at?: Place) => {
      if (typeof value === 'string') at!.parentData[at!.parentDataProperty] = { [member]: value }
      return true
    }
  },
  {
    keyword: 'unit',
    modifying: true,
    errors: false,
    validate: (unit: 'ms' | 'bytes', value: unknown, schema?: unknown, at?: Place) => {
      const quantity = typeof value === 'string' ? parseQuantity(value, unit) : value
      const { least, most } = schema as { least: number; most: number }
      if (typeof quantity !== 'number') return false
      const number = unit === 'bytes' ? Math.round(quantity) : quantity
      at!.parentData[at!.parentDataProperty] = number
      return number >= least && number <= most
    }
  },
  {
    keyword: 'notBuilt',
    errors: false,
    validate: (_: true, value: unknown) => !isSwitchedOn(value)
  },
  {
    keyword: 'check',
    errors: false,
    validate: (isRight: (value: unknown) => boolean, value: unknown) => isRight(value)
  },
  {
    keyword: 'distinct',
    errors: false,
    validate: (rules: Distinct[], items: unknown) =>
      !Array.isArray(items) || rules.every(rule => findRepeated(items, rule) === undefined)
  },
  {
    keyword: 'partOfType',
    errors: false,
    // Of a type that isn't known, that has no part of its own, or that is off, it can't be missing.
    validate: (_: true, value: Record<string, unknown>, schema?: unknown) => {
      const { properties } = schema as SchemaNode
      const type = String(value.type)
      const hasPart = properties!.type!.enum!.includes(type) && Object.hasOwn(properties!, type)
      return !hasPart || value.enabled === false || typeof value[type] === 'object'
    }
  },
  {
    keyword: 'hashed',
    modifying: true,
    errors: false,
    validate: (hash: (text: string) => string, text: unknown, _?: unknown, at?: Place) => {
      if (typeof text === 'string') at!.parentData[at!.parentDataProperty] = hash(text)
      return true
    }
  }
]

/** Where a value is. */
type Place = NonNullable<Parameters<ValidateFunction>[1]>

/** The compiled check of a schema, without its parts: they have a check of their own. */
interface Checker {
  check: ValidateFunction
  /** Compiles the parts. */
  ajv: Ajv
  members: [string, SectionSchema][]
  items: SectionSchema | undefined
}

interface SectionSchema extends TSchema {
  properties?: Record<string, SectionSchema>
  items?: SectionSchema
  default?: unknown
  secret?: true
  shorthand?: string
}

const checkers = new WeakMap<TSchema, Checker>()

/**
 * Compiles a section when it first says something, and once: the file, the gateway and its plugins have sections in
 * common. Compiling all of it for each takes half of the time of a start.
 */
function checkerOf(schema: SectionSchema, ajv: Ajv | undefined): Checker {
  const known = checkers.get(schema)
  if (known !== undefined) return known
  const { properties, items, ...own } = schema
  // A value that is secret, or may be text, has one check for all that is in it.
  const isWhole = schema.secret || schema.shorthand !== undefined
  const members = isWhole ? [] : Object.entries(properties ?? {}).filter(([, each]) => isPart(each))
  const hasParts = !isWhole && items !== undefined && isPart(items)
  const others = members.map(([name, each]) => [name, { default: each.default }])
  const compiler = ajv ?? newAjv()
  const checker = {
    check: compiler.compile({
      ...own,
      ...(properties && { properties: { ...properties, ...Object.fromEntries(others) } }),
      ...(items && !hasParts && { items })
    }),
    ajv: compiler,
    members,
    items: hasParts ? items : undefined
  }
  checkers.set(schema, checker)
  return checker
}

function isPart({ properties, items }: SectionSchema): boolean {
  return properties !== undefined || items !== undefined
}

/** An error, and the schema that its `schemaPath` begins at. */
type Fault = [ErrorObject, TSchema]

function errorsOf(schema: SectionSchema, value: unknown, at?: Place, ajv?: Ajv): Fault[] {
  const checker = checkerOf(schema, ajv)
  const { check, members, items } = checker
  const errors: Fault[] = check(value, at) ? [] : check.errors!.map(error => [error, schema])
  const look = (part: SectionSchema, inside: object, name: string | number) => {
    const found = (inside as Record<string | number, unknown>)[name]
    if (found === undefined || (isMapping(found) && completeEmpty(part, found))) return
    const instancePath = `${at?.instancePath ?? ''}/${name}`
    const where = { parentData: inside, parentDataProperty: name, rootData: inside }
    const place = { instancePath, ...where, dynamicAnchors: {} }
    for (const each of errorsOf(part, found, place, checker.ajv)) errors.push(each)
  }
  if (isMapping(value)) for (const [name, part] of members) look(part, value, name)
  if (items && Array.isArray(value)) for (const index of value.keys()) look(items, value, index)
  return errors
}

function isMapping(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function newAjv(): Ajv {
  const ajv = new Ajv({
    allErrors: true,
    useDefaults: true,
    verbose: true,
    strict: false,
    // JSON reads 1e999 as Infinity.
    strictNumbers: true,
    // A start takes half as long without: the schemas are our own, and their code runs once.
    meta: false,
    validateSchema: false,
    code: { optimize: false }
  })
  for (const keyword of keywords) ajv.addKeyword({ ...keyword })
  return ajv
}

/**
 * Checks options against their schema, fills in the defaults, turns quantities into numbers.
 * What was given is left as it is.
 *
 * @throws {OptionsError} with every issue at once
 * @example
 * const Options = Section({ timeout: Duration('3s', 'how long') }, 'an example')
 * checkOptions(Options, {}) // { timeout: 3000 }
 */
export function checkOptions<T extends TSchema>(schema: T, given: unknown, name?: string) {
  const options = structuredClone(given ?? {})
  const issues = findIssues(schema, options)
  if (issues.length > 0) throw new OptionsError(issues, name)
  return options as Static<T>
}

/** The issues of `options`, which is completed in place. */
export function findIssues(schema: TSchema, options: unknown): Issue[] {
  dropSwitchedOff(schema as SchemaNode, options, false)
  addImplied(schema as SchemaNode, options)
  const errors = errorsOf(schema, options)
  // Where no alternative fits, what is wrong with each of them only confuses.
  const unions = errors.filter(([{ keyword }]) => keyword === 'anyOf')
  const seen = new Set<string>()
  return errors.flatMap(([error, root]) => {
    const isPart = unions.some(([{ instancePath }]) => error.instancePath.startsWith(instancePath))
    if (isPart && error.keyword !== 'anyOf') return []
    const issue = toIssue(error, root)
    const id = formatPath(issue.path)
    if (seen.has(id)) return []
    seen.add(id)
    return [issue]
  })
}

/** Is this an absolute http or https URL, without credentials (they belong into headers)? */
export function isHttpUrl(value: unknown): boolean {
  if (typeof value !== 'string' || !URL.canParse(value)) return false
  const url = new URL(value)
  return (
    (url.protocol === 'http:' || url.protocol === 'https:') &&
    url.hash + url.username + url.password === ''
  )
}
