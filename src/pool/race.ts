import type { Attempt } from './attempt.ts'
import type { Hedges } from './hedge.ts'

/** Whose attempts they are. */
export interface Racer {
  /** This one is late: makes another one beside it, if it may. */
  late(attempt: Attempt): Attempt | undefined
}

/** The attempts of one call. One follows another that has failed, or runs beside one that is late. */
export class Race {
  readonly #racer: Racer
  readonly #hedges: Hedges | undefined
  /** Extended with `concat`: `push` reserves memory for 16 more. */
  #attempts: readonly Attempt[] = []
  /** The one that runs beside another. */
  #second: Attempt | undefined
  #isMakingSecond = false
  /** One has given the answer: what is begun now goes on with it, and nobody is late. */
  #isWon = false
  #timer: NodeJS.Timeout | undefined

  /** @param hedges undefined: nobody minds when one is late */
  constructor(racer: Racer, hedges: Hedges | undefined) {
    this.#racer = racer
    this.#hedges = hedges
    hedges?.earn()
  }

  /** How many attempts were made although none had failed. */
  get hedged(): 0 | 1 {
    return this.#second === undefined ? 0 : 1
  }

  begin(attempt: Attempt): void {
    this.#attempts = this.#attempts.concat(attempt)
    // It may be repeated at once, over another connection or without the question for usage.
    if (this.#second?.candidate === attempt.candidate) this.#second = attempt
    if (this.#second !== undefined || this.#isMakingSecond || this.#isWon) return
    const { backend, candidate } = attempt
    const late = this.#hedges?.lateAfter(backend.live, candidate.upstream)
    clearTimeout(this.#timer)
    if (late !== undefined) this.#timer = setTimeout(() => this.hedge(attempt), late).unref()
  }

  /** This one is late. */
  hedge(attempt: Attempt): void {
    if (!attempt.isPending) return
    this.#isMakingSecond = true
    this.#second = this.#racer.late(attempt)
    this.#isMakingSecond = false
  }

  /** Can one of the others still give the answer? */
  goesOnWithout(attempt: Attempt): boolean {
    return this.#attempts.some(each => each !== attempt && each.isPending)
  }

  /** This one gives the answer: the others are stopped. Returns those that might have given it, too. */
  win(winner: Attempt, isSuccess: boolean): Attempt[] {
    clearTimeout(this.#timer)
    if (isSuccess) this.#learn(winner)
    this.#isWon = true
    const isHedge = this.#second !== undefined && winner === this.#second
    const losers: Attempt[] = []
    for (const other of this.#attempts) {
      if (other === winner) continue
      if (other.isPending) losers.push(other)
      const isLate = isHedge && other.isPending
      // All that will ever be known of it is that it took longer than this.
      if (isLate) {
        this.#learn(other)
        other.backend.live.reputation.observeLatency(other.age, performance.now())
      }
      other.cancel(this.#second === undefined ? 'cancelled' : 'hedged')
    }
    this.#count(isHedge ? 'won' : 'lost')
    return losers
  }

  cancel(): void {
    clearTimeout(this.#timer)
    for (const attempt of this.#attempts) attempt.cancel()
  }

  /** The call is over. */
  end(): void {
    this.cancel()
    this.#count('lost')
    for (const attempt of this.#attempts) attempt.letGo()
  }

  #learn({ backend, candidate, age }: Attempt): void {
    this.#hedges?.observe(backend.live, candidate.upstream, age)
  }

  #count(result: 'won' | 'lost'): void {
    if (this.#second === undefined) return
    this.#second = undefined
    this.#hedges!.results[result]++
  }
}
