import { readFileSync } from 'node:fs'
import { isIP } from 'node:net'

/** How a server's certificate is checked, as Node's TLS has it; undefined without TLS. */
export function tlsOf({ host, tls, caFile }: TlsTarget) {
  if (tls === undefined || tls === 'off') return undefined
  return {
    rejectUnauthorized: tls === 'verified',
    ...(isIP(host) === 0 ? { servername: host } : {}),
    ...(caFile === undefined ? {} : { ca: readFileSync(caFile, 'utf8') })
  }
}

interface TlsTarget {
  host: string
  tls: 'off' | 'verified' | 'unverified' | undefined
  caFile: string | undefined
}
