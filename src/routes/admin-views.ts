import type { FastifyInstance } from 'fastify'
import { Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { parseTime } from '../keys/key.ts'
import type { Breaker } from '../pool/breaker.ts'
import type { Dimension } from '../reporters/usage-store.ts'
import type { Administered, AdminRoute } from './admin.ts'

/** What the admin API shows: usage, backends, the configuration, and a description of itself. */

const Day = (description: string) =>
  Type.Optional(
    Type.String({
      check: (text: unknown) =>
        /^\d{4}-\d\d-\d\d$/.test(String(text)) && !Number.isNaN(parseTime(text)),
      expects: 'a day such as 2026-01-31',
      description
    })
  )
const UsageQuery = Type.Object(
  {
    group_by: Type.String({
      pattern: '^(key|user|model|backend|day|tag:.+)$',
      expects: 'key, user, model, backend, day, or such as tag:team',
      description: 'key (its id), user, model, backend, day, or tag: and the name of a tag'
    }),
    since: Day('The first day, in UTC'),
    until: Day('The last day, in UTC')
  },
  { additionalProperties: false }
)
type UsageQuery = { group_by: Dimension; since?: string; until?: string }

const count = Type.Integer({ minimum: 0 })
const SumShown = Type.Object({
  value: Type.String({ description: "A key's id, a user, a day ...; empty where there is none" }),
  currency: Type.Union([Type.String(), Type.Null()]),
  requests: count,
  input_tokens: count,
  output_tokens: count,
  cached_tokens: count,
  cost: Type.Number()
})
const CircuitShown = Type.Object(
  {
    state: Type.Enum(['closed', 'half_open', 'open']),
    reason: Type.Union([Type.String(), Type.Null()]),
    until: Type.Union([Type.String({ format: 'date-time' }), Type.Null()])
  },
  { description: 'closed: it gets calls; half_open: a single one; open: none until then' }
)
const BackendShown = Type.Object({
  name: Type.String(),
  url: Type.String(),
  weight: Type.Integer(),
  models: Type.Union([Type.Array(Type.String()), Type.Null()], {
    description:
      'What it serves: as configured, or as it lists them itself; null: not known, it takes all'
  }),
  healthy: Type.Boolean({ description: 'What health checks say' }),
  circuit: CircuitShown,
  in_flight: Type.Integer({ description: 'Attempts whose answer has not ended' }),
  down_since: Type.Union([Type.String({ format: 'date-time' }), Type.Null()]),
  last_error: Type.Union([
    Type.Object({ at: Type.String({ format: 'date-time' }), reason: Type.String() }),
    Type.Null()
  ])
})

export default function viewRoutes(
  { backends, usage, config }: Administered,
  scope: FastifyInstance
): AdminRoute[] {
  return [
    {
      method: 'GET',
      url: '/usage',
      summary: 'What was spent, by whole days in UTC; from the reporter of type builtin',
      querystring: UsageQuery,
      response: {
        200: Type.Object(
          { group_by: Type.String(), sums: Type.Array(SumShown) },
          { description: 'Sums, a line for each currency' }
        )
      },
      async handler({ query }) {
        const { group_by, ...days } = query as UsageQuery
        const sums = await usage.sums({ by: group_by, ...days })
        if (sums === undefined) {
          throw new GatewayError(
            'conflict',
            'Usage is not kept here: usage.reporters needs one of type builtin.'
          )
        }
        return { group_by, ...days, sums }
      }
    },
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
      handler: async () => ({
        backends: backends.pool.backends.map(({ name, config, live }) => ({
          name,
          url: live.origin + live.basePath,
          weight: config.weight,
          models: config.models ?? (live.models === undefined ? null : [...live.models.keys()]),
          healthy: live.healthy,
          circuit: toCircuit(live.breaker),
          in_flight: live.inFlight,
          down_since: live.healthy ? null : toIso(live.changedAt),
          last_error: live.lastError === undefined ? null : toShown(live.lastError)
        }))
      })
    },
    {
      method: 'GET',
      url: '/config',
      summary: 'The running configuration; secrets are ***',
      response: { 200: Type.Object({}, { description: 'Its sections' }) },
      handler: async () => config()
    },
    {
      method: 'GET',
      url: '/openapi.json',
      summary: 'This description',
      response: { 200: Type.Object({}, { description: 'OpenAPI 3.1' }) },
      handler: async () => scope.swagger()
    }
  ]
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

function toShown({ at, reason }: { at: number; reason: string }) {
  return { at: toIso(at), reason }
}

function toIso(time: number): string {
  return new Date(time).toISOString()
}
