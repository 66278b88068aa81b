import { Socket } from 'node:net'
import { buildConnector } from 'undici'

/** Opens a connection; `done` hears when it stands, or why it can't. */
export type Connector = (...args: Parameters<buildConnector.connector>) => Socket

/** Sockets are read one after another: all of them into this. */
const received = Buffer.allocUnsafeSlow(64 * 1024)
/** The socket that is being read, and what came until undici takes it. */
let reading: Socket | undefined
let piece: Buffer | null = null
/**
 * What undici has not taken, or given back, because the client is slow: as long as it is here, and be it empty,
 * the socket does not tell of its end either, which undici would take for the answer's.
 */
const left = new WeakMap<Socket, Buffer>()
/** Sockets that have sent a request whose response has not begun. */
const asked = new WeakSet<Socket>()
const CONTINUE = Buffer.from('HTTP/1.1 100')
const HEAD_END = Buffer.from('\r\n\r\n')
const CHUNKED = /\r\ntransfer-encoding:[ \t]*chunked[ \t]*(\r|$)/i
const LENGTH = /\r\ncontent-length:[^\r]*/gi

/**
 * undici's own connections (`timeout` in ms), but each piece goes to its parser as it is read. A socket would
 * make 64 KB of buffer for each read, put what came into a queue and tell of it in a later tick. TLS sockets do so
 * here, too, for they go on giving what they have decrypted when they are told to stop.
 */
export function directConnector(timeout: number): Connector {
  const onread = { buffer: received, callback: receive }
  const options = { timeout, allowH2: false }
  const connect = buildConnector({ ...options, onread } as buildConnector.BuildOptions) as Connector
  const connectTls = buildConnector(options) as Connector
  return (target, done) => {
    const socket = (target.protocol === 'https:' ? connectTls : connect)(target, done)
    socket.read = read
    socket.unshift = unshift
    socket.write = write as Socket['write']
    return socket
  }
}

/** Has all gone out over the connection whose answer is being read? Of TLS that is not known. */
export function isAllSent(): boolean {
  return reading?.writableLength === 0
}

function receive(this: Socket, length: number): boolean {
  piece = Buffer.allocUnsafe(length)
  received.copy(piece, 0, 0, length)
  piece = acceptable(this, piece)
  if (piece === null) return true
  reading = this
  this.emit('readable')
  reading = undefined
  if (piece === null) return true
  left.set(this, piece)
  piece = null
  return false
}

function read(this: Socket, size?: number): Buffer | null {
  if (reading === this) {
    const taken = piece
    piece = null
    return taken
  }
  const kept = left.get(this)
  if (kept === undefined) {
    const chunk: Buffer | null = Socket.prototype.read.call(this, size)
    return chunk && acceptable(this, chunk)
  }
  if (size === 0) return null
  left.delete(this)
  return kept
}

/** undici writes nothing but heads as strings. */
function write(this: Socket, chunk: unknown, ...more: unknown[]): boolean {
  if (typeof chunk === 'string') asked.add(this)
  return (Socket.prototype.write as (...given: unknown[]) => boolean).call(this, chunk, ...more)
}

/**
 * Returns what a socket has received, in a form that undici accepts; null: nothing is left. In front of a response
 * `100 Continue` is left out, which some servers send without being asked. A length beside chunks is left out, because the
 * chunks count (RFC 9112, section 6.3).
 */
function acceptable(socket: Socket, chunk: Buffer): Buffer | null {
  if (!asked.has(socket)) return chunk
  let rest = chunk
  let end = rest.indexOf(HEAD_END)
  while (end >= CONTINUE.length && CONTINUE.compare(rest, 0, CONTINUE.length) === 0) {
    rest = rest.subarray(end + HEAD_END.length)
    end = rest.indexOf(HEAD_END)
  }
  if (rest.length === 0) return null
  asked.delete(socket)
  if (end === -1) return rest
  const head = rest.toString('latin1', 0, end)
  const plain = CHUNKED.test(head) ? head.replace(LENGTH, '') : head
  if (plain.length === head.length) return rest
  return Buffer.concat([Buffer.from(plain, 'latin1'), rest.subarray(end)])
}

function unshift(this: Socket, rest: Buffer): void {
  if (reading === this) piece = rest
  else left.set(this, rest)
}
