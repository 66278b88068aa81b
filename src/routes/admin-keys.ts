import { Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { keyFields } from '../keys/fields.ts'
import type { KeyStore } from '../keys/key-store.ts'
import { type KeyChanges, KeySpec, maskKey } from '../keys/stored-key.ts'
import { Duration, LONGEST_AGE, Section } from '../options.ts'
import type { Administered, AdminRoute, Changed } from './admin.ts'

/** `/admin/keys`: the keys of the embedded store. */

const text = (description: string) => Type.String({ description })
const time = (description: string) => Type.String({ format: 'date-time', description })
const warning = Type.Optional(text('The change holds here, but not everywhere yet'))

const Shown = {
  ...keyFields,
  id: text('Stays the same when the key is rotated'),
  key: text('Enough to tell keys apart'),
  status: Type.Enum(['active', 'disabled', 'expired', 'quota_exceeded', 'revoked']),
  created_at: time('When it was made'),
  updated_at: time('When it was changed'),
  revoked_at: Type.Optional(time('When it was revoked')),
  old_key_until: Type.Optional(time('How long the key before the last rotation is valid'))
}
const ShownKey = Type.Object({ ...Shown, warning }, { description: 'The key' })
const NewKey = Type.Object(
  { ...Shown, key: text('The key itself, this once'), warning },
  { description: 'The new key' }
)
const KeyId = Type.Object({ id: text('Id of the key') })
const KeyPatch = Type.Object(keyFields, {
  additionalProperties: false,
  patch: true,
  description: 'What changes; null takes a member away (RFC 7396)'
})
const RotateOptions = Section(
  { grace: Duration('0', 'How long the old key stays valid', 0, LONGEST_AGE) },
  'How it is rotated'
)
export const Offset = Type.Integer({
  minimum: 0,
  // SQLite takes no larger one.
  check: Number.isSafeInteger,
  expects: `an integer of 0 or more, up to ${Number.MAX_SAFE_INTEGER}`,
  default: 0,
  description: 'How many are left out'
})
const ListQuery = Type.Object(
  {
    offset: Offset,
    limit: Type.Integer({
      minimum: 1,
      maximum: 1000,
      default: 20,
      description: 'How many at most'
    }),
    user_id: Type.Optional(Type.String({ minLength: 1, description: 'Keys of this user alone' }))
  },
  { additionalProperties: false }
)

export default function keyRoutes({ keys }: Administered, changed: Changed): AdminRoute[] {
  const idOf = (params: unknown) => (params as { id: string }).id
  return [
    {
      method: 'GET',
      url: '/keys',
      summary: 'Lists keys, the newest first',
      querystring: ListQuery,
      response: {
        200: Type.Object(
          { keys: Type.Array(Type.Object(Shown)), total: Type.Integer() },
          { description: 'Keys, and how many there are in all' }
        )
      },
      handler: async ({ query }) => keys().list(query as Parameters<KeyStore['list']>[0])
    },
    {
      method: 'POST',
      url: '/keys',
      summary: 'Makes a key, and shows it this once',
      body: KeySpec,
      response: { 201: NewKey },
      async handler(request, reply) {
        const spec = request.body as KeySpec
        const { key, record } = await keys().create(spec)
        const told = await changed(request, 'create', { keyId: record.id })
        reply.code(201)
        // Who brings a key has it already.
        return { ...record, key: spec.key === undefined ? key : maskKey(key), ...told }
      }
    },
    {
      method: 'GET',
      url: '/keys/:id',
      summary: 'Shows a key',
      params: KeyId,
      response: { 200: ShownKey },
      handler: async ({ params }) => there(await keys().get(idOf(params)))
    },
    {
      method: 'PATCH',
      url: '/keys/:id',
      summary: 'Changes what is named',
      params: KeyId,
      body: KeyPatch,
      response: { 200: ShownKey },
      async handler(request) {
        const id = idOf(request.params)
        const record = there(await keys().update(id, request.body as KeyChanges))
        return { ...record, ...(await changed(request, 'update', { keyId: id })) }
      }
    },
    {
      method: 'DELETE',
      url: '/keys/:id',
      summary: 'Deletes a key; bills keep its id',
      params: KeyId,
      response: {
        200: Type.Object(
          { id: text('Its id'), deleted: Type.Literal(true), warning },
          { description: 'It is deleted' }
        )
      },
      async handler(request) {
        const id = idOf(request.params)
        if (!(await keys().delete(id))) throw noSuchKey()
        return { id, deleted: true, ...(await changed(request, 'delete', { keyId: id })) }
      }
    },
    {
      method: 'POST',
      url: '/keys/:id/rotate',
      summary: 'Makes a new key under the same id, and shows it this once',
      params: KeyId,
      body: RotateOptions,
      response: { 200: NewKey },
      async handler(request) {
        const id = idOf(request.params)
        const { status } = there(await keys().get(id))
        if (status === 'revoked') throw new GatewayError('conflict', 'This API key is revoked.')
        const { key, record } = there(await keys().rotate(id, request.body as { grace: number }))
        return { ...record, key, ...(await changed(request, 'rotate', { keyId: id })) }
      }
    },
    {
      method: 'POST',
      url: '/keys/:id/revoke',
      summary: 'Revokes a key, for good',
      params: KeyId,
      response: { 200: ShownKey },
      async handler(request) {
        const id = idOf(request.params)
        const record = there(await keys().revoke(id))
        return { ...record, ...(await changed(request, 'revoke', { keyId: id })) }
      }
    }
  ]
}

export function there<T>(found: T | undefined): T {
  if (found === undefined) throw noSuchKey()
  return found
}

export function noSuchKey(): GatewayError {
  return new GatewayError('not_found', 'There is no such key.')
}
