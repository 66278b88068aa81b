import type { RedisClientType } from '@redis/client'
import { reasonOf } from './reason.ts'
import type { CacheOptions } from './storage.ts'
import { tlsOf } from './tls.ts'

/**
 * A Redis server. It is connected to when it is needed, and anew after any error, so that nothing is
 * ever asked of a connection whose state isn't known.
 */
export class Redis {
  readonly #options: CacheOptions
  #client: RedisClientType | undefined
  #connecting: Promise<RedisClientType> | undefined
  #isClosed = false

  constructor(options: CacheOptions) {
    this.#options = options
  }

  /**
   * Does some work with the connection.
   *
   * @throws {Error} with the server's or the system's own words, fit for a log
   */
  async run<T>(work: (client: RedisClientType) => Promise<T>): Promise<T> {
    const { read_timeout } = this.#options
    let timer: NodeJS.Timeout | undefined
    try {
      const client = await this.#connected()
      const late = Promise.withResolvers<never>()
      timer = setTimeout(
        () => late.reject(new Error(`no answer in ${read_timeout} ms`)),
        read_timeout
      )
      return await Promise.race([work(client), late.promise])
    } catch (error) {
      this.#drop()
      throw new Error(reasonOf(firstOf(error)))
    } finally {
      clearTimeout(timer)
    }
  }

  async close(): Promise<void> {
    this.#isClosed = true
    this.#drop()
  }

  async #connected(): Promise<RedisClientType> {
    if (this.#client?.isReady) return this.#client
    this.#connecting ??= this.#connect().finally(() => {
      this.#connecting = undefined
    })
    return this.#connecting
  }

  async #connect(): Promise<RedisClientType> {
    this.#drop()
    const { createClient } = await import('@redis/client')
    const { addr, username, password, db, tls, dial_timeout } = this.#options
    const [, host = '', port] = /^\[?(.*?)\]?:(\d+)$/.exec(addr)!
    const checked = tlsOf({
      host,
      tls: tls.enabled ? (tls.verify ? 'verified' : 'unverified') : 'off',
      caFile: tls.ca_file
    })
    const client = createClient({
      ...(username ? { username } : {}),
      ...(password ? { password } : {}),
      database: db,
      disableOfflineQueue: true,
      socket: {
        host,
        port: Number(port),
        connectTimeout: dial_timeout,
        reconnectStrategy: false,
        ...(checked === undefined ? {} : { tls: true, ...checked })
      }
    } as never) as RedisClientType
    if (this.#isClosed) throw new Error('closed')
    this.#client = client
    // Whoever waits for it gets the error, too.
    client.on('error', () => {})
    // The handshake may hang where connecting does not.
    let isLate = false
    const timer = setTimeout(() => {
      isLate = true
      this.#drop()
    }, dial_timeout)
    try {
      await client.connect()
    } catch (error) {
      throw isLate ? new Error(`no answer in ${dial_timeout} ms`) : error
    } finally {
      clearTimeout(timer)
    }
    // One that is given up while it dials goes on dialling.
    if (this.#client === client) return client
    client.destroy()
    throw new Error('closed')
  }

  #drop(): void {
    const client = this.#client
    this.#client = undefined
    client?.destroy()
  }
}

/** Of a transaction the first thing that went wrong in it. */
function firstOf(error: unknown): unknown {
  const { replies = [] } = error as { replies?: unknown[] }
  return replies.find(each => each instanceof Error) ?? error
}
