import type { Registry } from '@prometheus-io/client'

import type { Caller, Endpoint, Exchange, Exchanges } from './exchange.ts'
import type { Payload } from './payload.ts'
import type { Keys } from './plugins/auth.ts'
import type { Backends } from './plugins/backends.ts'
import type { Discovery } from './plugins/discovery.ts'
import type { Limits } from './plugins/limits.ts'
import type { Logging } from './plugins/logging.ts'
import type { Tokens } from './plugins/metering.ts'
import type { AnswerHook, Forwarding } from './plugins/proxy.ts'
import type { UsageReports } from './plugins/usage.ts'

/**
 * Types of what the parts decorate their scope with. A server that registers parts imports them:
 * `import type {} from 'llmproxy/types'`. No other module of the package changes Fastify's types, so a host may have
 * decorators of the same names.
 */
declare module 'fastify' {
  interface FastifyInstance {
    exchanges: Exchanges
    keys: Keys
    limits: Limits
    backends: Backends
    discovery: Discovery
    answerHooks: AnswerHook[]
    proxy: Forwarding
    tokens: Tokens
    usage: UsageReports
    logging: Logging
    metricsRegistry: Registry
  }
  interface FastifyRequest {
    exchange: Exchange
    caller: Caller | undefined
    payload: Payload | undefined
  }
  interface FastifyReply {
    /** Sends the request to a backend and its response to the client. */
    forward(): FastifyReply
  }
  interface FastifyContextConfig {
    /** The API that a route belongs to. */
    endpoint?: Endpoint
    /** Whether the route needs an API key; default: true. */
    auth?: boolean
    /** Path of the route that has the same handler: `auth.skip_paths` that cover it cover this one, too. */
    aliasOf?: string
    /** Whether machines request the route all the time: such requests are not in the access log. */
    probe?: boolean
  }
}
