import type { Socket } from 'node:net'
import { Readable } from 'node:stream'
import { Client, type Dispatcher, Pool as Sockets } from 'undici'
import type { UsageField } from '../payload-edits.ts'
import { Breaker } from './breaker.ts'
import { type Connector, directConnector } from './connector.ts'
import type { ContinuationWay } from './continuation.ts'
import { type Facts, type Job, Load, Speeds } from './load.ts'
import type { ModelCard, ModelEntry } from './models.ts'
import { PrefixIndex } from './prefix-index.ts'
import { Reach } from './reach.ts'
import { Reputation } from './reputation.ts'

/** How long a backend is waited for, in milliseconds; 0: for ever. */
export interface TimeLimits {
  /** To a connection; never 0. */
  connectTimeout: number
  /** To the first byte of the answer's body. */
  timeout: number
  /** How long a stream's head waits for its first event. */
  holdFirstEvent: number
  /** Between two chunks. */
  idleTimeout: number
  /** To the end of the answer. */
  totalTimeout: number
}

/** One inference server as it is configured. Times in milliseconds. */
export interface BackendConfig extends TimeLimits {
  name: string
  /** Base URL; a trailing slash or `/v1` is no part of it. */
  url: string
  weight: number
  /** Those with a lower one are asked first. */
  priority: number
  /** Most requests at once; 0: no limit. */
  maxConcurrent: number
  /** The models it serves; those it lists itself if left out. The first entry that fits holds. */
  models: ModelEntry[] | undefined
  /** It is asked which models it has. */
  listsModels: boolean
  /** How it goes on with an answer that another one has begun; undefined: it can't. */
  continuation: ContinuationWay | undefined
  /** Whether each API key has its own part of the prefix cache. */
  saltsCache: boolean
  /** Whether it can report the usage so far in every event of a stream; undefined: its list of models shows that. */
  continuousUsage: boolean | undefined
  /** Sent with every request, over the client's own. */
  headers: Record<string, string>
  /** Time to a connection for those who wait longest. */
  longestConnect: number
}

/** Why a backend cannot be called, as far as is known. */
export const TROUBLES = ['unhealthy', 'unreachable', 'refused', 'circuit_open'] as const
export type Trouble = (typeof TROUBLES)[number]

/** Sees one request through; a connection that is being opened for it shows up in `socket`. */
export interface BackendHandler extends Dispatcher.DispatchHandler {
  socket: Socket | undefined
}

/** One that is new or back gets its share of the calls over this time (ms), beginning with a tenth. */
const RAMP_MS = 30_000
const RAMP_FROM = 0.1
/** A server that refused a field is asked again after a while: it may have been upgraded. */
const REMEMBER_REFUSAL_MS = 10 * 60_000

/** Owners of models, by which engines can be told that report the usage so far, and the sum of all choices. */
const RUNNING_USAGE = new Set(['vllm', 'sglang'])

/** Owners of models, by which engines can be told that read `max_completion_tokens`. Ollama ignores it. */
const COMPLETION_LIMIT = new Set(['vllm', 'sglang', 'llamacpp', 'openai', 'system', 'llmproxy'])

/** Largest head of an answer, in bytes. */
const MAX_HEAD = 64 * 1024

/** From so many connections on they are let go of when none is in use. */
const MANY_CONNECTIONS = 256

/** One inference server: how it is configured, and what is known of it at the moment. */
export class Backend {
  readonly config: BackendConfig
  readonly live: Live

  /** `live`: of the same server under an earlier configuration. */
  constructor(config: BackendConfig, live = new Live(config)) {
    this.config = config
    this.live = live
  }

  get name(): string {
    return this.config.name
  }

  /** May it be given work, as far as health checks know? */
  get available(): boolean {
    return this.live.healthy && !this.live.isDrained
  }

  /** Can it take another request? */
  get hasRoom(): boolean {
    const { maxConcurrent } = this.config
    return maxConcurrent === 0 || this.live.inFlight < maxConcurrent
  }

