import { Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { type Backend, TROUBLES } from '../pool/backend.ts'
import type { Breaker } from '../pool/breaker.ts'
import type { Speed } from '../pool/load.ts'
import type { ModelEntry } from '../pool/models.ts'
import type { Administered, AdminRoute, Changed } from './admin.ts'

/** The backends: how they are, and which of them get calls. */

const CircuitShown = Type.Object(
  {
    state: Type.Enum(['closed', 'half_open', 'open']),
    reason: Type.Union([Type.String(), Type.Null()]),
    until: Type.Union([Type.String({ format: 'date-time' }), Type.Null()])
  },
  { description: 'closed: it gets calls; half_open: a single one; open: none until then' }
)
const SpeedShown = Type.Object({
  prefill_tokens_per_second: Type.Number(),
  time_per_output_token_ms: Type.Number()
})
const BackendShown = Type.Object(
  {
    name: Type.String(),
    url: Type.String(),
    source: Type.Union([Type.String(), Type.Null()], {
      description: 'Which source of discovery has found it; null: it is configured'
    }),
    weight: Type.Integer(),
    priority: Type.Integer({ description: 'Those with a lower one are asked first' }),
    models: Type.Union([Type.Array(Type.String()), Type.Null()], {
      description:
        'What it serves: as configured, `name = its own name` where it has another, or as it lists them itself; null: not known, it takes all'
    }),
    healthy: Type.Boolean({ description: 'What health checks say' }),
    trouble: Type.Union([Type.Enum([...TROUBLES]), Type.Null()], {
      description: 'Why it cannot be called; null: it can'
    }),
    drained: Type.Boolean({ description: 'Somebody wants it to get no calls' }),
    circuit: CircuitShown,
    in_flight: Type.Integer({ description: 'Attempts whose answer has not ended' }),
    warm: Type.Number({
      description: 'Part of its share of the calls that it gets: below 1 for 30 s after it is back'
    }),
    wait_ms: Type.Number({ description: 'What a call would wait before its prompt is read' }),
    ttft_ms: Type.Union([Type.Number(), Type.Null()], {
      description: 'Expected time to the first byte, as latency_based has it; null: not known'
    }),
    speed: Type.Object(SpeedShown.properties, {
      description: 'Learned from its answers; 8000 and 30 are believed before the first'
    }),
    models_speed: Type.Record(Type.String(), SpeedShown, {
      description: 'The same of the models that were asked for last, 64 at most'
    }),
    prefixes: Type.Integer({
      description: 'Beginnings of prompts that it should have in its cache, 32768 at most'
    }),
    down_since: Type.Union([Type.String({ format: 'date-time' }), Type.Null()]),
    last_error: Type.Union([
      Type.Object({ at: Type.String({ format: 'date-time' }), reason: Type.String() }),
      Type.Null()
    ])
  },
  { description: 'A backend' }
)
const BackendName = Type.Object({ name: Type.String({ description: 'Its name' }) })

export default function backendRoutes({ backends }: Administered, changed: Changed): AdminRoute[] {
  const shown = (each: Backend) => toShown(each, backends.sourceOf(each.name) ?? null)
  const turn = (action: 'drain' | 'undrain', summary: string): AdminRoute => ({
    method: 'POST',
    url: `/backends/:name/${action}`,
    summary,
    params: BackendName,
    response: { 200: BackendShown },
    async handler(request) {
      const { name } = request.params as { name: string }
      if (!backends.drain(name, action === 'drain')) {
        throw new GatewayError('not_found', 'There is no backend of this name.')
      }
      await changed(request, `${action} backend`, { backend: name })
      return shown(backends.pool.backends.find(each => each.name === name)!)
    }
  })
  return [
    {
      method: 'GET',
      url: '/backends',
      summary: 'How the backends are, as this process sees them',
      response: {
        200: Type.Object(
          { backends: Type.Array(BackendShown) },
          { description: 'The backends that are in use' }
        )
      },
      handler: async () => ({ backends: backends.pool.backends.map(shown) })
    },
    turn('drain', 'Gives a backend no more calls; it ends those it has'),
    turn('undrain', 'Gives a backend calls again')
  ]
}

function toShown({ name, config, live }: Backend, source: string | null) {
  const { lastError, models, load } = live
  const now = performance.now()
  return {
    name,
    url: live.origin + live.basePath,
    source,
    weight: config.weight,
    priority: config.priority,
    models: config.models?.map(toName) ?? (models === undefined ? null : [...models.keys()]),
    healthy: live.healthy,
    trouble: live.trouble ?? null,
    drained: live.isDrained,
    circuit: toCircuit(live.breaker),
    in_flight: live.inFlight,
    warm: rounded(live.rampUp(now)),
    wait_ms: rounded(load.wait(now)),
    ttft_ms: rounded(live.reputation.latency(now) ?? null),
    speed: toSpeed(load.speeds.overall),
    models_speed: Object.fromEntries(
      load.speeds.entries().map(([model, speed]) => [model, toSpeed(speed)])
    ),
    prefixes: live.prefixes.size,
    down_since: live.healthy ? null : toIso(live.changedAt),
    last_error:
      lastError === undefined ? null : { at: toIso(lastError.at), reason: lastError.reason }
  }
}

function toName({ name, upstream }: ModelEntry): string {
  return upstream === undefined ? name : `${name} = ${upstream}`
}

function toCircuit(breaker: Breaker) {
  const now = performance.now()
  const { reason, until } = breaker.opened ?? {}
  return {
    state: breaker.state(now),
    reason: reason ?? null,
    until: until === undefined ? null : toIso(Date.now() + until - now)
  }
}

function toSpeed({ prefillRate, tpot }: Speed) {
  return {
    prefill_tokens_per_second: rounded(prefillRate * 1000),
    time_per_output_token_ms: rounded(tpot)
  }
}

/** To hundredths. */
function rounded<T extends number | null>(value: T): T {
  return (value === null ? null : Math.round(value * 100) / 100) as T
}

function toIso(time: number): string {
  return new Date(time).toISOString()
}
