import { membersOf } from './fragments.ts'

/** Options as they may be shown: in the form of the configuration file, without what is secret. */

interface SchemaNode {
  secret?: true
  secretPath?: true
  unit?: 'ms' | 'bytes'
  anyOf?: SchemaNode[]
  items?: SchemaNode
  properties?: Record<string, SchemaNode>
  patternProperties?: Record<string, SchemaNode>
  notBuilt?: true
}

const MASK = '***'
const TIMES = [
  ['d', 86_400_000],
  ['h', 3_600_000],
  ['m', 60_000],
  ['s', 1000]
] as const

/**
 * What is secret, and everything inside of it, is `***`; of what its schema does not know nothing is shown.
 * So are the secrets of URLs: user and password, the query, and the path where `secretPath` says so. Times have a
 * unit, as in a file.
 *
 * @param schema made with the keywords of `options.ts`
 * @example
 * const schema = { properties: { token: { secret: true }, timeout: { unit: 'ms' } } }
 * masked(schema, { token: 'abc', timeout: 90_000, other: 1 }) // { token: '***', timeout: '90s' }
 */
export function masked(schema: object, value: unknown): unknown {
  const node = alternativeFor(schema as SchemaNode, value)
  if (Array.isArray(value)) return value.map(item => masked(itemOf(node), item))
  if (typeof value !== 'object' || value === null) return leaf(node, value)
  const members = [...shownMembers(node, value)]
  return Object.fromEntries(members.map(([name, inner, member]) => [name, masked(inner, member)]))
}

/**
 * The same as JSON in many small pieces, so that a long one can be made in slices.
 *
 * @example
 * const schema = { properties: { token: { secret: true }, ports: {} } }
 * const pieces = [...maskedJson(schema, { token: 'abc', ports: [1, 2] })]
 * pieces.join('') // '{"token":"***","ports":[1,2]}'
 */
export function* maskedJson(schema: object, value: unknown): Generator<string> {
  const node = alternativeFor(schema as SchemaNode, value)
  let separator = ''
  if (Array.isArray(value)) {
    yield '['
    for (const item of value) {
      yield separator
      yield* maskedJson(itemOf(node), item)
      separator = ','
    }
    yield ']'
  } else if (typeof value !== 'object' || value === null) {
    yield JSON.stringify(leaf(node, value))
  } else {
    yield '{'
    for (const [name, inner, member] of shownMembers(node, value)) {
      yield `${separator}${JSON.stringify(name)}:`
      yield* maskedJson(inner, member)
      separator = ','
    }
    yield '}'
  }
}

function leaf({ secret, secretPath, unit }: SchemaNode, value: unknown): unknown {
  if (secret) return value === '' || value === undefined ? value : MASK
  if (unit === 'ms' && typeof value === 'number') return toText(value)
  return typeof value === 'string' ? maskedUrl(value, secretPath) : value
}

/** Returns the schema of an item. All items of a secret list are secret. */
function itemOf(node: SchemaNode): SchemaNode {
  return node.secret ? node : (node.items ?? {})
}

/** The members that the schema knows, each with its own schema. */
function* shownMembers(
  node: SchemaNode,
  value: object
): Generator<[name: string, schema: SchemaNode, member: unknown]> {
  const { secret, properties, patternProperties } = node
  const other = secret ? node : Object.values(patternProperties ?? {})[0]
  for (const [name, member] of membersOf(value as Record<string, unknown>)) {
    const isKnown = !secret && Object.hasOwn(properties ?? {}, name)
    const inner = isKnown ? properties![name] : other
    if (inner !== undefined && !inner.notBuilt && member !== undefined) yield [name, inner, member]
  }
}

/** Of alternatives the one for a list, for a mapping, or for anything else. */
export function alternativeFor<T extends object>(schema: T, value: unknown): T {
  const { anyOf, secret } = schema as SchemaNode
  if (anyOf === undefined || secret) return schema
  const isMapping = typeof value === 'object' && value !== null && !Array.isArray(value)
  const fits = ({ items, properties, patternProperties }: SchemaNode) =>
    Array.isArray(value)
      ? items !== undefined
      : isMapping === ((properties ?? patternProperties) !== undefined)
  return (anyOf.find(fits) ?? {}) as T
}

/** Scheme, user and password, host, path, query and fragment; a path alone has no scheme. */
const URL_PARTS = /^(?:([a-z][a-z\d+.-]*:\/\/)(.*@)?([^/?#@]*))?(\/[^?#]*)?(\?[^#]*)?(#.*)?$/is

/**
 * A URL, or a path, without its secrets. Any other text stays as it is.
 *
 * @param secretPath whether the path is secret, too
 * @example
 * maskedUrl('redis://user:abc@host/1?token=abc', undefined) // 'redis://***@host/1?***'
 */
export function maskedUrl(text: string, secretPath: true | undefined): string {
  const parts = URL_PARTS.exec(text)
  if (parts === null || (parts[1] === undefined && parts[4] === undefined)) return text
  const [, scheme = '', user, host = '', path = '', query, fragment] = parts
  return [
    scheme,
    user === undefined ? '' : `${MASK}@`,
    host,
    secretPath && path !== '/' && path !== '' ? `/${MASK}` : path,
    query === undefined ? '' : `?${MASK}`,
    fragment === undefined ? '' : `#${MASK}`
  ].join('')
}

function toText(ms: number): string {
  const [unit, size] = TIMES.find(([, size]) => ms > 0 && ms % size === 0) ?? ['ms', 1]
  return ms === 0 ? '0' : `${ms / size}${unit}`
}
