import { Type } from 'typebox'
import type { Distinct } from '../issues.ts'
import { isTooDeep, TOO_DEEP } from '../json-body.ts'
import { checkOptions, OptionsError } from '../options.ts'
import { keyFields, Time } from './fields.ts'
import { NewKeyText, toHash } from './static.ts'
import { type OwnedKey, toRows } from './stored-key.ts'

/** A whole list of keys for the embedded store, as the original's admin API receives it. */

export const OwnedSpec = Type.Object(
  { key: NewKeyText, ...keyFields, starts_at: Time('Not valid before') },
  { additionalProperties: false }
)
export const SyncOptions = Type.Object(
  {
    keys: Type.Array(OwnedSpec, {
      distinct: [
        { by: given => toHash(String((given as { key?: unknown }).key)), what: 'key' }
      ] satisfies Distinct[]
    }),
    mode: Type.Enum(['full', 'incremental'], {
      default: 'full',
      description: 'full: keys that are not in the list are deleted'
    }),
    confirm: Type.Boolean({
      default: false,
      description: 'Must be true where an empty list deletes all keys'
    })
  },
  { additionalProperties: false }
)

/** The request, without the keys. */
export interface SyncRequest {
  mode: 'full' | 'incremental'
  confirm: boolean
  count: number
}

function withoutBlank(this: unknown, _name: string, value: unknown): unknown {
  return value === '' && !Array.isArray(this) ? undefined : value
}

/**
 * Reads the body of a request: what is asked for, and then the rows of its keys (see {@link toRows}).
 *
 * @throws {SyntaxError} when it is not JSON
 * @throws {OptionsError}
 */
export function* readSync(body: Uint8Array): Generator<SyncRequest | string> {
  const text = new TextDecoder().decode(body)
  if (isTooDeep(text)) throw new OptionsError([{ path: [], message: `body ${TOO_DEEP}` }])
  // An empty text says nothing.
  const given = text === '' ? {} : JSON.parse(text, withoutBlank)
  const { keys, mode, confirm } = checkOptions(SyncOptions, given) as SyncRequest & {
    keys: OwnedKey[]
  }
  yield { mode, confirm, count: keys.length }
  yield* toRows(keys)
}
