/** Lengths of time and sizes as text with units. */

const UNITS = {
  ms: { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 },
  bytes: { b: 1, kb: 1024, mb: 1024 ** 2, gb: 1024 ** 3 }
} as const

/**
 * Reads a quantity such as `1m30s` or `64MB`.
 *
 * @returns milliseconds or bytes; undefined when the text isn't one.
 * @example
 * parseQuantity('1m30s', 'ms') // 90000
 * parseQuantity('64MB', 'bytes') // 67108864
 */
export function parseQuantity(text: string, unit: 'ms' | 'bytes'): number | undefined {
  const factors: Record<string, number> = UNITS[unit]
  if (text === '0') return 0
  let total = 0
  let matched = 0
  for (const [part, number, suffix] of text.matchAll(/(\d+(?:\.\d+)?)([a-z]+)/gi)) {
    const factor = factors[suffix!.toLowerCase()]
    if (factor === undefined) return undefined
    total += Number(number) * factor
    matched += part.length
  }
  return matched > 0 && matched === text.length ? total : undefined
}
