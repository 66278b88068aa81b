import { Counter, Gauge, type Registry } from '@prometheus-io/client'
import type { Discovery } from '../plugins/discovery.ts'

/** How the sources of backends fare. */
export function discoveryMetrics(discovery: Discovery, registers: Registry[]): void {
  const labelNames = ['source']
  new Gauge({
    name: 'llmproxy_discovery_source_up',
    help: '1: the source of backends has answered last; 0: it fails, and what it said before holds',
    labelNames,
    // Of several workers: down as soon as one of them finds it so.
    aggregator: 'min',
    registers,
    collect() {
      this.reset()
      for (const { name, isUp } of discovery.sources) this.set({ source: name }, Number(isUp))
    }
  })
  new Gauge({
    name: 'llmproxy_discovery_backends',
    help: 'Backends that the source has, as it said last',
    labelNames,
    aggregator: 'max',
    registers,
    collect() {
      this.reset()
      for (const { name, backends = [] } of discovery.sources)
        this.set({ source: name }, backends.length)
    }
  })
  new Gauge({
    name: 'llmproxy_discovery_last_change_timestamp_seconds',
    help: 'When the backends of the source have changed last, in Unix time; 0: it has not answered yet',
    labelNames,
    aggregator: 'max',
    registers,
    collect() {
      this.reset()
      for (const { name, changedAt } of discovery.sources)
        this.set({ source: name }, changedAt / 1000)
    }
  })
  new Counter({
    name: 'llmproxy_discovery_errors_total',
    help: 'How often the source has failed',
    labelNames,
    registers,
    collect() {
      this.reset()
      for (const { name, errors } of discovery.sources) this.inc({ source: name }, errors)
    }
  })
}
