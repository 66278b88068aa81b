import type {} from '@fastify/swagger'
import type {
  FastifyInstance,
  FastifyPluginAsync,
  FastifyReply,
  FastifyRequest,
  FastifySchema
} from 'fastify'
import type { TSchema } from 'typebox'
import { openaiError } from '../dialects/openai.ts'
import { GatewayError, toGatewayError } from '../errors.ts'
import { formatPath, type Issue } from '../issues.ts'
import { isTooDeep, replaced, TOO_DEEP } from '../json-body.ts'
import { KeyExistsError, type KeyStore } from '../keys/key-store.ts'
import { plainSchema } from '../openapi.ts'
import { findIssues, OptionsError } from '../options.ts'
import type { Backends } from '../plugins/backends.ts'
import type { UsageReports } from '../plugins/usage.ts'
import { DatabaseError } from '../store/sql.ts'
import { VERSION } from '../version.ts'
import backendRoutes from './admin-backends.ts'
import configRoutes from './admin-config.ts'
import keyRoutes from './admin-keys.ts'
import originalRoutes from './admin-original.ts'
import viewRoutes from './admin-views.ts'

/** What the admin API shows and changes. */
export interface Administered {
  keys(): KeyStore
  /** Resolves when whoever shares the limits has been told of changed keys; false: that failed. */
  shared(): Promise<boolean>
  backends: Backends
  usage: UsageReports
  /** Pieces of the running configuration as JSON, without its secrets. */
  config(): Iterable<string>
  /** Reads the configuration again and takes it over; undefined: there is no file. */
  reload(): Promise<string> | undefined
}

/** What a route of the admin API is made of. */
export interface AdminRoute {
  method: 'GET' | 'POST' | 'PATCH' | 'DELETE'
  url: string
  summary: string
  params?: TSchema
  querystring?: TSchema
  body?: TSchema
  /** Of the answer, by its status; for the description alone. */
  response: Record<number, TSchema>
  /** Errors look as in the original. */
  isOriginal?: boolean
  bodyLimit?: number
  /** The body stays the bytes that came, unchecked; `body` is for the description alone. */
  isRaw?: boolean
  /** Makes of a body as it came what is checked. */
  read?(body: unknown): unknown
  handler(request: FastifyRequest, reply: FastifyReply): Promise<unknown>
}

const BODY_LIMIT = 1024 * 1024
const EVERY = ['GET', 'POST', 'PUT', 'PATCH', 'DELETE'] as const
const NOT_SHARED =
  'The change holds here, but other gateways that share the limits could not be told of it.'

/** The routes of the admin API; who may call them is not asked here. */
export default function adminRoutes(administered: Administered): FastifyPluginAsync {
  return async scope => {
    scope.removeAllContentTypeParsers()
    scope.addContentTypeParser('*', { parseAs: 'buffer' }, parseJson(scope))
    scope.setValidatorCompiler(({ schema, httpPart }) => toValidator(schema as Described, httpPart))
    scope.setSerializerCompiler(() => JSON.stringify)
    scope.setErrorHandler(answerError)
    const { default: swagger } = await import('@fastify/swagger')
    await scope.register(swagger, {
      openapi: {
        openapi: '3.1.0',
        info: { title: 'LLMProxy admin API', version: VERSION },
        components: {
          securitySchemes: {
            token: { type: 'apiKey', in: 'header', name: 'X-Admin-Token' },
            bearer: { type: 'http', scheme: 'bearer' }
          }
        },
        security: [{ token: [] }, { bearer: [] }]
      },
      transform: ({ schema, url }) => ({ schema: plainSchema(schema ?? {}) as FastifySchema, url })
    })

    /** Writes down who has changed what; what the caller must know of it. */
    const changed: Changed = async (request, action, details) => {
      scope.log.info(
        { requestId: request.exchange.id, action, ...details, by: request.exchange.clientIp },
        'admin'
      )
      if (await administered.shared()) return {}
      return { warning: NOT_SHARED }
    }
    for (const route of [
      ...keyRoutes(administered, changed),
      ...viewRoutes(administered, scope),
      ...configRoutes(administered, changed),
      ...backendRoutes(administered, changed),
      ...originalRoutes(administered, changed)
    ]) {
      declare(scope, route)
    }
    const refuse = (error: () => GatewayError) => async () => {
      throw error()
    }
    scope.route({
      method: [...EVERY],
      url: '/*',
      schema: { hide: true },
      config: OPEN,
      handler: refuse(() => new GatewayError('not_found', 'There is no such route.'))
    })
  }
}

