import { totalmem } from 'node:os'
import { getHeapStatistics } from 'node:v8'
import type { FastifyPluginAsync } from 'fastify'
import { type Static, Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { withExchanges } from '../exchange.ts'
import { checkOptions, Duration, type Given, Section, Size } from '../options.ts'
import { part, share, toPart } from '../parts.ts'

/**
 * Sheds load that the process cannot carry: new requests get 503 `overloaded` while the event loop is late or the
 * heap is nearly full, and a request whose body would exceed the memory for all bodies is rejected. Requests in
 * flight go on; health, metrics and admin routes always respond.
 *
 * @example
 * await fastify.register(overload, { event_loop_delay: '500ms' })
 * fastify.overload.reason // undefined
 */

export const OverloadOptions = Section(
  {
    event_loop_delay: Duration(
      '1s',
      'Delay of the event loop, twice in a row, from which new requests are rejected; 0: never',
      0
    ),
    heap_used: Type.Number({
      minimum: 0,
      maximum: 1,
      default: 0.95,
      description: 'Part of the heap limit in use from which new requests are rejected; 0: never'
    }),
    request_bodies: Type.Optional(
      Size(
        undefined,
        'Memory for all request bodies together; default: a quarter of the heap limit, or of the memory limit of the container if that is lower; never less than max_body_size'
      )
    )
  },
  'Load that is rejected'
)
export type OverloadOptions = Static<typeof OverloadOptions>

export interface Overload {
  update(options: Given<OverloadOptions>): void
  /** Why new requests are rejected at the moment. */
  readonly reason: string | undefined
}

/** How often (ms) the process is looked at. */
const INTERVAL = 250

const overloadPlugin: FastifyPluginAsync<Given<OverloadOptions>> = async function overload(
  fastify,
  given
) {
  let options: OverloadOptions
  let reason: string | undefined
  /** How often in a row the event loop was late. */
  let late = 0
  let expectedAt = performance.now() + INTERVAL
  const exchanges = withExchanges(fastify)
  update(given)

  function update(changed: Given<OverloadOptions>): void {
    options = checkOptions(OverloadOptions, changed)
    const most = options.request_bodies ?? defaultBodies(part(fastify, 'peers')?.count ?? 1)
    exchanges.bodies.most = Math.max(most, fastify.initialConfig.bodyLimit ?? 0)
  }

  const timer = setInterval(() => {
    const now = performance.now()
    const before = reason
    const delay = now - expectedAt
    const isLate = options.event_loop_delay > 0 && delay > options.event_loop_delay
    late = isLate ? late + 1 : 0
    // A single stall has ended when it is measured: rejecting requests afterwards has no use.
    reason = late > 1 ? `the event loop is ${Math.round(delay)} ms late` : heapReason(options)
    expectedAt = now + INTERVAL
    if (reason !== undefined && before === undefined) {
      fastify.log.warn({ reason }, 'overloaded: new requests are rejected')
    } else if (reason === undefined && before !== undefined) {
      fastify.log.info('new requests are accepted again')
    }
  }, INTERVAL).unref()

  share(fastify, 'overload', {
    update,
    get reason() {
      return reason
    }
  })
  fastify.addHook('onRequest', ({ exchange }, _reply, done) => {
    if (reason === undefined || exchange.endpoint === undefined) return done()
    throw new GatewayError('overloaded', 'The gateway is overloaded. Retry in a moment.', {
      headers: { 'retry-after': '1' }
    })
  })
  fastify.addHook('onClose', async () => clearInterval(timer))
}

function heapReason(options: OverloadOptions): string | undefined {
  if (options.heap_used === 0) return undefined
  const { used_heap_size, heap_size_limit } = getHeapStatistics()
  const used = used_heap_size / heap_size_limit
  return used > options.heap_used ? `${Math.round(used * 100)} % of the heap are used` : undefined
}

/** @param processes that share the memory of the container */
function defaultBodies(processes: number): number {
  const container = process.constrainedMemory()
  const isLimited = container > 0 && container < totalmem()
  const limit = isLimited ? container / processes : Number.POSITIVE_INFINITY
  return Math.min(getHeapStatistics().heap_size_limit, limit) / 4
}

export default toPart(overloadPlugin, {
  name: 'overload',
  decorates: ['overload']
})
