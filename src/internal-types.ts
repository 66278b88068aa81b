import type { Lifecycle } from './app.ts'
import type { Connections } from './connections.ts'
import type { DataDirWatch } from './data-dir-watch.ts'
import type { Peers } from './peers.ts'
import type { Admin } from './plugins/admin.ts'
import type { Overload } from './plugins/overload.ts'

/** Types of decorators that only the gateway's own code uses. No module imports this one: see `types.ts`. */
declare module 'fastify' {
  interface FastifyInstance {
    admin: Admin
    connections: Connections
    dataDirWatch: DataDirWatch
    lifecycle: Lifecycle
    overload: Overload
    peers: Peers
  }
  interface FastifyContextConfig {
    /** Errors look as in the original's admin API. */
    isOriginal?: boolean
    /** The body stays the bytes that came. */
    isRaw?: boolean
  }
}
