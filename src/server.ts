import { readFileSync, unwatchFile, watchFile } from 'node:fs'
import { type Server as HttpServer, STATUS_CODES } from 'node:http'
import type { Server as TlsServer } from 'node:https'
import { flushCompileCache } from 'node:module'
import type { Socket } from 'node:net'
import cors from '@fastify/cors'
import Fastify, {
  type FastifyBaseLogger,
  type FastifyInstance,
  type FastifyReply,
  type FastifyRequest,
  LogController
} from 'fastify'
import { addressOf, trusting } from './address.ts'
import gateway, { answerError, type Gateway } from './app.ts'
import { allOrNothing } from './changes.ts'
import { type Config, ConfigSchema } from './config.ts'
import { Connections } from './connections.ts'
import { openaiError } from './dialects/openai.ts'
import { GatewayError, toGatewayError } from './errors.ts'
import { networksOf } from './keys/key.ts'
import { listen, serversOf } from './listen.ts'
import { Log } from './logs/log.ts'
import { giveMemoryBack, keepYoung } from './memory.ts'
import { LONGEST } from './options.ts'
import { share } from './parts.ts'
import type { Peers } from './peers.ts'
import { VERSION } from './version.ts'

/** What serves: this process, or workers that it looks after. */
export interface Server {
  readonly url: string
  readonly log: FastifyBaseLogger
  /**
   * Takes over another configuration; running exchanges keep the one they began with. What fails changes nothing.
   * Members that need a restart must be as they were (see `takeOver` in `changes.ts`).
   */
  reload(config: Config): Promise<void>
  /** Sets the function that reads the configuration again for the admin API and returns the changes as JSON. */
  onReload(read: () => Promise<string>): void
  /** Lets running answers finish, then stops. */
  close(): Promise<void>
  /** Longest time (ms) that this may take. */
  readonly stopTimeout: number
}

/** The line that tells that calls can be made. */
export const LISTENING = 'LLMProxy is listening'

const WATCH_INTERVAL = 1_000

/** Time (ms) beyond the drain for usage events, databases and logs. */
const CLOSE_TIMEOUT = 13_000

/** Longest time (ms) that an orderly stop may take. */
export function stopTimeout({ drain_delay, drain_timeout }: Config['server']): number {
  return Math.min(drain_delay + drain_timeout + CLOSE_TIMEOUT, LONGEST)
}

/** Serves in this process. `peers`: the other workers, if it is one of several. */
export async function startServer(
  started: Config,
  dataDir: string,
  peers?: Peers
): Promise<Server & { gateway: Gateway; connections: Connections }> {
  keepYoung()
  let config = started
  let read = peers?.reload
  const out = new Log(config.log, dataDir)
  const log = out.logger
  const app = await createApp(config, log, { dataDir, peers, reload: () => read?.() })
  const { fastify, control: gateway } = app
  const url = await listen(fastify, config.server.listen)
  const address = { version: VERSION, node: process.version, url }
  // Of several workers the primary says this, once.
  const level = peers === undefined ? 'info' : 'debug'
  log[level](address, LISTENING)
  // The end of the process is too late: it waits for no disk (`exit.ts`).
  flushCompileCache()
  if (peers === undefined) sayDemo(log, gateway, url)
  const idle = giveMemoryBack(gateway.exchanges)

  const { enabled, cert_file, key_file, client_ca_file } = config.server.tls
  const files = [cert_file, key_file, client_ca_file].filter(file => enabled && file !== undefined)
  for (const file of files) {
    watchFile(file!, { interval: WATCH_INTERVAL, persistent: false }, renewTls)
  }

  function renewTls(): void {
    try {
      const context = readTls(config.server.tls)
      for (const each of serversOf(fastify)) {
        ;(each as unknown as TlsServer).setSecureContext(context)
      }
      log.info('TLS certificate renewed')
    } catch (error) {
      log.error({ err: error }, 'the changed TLS files cannot be used; the last good ones stay')
    }
  }

  async function take(changed: Config): Promise<void> {
    await out.update(changed.log)
    await app.reload(changed)
  }

  return {
    url,
    log,
    gateway,
    connections: app.connections,
    async reload(changed) {
      await allOrNothing(take, config, changed)
      config = changed
    },
    onReload(reader) {
      read = reader
    },
    get stopTimeout() {
      return stopTimeout(config.server)
    },
    async close() {
      for (const file of files) unwatchFile(file!)
      clearInterval(idle)
      log[level]('shutting down')
      await fastify.close()
      log[level]('stopped')
      await out.flush()
    }
  }
}

/** What is around the gateway, if it is there. */
interface Surroundings {
  dataDir?: string | undefined
  peers?: Peers | undefined
  /** Reads the configuration again. */
  reload?: () => Promise<string> | undefined
}

