import { Type } from 'typebox'
import type { Distinct } from '../issues.ts'
import { keyFields, Time } from '../keys/fields.ts'
import { KeyText, toHash } from '../keys/static.ts'
import type { KeyChanges, OwnedKey, StoredKey } from '../keys/stored-key.ts'
import { OptionsError } from '../options.ts'
import type { Administered, AdminRoute, Changed } from './admin.ts'
import { noSuchKey, there } from './admin-keys.ts'

/** The six endpoints of the original's admin API, with its envelope: all POST, a key named by itself. */

const MAX_PAGE = 100
/** For a whole list of keys. */
const SYNC_LIMIT = 64 * 1024 * 1024

const Reference = Type.String({
  ...KeyText,
  description: 'The key, sha256: and its SHA-256, or its id'
})
const OwnedSpec = Type.Object(
  { key: KeyText, ...keyFields, starts_at: Time('Not valid before') },
  { additionalProperties: false }
)
const Changes = Type.Object(
  { key: Reference, ...keyFields },
  { additionalProperties: false, patch: true, description: 'An empty text takes a member away' }
)
const Named = Type.Object({ key: Reference }, { additionalProperties: false })
const Page = Type.Object(
  {
    offset: Type.Integer({ minimum: 0, default: 0 }),
    limit: Type.Integer({ minimum: 1, default: 20, description: `At most ${MAX_PAGE}` })
  },
  { additionalProperties: false }
)
const SyncOptions = Type.Object(
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
interface SyncOptions {
  keys: OwnedKey[]
  mode: 'full' | 'incremental'
  confirm: boolean
}

const Envelope = Type.Object(
  {
    success: Type.Literal(true),
    message: Type.String(),
    data: Type.Optional(Type.Object({})),
    warning: Type.Optional(Type.String())
  },
  { description: 'Done' }
)

export default function originalRoutes({ keys }: Administered, changed: Changed): AdminRoute[] {
  /** @throws {GatewayError} 404 */
  const find = async (reference: string) =>
    there((await keys().get(toHash(reference))) ?? (await keys().get(reference)))
  const post = (
    name: string,
    summary: string,
    body: AdminRoute['body'] & object,
    handler: AdminRoute['handler'],
    bodyLimit?: number
  ): AdminRoute => ({
    method: 'POST',
    url: `/keys/${name}`,
    summary: `${summary} (as in the original)`,
    body,
    response: { 200: Envelope },
    isOriginal: true,
    read: body => withoutBlanks(body, name === 'update' ? null : undefined),
    handler,
    ...(bodyLimit === undefined ? {} : { bodyLimit })
  })
  return [
    post('create', 'Takes over a key', OwnedSpec, async request => {
      const { record } = await keys().create(request.body as OwnedKey)
      const told = await changed(request, 'create', { keyId: record.id })
      return done('The key was created.', toOriginal(record), told)
    }),
    post('update', 'Changes a key', Changes, async request => {
      const { key, ...changes } = request.body as { key: string } & KeyChanges
      const { id } = await find(key)
      const record = there(await keys().update(id, changes))
      const told = await changed(request, 'update', { keyId: id })
      return done('The key was updated.', toOriginal(record), told)
    }),
    post('delete', 'Deletes a key', Named, async request => {
      const { id } = await find((request.body as { key: string }).key)
      if (!(await keys().delete(id))) throw noSuchKey()
      const told = await changed(request, 'delete', { keyId: id })
      return done('The key was deleted.', undefined, told)
    }),
    post('get', 'Shows a key', Named, async ({ body }) =>
      done('Found.', toOriginal(await find((body as { key: string }).key)))
    ),
    post('list', 'Lists keys', Page, async ({ body }) => {
      const { offset, limit } = body as { offset: number; limit: number }
      const page = await keys().list({ offset, limit: Math.min(limit, MAX_PAGE) })
      return done('Found.', { keys: page.keys.map(toOriginal), total: page.total })
    }),
    post(
      'sync',
      'Takes over a list of keys, all of it or nothing',
      SyncOptions,
      async request => {
        const { keys: specs, mode, confirm } = request.body as SyncOptions
        if (specs.length === 0 && mode === 'full' && !confirm) {
          const message =
            'is empty: that would delete all keys; if it is meant, say "confirm": true'
          throw new OptionsError([{ path: ['keys'], message }])
        }
        await keys().sync(specs, mode)
        const told = await changed(request, 'sync', { keys: specs.length, mode })
        return done(`${specs.length} keys were synchronised (${mode}).`, undefined, told)
      },
      SYNC_LIMIT
    )
  ]
}

/** An empty text says nothing, or takes a member away. */
function withoutBlanks(body: unknown, blank: null | undefined): unknown {
  return body && JSON.parse(JSON.stringify(body), (_, each) => (each === '' ? blank : each))
}

function done(message: string, data: object | undefined, told: { warning?: string } = {}) {
  return { success: true, message, ...(data === undefined ? {} : { data }), ...told }
}

/** The original's numbers; what it doesn't know is not valid there. */
const STATUS = { active: 0, disabled: 1, quota_exceeded: 2, expired: 3, revoked: 1 } as const

/** A key as the original shows it, with all that it did not have; the key itself is masked. */
function toOriginal(record: StoredKey) {
  return { ...record, status: STATUS[record.status] }
}
