import type { ServerResponse } from 'node:http'
import { Socket } from 'node:net'

/** How long (ms) the rest of a rejected request is read, and how much of it (bytes). */
const LINGER_MS = 5_000
const LINGER_BYTES = 128 * 1024 * 1024

/**
 * Closes the connection of a response in stages (RFC 9112, section 9.6), because its request has not arrived completely:
 * the response is sent, then the rest of the request is read and dropped within bounds. If a connection is closed while
 * data arrives, the client gets a reset and may never read the response.
 *
 * @param response must have `connection: close`
 */
export function closeInStages({ socket }: ServerResponse): void {
  if (!(socket instanceof Socket)) return
  const destroySoon = socket.destroySoon.bind(socket)
  // Node calls it once the response has been handed to the connection.
  socket.destroySoon = () => {
    socket.destroySoon = destroySoon
    const most = socket.bytesRead + LINGER_BYTES
    const close = () => socket.destroy()
    const timer = setTimeout(close, LINGER_MS).unref()
    const look = setInterval(() => {
      if (socket.bytesRead > most) close()
    }, LINGER_MS / 100).unref()
    socket.once('end', close).once('close', () => {
      clearTimeout(timer)
      clearInterval(look)
    })
    socket.end()
    socket.resume()
  }
}