/** The gateway in a Fastify server of its own, as the configuration has it, not listening yet. */
export async function createApp(
  config: Config,
  log: FastifyBaseLogger,
  { dataDir, peers, reload }: Surroundings = {}
) {
  const { server } = config
  let running = config
  const http = {
    maxHeaderSize: server.max_header_bytes,
    headersTimeout: server.header_timeout,
    connectionsCheckingInterval: 500,
    requireHostHeader: false
  }
  let control!: Gateway
  /** A request that no hook sees. */
  const refuseEarly = (error: GatewayError, clientIp: string | undefined) => ({
    error,
    id: control.exchanges.stillborn(error, clientIp)
  })
  const fastify = Fastify({
    ...(server.tls.enabled
      ? { https: { ...http, ...readTls(server.tls), handshakeTimeout: server.header_timeout } }
      : { http }),
    // 0: the time for the body is limited, the time an answer takes is not.
    connectionTimeout: 0,
    requestTimeout: server.read_timeout,
    keepAliveTimeout: server.idle_timeout,
    bodyLimit: server.max_body_size,
    trustProxy: Array.isArray(server.trust_proxy)
      ? trusting(networksOf(server.trust_proxy))
      : server.trust_proxy,
    requestIdHeader: false,
    forceCloseConnections: true,
    return503OnClosing: false,
    loggerInstance: log,
    childLoggerFactory: (logger: FastifyBaseLogger) => logger,
    logController: new QuietLog({ disableRequestLogging: true }),
    clientErrorHandler: (error: NodeJS.ErrnoException, socket: Socket) => {
      if (!isAnswerable(error, socket)) socket.destroy()
      else answerRaw(socket, refuseEarly(toClientError(error), socket.remoteAddress))
    },
    frameworkErrors: (error: unknown, request: FastifyRequest, reply: FastifyReply) => {
      const refused = refuseEarly(toGatewayError(error), addressOf(request))
      reply
        .code(refused.error.statusCode)
        .headers(idHeaders(refused.id))
        .type(JSON_TYPE)
        .send(JSON.stringify(openaiError(refused.error)))
    },
    routerOptions: { maxParamLength: 500, ignoreTrailingSlash: true },
    rewriteUrl: ({ url }: { url?: string }) => withoutOrigin(url ?? '/'),
    // A large file of keys may take longer to read than plugins usually may.
    pluginTimeout: 0,
    exposeHeadRoutes: true
  } as never) as unknown as FastifyInstance
  const connections = new Connections(log, peers?.count ?? 1)
  connections.update(server)
  connections.watch(fastify.server as HttpServer)
  share(fastify, 'connections', connections)
  fastify.addHook('onListen', async () => {
    for (const other of serversOf(fastify).slice(1)) connections.watch(other)
  })
  fastify.setErrorHandler(answerError)
  if (server.cors.enabled) await fastify.register(cors, corsOptions(server.cors))

  fastify.server.on('checkExpectation', (request, response) => {
    const { error, id } = refuseEarly(
      new GatewayError('unknown_expectation', UNKNOWN_EXPECTATION),
      request.socket.remoteAddress
    )
    response
      .writeHead(error.statusCode, { ...idHeaders(id), 'content-type': JSON_TYPE })
      .end(JSON.stringify(openaiError(error)))
  })

  await fastify.register(gateway, {
    ...sections(config),
    settings: () => {
      const { server, log } = running
      return { schema: ConfigSchema, value: { server, log } }
    },
    ownsNotFound: true,
    ...(peers === undefined ? {} : { peers }),
    ...(dataDir === undefined ? {} : { dataDir }),
    ...(reload === undefined ? {} : { reload }),
    onGateway: (created: Gateway) => {
      control = created
    }
  })
  // After the gateway's own hook, in which it drains.
  await fastify.register(async last => {
    last.addHook('preClose', async () => connections.close())
  })
  await fastify.ready()
  return {
    fastify,
    control,
    connections,
    async reload(changed: Config): Promise<void> {
      await control.reload(sections(changed))
      const { header_timeout, read_timeout, idle_timeout } = changed.server
      for (const each of serversOf(fastify)) {
        each.headersTimeout = header_timeout
        each.requestTimeout = read_timeout
        each.keepAliveTimeout = idle_timeout
      }
      connections.update(changed.server)
      running = changed
    }
  }
}

