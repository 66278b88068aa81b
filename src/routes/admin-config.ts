import { Readable } from 'node:stream'
import { setImmediate } from 'node:timers/promises'
import { Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import type { Administered, AdminRoute, Changed } from './admin.ts'

/** The configuration: what it is, and that it is read again. */

const JSON_TYPE = 'application/json; charset=utf-8'
const anything = (description: string) => Type.Optional(Type.Unknown({ description }))
const ChangesShown = (description: string) =>
  Type.Array(
    Type.Object({
      path: Type.String({ description: 'Such as backends[gpu-1].weight' }),
      before: anything('Not there: it was not there'),
      after: anything('Not there: it is gone')
    }),
    { description }
  )

export default function configRoutes(
  { config, reload }: Administered,
  changed: Changed
): AdminRoute[] {
  return [
    {
      method: 'GET',
      url: '/config',
      summary: 'The running configuration; secrets are ***',
      response: { 200: Type.Object({}, { description: 'Its sections' }) },
      async handler(_request, reply) {
        reply.type(JSON_TYPE)
        return Readable.from(encoded(config()), { objectMode: false })
      }
    },
    {
      method: 'POST',
      url: '/reload',
      summary:
        'Reads the configuration file again and takes it over, in all workers, or changes nothing',
      response: {
        200: Type.Object(
          {
            changed: ChangesShown('What differs from before, and holds now'),
            restart_needed: ChangesShown('What the file says, and holds when it is started again'),
            omitted: Type.Optional(
              Type.Integer({
                description: 'Number of changes beyond the 200 of each kind that are shown'
              })
            )
          },
          { description: 'What differs; secrets are ***, and a long value is its length' }
        )
      },
      async handler(request, reply) {
        const reloading = reload()
        if (reloading === undefined) {
          throw new GatewayError(
            'conflict',
            'This gateway was not started from a file: there is nothing to read again.'
          )
        }
        const changes = await reloading
        await changed(request, 'reload', {})
        reply.type(JSON_TYPE)
        return changes
      }
    }
  ]
}

/** Number of characters that are sent before other work has its turn. */
const PART = 64 * 1024

async function* encoded(pieces: Iterable<string>): AsyncGenerator<Buffer> {
  let part = ''
  for (const piece of pieces) {
    part += piece
    if (part.length < PART) continue
    yield Buffer.from(part)
    part = ''
    await setImmediate()
  }
  yield Buffer.from(part)
}
