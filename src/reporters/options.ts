import { Type } from 'typebox'
import { Duration, Section } from '../options.ts'

/** How many records go together where that is cheaper than one by one. */
export function batchOptions(what: string) {
  return Section(
    {
      max_events: Type.Integer({
        minimum: 1,
        maximum: 1000,
        default: 500,
        description: `Records in ${what}`
      }),
      max_wait: Duration('1s', 'How long a record waits for others')
    },
    `Several records in ${what}`
  )
}
