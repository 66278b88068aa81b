import type { Backend } from './backend.ts'
import type { OpenReason } from './breaker.ts'
import type { Scores, ScoreUnit, StrategyName } from './strategies.ts'

/** Why a backend was not given a call; see docs/routing.md. */
export type PassedOver =
  | 'unhealthy'
  | 'drained'
  | 'no_model'
  | 'not_in_rule'
  | 'not_known_to_have_it'
  | 'pinned_elsewhere'
  | 'cannot_go_on'
  | 'circuit_open'
  | 'tried'
  | 'other_model'
  | 'full'
  | 'higher_tier'
  | 'not_drawn'

/** A backend at the moment of a choice. Never the {@link Backend} itself: it may be gone, and is large. */
interface Seen {
  backend: string
  model: string | undefined
  score: number | undefined
  /** Tokens of the prompt in its cache. */
  cached: number | undefined
  passedOver: PassedOver | undefined
  circuit: OpenReason | undefined
}

/** What the admin API says of a request. Times in ms, `at` as ISO 8601. */
export interface Explanation {
  request_id: string
  model: string | null
  strategy: StrategyName
  attempts: {
    at: string
    /** null: none could be given the call. */
    backend: string | null
    /** null: there is none yet. */
    outcome: string | null
    /** How long it has waited for room; 0 where it did not. */
    queued_ms: number
    /** What the scores are; null: there was nothing to compare. */
    score_unit: ScoreUnit | null
    candidates: {
      backend: string
      model: string | null
      score: number | null
      cached_tokens: number | null
      passed_over: PassedOver | null
      circuit: OpenReason | null
    }[]
  }[]
}

/** Requests that are remembered, and backends in all their choices together. */
const MAX_REQUESTS = 1_000
const MAX_SEEN = 50_000
/** Choices of one request that are. */
const MAX_CHOICES = 32
const MAX_MODEL = 200
/** Longest trace in a header, in bytes. */
const MAX_LINE = 1_024

/** One choice of a backend, as it was made: each step of it says whom it has passed over. */
export class Choice implements Scores {
  readonly at = Date.now()
  backend: string | undefined
  /** What became of the attempt; `queued`, or an error's code, where there was none. */
  outcome: string | undefined
  queuedMs = 0
  unit: ScoreUnit | undefined
  /** Of those that are compared. */
  model: string | undefined
  readonly seen: Seen[] = []

  passOver({ name, live }: Backend, model: string | undefined, passedOver: PassedOver): void {
    const circuit = passedOver === 'circuit_open' ? live.breaker.opened?.reason : undefined
    this.#add(name, model, undefined, undefined, passedOver, circuit)
  }

  note(
    unit: ScoreUnit,
    backends: readonly Backend[],
    scores: readonly number[],
    cached?: readonly number[]
  ): void {
    this.unit = unit
    for (let at = 0; at < backends.length; at++) {
      this.#add(backends[at]!.name, this.model, scores[at], cached?.[at], undefined, undefined)
    }
  }

  leaveOut(backend: Backend): void {
    this.passOver(backend, this.model, 'not_drawn')
  }

  /** What is left when all others have been passed over, or nobody is asked whether it is the best. */
  choose({ name }: Backend, model: string | undefined): void {
    this.backend = name
    if (this.unit === undefined) {
      this.#add(name, model, undefined, undefined, undefined, undefined)
    }
  }

  // All have the same shape, so that V8 reads them fast.
  #add(
    backend: string,
    model: string | undefined,
    score: number | undefined,
    cached: number | undefined,
    passedOver: PassedOver | undefined,
    circuit: OpenReason | undefined
  ): void {
    this.seen.push({ backend, model: shortened(model), score, cached, passedOver, circuit })
  }
}

/** All choices for one request. */
export class Decision {
  readonly id: string
  readonly model: string | undefined
  strategy: StrategyName
  choices: readonly Choice[] = []
  /** Backends in all of them. */
  seen = 0
  isForgotten = false