export type Changed = (
  request: FastifyRequest,
  action: string,
  details: { keyId?: string; keys?: number; mode?: string; backend?: string }
) => Promise<{ warning?: string }>

/** Neither an API key nor a limit of calls has to do with it. */
const OPEN = { auth: false, rateLimit: false } as const

function declare(scope: FastifyInstance, route: AdminRoute): void {
  const {
    method,
    url,
    handler,
    isOriginal = false,
    isRaw = false,
    bodyLimit = BODY_LIMIT,
    read,
    ...schema
  } = route
  scope.route({
    method,
    url,
    bodyLimit,
    schema,
    config: { ...OPEN, isOriginal, isRaw },
    ...(isRaw ? { validatorCompiler: () => () => true } : {}),
    preValidation: (request, _reply, done) => {
      if (read !== undefined && !isRaw) request.body = read(request.body)
      done()
    },
    async handler(request, reply) {
      try {
        return await handler(request, reply)
      } catch (error) {
        throw toAdminError(error)
      }
    }
  })
  if (!isOriginal) return
  scope.route({
    method: EVERY.filter(each => each !== method),
    url,
    schema: { hide: true },
    config: { ...OPEN, isOriginal },
    handler: async () => {
      throw new GatewayError('method_not_allowed', `Only ${method} is possible here.`, {
        headers: { allow: method }
      })
    }
  })
}

/** What the store complains about, as an answer. */
function toAdminError(error: unknown): unknown {
  if (error instanceof OptionsError) return invalid(error.issues)
  if (error instanceof KeyExistsError) {
    return new GatewayError('conflict', 'There is such a key already.')
  }
  if (!(error instanceof DatabaseError)) return error
  return new GatewayError('store_unavailable', 'The store cannot be used at the moment.', {
    cause: error
  })
}

function invalid(issues: Issue[], part = ''): GatewayError {
  const lines = issues.map(({ path, message }) => `${formatPath(path) || part} ${message}`.trim())
  return new GatewayError('invalid_request', lines.join('; '), { cause: new OptionsError(issues) })
}

type Described = TSchema & {
  default?: unknown
  patch?: true
  properties?: Record<string, { type?: string }>
}

/** Checks with the house's keywords, so that an error names the member and what was expected. */
function toValidator(schema: Described, part = '') {
  return (given: unknown) => {
    const value = structuredClone(given ?? schema.default)
    if (part === 'querystring') readNumbers(schema, value as Record<string, unknown>)
    // Null takes a member away, and needs no check.
    const set = schema.patch ? replaced(value, each => each ?? undefined) : value
    const issues = findIssues(schema, set)
    return issues.length > 0 ? { error: invalid(issues, part) } : { value }
  }
}

function readNumbers({ properties = {} }: Described, query: Record<string, unknown>): void {
  for (const [name, value] of Object.entries(query)) {
    const isNumber = properties[name]?.type === 'integer' && /^\d+$/.test(String(value))
    if (isNumber) query[name] = Number(value)
  }
}

/** Whatever its type says, a body is JSON. What a parser complains about may hold some of it. */
function parseJson(scope: FastifyInstance) {
  const parse = scope.getDefaultJsonParser('error', 'error')
  return (
    request: FastifyRequest,
    bytes: Buffer,
    done: (error: Error | null, body?: unknown) => void
  ): void => {
    if (request.routeOptions.config.isRaw) return done(null, bytes)
    const text = bytes.toString()
    if (text === '') return done(null, undefined)
    if (isTooDeep(text)) return done(invalid([{ path: [], message: TOO_DEEP }], 'body'))
    parse(request, text, (error, body) => {
      if (error === null) done(null, body)
      else done(new GatewayError('invalid_json', 'The request body is not valid JSON.'))
    })
  }
}

function answerError(error: unknown, request: FastifyRequest, reply: FastifyReply): void {
  const gatewayError = toGatewayError(error)
  const { exchange, routeOptions } = request
  exchange.answeredWith(gatewayError)
  const { cause, message } = gatewayError
  if (gatewayError.statusCode >= 500) {
    request.log.error({ err: cause ?? error, requestId: exchange.id }, 'the admin API has failed')
  }
  const { error: shown } = openaiError(gatewayError)
  const param =
    cause instanceof OptionsError ? formatPath(cause.issues[0]!.path).slice(0, -1) || null : null
  reply
    .code(gatewayError.statusCode)
    .headers({ 'x-request-id': exchange.id, ...gatewayError.headers })
    .type('application/json; charset=utf-8')
    .send(
      JSON.stringify(
        routeOptions.config.isOriginal
          ? { success: false, message: '', error: message }
          : { error: { ...shown, param } }
      )
    )
}