  /** Can it report the usage so far in every event of a stream? */
  get reportsRunningUsage(): boolean {
    const { continuousUsage } = this.config
    if (continuousUsage !== undefined) return continuousUsage
    return RUNNING_USAGE.has(this.#owner)
  }

  /** Does it report the sum of all choices, as far as is known? */
  get reportsSum(): boolean {
    return RUNNING_USAGE.has(this.#owner)
  }

  /** Does it read `max_completion_tokens`, as far as is known? */
  get readsCompletionLimit(): boolean {
    return COMPLETION_LIMIT.has(this.#owner)
  }

  /** `owned_by` of its first model, in which engines give their own name. */
  get #owner(): string {
    const [card] = this.live.models?.values() ?? []
    return String(card?.owned_by)
  }

  /** Sends a request, over a connection of its own if it must be `fresh`. */
  dispatch(options: Dispatcher.DispatchOptions, handler: BackendHandler, fresh = false): void {
    const limited = {
      ...options,
      path: this.live.basePath + options.path,
      // The attempt has timers of its own; but only undici sees when a streamed body has been sent.
      headersTimeout: options.body instanceof Readable ? this.config.timeout : 0,
      bodyTimeout: 0
    }
    this.live.dispatch(limited, handler, fresh)
  }
}

/** Connections to a server, and what was learned of it: kept while its settings change. */
export class Live {
  /** Exchanges whose answer has not ended; see {@link begin}. */
  inFlight = 0
  /** What health checks found, and since when that is so (Unix ms). */
  healthy = true
  changedAt = Date.now()
  /** What went wrong last, in calls or health checks. */
  lastError: { at: number; reason: string } | undefined
  /** When it last began to stream an answer (monotonic, ms). */
  streamedAt = Number.NEGATIVE_INFINITY
  /** An active check has been made. */
  isProbed = false
  /** Why it refuses the gateway, if it did when it was asked for its models. */
  refusal: string | undefined
  /** What it lists itself, by id; undefined as long as that is not known. */
  models: ReadonlyMap<string, ModelCard> | undefined
  /** Whether connections can be opened. */
  readonly reach: Reach
  /** Whether its calls go well. */
  readonly breaker = new Breaker()
  /** What its calls were like. */
  readonly reputation = new Reputation()
  /** The work it has under way, and how fast it is. */
  readonly load: Load
  /** The prompts whose beginnings it should have in its cache. */
  readonly prefixes = new PrefixIndex()
  /** A request is over: there may be room for another one. */
  onEnd: (() => void) | undefined
  /** Called when health checks or an operator have taken it out or back. */
  onTurn: (() => void) | undefined
  /** Smooth weighted round robin keeps its place here. */
  currentWeight = 0
  readonly origin: string
  readonly basePath: string
  readonly #settings: {
    allowH2: false
    maxHeaderSize: number
    connect: (...args: Parameters<Connector>) => void
  }
  #sockets: Sockets
  /** Most requests at once over these connections. */
  #peak = 0
  #opening: BackendHandler | undefined
  /** Handlers of streamed bodies: undici opens their connections in a microtask. */
  readonly #openingLater: BackendHandler[] = []
  readonly #usageRefusedAt: Record<UsageField, number> = {
    include_usage: Number.NEGATIVE_INFINITY,
    continuous_usage_stats: Number.NEGATIVE_INFINITY
  }
  #isDrained = false
  #backAt = Number.NEGATIVE_INFINITY

