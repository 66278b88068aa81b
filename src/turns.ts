import type { Socket } from 'node:net'
import type { FastifyBaseLogger, FastifyReply, FastifyRequest } from 'fastify'
import { Complaint } from './logs/complaint.ts'

/** Maximum number of requests that wait on one connection behind the one that is served. */
const MAX_WAITING = 16

/**
 * Requests that a client has sent before the response to an earlier one was complete (pipelining). Node reads and
 * parses them in advance. Their responses must keep the order, so each waits until the one before it is answered: it
 * takes no slot and no backend, and nothing is left of it if the client disconnects.
 */
export class Turns {
  /** Connections closed because of more requests. */
  closed = 0
  readonly #waiting = new WeakMap<Socket, number>()
  readonly #complaint: Complaint

  constructor(log: FastifyBaseLogger) {
    this.#complaint = new Complaint((connections, latest) =>
      log.warn(
        { connections, latest },
        `connections closed: more than ${MAX_WAITING} requests waited on one`
      )
    )
  }

  /** Calls `begin` when it is this request's turn, if ever. */
  wait({ raw: { socket }, ip }: FastifyRequest, { raw }: FastifyReply, begin: () => void): void {
    // Node has more of the same piece of data.
    if (socket.destroyed) return
    const waiting = this.#waiting.get(socket) ?? 0
    if (waiting >= MAX_WAITING) {
      this.closed++
      this.#complaint.add(1, ip)
      socket.destroy()
      return
    }
    this.#waiting.set(socket, waiting + 1)
    raw.once('socket', () => {
      this.#waiting.set(socket, this.#waiting.get(socket)! - 1)
      begin()
    })
  }
}
