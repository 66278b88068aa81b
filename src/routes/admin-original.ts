import { Type } from 'typebox'
import { batchesOf } from '../batches.ts'
import { GatewayError } from '../errors.ts'
import { replaced } from '../json-body.ts'
import { keyFields } from '../keys/fields.ts'
import { OwnedSpec, readSync, SyncOptions, type SyncRequest } from '../keys/key-sync.ts'
import { KeyText, toHash } from '../keys/static.ts'
import type { KeyChanges, OwnedKey, StoredKey } from '../keys/stored-key.ts'
import { OptionsError } from '../options.ts'
import type { Administered, AdminRoute, Changed } from './admin.ts'
import { noSuchKey, Offset, there } from './admin-keys.ts'

/** The six endpoints of the original's admin API, with its envelope: all POST, a key named by itself. */

const MAX_PAGE = 100
/** For a whole list of keys. */
const SYNC_LIMIT = 64 * 1024 * 1024
/** Maximum size (bytes) of a list that is read without a thread: that takes a few milliseconds. */
const SMALL = 16 * 1024

const Reference = Type.String({
  ...KeyText,
  description: 'The key, sha256: and its SHA-256, or its id'
})
const Changes = Type.Object(
  { key: Reference, ...keyFields },
  { additionalProperties: false, patch: true, description: 'An empty text takes a member away' }
)
const Named = Type.Object({ key: Reference }, { additionalProperties: false })
const Page = Type.Object(
  {
    offset: Offset,
    limit: Type.Integer({ minimum: 1, default: 20, description: `At most ${MAX_PAGE}` })
  },
  { additionalProperties: false }
)
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
    handler: AdminRoute['handler']
  ): AdminRoute => ({
    method: 'POST',
    url: `/keys/${name}`,
    summary: `${summary} (as in the original)`,
    body,
    response: { 200: Envelope },
    isOriginal: true,
    read: body => withoutBlanks(body, name === 'update' ? null : undefined),
    handler
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
    {
      ...post(
        'sync',
        'Takes over a list of keys, all of it or nothing',
        SyncOptions,
        async request => {
          const { mode, confirm, count, rows } = await readList(request.body as Buffer | null)
          if (count === 0 && mode === 'full' && !confirm) {
            const message =
              'is empty: that would delete all keys; if it is meant, say "confirm": true'
            throw new OptionsError([{ path: ['keys'], message }])
          }
          await keys().sync(rows, mode)
          const told = await changed(request, 'sync', { keys: count, mode })
          return done(`${count} keys were synchronised (${mode}).`, undefined, told)
        }
      ),
      isRaw: true,
      bodyLimit: SYNC_LIMIT
    }
  ]
}

/** Reads a list of keys without blocking the event loop. */
async function readList(given: Uint8Array | null) {
  const body = given ?? new Uint8Array()
  const bytes = new Uint8Array(body)
  const data = { data: bytes, transfer: [bytes.buffer] }
  const parts =
    body.length <= SMALL
      ? readSync(body)
      : batchesOf<SyncRequest | string>('keys/key-sync-thread', data)
  const rows: string[] = []
  let asked: SyncRequest | undefined
  try {
    for await (const part of parts) {
      if (typeof part === 'string') rows.push(part)
      else asked = part
    }
  } catch (error) {
    if ((error as Error).name !== 'SyntaxError') throw error
    throw new GatewayError('invalid_json', 'The request body is not valid JSON.')
  }
  return { ...asked!, rows }
}

/** An empty text says nothing, or takes a member away. */
function withoutBlanks(body: unknown, blank: null | undefined): unknown {
  return replaced(body, each => (each === '' ? blank : each))
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
