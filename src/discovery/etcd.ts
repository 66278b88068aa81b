import { type Static, Type } from 'typebox'
import { isServer, toUrl } from './address.ts'
import { pause, readLines, type Server, TlsFiles, withServer } from './ask.ts'
import { type Entry, MAX_BACKENDS } from './entry.ts'
import type { Watch } from './source.ts'

export const EtcdOptions = Type.Object(
  {
    endpoints: Type.Array(
      Type.String({
        check: isServer,
        expects: 'an address such as http://etcd:2379 or etcd:2379',
        description: 'Member'
      }),
      {
        minItems: 1,
        expects: 'a list of at least one address such as http://etcd:2379',
        description: 'Its members; the first that answers is asked'
      }
    ),
    prefix: Type.String({
      minLength: 1,
      description: 'A backend is what stands under a key that begins so'
    }),
    username: Type.Optional(Type.String({ minLength: 1, description: 'User' })),
    password: Type.Optional(Type.String({ secret: true, description: 'Password' })),
    tls: Type.Optional(TlsFiles)
  },
  { additionalProperties: false, description: 'Keys of etcd, through its v3 gateway' }
)
type EtcdOptions = Static<typeof EtcdOptions>

const TIMEOUT = 10_000
/** How long (ms) one watch lasts. A connection that died unnoticed is found out then. */
const WATCH_MS = 120_000
/** Least time (ms) between two questions, however often a watch ends. */
const GAP = 250

/** Reads all keys under the prefix, and hears of changes from there on; reads anew when it has fallen behind. */
export function watchEtcd(options: EtcdOptions): Watch {
  const { endpoints, tls, prefix } = options
  return (say, signal) =>
    withServer(tls, async server => {
      let keys = await reach(endpoints, endpoint => Keys.read(endpoint, options, server, signal))
      while (!signal.aborted) {
        const readAt = performance.now()
        const told = () =>
          say([...keys.values].map(([key, text]) => toEntry(key.slice(prefix.length), text)))
        told()
        for await (const _ of keys.watch()) told()
        await pause(readAt + GAP - performance.now(), signal)
        if (!signal.aborted) keys = await Keys.read(keys.endpoint, options, server, signal)
      }
    })
}

/** The first member that does it; what the last one says when none does. */
async function reach<T>(endpoints: string[], ask: (endpoint: string) => Promise<T>): Promise<T> {
  let failure: unknown
  for (const endpoint of endpoints) {
    try {
      return await ask(toUrl(endpoint))
    } catch (error) {
      failure = error
    }
  }
  throw failure
}

interface KeyValue {
  key: string
  value?: string
}

interface WatchAnswer {
  error?: { message?: string }
  result?: {
    canceled?: boolean
    compact_revision?: string
    cancel_reason?: string
    events?: { type?: 'PUT' | 'DELETE'; kv: KeyValue }[]
  }
}

/** What stands under the prefix, as a member last told. */
class Keys {
  readonly endpoint: string
  readonly values = new Map<string, string>()
  readonly #server: Server
  readonly #headers: Record<string, string>
  readonly #signal: AbortSignal
  readonly #range: { key: string; range_end: string }
  #revision = 0n

  private constructor(
    endpoint: string,
    prefix: string,
    server: Server,
    headers: Record<string, string>,
    signal: AbortSignal
  ) {
    this.endpoint = endpoint
    this.#server = server
    this.#headers = headers
    this.#signal = signal
    this.#range = { key: encode(Buffer.from(prefix)), range_end: encode(endOf(prefix)) }
  }

  static async read(
    endpoint: string,
    { prefix, username: name, password = '' }: EtcdOptions,
    server: Server,
    signal: AbortSignal
  ): Promise<Keys> {
    const headers: Record<string, string> = {}
    if (name !== undefined) {
      const question = { method: 'POST', body: { name, password }, timeout: TIMEOUT, signal }
      const { token } = (await server.json(`${endpoint}/v3/auth/authenticate`, question)) as {
        token: string
      }
      headers.authorization = token
    }
    const keys = new Keys(endpoint, prefix, server, headers, signal)
    await keys.#read()
    return keys
  }

  async #read(): Promise<void> {
    const { header, kvs } = (await this.#server.json(`${this.endpoint}/v3/kv/range`, {
      method: 'POST',
      headers: this.#headers,
      body: { ...this.#range, limit: MAX_BACKENDS + 1 },
      timeout: TIMEOUT,
      signal: this.#signal
    })) as { header: { revision: string }; kvs?: KeyValue[] }
    this.#revision = BigInt(header.revision)
    for (const each of kvs ?? []) this.#put(each)
  }

  /** Yields after each change, until all must be read again. */
  async *watch(): AsyncGenerator<void> {
    const over = AbortSignal.timeout(WATCH_MS)
    const { body } = await this.#server.ask(`${this.endpoint}/v3/watch`, {
      method: 'POST',
      headers: this.#headers,
      body: { create_request: { ...this.#range, start_revision: String(this.#revision + 1n) } },
      timeout: TIMEOUT,
      idle: WATCH_MS + TIMEOUT,
      signal: AbortSignal.any([this.#signal, over])
    })
    try {
      for await (const { error, result } of readLines(body) as AsyncGenerator<WatchAnswer>) {
        if (error !== undefined) throw new Error(error.message ?? 'the watch has failed')
        // Nothing is left of what it should begin with.
        if (result?.compact_revision !== undefined) return
        if (result?.canceled) throw new Error(result.cancel_reason || 'the watch was ended')
        for (const { type, kv } of result?.events ?? []) {
          if (type === 'DELETE') this.values.delete(decode(kv.key))
          else this.#put(kv)
        }
        if (result?.events !== undefined) yield
      }
    } catch (error) {
      if (!over.aborted) throw error
    }
  }

  #put({ key, value = '' }: KeyValue): void {
    const name = decode(key)
    if (this.values.size <= MAX_BACKENDS || this.values.has(name))
      this.values.set(name, decode(value))
  }
}

/** JSON as in `backends[]`, or a URL alone; the rest of the key is its name if it has no other. */
function toEntry(rest: string, text: string): Entry {
  const name = rest.replace(/^\/+|\/+$/g, '')
  try {
    const said = JSON.parse(text)
    if (typeof said === 'object' && said !== null) return { name, ...said }
    if (typeof said === 'string') return { name, url: said }
  } catch {}
  return { name, url: text.trim() }
}

/** The first key that does not begin so. */
function endOf(prefix: string): Buffer {
  const end = Buffer.from(prefix)
  end[end.length - 1]!++
  return end
}

function encode(bytes: Buffer): string {
  return bytes.toString('base64')
}

function decode(text: string): string {
  return Buffer.from(text, 'base64').toString()
}
