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
  const { secret, secretPath, unit, items, properties, patternProperties } = alternativeFor(
    schema as SchemaNode,
    value
  )
  if (secret) return withoutLeaves(value)
  if (unit === 'ms' && typeof value === 'number') return toText(value)
  if (typeof value === 'string') return maskedUrl(value, secretPath)
  if (Array.isArray(value)) return value.map(item => masked(items ?? {}, item))
  if (typeof value !== 'object' || value === null) return value
  const other = Object.values(patternProperties ?? {})[0]
  return Object.fromEntries(
    Object.entries(value).flatMap(([name, member]) => {
      const inner = Object.hasOwn(properties ?? {}, name) ? properties![name] : other
      return inner === undefined || inner.notBuilt ? [] : [[name, masked(inner, member)]]
    })
  )
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

function withoutLeaves(value: unknown): unknown {
  if (value === '' || value === undefined) return value
  if (Array.isArray(value)) return value.map(withoutLeaves)
  if (typeof value !== 'object' || value === null) return MASK
  return Object.fromEntries(
    Object.entries(value).map(([name, member]) => [name, withoutLeaves(member)])
  )
}

function toText(ms: number): string {
  const [unit, size] = TIMES.find(([, size]) => ms > 0 && ms % size === 0) ?? ['ms', 1]
  return ms === 0 ? '0' : `${ms / size}${unit}`
}
