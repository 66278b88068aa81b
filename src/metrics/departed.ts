import type { Registry } from '@prometheus-io/client'

/** So long (ms) scrapers may still read what was counted of a backend that has gone. */
const KEEP_MS = 60_000

/** What is needed of a counter and a histogram. */
interface Counted {
  type: unknown
  labelNames: readonly string[]
  get(): Promise<{ values: { labels: Record<string, string> }[] }>
  remove(labels: Record<string, string>): void
}

/**
 * Takes what was counted of backends that have gone out of the registry, so that it does not grow with every
 * pod there ever was.
 *
 * @param names of the backends in use, those included that only finish their requests
 * @returns looks who has gone; to be called when backends change, and now and then
 */
export function forgetDeparted(registry: Registry, names: () => Iterable<string>): () => void {
  let before = new Set<string>()
  /** When each was missed first (monotonic, ms). */
  const departed = new Map<string, number>()
  return () => {
    const now = performance.now()
    const present = new Set(names())
    for (const name of before) if (!present.has(name)) departed.set(name, now)
    before = present
    for (const [name, since] of departed) {
      if (!present.has(name) && now - since < KEEP_MS) continue
      departed.delete(name)
      if (!present.has(name)) void forget(registry, name)
    }
  }
}

async function forget(registry: Registry, backend: string): Promise<void> {
  for (const metric of registry.getMetricsAsArray() as unknown as Counted[]) {
    // A gauge shows the backends that are there, each time it is read.
    if (metric.type === 'gauge' || !metric.labelNames.includes('backend')) continue
    const { values } = await metric.get()
    for (const { labels } of values) {
      const { le: _, ...own } = labels
      if (own.backend === backend) metric.remove(own)
    }
  }
}
