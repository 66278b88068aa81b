import '../check-node.ts'
import { existsSync } from 'node:fs'
import type { FastifyPluginAsync, FastifyRequest } from 'fastify'
import { type Static, Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { type Caller, withExchanges } from '../exchange.ts'
import { pathBelow } from '../http.ts'
import type { Distinct } from '../issues.ts'
import { admitSomebody } from '../keys/first-key.ts'
import { type KeyNews, matchesModel, StatusCodes } from '../keys/key.ts'
import { DEFAULT_STORE, KeyStore, keyFile, type OnKeyChange } from '../keys/key-store.ts'
import { Keyring } from '../keys/keyring.ts'
import {
  closeSources,
  looksIntoStore,
  SourceOptions,
  type Sources,
  sourceIssues,
  toSources
} from '../keys/sources.ts'
import { type StaticKey, StaticKeyList } from '../keys/static.ts'
import { checkOptions, type Given, HeaderName, OptionsError, Section } from '../options.ts'
import { part, share, toPart } from '../parts.ts'
import { StorageOptions } from '../store/storage.ts'

/**
 * Checks API keys: a request with a good key gets `request.caller`, any other is answered 401, 403,
 * 429 or 503 before its body has been read.
 *
 * @example
 * await fastify.register(auth, { keys: ['sk-secret'] })
 * fastify.get('/hello', async request => `hello ${request.caller.id}`)
 */

export const AuthOptions = Section(
  {
    enabled: Type.Boolean({
      default: false,
      description: 'Requires an API key; if left out, true where keys or pipeline are listed'
    }),
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
        default: ['/health', '/healthz', '/livez', '/readyz'],
        description:
          'Paths that need no key, with all below them and their other names (/healthz of /health)'
      }
    ),
    status_codes: StatusCodes,
    keys: StaticKeyList('Keys, in short'),
    db_path: Type.String({
      minLength: 1,
      default: DEFAULT_STORE,
      restart: true,
      description:
        'File of the embedded store (where neither keys nor pipeline are given, and type: builtin), below the data directory if relative'
    }),
    pipeline: Type.Array(SourceOptions, {
      default: [],
      distinct: [
        { by: given => (given as { name?: unknown }).name, what: 'name' }
      ] satisfies Distinct[],
      description: 'Sources of keys, in order'
    })
  },
  'API keys',
  ['keys', 'pipeline']
)
export type AuthOptions = Static<typeof AuthOptions>

/** A key alone may be given as text; `storage` has what the pipeline names. */
export type GivenAuthOptions = Given<Omit<AuthOptions, 'keys'>> & {
  keys?: readonly (string | Given<StaticKey>)[]
  storage?: Given<StorageOptions>
  /** Directory of the embedded store if `db_path` is relative; default: `./data`, as of the program. */
  dataDir?: string | undefined
}

export interface Keys {
  update(options: AuthOptions, storage: StorageOptions): Promise<void>
  credentialHeaders(): readonly string[]
  /** @throws {GatewayError} `model_not_allowed` if the key of a request is restricted to other models */
  checkModel(request: FastifyRequest): void
  /** Status of a response to a caller whose quota is used up. */
  quotaStatus(): number
  /** Drops what is remembered of the key with this SHA-256, or of all, in this process. */
  forget(hash?: string): void
  /** Takes over what another gateway says of keys: what is dead there is revoked here, where it is known. */
  hear(news: readonly KeyNews[]): Promise<void>
  /** Are told of keys that were changed in the store, here. */
  readonly onChange: OnKeyChange[]
  /** The embedded store, whether keys are looked up there or not. A change of it is told to all workers. */
  store(): KeyStore
}

