import crypto from 'node:crypto'
import { normalizeIP } from '@fastify/rate-limit'
import Fastify, {
  type FastifyInstance,
  type FastifyPluginAsync,
  type FastifyRequest,
  LogController
} from 'fastify'
import { type Static, Type } from 'typebox'
import { GatewayError } from '../errors.ts'
import { withExchanges } from '../exchange.ts'
import type { Issue } from '../issues.ts'
import { Lru } from '../keys/lru.ts'
import { ADDRESS_OR_NONE, listen, serversOf } from '../listen.ts'
import { checkOptions, type Given, OptionsError, Section } from '../options.ts'
import { part, share, toPart } from '../parts.ts'
import { VERSION } from '../version.ts'

/**
 * Lets in who has the admin token, and nobody else: under `/admin` of this server, or of a server of its
 * own where `listen` names an address. What can be done there is in the routes it is given.
 *
 * @example
 * const routes = async scope => scope.get('/hello', async () => 'hello')
 * await fastify.register(admin, { token: 'secret', routes })
 */

export const AdminOptions = Section(
  {
    enabled: Type.Boolean({ default: false, restart: true, description: 'Serves /admin' }),
    token: Type.String({
      pattern: '^[\\x21-\\x7e]*$',
      expects: 'text without spaces and line ends',
      secret: true,
      default: '',
      description: 'Whoever has it may do everything'
    }),
    listen: Type.String({
      ...ADDRESS_OR_NONE,
      default: '',
      restart: true,
      description: 'Address and port of its own, plain HTTP; else it is on server.listen'
    })
  },
  'The admin API'
)
export type AdminOptions = Static<typeof AdminOptions>

/** The options of the plugin, and the routes that need the token. */
export type GivenAdminOptions = Given<AdminOptions> & { routes: FastifyPluginAsync }

export interface Admin {
  /** Takes over another token; anything else needs a restart. */
  update(options: AdminOptions): void
}

const PREFIX = '/admin'
/** Wrong tokens that an address may try in a window (ms), in each worker, and addresses that are remembered. */
const MAX_FAILURES = 10
const WINDOW = 60_000
const MAX_ADDRESSES = 10_000
const REQUEST_TIMEOUT = 30_000

/** What an admin API without a token would be: open to everybody. */
export function adminIssues({ enabled, token }: AdminOptions): Issue[] {
  if (!enabled || token !== '') return []
  return [{ path: ['token'], message: 'is missing, but the admin API is enabled' }]
}

const adminPlugin: FastifyPluginAsync<GivenAdminOptions> = async function admin(fastify, given) {
  const { routes, ...givenOptions } = given
  const options = checkOptions(AdminOptions, { enabled: true, ...givenOptions })
  const issues = adminIssues(options)
  if (issues.length > 0) throw new OptionsError(issues)
  let expected = digest(options.token)
  share(fastify, 'admin', {
    update(changed) {
      if (changed.token !== '') expected = digest(changed.token)
    }
  })
  if (!options.enabled) return

  const failures = new Failures()
  const guarded: FastifyPluginAsync = async scope => {
    scope.addHook('onRequest', async (request, reply) => {
      reply.header('cache-control', 'no-store')
      const address = normalizeIP(request.exchange.clientIp)
      const token = presentedToken(request)
      if (token !== undefined && crypto.timingSafeEqual(digest(token), expected)) return
      failures.check(address)
      if (token === undefined) {
        throw new GatewayError(
          'missing_admin_token',
          'The admin token is required: send it as "X-Admin-Token: TOKEN" or "Authorization: Bearer TOKEN".',
          { headers: { 'www-authenticate': 'Bearer' } }
        )
      }
      failures.count(address)
      fastify.log.warn({ action: 'refused', by: request.exchange.clientIp }, 'admin')
      throw new GatewayError('invalid_admin_token', 'This admin token is not valid.')
    })
    await scope.register(routes)
  }
  if (options.listen === '') await fastify.register(guarded, { prefix: PREFIX })
  else await serveApart(fastify, guarded, options.listen)
}

/** A server that has nothing but this; it is there before the gateway itself serves. */
async function serveApart(
  fastify: FastifyInstance,
  routes: FastifyPluginAsync,
  address: string
): Promise<void> {
  const { log } = fastify
  const own = Fastify({
    loggerInstance: log,
    logController: new LogController({ disableRequestLogging: true }),
    requestTimeout: REQUEST_TIMEOUT,
    forceCloseConnections: true
  }) as unknown as FastifyInstance
  withExchanges(own)
  await own.register(routes, { prefix: PREFIX })
  own.get('/health', (_request, reply) => reply.send({ status: 'ok', version: VERSION }))
  own.setNotFoundHandler((_request, reply) => {
    const error = { code: 'not_found', message: 'There is no such route.' }
    reply.code(404).send({ error })
  })
  const connections = part(fastify, 'connections')
  connections?.watch(own.server, true)
  fastify.addHook('onReady', async () => {
    const url = await listen(own, address)
    for (const other of serversOf(own).slice(1)) connections?.watch(other, true)
    // Of several workers one line is enough.
    log[part(fastify, 'peers') === undefined ? 'info' : 'debug'](
      { url },
      'the admin API is listening'
    )
  })
  fastify.addHook('onClose', () => own.close())
}

/** How often each address has shown a wrong token lately. */
class Failures {
  readonly #byAddress = new Lru<string, { count: number; until: number }>(MAX_ADDRESSES)

  /** @throws {GatewayError} for an address that has failed too often */
  check(address: string): void {
    const { count, until } = this.#byAddress.get(address) ?? { count: 0, until: 0 }
    const left = until - performance.now()
    if (count < MAX_FAILURES || left <= 0) return
    throw new GatewayError('rate_limit_exceeded', 'Too many wrong admin tokens.', {
      headers: { 'retry-after': String(Math.ceil(left / 1000)) }
    })
  }

  count(address: string): void {
    const before = this.#byAddress.get(address)
    const now = performance.now()
    if (before !== undefined && now < before.until) before.count++
    else this.#byAddress.set(address, { count: 1, until: now + WINDOW })
  }
}

function presentedToken({ headers }: FastifyRequest): string | undefined {
  const own = headers['x-admin-token']
  if (typeof own === 'string' && own !== '') return own
  return /^Bearer +(\S+) *$/i.exec(headers.authorization ?? '')?.[1]
}

/** Of the same length, however long the token is. */
function digest(token: string): Buffer {
  return crypto.hash('sha256', token, 'buffer')
}

export default toPart(adminPlugin, {
  name: 'admin',
  decorates: ['admin']
})
