/** The file descriptors of this process: each connection, file and thread takes some. */

/** Descriptors kept for the program itself: files, threads, databases, Redis. */
const OWN = 64
/** While fewer than this are free, no client is accepted: backends, files and handovers still get one. */
const RESERVE = 32

/** Descriptors this process may have open; infinite where the system sets no limit. */
export const descriptorLimit = readLimit()

/**
 * Connections of clients that this process can serve. Each may need another one to a backend, so clients get half
 * of the descriptors that the program itself leaves.
 */
export function servableConnections(limit = descriptorLimit): number {
  return Math.max(1, Math.floor((limit - OWN) / 2))
}

/**
 * Whether a connection with this descriptor took one of the last. The system gives the lowest number that is free,
 * so all below it are in use.
 */
export function isAmongLast(descriptor: number, limit = descriptorLimit): boolean {
  return descriptor >= limit - Math.min(RESERVE, limit / 4)
}

function readLimit(): number {
  const report = process.report as NodeJS.ProcessReport & { excludeNetwork: boolean }
  const { excludeNetwork } = report
  // Else the report resolves the names of all peers.
  report.excludeNetwork = true
  const { userLimits } = report.getReport() as {
    userLimits?: { open_files: { soft: number | 'unlimited' } }
  }
  report.excludeNetwork = excludeNetwork
  const soft = userLimits?.open_files.soft
  return typeof soft === 'number' ? soft : Number.POSITIVE_INFINITY
}
