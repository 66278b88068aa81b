import type { Server } from 'node:http'
import type { BlockList, Socket } from 'node:net'
import type { FastifyBaseLogger } from 'fastify'
import { addressOf, isListed, networkOf } from './address.ts'
import { descriptorLimit, isAmongLast, servableConnections } from './descriptors.ts'
import { networksOf } from './keys/key.ts'
import { Complaint } from './logs/complaint.ts'

/** The bounds as a configuration has them; `auto` follows from the descriptor limit. */
export interface ConnectionBounds {
  max_connections: number | 'auto'
  /** 0: none. */
  max_connections_per_address: number | 'auto'
  trust_proxy: boolean | string[]
}

/** Why connections are closed as soon as they are open, or not even accepted, as the log says it. */
const REASONS = {
  max_connections: 'connections closed: server.max_connections is reached',
  max_connections_per_address:
    'connections closed: server.max_connections_per_address is reached; list a front proxy in server.trust_proxy',
  admin_connections:
    'connections closed: the share of admin.listen in server.max_connections is reached',
  descriptors: 'connections closed: few file descriptors are left; raise "ulimit -n"',
  accept: 'connections could not be accepted'
}
export type RefusalReason = keyof typeof REASONS

/** Connections of the admin API's own port: an eighth of all, and no more than this. */
const MAX_ADMIN = 64

/** A port with bounds of its own, so that connections to one port leave the other one reachable. */
class Port {
  open = 0
  /** Open connections of each address. */
  readonly byAddress = new Map<string, number>()
  max = Number.POSITIVE_INFINITY
  maxPerAddress = Number.POSITIVE_INFINITY
}

interface Connection {
  port: Port
  /** The addresses that count as one. */
  group: string
}

/**
 * The connections of clients, bounded so that they cannot take all descriptors. One beyond a bound is closed before
 * anything is read from it, and before a TLS handshake: a response would need what is scarce.
 *
 * @example
 * const connections = new Connections(log, 1)
 * connections.update({ max_connections: 100, max_connections_per_address: 10, trust_proxy: false })
 * connections.watch(fastify.server)
 * connections.open // 0
 */
export class Connections {
  /** Connections refused since the start. */
  readonly refused = new Map<RefusalReason, number>()
  readonly #log: FastifyBaseLogger
  /** Processes that share the bounds. */
  readonly #processes: number
  readonly #sockets = new Map<Socket, Connection>()
  /** One listener for all sockets. */
  readonly #onClose: (this: Socket) => void
  readonly #complaints = new Map<RefusalReason, Complaint>()
  readonly #clients = new Port()
  /** The port of the admin API, if it has one of its own. */
  #admin: Port | undefined
  /** Maximum number of connections to all ports. */
  #max = Number.POSITIVE_INFINITY
  #maxPerAddress: ConnectionBounds['max_connections_per_address'] = 0
  #trusted: BlockList | 'all' | undefined

