import { Lru } from '../keys/lru.ts'

/** What a call asks of a backend. */
export interface Demand {
  /** As its caller calls it. */
  model: string
  /** Of the prompt. */
  tokens: number
  /** What of them the backend was sent before, what it should still have, and how old that is. */
  cached: Cached
  /** It is seen when the answer begins. */
  isStream: boolean
}

/** See {@link Shared}; in tokens. */
export interface Cached {
  sent: number
  kept: number
  age: number
}

/** What became known of a call when it was over; times are monotonic, in ms. */
export interface Facts {
  /** As the backend says it, or estimated. */
  promptTokens: number
  completionTokens: number
  /** Of the prompt, if the backend says so. */
  cachedTokens: number | undefined
  /** When the first and the last token came; 0: not known. */
  firstTokenAt: number
  lastTokenAt: number
}

/** Believed until the first answers teach better: tokens per ms, and ms, of what one large GPU makes of a large model. */
const PREFILL_RATE = 8
const TPOT = 30
/** So many observations are averaged at first; then each moves what is believed so far. */
const FIRST = 40
const STEP = 0.01
/** A slower token than so many times what is believed counts no more: its reader may have stopped reading. */
const MOST_TPOT = 10
/** A shorter prompt says more about the round trip than about the rate; a longer one counts fully. */
const LEAST_TOKENS = 64
const FULL_TOKENS = 1024
/** Less time (ms) than that does not show whether a prompt was in the cache. */
const LEAST_SAVED = 100
/** Models of a backend whose speeds are kept. */
const MAX_MODELS = 64

/** How fast a backend works with a model. */
export class Speed {
  /** Prompt tokens per ms. */
  prefillRate = PREFILL_RATE
  /** Time (ms) per output token. */
  tpot = TPOT
  /** Observations, where the belief at the beginning counts for half of one. */
  #prefills = 1 / 2
  #tpots = 1 / 2

  /**
   * First the mean; then steps up or down, which find the median: waits for other things than prompts, and
   * caches that nobody knows of, make rates that are far off.
   */
  learnPrefill(tokens: number, ms: number): void {
    const weight = Math.min(1, tokens / FULL_TOKENS)
    const ratio = tokens / (Math.max(ms, 1) * this.prefillRate)
    if (this.#prefills < FIRST) {
      this.#prefills += weight
      this.prefillRate *= ratio ** (weight / this.#prefills)
    } else this.prefillRate *= (1 + STEP * weight) ** Math.sign(ratio - 1)
  }

  learnTpot(ms: number): void {
    this.#tpots = Math.min(this.#tpots + 1, 2 * FIRST)
    this.tpot += (Math.min(ms, MOST_TPOT * this.tpot) - this.tpot) / this.#tpots
  }
}

/** How fast a backend, or all together, work with each model. */
export class Speeds {
  /** With whichever model. */
  readonly overall = new Speed()
  readonly #ofModels = new Lru<string, Speed>(MAX_MODELS)

  of(model: string): Speed | undefined {
    return this.#ofModels.get(model)
  }

  /** Those who shall learn from an answer of this model. */
  learners(model: string): Speed[] {
    const known = this.#ofModels.get(model) ?? new Speed()
    this.#ofModels.set(model, known)
    return [known, this.overall]
  }

  entries(): [model: string, speed: Speed][] {
    return [...this.#ofModels.entries()]
  }
}

/** The work that a backend has under way, in the time it will take, and how fast it does such work. */
export class Load {
  readonly speeds = new Speeds()
  /** Of all backends: believed of this one until more is known of it. */
  readonly #fleet: Speeds
  /** Tokens of prompts that are still to be read, and the time (ms) that takes. */
  #tokens = 0
  #prefill = 0
  /** One token for each answer that is being written (ms). */
  #decode = 0
  /** How many prompts that are. */
  #unread = 0
  /** Of those the ones without a stream: nobody sees when they have been read. */
  readonly #silent: Job[] = []
  /** And the ones that none which came later has overtaken. */
  readonly #queue: Job[] = []

  constructor(fleet: Speeds) {
    this.#fleet = fleet
  }

  /** How long (ms) a call would wait before its own prompt is read. */
  wait(now: number): number {
    while (this.#silent.length > 0 && this.#silent[0]!.readAt <= now) this.#silent[0]!.read()
    return this.#prefill + this.#decode + this.#overdue(now)
  }

  /** How much later the first in the queue is than it should be: whatever it waits for, others will too. */
  #overdue(now: number): number {
    const first = this.#queue[0]
    return first === undefined ? 0 : Math.max(0, now - first.readAt)
  }

  /** Time (ms) to read so many tokens. */
  prefill(model: string, tokens: number): number {
    return tokens / this.speedWith(model).prefillRate
  }

