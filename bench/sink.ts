import { type AddressInfo, createServer } from 'node:net'
import { MessageReader } from './http1.ts'

/** Receives usage events, and counts them: by the brackets, one for each `request_id`. */

const RECEIVED = Buffer.from('HTTP/1.1 204 No Content\r\n\r\n')
let events = 0

const server = createServer({ noDelay: true }, socket => {
  let body: Buffer[] = []
  const reader = new MessageReader({
    onHead: () => {},
    onBody: bytes => body.push(bytes),
    onEnd: () => {
      events += Buffer.concat(body).toString('latin1').split('"request_id"').length - 1
      body = []
      socket.write(RECEIVED)
    }
  })
  socket.on('data', bytes => reader.read(bytes as Buffer))
  socket.on('error', () => {})
})

server.listen({ port: 0, host: '127.0.0.1', backlog: 4096 }, () => {
  process.send!({ port: (server.address() as AddressInfo).port })
})
process.on('message', () => process.send!({ events }))
process.on('disconnect', () => process.exit())