  constructor(log: FastifyBaseLogger, processes: number) {
    this.#log = log
    this.#processes = processes
    const leave = (socket: Socket) => this.#leave(socket)
    this.#onClose = function onClose() {
      leave(this)
    }
  }

  get open(): number {
    return this.#sockets.size
  }

  update({ max_connections, max_connections_per_address, trust_proxy }: ConnectionBounds): void {
    const share = (bound: number) => Math.ceil(bound / this.#processes)
    const servable = servableConnections()
    this.#max = max_connections === 'auto' ? servable : share(max_connections)
    this.#maxPerAddress =
      max_connections_per_address === 'auto' ? 'auto' : share(max_connections_per_address)
    this.#share()
    if (typeof trust_proxy === 'boolean') this.#trusted = trust_proxy ? 'all' : undefined
    else this.#trusted = networksOf(trust_proxy)
    if (this.#max <= servable) return
    this.#log.warn(
      { max_connections: this.#max, servable, descriptors: descriptorLimit },
      'server.max_connections exceeds what the limit of file descriptors allows; raise "ulimit -n"'
    )
  }

  /** Counts and bounds what a server accepts; `isAdmin`: it is the admin API's own. */
  watch(server: Server, isAdmin = false): void {
    if (isAdmin) this.#admin ??= new Port()
    this.#share()
    const port = isAdmin ? this.#admin! : this.#clients
    server.prependListener('connection', (socket: Socket) => this.#enter(socket, port))
    server.on('error', (error: NodeJS.ErrnoException) => {
      if (error.syscall === 'accept') this.refuse('accept', 1, error.code)
    })
  }

  /** Counts refused connections, and logs them from time to time; `detail`: an address or a code. */
  refuse(reason: RefusalReason, connections: number, detail?: string): void {
    this.refused.set(reason, (this.refused.get(reason) ?? 0) + connections)
    let complaint = this.#complaints.get(reason)
    if (complaint === undefined) {
      complaint = new Complaint((connections, latest) =>
        this.#log.warn({ connections, latest, open: this.open }, REASONS[reason])
      )
      this.#complaints.set(reason, complaint)
    }
    complaint.add(connections, detail ?? '')
  }

  /** Closes what is left, also connections that never got through a TLS handshake: Node's server waits for them. */
  close(): void {
    for (const socket of this.#sockets.keys()) socket.destroy()
    for (const each of this.#complaints.values()) each.end()
  }

  /** Divides the maximum among the ports. */
  #share(): void {
    const ofAdmin = this.#admin && Math.min(Math.ceil(this.#max / 8), MAX_ADMIN)
    this.#clients.max = Math.max(1, this.#max - (ofAdmin ?? 0))
    const all = this.#maxPerAddress
    this.#clients.maxPerAddress =
      all === 'auto' ? Math.ceil(this.#clients.max / 2) : all || Number.POSITIVE_INFINITY
    if (this.#admin === undefined || ofAdmin === undefined) return
    this.#admin.max = ofAdmin
    this.#admin.maxPerAddress = Math.ceil(ofAdmin / 2)
  }

  #enter(socket: Socket, port: Port): void {
    const address = addressOf({ ip: socket.remoteAddress })
    const group = networkOf(address)
    const ofGroup = port.byAddress.get(group) ?? 0
    const reason = this.#reasonAgainst(socket, port, address, ofGroup)
    if (reason !== undefined) {
      this.refuse(reason, 1, address)
      // The server's own listener, which comes next, expects an open one.
      process.nextTick(() => socket.destroy())
      return
    }
    this.#sockets.set(socket, { port, group })
    port.open++
    port.byAddress.set(group, ofGroup + 1)
    socket.on('close', this.#onClose)
  }

  #leave(socket: Socket): void {
    const { port, group } = this.#sockets.get(socket)!
    this.#sockets.delete(socket)
    port.open--
    const left = port.byAddress.get(group)! - 1
    if (left > 0) port.byAddress.set(group, left)
    else port.byAddress.delete(group)
  }

  #reasonAgainst(
    socket: Socket,
    port: Port,
    address: string,
    ofGroup: number
  ): RefusalReason | undefined {
    const isAdmin = port === this.#admin
    if (port.open >= port.max) return isAdmin ? 'admin_connections' : 'max_connections'
    if (isAmongLast(descriptorOf(socket))) return 'descriptors'
    if (ofGroup < port.maxPerAddress || this.#trusts(address)) return undefined
    return isAdmin ? 'admin_connections' : 'max_connections_per_address'
  }

  #trusts(address: string): boolean {
    const trusted = this.#trusted
    if (trusted === 'all' || trusted === undefined) return trusted === 'all'
    return isListed(trusted, address)
  }
}

function descriptorOf(socket: Socket): number {
  return (socket as Socket & { _handle?: { fd?: number } })._handle?.fd ?? -1
}
