import { type Static, Type } from 'typebox'
import { Duration, HeadersToSend, Url } from '../options.ts'
import { pause, readJson, TlsFiles, withServer } from './ask.ts'
import type { Entry } from './entry.ts'
import type { Watch } from './source.ts'

export const HttpOptions = Type.Object(
  {
    url: Url('Answers {"backends": [...]}, {"services": [...]} or a list'),
    method: Type.Enum(['GET', 'POST'], { default: 'GET', description: 'Method' }),
    timeout: Duration('10s', 'How long the answer may take'),
    headers: HeadersToSend,
    interval: Type.Optional(Duration(undefined, 'discovery.interval for this source')),
    tls: Type.Optional(TlsFiles)
  },
  { additionalProperties: false, description: 'A service that has a list' }
)
type HttpOptions = Static<typeof HttpOptions>

/** Asks a service again and again; one that gives an ETag may say that nothing has changed (304). */
export function watchHttp(
  { url, method, timeout, headers, tls }: HttpOptions,
  interval: number
): Watch {
  return async (say, signal) => {
    let entries: Entry[] = []
    let etag: string | undefined
    while (!signal.aborted) {
      await withServer(tls, async server => {
        const answer = await server.ask(
          url,
          {
            method,
            headers: { ...headers, ...(etag === undefined ? {} : { 'if-none-match': etag }) },
            timeout,
            signal: AbortSignal.any([signal, AbortSignal.timeout(timeout)])
          },
          ...(etag === undefined ? [] : [304])
        )
        if (answer.statusCode === 304) return answer.body.dump()
        entries = listIn(await readJson(answer.body))
        etag = answer.headers.etag as string | undefined
      })
      say(entries)
      await pause(interval, signal)
    }
  }
}

function listIn(json: unknown): Entry[] {
  if (Array.isArray(json)) return json
  const { backends, services } = (json ?? {}) as { backends?: unknown; services?: unknown }
  const lists = [backends, services].filter(Array.isArray)
  if (lists.length > 0) return lists.flat()
  throw new Error('the answer is neither a list nor has it backends or services')
}
