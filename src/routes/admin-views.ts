import type { FastifyInstance } from 'fastify'
import { Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { parseTime } from '../keys/key.ts'
import type { Dimension } from '../reporters/usage-store.ts'
import type { Administered, AdminRoute } from './admin.ts'

/** What the admin API shows: usage, how a backend was chosen, and a description of itself. */

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
  cache_write_tokens: count,
  cost: Type.Number()
})

const text = Type.Union([Type.String(), Type.Null()])
const number = Type.Union([Type.Number(), Type.Null()])
const ExplanationShown = Type.Object(
  {
    request_id: Type.String(),
    model: text,
    strategy: Type.String({ description: 'routing.load_balance at that time' }),
    attempts: Type.Array(
      Type.Object({
        at: Type.String({ format: 'date-time' }),
        backend: Type.Union(text.anyOf, { description: 'Which was chosen; null: none could be' }),
        outcome: Type.Union(text.anyOf, {
          description:
            '2xx, 3xx, 4xx, 429, 5xx, connect_failure, timeout, cancelled, local_failure or broke_off; without a backend queued, or what the call ended with; null: under way'
        }),
        queued_ms: Type.Number({ description: 'How long it has waited for room' }),
        score_unit: Type.Union(text.anyOf, { description: 'What score is' }),
        candidates: Type.Array(
          Type.Object({
            backend: Type.String(),
            model: Type.Union(text.anyOf, { description: 'Which it was looked at for' }),
            score: number,
            cached_tokens: Type.Union(number.anyOf, {
              description: 'Of the prompt, where the strategy counts them'
            }),
            passed_over: Type.Union(text.anyOf, { description: 'Why it was' }),
            circuit: Type.Union(text.anyOf, { description: 'Why it is open' })
          })
        )
      }),
      { description: 'In their order' }
    )
  },
  { description: 'How its backends were chosen' }
)

export default function viewRoutes(
  { usage, backends }: Administered,
  scope: FastifyInstance
): AdminRoute[] {
  return [
    {
      method: 'GET',
      url: '/explain/:requestId',
      summary: 'Why one of the latest 1,000 calls (of each worker) went to the backends it went to',
      params: Type.Object({
        requestId: Type.String({ description: 'As in x-llmproxy-request-id' })
      }),
      response: { 200: ExplanationShown },
      async handler({ params }) {
        const explanation = await backends.explain((params as { requestId: string }).requestId)
        if (explanation === undefined) {
          throw new GatewayError('not_found', 'Nothing is known, or no more, of such a call.')
        }
        return explanation
      }
    },
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
