import { parseQuantity } from './quantity.ts'

/** Defaults of empty sections. Most sections of a file are empty, and compiling their checks takes far longer. */

export interface DefaultsNode {
  properties?: Record<string, DefaultsNode>
  required?: readonly string[]
  unit?: 'ms' | 'bytes'
  default?: unknown
}

/** Keywords that an empty section cannot violate; `required` is looked at. */
const HARMLESS = new Set([
  ...['type', 'properties', 'required', 'additionalProperties', 'default', 'description'],
  ...['enabledBy', 'restart']
])

/**
 * Completes an empty section in place.
 *
 * @returns false, and does nothing, where the section has content or a check must decide
 * @example
 * const schema = { properties: { timeout: { unit: 'ms', default: '3s' }, retries: { default: 2 } } }
 * const section = {}
 * completeEmpty(schema, section) // true
 * section // { timeout: 3000, retries: 2 }
 */
export function completeEmpty(schema: DefaultsNode, section: Record<string, unknown>): boolean {
  const { properties, required = [] } = schema
  if (properties === undefined || Object.keys(section).length > 0) return false
  if (!Object.keys(schema).every(keyword => HARMLESS.has(keyword))) return false
  if (required.some(name => properties[name]?.default === undefined)) return false
  const filled: Record<string, unknown> = {}
  for (const [name, member] of Object.entries(properties)) {
    if (member.default === undefined) continue
    const value = structuredClone(member.default)
    if (member.properties && !completeEmpty(member, value as Record<string, unknown>)) return false
    filled[name] =
      member.unit && typeof value === 'string' ? parseQuantity(value, member.unit) : value
  }
  Object.assign(section, filled)
  return true
}