/** The target of a request that was written for a proxy (absolute form, RFC 9112, section 3.2.2) names this server. */
function withoutOrigin(target: string): string {
  if (target.startsWith('/')) return target
  const rest = target.replace(/^https?:\/\/[^/?#]*/i, '')
  return rest.startsWith('?') || rest === '' ? `/${rest}` : rest
}

/** The gateway logs a line for each exchange itself; Fastify's own would hold URLs with their queries. */
class QuietLog extends LogController {
  override streamError(): void {}
  override routeNotFound(): void {}
  override serviceUnavailable(): void {}
}

/** What the gateway plugin takes of a file. */
export function sections(config: Config) {
  const { backends, routing, health_check, discovery } = config
  const { auth, rate_limit, usage, storage, logging, metrics } = config
  const { db_path: _, ...admin } = config.admin
  const { write_timeout, heartbeat, allow_engine_controls, overload } = config.server
  const { drain_delay, drain_timeout } = config.server
  const parts = { auth, rate_limit, usage, storage, logging, metrics, admin }
  const serving = {
    proxy: { write_timeout, heartbeat, allow_engine_controls },
    overload,
    drain_delay,
    drain_timeout
  }
  return { backends, routing, health_check, discovery, ...parts, ...serving }
}

function readTls(tls: Config['server']['tls']) {
  return {
    cert: readFileSync(tls.cert_file!),
    key: readFileSync(tls.key_file!),
    minVersion: 'TLSv1.2' as const,
    ...(tls.client_ca_file === undefined ? {} : { ca: readFileSync(tls.client_ca_file) }),
    requestCert: tls.client_auth !== 'none',
    rejectUnauthorized: tls.client_auth === 'require'
  }
}

/** Headers that SDKs read: ids, limits, and whether and when to retry. */
const EXPOSED = [
  ...['x-request-id', 'request-id', 'x-llmproxy-request-id', 'x-llmproxy-attempts'],
  ...['retry-after', 'retry-after-ms', 'x-should-retry'],
  ...['limit', 'remaining', 'reset'].flatMap(name =>
    ['requests', 'tokens'].map(unit => `x-ratelimit-${name}-${unit}`)
  ),
  ...['limit', 'remaining', 'reset'].flatMap(name =>
    ['requests', 'tokens'].map(unit => `anthropic-ratelimit-${unit}-${name}`)
  )
]
const CORS_METHODS = ['GET', 'POST', 'PUT', 'DELETE', 'OPTIONS']

function corsOptions(options: Config['server']['cors']) {
  const all = options.allowed_origins.includes('*')
  return {
    origin: all && !options.allow_credentials ? '*' : all ? true : options.allowed_origins,
    methods: options.allowed_methods.length > 0 ? options.allowed_methods : CORS_METHODS,
    ...(options.allowed_headers.length > 0 ? { allowedHeaders: options.allowed_headers } : {}),
    exposedHeaders: [...EXPOSED, ...options.expose_headers],
    credentials: options.allow_credentials,
    ...(options.max_age > 0 ? { maxAge: options.max_age } : {})
  }
}

function sayDemo(log: FastifyBaseLogger, { demoUrl }: Gateway, url: string): void {
  if (demoUrl === undefined) return
  log.info('A backend of this configuration is the built-in demo. Try it:')
  log.info(
    `curl -N ${url}/v1/chat/completions -H 'content-type: application/json' ` +
      `-d '{"model": "demo", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'`
  )
}

const JSON_TYPE = 'application/json; charset=utf-8'
const UNKNOWN_EXPECTATION = 'Only 100-continue can be expected.'

function idHeaders(id: string) {
  return { 'x-llmproxy-request-id': id, 'x-request-id': id }
}

/** Where an answer is on its way already nothing may be written into it. */
function isAnswerable(error: NodeJS.ErrnoException, socket: Socket): boolean {
  const running = (socket as Socket & { _httpMessage?: { headersSent: boolean } })._httpMessage
  return error.code !== 'ECONNRESET' && socket.writable && !running?.headersSent
}

function toClientError({ code }: NodeJS.ErrnoException): GatewayError {
  if (code === 'HPE_HEADER_OVERFLOW') {
    return new GatewayError('headers_too_large', 'The headers of this request are too large.')
  }
  return code === 'ERR_HTTP_REQUEST_TIMEOUT'
    ? new GatewayError('request_timeout', 'The request did not arrive in time.')
    : new GatewayError('invalid_request', 'This is not a valid HTTP request.')
}

/** What is not even HTTP gets a short answer, in OpenAI's shape, and the connection is closed. */
function answerRaw(socket: Socket, { error, id }: { error: GatewayError; id: string }): void {
  const body = JSON.stringify(openaiError(error))
  const headers = {
    ...idHeaders(id),
    'content-type': JSON_TYPE,
    'content-length': Buffer.byteLength(body),
    connection: 'close'
  }
  const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`)
  socket.write(
    `HTTP/1.1 ${error.statusCode} ${STATUS_CODES[error.statusCode]}\r\n${lines.join('')}\r\n${body}`
  )
  socket.destroySoon()
}
