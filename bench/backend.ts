import { type AddressInfo, createServer, type Socket } from 'node:net'
import { MessageReader, now } from './http1.ts'

/**
 * The inference server of the bench. The request says what it wants in its `user` member:
 * `"user":"bench CHUNKS,MS"` streams so many events so far apart, each with the time it was sent as its text; without
 * it comes a whole answer of 1 KB. Usage is reported as vLLM does: in a chunk of its own, when asked.
 */

const HEAD = 'HTTP/1.1 200 OK\r\ncontent-type: '
const STREAM_HEAD = `${HEAD}text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n`
const EVENT =
  '"object":"chat.completion.chunk","created":1767225600,"model":"bench","choices":[{"index":0,"delta":'
const USAGE = '"usage":{"prompt_tokens":21,"completion_tokens":100,"total_tokens":121}'
const ANSWER = `{"id":"chatcmpl-bench","object":"chat.completion","created":1767225600,"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":"${'word '.repeat(160)}"},"finish_reason":"stop"}],${USAGE}}`
const WHOLE = Buffer.from(
  `${HEAD}application/json\r\ncontent-length: ${ANSWER.length}\r\n\r\n${ANSWER}`
)

const NEAR = 1024

const sockets = new Set<Socket>()

const server = createServer({ noDelay: true }, socket => {
  sockets.add(socket)
  // The wish stands near one end or the other, wherever the entrant has put it.
  let beginning = ''
  let ending = ''
  const reader = new MessageReader({
    onHead: () => {
      beginning = ''
      ending = ''
    },
    onBody: bytes => {
      if (beginning.length < NEAR) beginning += bytes.toString('latin1', 0, NEAR)
      const last = bytes.toString('latin1', Math.max(0, bytes.length - NEAR))
      ending = (ending + last).slice(-NEAR)
    },
    onEnd: () => answer(socket, beginning + ending)
  })
  socket.on('data', bytes => reader.read(bytes as Buffer))
  socket.on('error', () => {})
  socket.on('close', () => sockets.delete(socket))
})

function answer(socket: Socket, body: string): void {
  const wish = /"user": ?"bench (\d+),(\d+)"/.exec(body)
  if (wish === null) {
    socket.write(WHOLE)
    return
  }
  let left = Number(wish[1]) - 1
  const asksForUsage = body.includes('"include_usage":true')
  const first = event('"role":"assistant",')
  socket.write(STREAM_HEAD + first)
  const timer = setInterval(() => {
    if (socket.destroyed) return clearInterval(timer)
    left--
    if (left > 0) return void socket.write(event(''))
    clearInterval(timer)
    const usage = asksForUsage ? frame(`data: {"choices":[],${USAGE}}\n\n`) : ''
    socket.write(`${event('', '"stop"')}${usage}${frame('data: [DONE]\n\n')}0\r\n\r\n`)
  }, Number(wish[2]))
}

function event(role: string, finishReason = 'null'): string {
  const time = String(now()).padStart(16, '0')
  return frame(
    `data: {"id":"chatcmpl-bench",${EVENT}{${role}"content":" ${time}"},"logprobs":null,"finish_reason":${finishReason}}]}\n\n`
  )
}

function frame(data: string): string {
  return `${data.length.toString(16)}\r\n${data}\r\n`
}

server.listen({ port: 0, host: '127.0.0.1', backlog: 4096 }, () => {
  process.send!({ port: (server.address() as AddressInfo).port })
})
process.on('message', () => process.send!({ open: sockets.size }))
process.on('disconnect', () => process.exit())
