import { randomUUID } from 'node:crypto'
import type { IncomingHttpHeaders } from 'node:http'
import type { Caller, Exchange } from './exchange.ts'

/** A request of the gateway itself, which bills a stored response that its caller has not read. */
export interface Settlement {
  /** The caller that is billed; undefined where no keys are checked. */
  readonly caller: Caller | undefined
  /** The backend does not have the response any more: the estimated prompt is billed. */
  readonly isLost: boolean
  /** Ends it. */
  readonly signal: AbortSignal | undefined
  /** The exchange of this request, once it has begun. */
  exchange: Exchange | undefined
}

const HEADER = 'x-llmproxy-settlement'

/** The settlements under way. A request is one of them if it has its random token. */
export class Settlements {
  readonly #underway = new Map<string, Settlement>()

  /** Begins a settlement: `headers` are those of its request. */
  begin(settlement: Settlement): { headers: Record<string, string>; end: () => void } {
    const token = randomUUID()
    this.#underway.set(token, settlement)
    return { headers: { [HEADER]: token }, end: () => void this.#underway.delete(token) }
  }

  /** Returns the settlement that a request belongs to; undefined for requests of clients. */
  of(headers: IncomingHttpHeaders): Settlement | undefined {
    if (this.#underway.size === 0) return undefined
    const token = headers[HEADER]
    return typeof token === 'string' ? this.#underway.get(token) : undefined
  }
}
