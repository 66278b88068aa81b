import { isDeepStrictEqual } from 'node:util'
import type { Distinct } from './issues.ts'
import { alternativeFor, masked } from './masked.ts'

/**
 * What differs between two configurations. Most of it a running gateway takes over with a reload; what it
 * can't has the keyword `restart` in its schema, or stands beside an `enabled` that has it and differs.
 */

/** A member that differs. */
export interface Change {
  /** Such as `backends[gpu-1].weight`; what has a name goes by it, anything else by its place. */
  path: string
  /** As a file has it, secrets as `***`; not there: it was not there. */
  before?: unknown
  after?: unknown
}

export interface Changes {
  /** Takes effect at a reload. */
  changed: Change[]
  /** Takes effect when the gateway is started again. */
  restart_needed: Change[]
  /** Number of changes beyond those that a reload shows. */
  omitted?: number
}

interface SchemaNode {
  restart?: true
  secret?: true
  notBuilt?: true
  items?: SchemaNode
  properties?: Record<string, SchemaNode>
  patternProperties?: Record<string, SchemaNode>
  distinct?: Distinct[]
}

type Mapping = Record<string, unknown>

/**
 * Compares two configurations that were checked against `schema`.
 *
 * @example
 * const schema = { properties: { port: { restart: true }, token: { secret: true } } }
 * const changes = compare(schema, { port: 1, token: 'a' }, { port: 2, token: 'b' })
 * changes.changed // [{ path: 'token', before: '***', after: '***' }]
 * changes.restart_needed // [{ path: 'port', before: 1, after: 2 }]
 */
export function compare(schema: object, before: unknown, after: unknown): Changes {
  const changes: Changes = { changed: [], restart_needed: [] }
  for (const { needsRestart, ...change } of differences(
    schema as SchemaNode,
    '',
    before,
    after,
    false
  )) {
    changes[needsRestart ? 'restart_needed' : 'changed'].push(change)
  }
  return changes
}

/**
 * The configuration that a gateway runs with after a reload: `wanted`, but for what needs a restart.
 *
 * @example
 * const schema = { properties: { port: { restart: true }, token: {} } }
 * takeOver(schema, { port: 1, token: 'a' }, { port: 2, token: 'b' }) // { port: 1, token: 'b' }
 */
export function takeOver<T>(schema: object, running: T, wanted: T): T {
  if (isKept(schema, running, wanted)) return running
  const { properties } = schema as SchemaNode
  if (properties === undefined || !isMapping(running) || !isMapping(wanted)) return wanted
  const members = namesOf(schema, running, wanted).map((name): [string, unknown] => [
    name,
    takeOver(properties[name]!, running[name], wanted[name])
  ])
  return Object.fromEntries(members.filter(([, member]) => member !== undefined)) as T
}

/**
 * Takes over a configuration in several steps. When one of them fails the one before is taken over again.
 *
 * @throws what that step has thrown
 */
export async function allOrNothing<T>(
  take: (configuration: T) => Promise<void>,
  before: T,
  wanted: T
): Promise<void> {
  try {
    await take(wanted)
  } catch (error) {
    await take(before).catch(cause => {
      const message = `${(error as Error).message}; and what was there before could not be restored`
      throw new Error(message, { cause })
    })
    throw error
  }
}

function* differences(
  given: SchemaNode,
  path: string,
  before: unknown,
  after: unknown,
  isPartOfKept: boolean
): Generator<Change & { needsRestart: boolean }> {
  if (given.notBuilt || isDeepStrictEqual(before, after)) return
  const schema = alternativeFor(given, before ?? after)
  const needsRestart = isPartOfKept || isKept(given, before, after)
  const inside = (inner: SchemaNode | undefined): SchemaNode =>
    schema.secret ? { ...inner, secret: true } : (inner ?? {})
  if (isMapping(before) && isMapping(after)) {
    const other = Object.values(schema.patternProperties ?? {})[0]
    for (const name of namesOf(schema, before, after)) {
      const inner = inside(schema.properties?.[name] ?? other)
      const at = path === '' ? name : `${path}.${name}`
      yield* differences(inner, at, before[name], after[name], needsRestart)
    }
  } else if (isListOfMappings(before) && isListOfMappings(after)) {
    for (const [name, one, other] of pairs(schema, before, after)) {
      yield* differences(inside(schema.items), path + name, one, other, needsRestart)
    }
  } else {
    yield {
      path,
      ...(before === undefined ? {} : { before: masked(given, before) }),
      ...(after === undefined ? {} : { after: masked(given, after) }),
      needsRestart
    }
  }
}

/** Does a running gateway keep what it has of this, whatever is wanted? */
function isKept(schema: SchemaNode, before: unknown, after: unknown): boolean {
  if (schema.restart) return true
  if (!schema.properties?.enabled?.restart || !isMapping(before) || !isMapping(after)) return false
  // What is not switched off before the next start goes on as it is.
  return before.enabled !== after.enabled
}

type Pair = [name: string, before: unknown, after: unknown]

/** Which items of two lists are about the same thing; undefined where there is no other. */
function pairs({ distinct }: SchemaNode, before: Mapping[], after: Mapping[]): Pair[] {
  const rule = distinct?.find(({ what }) => what === 'name')
  const namesBefore = before.map(item => rule?.by(item))
  const namesAfter = after.map(item => rule?.by(item))
  if ([...namesBefore, ...namesAfter].includes(undefined)) return byPlace(before, after)
  const itemsBefore = new Map(namesBefore.map((name, at) => [name, before[at]]))
  const itemsAfter = new Map(namesAfter.map((name, at) => [name, after[at]]))
  const all = [...new Set([...namesBefore, ...namesAfter])]
  const found = all.map((name): Pair => [`[${name}]`, itemsBefore.get(name), itemsAfter.get(name)])
  const order = [
    namesBefore.filter(name => itemsAfter.has(name)),
    namesAfter.filter(name => itemsBefore.has(name))
  ] as const
  return isDeepStrictEqual(...order) ? found : [...found, ['', ...order]]
}

/** What is equal at the beginning and at the end of both has stayed. */
function byPlace(before: Mapping[], after: Mapping[]): Pair[] {
  const least = Math.min(before.length, after.length)
  let start = 0
  while (start < least && isDeepStrictEqual(before[start], after[start])) start++
  let end = 0
  while (end < least - start && isDeepStrictEqual(before.at(-1 - end), after.at(-1 - end))) end++
  const count = Math.max(before.length, after.length) - start - end
  return Array.from({ length: count }, (_, at): Pair => {
    const place = start + at
    const one = place < before.length - end ? before[place] : undefined
    const other = place < after.length - end ? after[place] : undefined
    return [`[${place}]`, one, other]
  })
}

/** The members that one of them has, in the order of the schema. */
function namesOf({ properties }: SchemaNode, before: Mapping, after: Mapping): string[] {
  const names = Object.keys({ ...before, ...after })
  return properties === undefined
    ? names
    : Object.keys(properties).filter(name => names.includes(name))
}

function isMapping(value: unknown): value is Mapping {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isListOfMappings(value: unknown): value is Mapping[] {
  return Array.isArray(value) && value.every(isMapping)
}
