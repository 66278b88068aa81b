import { tracingChannel } from 'node:diagnostics_channel'
import { isAmongLast } from './descriptors.ts'

/**
 * How the primary hands connections over to its workers, where node:cluster leaves gaps while file descriptors are
 * scarce. Both functions lean on messages and handles that Node does not document.
 */

/** Message that node:cluster sends with a connection. */
interface Handover {
  cmd: string
  msg?: { act?: string; seq: number }
}

type Accept = (error: number, connection?: { fd: number; close(): void }) => void

/**
 * In the primary: connections wait for a worker, each with a descriptor. Those that take the last ones are closed.
 * The system would do that too, but nothing would show it, and no file could be opened.
 */
export function guardAccepting(onRefused: () => void): void {
  tracingChannel<object, object>('net.server.listen').asyncEnd.subscribe(message => {
    const { server } = message as { server: import('node:net').Server }
    const { _handle: listening } = server as unknown as { _handle: { onconnection: Accept } }
    // The cluster takes the handle out of its server as soon as that listens.
    server.once('listening', () => queueMicrotask(() => guard(listening, onRefused)))
  })
}

function guard(listening: { onconnection: Accept }, onRefused: () => void): void {
  const accept = listening.onconnection
  listening.onconnection = (error, connection) => {
    if (connection === undefined || !isAmongLast(connection.fd)) return accept(error, connection)
    connection.close()
    onRefused()
  }
}

/**
 * In a worker: a connection is lost while this process has no descriptor for it, and only its message arrives. The
 * primary waits for a reply before it hands over the next one, and Node sends none.
 */
export function acknowledgeLost(onLost: () => void): void {
  process.on('internalMessage' as never, ({ cmd, msg }: Handover, connection?: object | null) => {
    if (cmd !== 'NODE_HANDLE' || connection || msg?.act !== 'newconn') return
    process.send!({ cmd: 'NODE_CLUSTER', ack: msg.seq, accepted: true })
    onLost()
  })
}