const authPlugin: FastifyPluginAsync<GivenAuthOptions> = async function auth(fastify, given) {
  const { storage: givenStorage, dataDir, ...givenOptions } = given
  const storage = checkOptions(StorageOptions, givenStorage)
  let options = checkOptions(AuthOptions, { enabled: true, ...givenOptions })
  let headerNames: string[] = []
  let keyring: Keyring | undefined
  let sources: Sources = new Map()
  let opened: KeyStore | undefined
  let isStoreChecked = false
  const onChange: Keys['onChange'] = []
  const file = keyFile(dataDir, options.db_path)
  const issues = sourceIssues(options, storage)
  if (issues.length > 0) throw new OptionsError(issues)
  withExchanges(fastify)

  if (!fastify.hasRequestDecorator('caller')) fastify.decorateRequest('caller', undefined)
  share(fastify, 'keys', {
    update,
    credentialHeaders: () => headerNames,
    checkModel,
    quotaStatus: () => options.status_codes.quota_exceeded.http_code,
    forget: hash => keyring?.forget(hash),
    async hear(news) {
      const revoked = news.filter(each => each.revokedAt !== undefined)
      // Nobody's store is made by news.
      const hasStore = opened !== undefined || existsSync(file)
      try {
        if (revoked.length > 0 && hasStore) await store().hearRevoked(revoked)
      } finally {
        forget(news.map(each => each.hash))
      }
    },
    onChange,
    store
  } satisfies Keys)
  fastify.addHook('onClose', async () => {
    await keyring?.idle()
    closeSources(sources, new Map())
    await opened?.close()
  })
  const peers = part(fastify, 'peers')
  peers?.onNews(news => {
    if (news.kind === 'keys') forget(news.hashes)
  })
  await update(options, storage).catch(async error => {
    await opened?.close()
    throw error
  })

  /** What is refused changes nothing. */
  async function update(changed: AuthOptions, storage: StorageOptions): Promise<void> {
    const { log } = fastify
    const next = await toSources(changed, { storage, dataDir, store, log }, sources)
    await checkStore(changed)
    if (changed.enabled) await admitSomebody(next, store, file, log)
    const before = { keyring, sources }
    const { mode, status_codes: codes } = changed
    keyring = new Keyring({ mode, codes, sources: [...next.values()] }, log)
    sources = next
    options = changed
    headerNames = changed.header_names.map(name => name.toLowerCase())
    void before.keyring?.idle().then(() => closeSources(before.sources, next))
  }

  /** Keys that cannot be read would be refused one by one: better not to start. */
  async function checkStore(changed: AuthOptions): Promise<void> {
    if (isStoreChecked || !looksIntoStore(changed) || !existsSync(file)) return
    await store().check()
    isStoreChecked = true
  }

  function store(): KeyStore {
    opened ??= new KeyStore(file, (hashes, validFor) => {
      forget(hashes)
      peers?.tell({ kind: 'keys', ...(hashes === undefined ? {} : { hashes }) })
      for (const listener of onChange) listener(hashes, validFor)
    })
    return opened
  }

  function forget(hashes: readonly string[] | undefined): void {
    if (hashes === undefined) keyring?.forget()
    else for (const hash of hashes) keyring?.forget(hash)
  }

  fastify.addHook('onRequest', async request => {
    const { settlement } = request.exchange
    if (!isCaller(request.caller)) request.caller = undefined
    if (settlement !== undefined) {
      request.caller = settlement.caller
      return
    }
    if (!options.enabled || request.routeOptions.config.auth === false) return
    if (isSkipped(request, fastify.prefix, options.skip_paths)) return
    const key = presentedKey(request, headerNames)
    if (key === undefined) {
      throw new GatewayError(
        'missing_api_key',
        'An API key is required: send it as "Authorization: Bearer KEY".',
        { headers: { 'www-authenticate': 'Bearer' } }
      )
    }
    request.caller = await keyring!.caller(key, request.exchange.clientIp)
  })

  fastify.addHook('preHandler', (request, _reply, done) => {
    checkModel(request)
    done()
  })
}

function checkModel({ caller, exchange: { endpoint }, payload }: FastifyRequest): void {
  const models = caller?.models
  if (models === undefined || endpoint === undefined || endpoint.body === 'none') return
  if (endpoint.body === 'stream') {
    throw new GatewayError(
      'model_not_allowed',
      'This API key is held to some models, and the model of an upload is not read.'
    )
  }
  const model = payload?.model
  if (model === undefined || !matchesModel(models, model)) {
    throw new GatewayError('model_not_allowed', 'This API key may not use this model.')
  }
}

/** Whether this is a caller, which a host may have set; its decorator of this name may be another thing. */
function isCaller(value: unknown): value is Caller {
  return typeof (value as Caller | null | undefined)?.id === 'string'
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

/**
 * Paths are compared by whole segments: /health skips /health/ready, but not /healthy. It also skips /healthz, which is
 * the same route; /healthz alone does not skip /health, which has more below it.
 */
function isSkipped(request: FastifyRequest, prefix: string, skipPaths: string[]): boolean {
  const { aliasOf, endpoint } = request.routeOptions.config
  const path = pathBelow(request.url, prefix)
  const other = aliasOf ?? (endpoint?.upstreamPrefix ?? '') + path
  return skipPaths.some(skip => isBelow(path, skip) || isBelow(other, skip))
}

/** Whether a path is this folder, with or without a slash at its end, or below it. */
function isBelow(path: string, folder: string): boolean {
  const bare = folder.endsWith('/') ? folder.slice(0, -1) : folder
  return path.startsWith(bare) && (path.length === bare.length || path[bare.length] === '/')
}

export default toPart(authPlugin, {
  name: 'auth',
  decorates: ['keys']
})
