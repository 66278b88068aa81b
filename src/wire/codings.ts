import type { Transform } from 'node:stream'
import * as zlib from 'node:zlib'

/** Content codings (RFC 9110, section 8.4.1) that the gateway can undo. */

/** Each piece goes on as soon as it can be read. */
const AT_ONCE = { flush: zlib.constants.Z_SYNC_FLUSH }
export type Stage = Transform & zlib.Zlib

const CODINGS: Record<string, (() => Stage) | undefined> = {
  gzip: () => zlib.createGunzip(AT_ONCE),
  'x-gzip': () => zlib.createGunzip(AT_ONCE),
  deflate: () => zlib.createInflate(AT_ONCE),
  br: () => zlib.createBrotliDecompress(),
  zstd: () => zlib.createZstdDecompress()
}
/** A body with more codings than this is not read. */
const MAX_CODINGS = 3
/** Names that servers put into `content-encoding` although they are no codings. */
const NO_CODING =
  /^(identity|none|null|plain|text|binary|[78]-?bit|chunked|utf-?8|us-ascii|ascii)?$/

/**
 * Content codings of a body, in the order in which they were applied. `unknown`: one that cannot be undone.
 *
 * @example
 * codingsOf('GZIP, utf-8') // { codings: ['gzip'], unknown: undefined }
 */
export function codingsOf(header: string | string[] | undefined): {
  codings: string[]
  unknown: string | undefined
} {
  if (header === undefined || header === 'identity') return NOTHING
  const names = String(header)
    .toLowerCase()
    .split(',')
    .map(name => name.trim())
    .filter(name => !NO_CODING.test(name))
  const codings = names.filter(name => CODINGS[name] !== undefined)
  const unknown = names.find(name => CODINGS[name] === undefined)
  if (codings.length > MAX_CODINGS) return { codings: [], unknown: String(header) }
  return { codings, unknown }
}

/** Returns a stream that undoes one of {@link codingsOf}. */
export function newDecoder(coding: string): Stage {
  return CODINGS[coding]!()
}

const NOTHING = { codings: [], unknown: undefined }
