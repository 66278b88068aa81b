import { Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import type { Backend } from '../pool/backend.ts'
import type { Breaker } from '../pool/breaker.ts'
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
    drained: Type.Boolean({ description: 'Somebody wants it to get no calls' }),
    circuit: CircuitShown,
    in_flight: Type.Integer({ description: 'Attempts whose answer has not ended' }),
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
  const { lastError, models } = live
  return {
    name,
    url: live.origin + live.basePath,
    source,
    weight: config.weight,
    priority: config.priority,
    models: config.models?.map(toName) ?? (models === undefined ? null : [...models.keys()]),
    healthy: live.healthy,
    drained: live.isDrained,
    circuit: toCircuit(live.breaker),
    in_flight: live.inFlight,
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

function toIso(time: number): string {
  return new Date(time).toISOString()
}