  speedWith(model: string): Speed {
    return this.speeds.of(model) ?? this.#fleet.of(model) ?? this.#fleet.overall
  }

  learners(model: string): Speed[] {
    return [...this.speeds.learners(model), ...this.#fleet.learners(model)]
  }

  /** A call is sent. Whoever gets the job must {@link Job.end} it. */
  begin(demand: Demand, now: number): Job {
    const job = new Job(this, demand, this.#tokens, this.wait(now), now)
    if (!demand.isStream) this.#silent.push(job)
    else this.#queue.push(job)
    this.#unread++
    this.#tokens += job.tokens
    this.#prefill += job.prefill
    return job
  }

  /** Its prompt has been read: from now on it costs others a token's time. */
  toDecode(job: Job): void {
    this.#queue.splice(0, Math.max(0, this.#queue.indexOf(job)))
    this.#leavePrefill(job)
    this.#decode += job.tpot
  }

  leave(job: Job): void {
    if (job.isRead) this.#decode = Math.max(0, this.#decode - job.tpot)
    else this.#leavePrefill(job)
  }

  #leavePrefill(job: Job): void {
    drop(this.#silent, job)
    drop(this.#queue, job)
    this.#unread--
    // Sums of fractions do not come back to 0 by themselves.
    this.#tokens = this.#unread === 0 ? 0 : this.#tokens - job.tokens
    this.#prefill = this.#unread === 0 ? 0 : this.#prefill - job.prefill
  }
}

function drop(jobs: Job[], job: Job): void {
  const at = jobs.indexOf(job)
  if (at !== -1) jobs.splice(at, 1)
}

/** A call as the work it is for a backend. */
export class Job {
  readonly #load: Load
  readonly #demand: Demand
  readonly #startedAt: number
  /** Prompt tokens that the backend has to read before these. */
  readonly #ahead: number
  readonly tokens: number
  /** Time (ms) to read them, and to write a token, as believed when it began. */
  readonly prefill: number
  readonly tpot: number
  /** When they should have been read (monotonic, ms). */
  readonly readAt: number
  isRead = false
  isOver = false
  #ttft: number | undefined

  constructor(load: Load, demand: Demand, ahead: number, wait: number, now: number) {
    const speed = load.speedWith(demand.model)
    this.#load = load
    this.#startedAt = now
    this.#ahead = ahead
    this.#demand = demand
    this.tokens = demand.tokens - demand.cached.kept
    this.prefill = this.tokens / speed.prefillRate
    this.tpot = speed.tpot
    this.readAt = now + wait + this.prefill
  }

  /** The answer begins: a stream's first piece is there. */
  begun(now: number): void {
    this.#ttft = now - this.#startedAt
    if (!this.isRead && !this.isOver) this.read()
  }

  read(): void {
    this.isRead = true
    this.#load.toDecode(this)
  }

  end(): void {
    if (this.isOver) return
    this.isOver = true
    this.#load.leave(this)
  }

  /** Tokens that the backend has worked on since it was sent the beginning of this prompt. */
  get age(): number {
    return this.#demand.cached.age
  }

  /**
   * The backend has answered properly: what that says of its speed. Returns whether it still had in its
   * cache what it was sent before; undefined if nobody can tell.
   */
  learn({ promptTokens, cachedTokens, completionTokens, ...times }: Facts): boolean | undefined {
    const { tokens, cached, model } = this.#demand
    const isSaid = cachedTokens !== undefined
    const own = isSaid ? promptTokens - cachedTokens : tokens - cached.kept
    const doubt = isSaid ? 0 : cached.sent - cached.kept
    const written = times.lastTokenAt - times.firstTokenAt
    // By what was believed when it began.
    const hadIt = isSaid ? cachedTokens >= cached.sent / 2 : this.#guess()
    // Where others stood before it, or it may have been in the cache, its time is not its own.
    const isClear = own >= LEAST_TOKENS && doubt <= own / 4 && this.#ahead <= own
    for (const speed of this.#load.learners(model)) {
      if (isClear && this.#ttft !== undefined) speed.learnPrefill(this.#ahead + own, this.#ttft)
      if (completionTokens > 1 && written > 0) speed.learnTpot(written / (completionTokens - 1))
    }
    return cached.sent > 0 ? hadIt : undefined
  }

  /** By the time it took, if reading it all would have taken clearly longer. */
  #guess(): boolean | undefined {
    const { prefillRate } = this.#load.speedWith(this.#demand.model)
    const { sent } = this.#demand.cached
    const saved = sent / prefillRate
    if (this.#ttft === undefined || saved < LEAST_SAVED || this.#ahead > sent) return undefined
    const rest = (this.#ahead + this.#demand.tokens - sent) / prefillRate
    return this.#ttft < rest + saved / 2
  }
}
