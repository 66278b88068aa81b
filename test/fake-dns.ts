import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import type { TestContext } from 'node:test'

/** A DNS server over UDP (RFC 1035): A, AAAA and SRV, of the names it is given. */

export type DnsRecord =
  | { type: 'A'; address: string; ttl?: number }
  | { type: 'AAAA'; address: string; ttl?: number }
  | { type: 'SRV'; priority: number; weight: number; port: number; target: string; ttl?: number }

export interface FakeDns {
  address: string
  /** By name; a name that is not there is answered NXDOMAIN. */
  zone: Record<string, DnsRecord[]>
  /** What is answered instead. */
  trouble: 'servfail' | 'silence' | undefined
  queries: string[]
}

const TYPES = { A: 1, AAAA: 28, SRV: 33 } as const
const [NOERROR, SERVFAIL, NXDOMAIN] = [0, 2, 3]
/** Standard response, recursion desired and available. */
const FLAGS = 0x8180
const CLASS_IN = 1
/** A pointer to the name of the question, which begins at byte 12. */
const QUESTION_NAME = Buffer.from([0xc0, 12])

export async function fakeDns(t: TestContext, zone: Record<string, DnsRecord[]>): Promise<FakeDns> {
  const socket = createSocket('udp4')
  const dns: FakeDns = { address: '', zone, trouble: undefined, queries: [] }
  socket.on('message', (message, { port, address }) => {
    const { name, type, end } = readQuestion(message)
    dns.queries.push(`${name} ${type}`)
    if (dns.trouble === 'silence') return
    const known = dns.zone[name]
    const code = dns.trouble === 'servfail' ? SERVFAIL : known === undefined ? NXDOMAIN : NOERROR
    const records = code === NOERROR ? known!.filter(each => TYPES[each.type] === type) : []
    const head = Buffer.alloc(12)
    message.copy(head, 0, 0, 2)
    for (const [at, value] of [FLAGS | code!, 1, records.length].entries()) {
      head.writeUInt16BE(value, 2 + at * 2)
    }
    socket.send(
      Buffer.concat([head, message.subarray(12, end), ...records.map(toAnswer)]),
      port,
      address
    )
  })
  socket.bind(0, '127.0.0.1')
  await once(socket, 'listening')
  t.after(() => void socket.close())
  dns.address = `127.0.0.1:${socket.address().port}`
  return dns
}

function readQuestion(message: Buffer): { name: string; type: number; end: number } {
  const labels: string[] = []
  let at = 12
  while (message[at] !== 0) {
    const length = message[at]!
    labels.push(message.subarray(at + 1, at + 1 + length).toString())
    at += 1 + length
  }
  return { name: labels.join('.').toLowerCase(), type: message.readUInt16BE(at + 1), end: at + 5 }
}

function toAnswer(record: DnsRecord): Buffer {
  const data = toData(record)
  const fixed = Buffer.alloc(10)
  fixed.writeUInt16BE(TYPES[record.type], 0)
  fixed.writeUInt16BE(CLASS_IN, 2)
  fixed.writeUInt32BE(record.ttl ?? 60, 4)
  fixed.writeUInt16BE(data.length, 8)
  return Buffer.concat([QUESTION_NAME, fixed, data])
}

function toData(record: DnsRecord): Buffer {
  if (record.type === 'A') return Buffer.from(record.address.split('.').map(Number))
  if (record.type === 'AAAA') {
    // Only addresses such as ::1 are needed.
    const data = Buffer.alloc(16)
    data.writeUInt16BE(Number.parseInt(record.address.replace('::', ''), 16), 14)
    return data
  }
  const fixed = Buffer.alloc(6)
  for (const [at, value] of [record.priority, record.weight, record.port].entries()) {
    fixed.writeUInt16BE(value, at * 2)
  }
  const labels = record.target.split('.').filter(each => each !== '')
  const name = labels.flatMap(each => [Buffer.from([each.length]), Buffer.from(each)])
  return Buffer.concat([fixed, ...name, Buffer.from([0])])
}
