import type { Sink } from './reporters/posts.ts'

/** The other processes that serve the same port (`server.workers`). */
export interface Peers {
  /** The metrics of all together, in Prometheus' text format. */
  metrics(): Promise<string>
  /** Tells the others something that goes through JSON. */
  tell(news: News): void
  /** Where usage records go: one process writes them down for all. */
  readonly usage: Sink
  onNews(listener: (news: News) => void): void
}

/** A stored response was made: later calls about it go to the same backend. */
export interface News {
  response: string
  backend: string
  caller: string | undefined
}

declare module 'fastify' {
  interface FastifyInstance {
    peers: Peers | undefined
  }
}
