/** Settings that options imply: a section that lists something is switched on, and a type without settings needs no block. */

export interface SchemaNode {
  enabledBy?: readonly string[]
  partOfType?: true
  required?: readonly string[]
  items?: SchemaNode
  properties?: Record<string, SchemaNode>
  default?: unknown
}

/**
 * Completes options in place.
 *
 * @example
 * const schema = { enabledBy: ['reporters'], properties: { enabled: {}, reporters: {} } }
 * const usage = { reporters: ['billing'] }
 * addImplied(schema, usage)
 * usage // { reporters: ['billing'], enabled: true }
 */
export function addImplied(schema: SchemaNode, value: unknown): void {
  if (typeof value !== 'object' || value === null) return
  if (Array.isArray(value)) {
    if (schema.items !== undefined) for (const item of value) addImplied(schema.items, item)
    return
  }
  const fields = value as Record<string, unknown>
  const { enabledBy = [], partOfType, properties = {} } = schema
  if (fields.enabled === undefined && enabledBy.some(name => hasContent(fields[name]))) {
    fields.enabled = true
  }
  if (partOfType) addBlock(properties, fields)
  for (const [name, inner] of Object.entries(properties)) addImplied(inner, fields[name])
}

/** Adds the block of the type, if all fields of the block have defaults. */
function addBlock(properties: Record<string, SchemaNode>, fields: Record<string, unknown>): void {
  const type = String(fields.type)
  if (!Object.hasOwn(properties, type)) return
  const { properties: inner = {}, required = [] } = properties[type]!
  if (required.every(name => inner[name]?.default !== undefined)) fields[type] ??= {}
}

/** Whether a list has items, or a mapping has a number other than 0 (a limit of 0 is no limit). */
function hasContent(value: unknown): boolean {
  if (Array.isArray(value)) return value.length > 0
  if (typeof value === 'object' && value !== null) return Object.values(value).some(hasContent)
  return typeof value === 'number' && value !== 0
}
