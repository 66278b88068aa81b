/** Parts of the original's dialect that this version doesn't have: fine while they are switched off. */

/** Does a part that isn't built ask for anything? `enabled: false`, `no`, 0, "", [] and {} don't. */
export function isSwitchedOn(value: unknown): boolean {
  if (Array.isArray(value)) return value.some(isSwitchedOn)
  if (typeof value === 'string') return !/^(false|no|off|0|)$/i.test(value)
  if (typeof value !== 'object' || value === null) return Boolean(value)
  if ('enabled' in value) return isSwitchedOn(value.enabled)
  return Object.values(value).some(isSwitchedOn)
}

export interface SchemaNode {
  notBuilt?: true
  enum?: unknown[]
  later?: readonly string[]
  items?: SchemaNode
  properties?: Record<string, SchemaNode>
}

/**
 * Inside of what is switched off, parts that this version doesn't have are as good as not there:
 * they are taken out, so that a whole configuration of the dialect can be kept.
 */
export function dropSwitchedOff(schema: SchemaNode, value: unknown, isOff: boolean): void {
  if (typeof value !== 'object' || value === null) return
  if (Array.isArray(value)) {
    for (const item of value) dropSwitchedOff(schema.items ?? {}, item, isOff)
    const kept = value.filter(item => !(isLater(schema.items, item) && (isOff || isDisabled(item))))
    value.splice(0, value.length, ...kept)
    return
  }
  const members = value as Record<string, unknown>
  const isInnerOff = isOff || isDisabled(value)
  for (const [name, inner] of Object.entries(schema.properties ?? {})) {
    const isUnknown = inner.notBuilt || inner.later?.includes(String(members[name]))
    if (isInnerOff && isUnknown && name !== 'type') delete members[name]
    else dropSwitchedOff(inner, members[name], isInnerOff)
  }
}

function isDisabled(value: unknown): boolean {
  return (
    typeof value === 'object' && value !== null && 'enabled' in value && value.enabled === false
  )
}

/** Is this an item of a type that this version doesn't have? */
function isLater(schema: SchemaNode | undefined, item: unknown): boolean {
  const { type } = (item ?? {}) as { type?: unknown }
  return schema?.properties?.type?.later?.includes(String(type)) ?? false
}
