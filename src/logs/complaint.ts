/** How long (ms) the same thing is not said again. */
const PAUSE = 10_000

/**
 * Something that may befall one record, or one line, after the other: it is said at once, and then every 10 s
 * of how many it was true since.
 *
 * @example
 * const said = []
 * const refused = new Complaint((records, reason) => said.push(`${records} refused: ${reason}`))
 * for (let record = 0; record < 5; record++) refused.add(1, 'status 400')
 * refused.end()
 * said // ['1 refused: status 400', '4 refused: status 400']
 */
export class Complaint {
  readonly #say: (records: number, reason: string) => void
  #records = 0
  #reason = ''
  #timer: NodeJS.Timeout | undefined

  constructor(say: (records: number, reason: string) => void) {
    this.#say = say
  }

  add(records: number, reason: string): void {
    this.#records += records
    this.#reason = reason
    if (this.#timer === undefined) this.#speak()
  }

  /** Says what was not said yet. */
  end(): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    this.#sayRest()
  }

  #speak(): void {
    this.#sayRest()
    this.#timer = setTimeout(() => {
      this.#timer = undefined
      if (this.#records > 0) this.#speak()
    }, PAUSE).unref()
  }

  #sayRest(): void {
    if (this.#records > 0) this.#say(this.#records, this.#reason)
    this.#records = 0
  }
}
