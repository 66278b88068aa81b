import type { Socket } from 'node:net'
import { errors } from 'undici'
import { GatewayError, reasonOf } from '../errors.ts'
import type { Connector } from './connector.ts'
import { isLocal } from './failures.ts'

/** Time (ms) to the next try while no connection can be opened; doubled up to the longest. */
const FIRST_WAIT_MS = 250
const LONGEST_WAIT_MS = 5_000
/** Maximum time (ms) of a try: a warning at the start must not come a minute later. */
const TRY_MS = 5_000

/**
 * Whether connections to a server can be opened. It sees all that are opened, and tries on its own at the start and
 * while none can be: a gateway that is not ready gets no requests that would show that the server is back.
 */
export class Reach {
  /** Why the latest connection could not be opened; undefined: it could, or none has been tried. */
  failure: string | undefined
  /** Called when connections cannot be opened any more, and when they can again. */
  onTurn: (() => void) | undefined
  readonly #target: Parameters<Connector>[0]
  readonly #open: Connector
  #first: Promise<void> | undefined
  #trying: Socket | undefined
  #wait = FIRST_WAIT_MS
  #timer: NodeJS.Timeout | undefined
  #isClosed = false

  constructor({ protocol, host, hostname, port }: URL, open: Connector) {
    this.#target = { protocol, host, hostname: hostname.replace(/^\[|\]$/g, ''), port }
    this.#open = open
  }

  /** Opens a connection. */
  connect(...[target, done]: Parameters<Connector>): Socket {
    return this.#open(target, (...result) => {
      this.#see(result[0])
      done(...result)
    })
  }

  /** Tries a first connection; resolves when that is open or has failed. */
  begin(): Promise<void> {
    this.#first ??= this.#try()
    return this.#first
  }

  close(): void {
    this.#isClosed = true
    clearTimeout(this.#timer)
    this.#trying?.destroy(new Error('closed'))
  }

  #try(): Promise<void> {
    return new Promise(resolve => {
      const late = () => this.#trying?.destroy(new errors.ConnectTimeoutError())
      const timer = setTimeout(late, TRY_MS).unref()
      this.#trying = this.connect(this.#target, (_error, socket) => {
        clearTimeout(timer)
        socket?.destroy()
        this.#trying = undefined
        resolve()
      })
    })
  }

  #see(error: Error | null): void {
    // An error of the gateway's own says nothing of the server: the client has left, or there are no descriptors.
    const isOwn = error !== null && (error instanceof GatewayError || isLocal(error))
    if (this.#isClosed || isOwn) return
    const hadFailed = this.failure !== undefined
    this.failure = error === null ? undefined : reasonOf(error)
    clearTimeout(this.#timer)
    if (error === null) this.#wait = FIRST_WAIT_MS
    else this.#tryLater()
    if (hadFailed !== (error !== null)) this.onTurn?.()
  }

  #tryLater(): void {
    this.#timer = setTimeout(() => this.#try(), this.#wait).unref()
    this.#wait = Math.min(this.#wait * 2, LONGEST_WAIT_MS)
  }
}
