import { readFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Static, Type } from 'typebox'
import { Agent, request } from 'undici'
import { VERSION } from '../version.ts'

/** Questions to the servers that know where backends are: bounded in time and in size. */

const MAX_BYTES = 16 * 1024 * 1024
const MAX_REASON = 300

const file = (description: string) => Type.Optional(Type.String({ minLength: 1, description }))

export const TlsFiles = Type.Optional(
  Type.Object(
    {
      ca_file: file('Authority of its certificate, PEM; else those that Node trusts'),
      cert_file: file('Certificate that is shown to it, PEM'),
      key_file: file('Key of that, PEM')
    },
    {
      additionalProperties: false,
      description: 'TLS to it; the files are read again when they are needed'
    }
  )
)
export type TlsFiles = Static<typeof TlsFiles>

export interface Question {
  method?: string
  headers?: Record<string, string | undefined>
  /** Is sent as JSON. */
  body?: object
  /** How long (ms) the answer may take to begin. */
  timeout: number
  /** How long (ms) may pass between two parts of it; `timeout` if left out. */
  idle?: number
  signal: AbortSignal
}

/** An answer with a status that means failure. */
export class StatusError extends Error {
  readonly status: number

  constructor(status: number, said: string) {
    super(`status ${status}${said}`)
    this.status = status
  }
}

/** A server that is asked, over connections of their own until {@link close}. */
export class Server {
  readonly #agent: Agent

  private constructor(agent: Agent) {
    this.#agent = agent
  }

  static async open(tls: TlsFiles = {}): Promise<Server> {
    const read = (path: string | undefined) => path && readFile(path, 'utf8')
    const [ca, cert, key] = await Promise.all([tls.ca_file, tls.cert_file, tls.key_file].map(read))
    const connect = { ...(ca && { ca }), ...(cert && { cert }), ...(key && { key }) }
    return new Server(new Agent({ allowH2: false, connect: { ...connect, timeout: 10_000 } }))
  }

  /**
   * The answer, of status 200 or one of `others`; its body must be read or dumped.
   *
   * @throws {StatusError} with what a JSON body says in `message` or `error`
   */
  async ask(url: string, question: Question, ...others: number[]) {
    const { method = 'GET', headers, body, timeout, idle = timeout, signal } = question
    const answer = await request(url, {
      dispatcher: this.#agent,
      method: method as 'GET',
      headers: {
        accept: 'application/json',
        'user-agent': `llmproxy/${VERSION}`,
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
        ...headers
      },
      body: body === undefined ? null : JSON.stringify(body),
      headersTimeout: timeout,
      bodyTimeout: idle,
      signal
    })
    const { statusCode } = answer
    if (statusCode === 200 || others.includes(statusCode)) return answer
    throw new StatusError(statusCode, reasonIn(await readJson(answer.body).catch(() => undefined)))
  }

  /** The JSON of an answer of status 200, which must be there as a whole within `timeout`. */
  async json(url: string, question: Question): Promise<unknown> {
    const signal = AbortSignal.any([question.signal, AbortSignal.timeout(question.timeout)])
    const { body } = await this.ask(url, { ...question, signal })
    return readJson(body)
  }

  close(): Promise<void> {
    return this.#agent.destroy()
  }
}

/** Opens a server for one use. */
export async function withServer<T>(
  tls: TlsFiles | undefined,
  use: (server: Server) => Promise<T>
): Promise<T> {
  const server = await Server.open(tls)
  try {
    return await use(server)
  } finally {
    await server.close()
  }
}

export async function readJson(body: AsyncIterable<Buffer>): Promise<unknown> {
  let size = 0
  const chunks: Buffer[] = []
  for await (const chunk of body) {
    size += chunk.length
    if (size > MAX_BYTES) throw new Error(`an answer of more than ${MAX_BYTES} bytes`)
    chunks.push(chunk)
  }
  return parse(Buffer.concat(chunks).toString())
}

/** A stream of JSON, a line each. */
export async function* readLines(body: AsyncIterable<Buffer>): AsyncGenerator<unknown> {
  let rest: Buffer[] = []
  let size = 0
  for await (const chunk of body) {
    let from = 0
    for (let end = chunk.indexOf(10); end !== -1; end = chunk.indexOf(10, from)) {
      const line = Buffer.concat([...rest, chunk.subarray(from, end)]).toString()
      rest = []
      size = 0
      from = end + 1
      if (line.trim() !== '') yield parse(line)
    }
    size += chunk.length - from
    if (size > MAX_BYTES) throw new Error(`a line of more than ${MAX_BYTES} bytes`)
    rest.push(chunk.subarray(from))
  }
}

/** Waits, unless the signal comes before. */
export async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(Math.max(0, ms), undefined, { signal, ref: false }).catch(() => {})
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    // What it is instead may be a secret.
    throw new Error('an answer that is not JSON')
  }
}

function reasonIn(json: unknown): string {
  const { message, error } = (json ?? {}) as { message?: unknown; error?: unknown }
  const said = message ?? error
  return typeof said === 'string' && said !== '' ? `: ${said.slice(0, MAX_REASON)}` : ''
}