  constructor(id: string, model: string | undefined, strategy: StrategyName) {
    this.id = id
    this.model = shortened(model)
    this.strategy = strategy
  }

  explain(): Explanation {
    const attempts = this.choices.map(({ at, backend, outcome, queuedMs, unit, seen }) => ({
      at: new Date(at).toISOString(),
      backend: backend ?? null,
      outcome: outcome ?? null,
      queued_ms: rounded(queuedMs),
      score_unit: unit ?? null,
      candidates: seen.map(each => ({
        backend: each.backend,
        model: each.model ?? null,
        score: each.score === undefined ? null : rounded(each.score),
        cached_tokens: each.cached === undefined ? null : Math.round(each.cached),
        passed_over: each.passedOver ?? null,
        circuit: each.circuit ?? null
      }))
    }))
    return { request_id: this.id, model: this.model ?? null, strategy: this.strategy, attempts }
  }

  /** The same in a line of visible ASCII: the attempts, and then for each who was there. */
  toLine(): string {
    const attempts = this.choices.map(({ backend = 'nobody', outcome = 'under way', queuedMs }) =>
      queuedMs === 0 ? `${backend} ${outcome}` : `${backend} ${outcome} ${rounded(queuedMs)}ms`
    )
    const candidates = this.choices.map(({ unit, seen }) =>
      seen.map(each => this.#toText(each, unit)).join('; ')
    )
    const line = [`${this.strategy}: ${attempts.join(' -> ')}`, ...candidates].join(' | ')
    const ascii = line.replaceAll(/[^\x20-\x7e]/g, '?')
    return ascii.length > MAX_LINE ? `${ascii.slice(0, MAX_LINE - 4)} ...` : ascii
  }

  #toText({ backend, model, score, passedOver, circuit }: Seen, unit = ''): string {
    const who = model === this.model ? backend : `${backend} (${model})`
    if (score !== undefined) return `${who} ${unit}=${rounded(score)}`
    const why = circuit === undefined ? passedOver : `${passedOver} (${circuit})`
    return `${who} ${why ?? 'alone'}`
  }
}

/** The choices for the latest requests; for the oldest of them until others need their place. */
export class Decisions {
  readonly #ring = new Array<Decision | undefined>(MAX_REQUESTS).fill(undefined)
  /** Places in the ring: of the next one, and of the oldest that is there. */
  #next = 0
  #oldest = 0
  /** Backends in all of them. */
  #seen = 0

  begin(id: string, model: string | undefined, strategy: StrategyName): Decision {
    const decision = new Decision(id, model, strategy)
    if (this.#ring[this.#next] !== undefined) this.#drop()
    this.#ring[this.#next] = decision
    this.#next = (this.#next + 1) % MAX_REQUESTS
    return decision
  }

  /** Another choice, when it has been made. */
  add(decision: Decision, choice: Choice): void {
    if (decision.choices.length === MAX_CHOICES) return
    decision.choices = decision.choices.concat(choice)
    if (decision.isForgotten) return
    decision.seen += choice.seen.length
    this.#seen += choice.seen.length
    while (this.#seen > MAX_SEEN && this.#ring[this.#oldest] !== decision) this.#drop()
  }

  find(id: string): Decision | undefined {
    return this.#ring.find(each => each?.id === id)
  }

  #drop(): void {
    const oldest = this.#ring[this.#oldest]!
    oldest.isForgotten = true
    this.#seen -= oldest.seen
    this.#ring[this.#oldest] = undefined
    this.#oldest = (this.#oldest + 1) % MAX_REQUESTS
  }
}

function shortened(model: string | undefined): string | undefined {
  if (model === undefined || model.length <= MAX_MODEL) return model
  // Not a slice, which keeps all of it.
  return Buffer.from(model.slice(0, MAX_MODEL)).toString()
}

/** To hundredths. */
function rounded(value: number): number {
  return Math.round(value * 100) / 100
}
