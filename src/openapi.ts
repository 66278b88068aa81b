/** The house's schemas as plain JSON Schema, for OpenAPI. */

/** Keywords of `options.ts` and its like, which nobody else knows. */
const OURS = new Set([
  'check',
  'expects',
  'secret',
  'hashed',
  'unit',
  'least',
  'most',
  'distinct',
  'shorthand',
  'patch'
])

/**
 * The same schema without the keywords of our own. `patch`: a member may be null, which takes it away.
 *
 * @example
 * plainSchema({ type: 'string', check: () => true, secret: true }) // { type: 'string' }
 */
export function plainSchema(schema: unknown, isPatch = false): unknown {
  if (Array.isArray(schema)) return schema.map(each => plainSchema(each, isPatch))
  if (typeof schema !== 'object' || schema === null) return schema
  const takesNull = isPatch || 'patch' in schema
  const member = (inner: unknown) => {
    const plain = plainSchema(inner, takesNull)
    return takesNull ? { anyOf: [plain, { type: 'null' }] } : plain
  }
  return Object.fromEntries(
    Object.entries(schema).flatMap(([name, value]): [string, unknown][] => {
      if (OURS.has(name)) return []
      const isMap = name === 'properties' || name === 'patternProperties'
      if (!isMap) return [[name, plainSchema(value, takesNull)]]
      return [
        [name, Object.fromEntries(Object.entries(value).map(([each, its]) => [each, member(its)]))]
      ]
    })
  )
}
