import type { RedisClientType } from '@redis/client'
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

  constructor(options: CacheOptions) {
    this.#options = options
  }

  /**
   * Does some work with the connection.
   *
   * @throws with the server's or the system's own words when it could not be done
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
      throw error
    } finally {
      clearTimeout(timer)
    }
  }

  async close(): Promise<void> {
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
    const socket = { host, port: Number(port), connectTimeout: dial_timeout }
    const client = createClient({
      ...(username ? { username } : {}),
      ...(password ? { password } : {}),
      database: db,
      disableOfflineQueue: true,
      socket: {
        ...socket,
        reconnectStrategy: false,
        ...(checked === undefined ? {} : { tls: true, ...checked })
      }
    } as never) as RedisClientType
    this.#client = client
    // Whoever waits for it gets the error, too.
    client.on('error', () => {})
    // The handshake may hang where connecting does not.
    const timer = setTimeout(() => client.destroy(), dial_timeout)
    try {
      await client.connect()
    } finally {
      clearTimeout(timer)
    }
    return client
  }

  #drop(): void {
    const client = this.#client
    this.#client = undefined
    if (client?.isOpen) client.destroy()
  }
}
