import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import { type Static, Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { type Caller, withExchanges } from '../exchange.ts'
import { pathBelow } from '../http.ts'
import { type KeySource, matchesModel, StatusCodes } from '../keys/key.ts'
import { Keyring } from '../keys/keyring.ts'
import { type StaticKey, StaticKeyList, StaticKeys } from '../keys/static.ts'
import { WebhookKeys, WebhookKeysOptions } from '../keys/webhook.ts'
import { checkOptions, type Given, HeaderName, NotBuilt, Section } from '../options.ts'

/**
 * Checks API keys: a request with a good key gets `request.caller`, any other is answered 401, 403,
 * 429 or 503 before its body has been read.
 *
 * @example
 * await fastify.register(auth, { keys: ['sk-secret'] })
 * fastify.get('/hello', async request => `hello ${request.caller.id}`)
 */

const Provider = Type.Object(
  {
    name: Type.Optional(Type.String({ description: 'Name in logs' })),
    type: Type.Enum(['static', 'webhook'], {
      later: ['file', 'builtin', 'redis', 'database', 'lua'],
      description: 'What it is'
    }),
    enabled: Type.Boolean({ default: true, description: 'Switches it on' }),
    static: Type.Optional(
      Type.Object(
        { keys: StaticKeyList('Keys') },
        { additionalProperties: false, description: 'Keys in this file' }
      )
    ),
    webhook: Type.Optional(WebhookKeysOptions),
    lua: NotBuilt('Script that decides'),
    script: NotBuilt('Script that decides'),
    redis: NotBuilt('Keys in Redis'),
    database: NotBuilt('Keys in a database')
  },
  {
    additionalProperties: false,
    partOfType: true
  }
)

export const AuthOptions = Section(
  {
    enabled: Type.Boolean({ default: false, description: 'Asks for an API key' }),
    mode: Type.Enum(['first_match', 'all'], {
      default: 'first_match',
      description:
        'first_match: the first source that knows a key decides; all: every one must admit'
    }),
    header_names: Type.Array(HeaderName, {
      minItems: 1,
      default: ['Authorization', 'X-API-Key', 'api-key'],
      description: 'Headers a key may stand in; Authorization as "Bearer KEY"'
    }),
    skip_paths: Type.Array(
      Type.String({ pattern: '^/[^*?#]+$', expects: 'a path such as /health' }),
      {
        default: ['/health'],
        description: 'Paths that need no key, with all below them'
      }
    ),
    status_codes: StatusCodes,
    keys: StaticKeyList('Keys, in short'),
    pipeline: Type.Array(Provider, { default: [], description: 'Sources of keys, in order' })
  },
  'API keys'
)
export type AuthOptions = Static<typeof AuthOptions>

/** A key alone may be given as text. */
export type GivenAuthOptions = Given<Omit<AuthOptions, 'keys'>> & {
  keys?: readonly (string | Given<StaticKey>)[]
}

declare module 'fastify' {
  interface FastifyRequest {
    caller: Caller | undefined
  }
  interface FastifyInstance {
    keys: { update(options: AuthOptions): void; credentialHeaders(): readonly string[] }
  }
}

const authPlugin: FastifyPluginAsync<GivenAuthOptions> = async function auth(fastify, given) {
  let options = checkOptions(AuthOptions, { enabled: true, ...given })
  let headerNames = lowerCased(options.header_names)
  let keyring = toKeyring(options, fastify.log)
  withExchanges(fastify)

  if (!fastify.hasRequestDecorator('caller')) fastify.decorateRequest('caller', undefined)
  fastify.decorate('keys', {
    update: changed => {
      options = changed
      headerNames = lowerCased(changed.header_names)
      keyring = toKeyring(changed, fastify.log)
    },
    credentialHeaders: () => headerNames
  })

  fastify.addHook('onRequest', async request => {
    if (!options.enabled || isSkipped(request, fastify.prefix, options.skip_paths)) return
    const key = presentedKey(request, headerNames)
    if (key === undefined) {
      throw new GatewayError(
        'missing_api_key',
        'An API key is required: send it as "Authorization: Bearer KEY".',
        { headers: { 'www-authenticate': 'Bearer' } }
      )
    }
    request.caller = await keyring.caller(key, request.ip)
  })

  fastify.addHook('preHandler', (request, _reply, done) => {
    const models = request.caller?.models
    const { endpoint } = request.exchange
    if (models === undefined || endpoint === undefined || endpoint.body === 'none') return done()
    if (endpoint.body === 'stream') {
      throw new GatewayError(
        'model_not_allowed',
        'This API key is held to some models, and the model of an upload is not read.'
      )
    }
    const model = request.payload?.model
    if (model === undefined || !matchesModel(models, model)) {
      throw new GatewayError('model_not_allowed', 'This API key may not use this model.')
    }
    done()
  })
}

function toKeyring(options: AuthOptions, log: FastifyRequest['log']): Keyring {
  const sources: KeySource[] = []
  const onUnreadable = (member: string, keyId: string) =>
    log.warn({ keyId, member }, 'a member of a key is unreadable')
  if (options.keys.length > 0) sources.push(new StaticKeys('keys', options.keys))
  for (const { name, type, enabled, webhook, static: keys } of options.pipeline) {
    if (!enabled) continue
    if (type === 'webhook') {
      sources.push(new WebhookKeys(name ?? type, webhook!, options.status_codes, onUnreadable))
    } else sources.push(new StaticKeys(name ?? type, keys?.keys ?? []))
  }
  if (options.enabled && sources.length === 0) {
    log.warn('auth is enabled but has no keys and no source of keys: nobody will be admitted')
  }
  return new Keyring({ mode: options.mode, codes: options.status_codes, sources }, log)
}

function lowerCased(names: string[]): string[] {
  return names.map(name => name.toLowerCase())
}

/** The first key that one of the headers holds. */
function presentedKey(request: FastifyRequest, names: readonly string[]): string | undefined {
  for (const name of names) {
    const value = request.headers[name]
    if (typeof value !== 'string' || value === '') continue
    if (name !== 'authorization') return value
    const bearer = /^Bearer +(\S+) *$/i.exec(value)
    if (bearer !== null) return bearer[1]
  }
  return undefined
}

/** Paths are compared by whole segments: /health skips /health/ready, but not /healthy. */
function isSkipped(request: FastifyRequest, prefix: string, skipPaths: string[]): boolean {
  const path = pathBelow(request.url, prefix)
  return skipPaths.some(skip => {
    const bare = skip.endsWith('/') ? skip.slice(0, -1) : skip
    return path === bare || path.startsWith(`${bare}/`)
  })
}

export default fp(authPlugin, { name: 'auth', fastify: '5.x' })