  /** @param fleet what is known of the speed of all backends */
  constructor(
    { url, longestConnect }: Pick<BackendConfig, 'url' | 'longestConnect'>,
    fleet = new Speeds()
  ) {
    this.load = new Load(fleet)
    const parsed = new URL(url)
    this.origin = parsed.origin
    this.basePath = parsed.pathname.replace(/\/+$/, '').replace(/\/v1$/, '')
    this.reach = new Reach(parsed, directConnector(longestConnect))
    // No cap on connections: admission is the limits' work, and undici's own queue can't be seen.
    this.#settings = {
      allowH2: false,
      maxHeaderSize: MAX_HEAD,
      connect: (options, done) => {
        const socket = this.reach.connect(options, done)
        const handler = this.#opening ?? this.#openingLater.shift()
        if (handler !== undefined) handler.socket = socket
      }
    }
    this.#sockets = new Sockets(this.origin, this.#settings)
  }

  dispatch(options: Dispatcher.DispatchOptions, handler: BackendHandler, fresh: boolean): void {
    const sockets = fresh ? new Client(this.origin, this.#settings) : this.#sockets
    if (options.body instanceof Readable) this.#openLater(handler)
    else this.#opening = handler
    try {
      sockets.dispatch(options, handler)
    } finally {
      this.#opening = undefined
      if (fresh) void sockets.close()
    }
  }

  /** A question of the gateway's own; `path` below the base path. The body must be read or dumped. */
  ask(path: string, options: Omit<Dispatcher.RequestOptions, 'path' | 'origin'>) {
    this.#opening = { socket: undefined }
    try {
      return this.#sockets.request({ ...options, path: this.basePath + path })
    } finally {
      this.#opening = undefined
    }
  }

  begin(): void {
    this.inFlight++
    if (this.inFlight > this.#peak) this.#peak = this.inFlight
  }

  end(): void {
    this.inFlight--
    this.onEnd?.()
    if (this.inFlight > 0 || this.#peak < MANY_CONNECTIONS) return
    // undici keeps what it has made for each connection, also when that is closed.
    const used = this.#sockets
    this.#sockets = new Sockets(this.origin, this.#settings)
    this.#peak = 0
    void used.close()
  }

  /** Whether it takes this field of `stream_options`, as far as is known. */
  takesUsage(field: UsageField): boolean {
    return performance.now() - this.#usageRefusedAt[field] > REMEMBER_REFUSAL_MS
  }

  refuseUsage(fields: readonly UsageField[]): void {
    for (const field of fields) this.#usageRefusedAt[field] = performance.now()
  }

  fail(reason: string): void {
    this.lastError = { at: Date.now(), reason }
  }

  turn(healthy: boolean): void {
    if (healthy && !this.healthy) this.comeBack(performance.now())
    this.healthy = healthy
    this.changedAt = Date.now()
    this.onTurn?.()
  }

  /** Why it cannot be called; undefined: it can, as far as is known. */
  get trouble(): Trouble | undefined {
    return this.healthy ? this.seenTrouble : 'unhealthy'
  }

  /** The same without what health checks say. A backend that asked for a rest is up: requests still get its answer. */
  get seenTrouble(): Trouble | undefined {
    if (this.reach.failure !== undefined) return 'unreachable'
    if (this.refusal !== undefined) return 'refused'
    const isOpen = this.breaker.state(performance.now()) === 'open'
    return isOpen && !this.breaker.isResting ? 'circuit_open' : undefined
  }

  /** Somebody wants it to get no more calls; those under way go on. */
  get isDrained(): boolean {
    return this.#isDrained
  }

  set isDrained(isDrained: boolean) {
    if (this.#isDrained && !isDrained) this.comeBack(performance.now())
    this.#isDrained = isDrained
    this.onTurn?.()
  }

  /** It is there (again), and cold: it may have been restarted, and its cache be empty. */
  comeBack(now: number): void {
    this.#backAt = now
    this.prefixes.clear()
  }

  /** The part of its share of the calls that it gets while it warms up; 1 when it has. */
  rampUp(now: number): number {
    const age = (now - this.#backAt) / RAMP_MS
    return age >= 1 ? 1 : Math.max(RAMP_FROM, age)
  }

  /** A call was answered properly: how fast it was, and what was in the cache. */
  learn(job: Job, facts: Facts): void {
    const hadIt = job.learn(facts)
    if (hadIt !== undefined) this.prefixes.learn(job.age, hadIt)
    this.prefixes.wrote(facts.completionTokens)
  }

  /** Closes idle connections at once and busy ones when their answers have ended. */
  async close(): Promise<void> {
    this.reach.close()
    await this.#sockets.close()
  }

  async destroy(): Promise<void> {
    this.reach.close()
    await this.#sockets.destroy()
  }

  #openLater(handler: BackendHandler): void {
    this.#openingLater.push(handler)
    setImmediate(() => {
      const at = this.#openingLater.indexOf(handler)
      if (at !== -1) this.#openingLater.splice(at, 1)
    })
  }
}
