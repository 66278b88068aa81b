import type { FastifyInstance } from 'fastify'
import { Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { parseTime } from '../keys/key.ts'
import type { Dimension } from '../reporters/usage-store.ts'
import type { Administered, AdminRoute } from './admin.ts'

/** What the admin API shows: usage, and a description of itself. */

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
      pattern: '^(key|user|model|backend|day|tag|tag:.+)$',
      expects: 'key, user, model, backend, tag, day, or such as tag:team',
      description:
        'key (its id), user, model, backend, day, tag (NAME=VALUE of all tags), or tag: and the name of one'
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

export default function viewRoutes({ usage }: Administered, scope: FastifyInstance): AdminRoute[] {
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
      url: '/openapi.json',
      summary: 'This description',
      response: { 200: Type.Object({}, { description: 'OpenAPI 3.1' }) },
      handler: async () => scope.swagger()
    }
  ]
}
