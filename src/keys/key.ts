import crypto from 'node:crypto'
import { BlockList, isIP } from 'node:net'
import { type Static, Type } from 'typebox'
import { isListed } from '../address.ts'
import { type ErrorCode, GatewayError } from '../errors.ts'
import type { Caller } from '../exchange.ts'
import { inSlices } from '../slices.ts'

/** What a key source knows about one key. All but `id` may be missing. */
export interface KeyRecord {
  id: string
  name?: string | undefined
  userId?: string | undefined
  status: KeyStatus
  /** Unix milliseconds. */
  startsAt?: number | undefined
  expiresAt?: number | undefined
  /** Absent: every address, and none. */
  allowedIps?: BlockList | undefined
  deniedIps?: BlockList | undefined
  models?: string[] | undefined
  /** What is left to spend, where the source itself counts; 0 or less refuses. */
  quotaLeft?: number | undefined
  /** Limits and a quota that the gateway counts; see {@link Caller}. */
  limits?: Caller['limits']
  spent?: Caller['spent']
  tags?: Caller['tags']
  priority?: Caller['priority']
  trace?: Caller['trace']
}

export type KeyStatus = 'active' | 'disabled' | 'expired' | 'quota_exceeded'

/** What another gateway says of a key. */
export interface KeyNews {
  /** SHA-256. */
  hash: string
  /** It is dead since then (Unix ms); absent: it was changed. */
  revokedAt?: number
}

/** Where keys are looked up. */
export interface KeySource {
  readonly name: string
  /**
   * @returns the key's record, a GatewayError that refuses it, or undefined for an unknown key
   * @throws when the source can't tell (it is down): the caller gets 503, not 401
   */
  lookup(key: string, hash: string): Promise<KeyRecord | GatewayError | undefined>
  /** Drops what it remembers of the key with this hash, or of all. */
  forget?(hash?: string): void
  close?(): Promise<void>
}

const StatusCode = (what: string, status: number, message: string, allow = false) =>
  Type.Object(
    {
      allow: Type.Boolean({ default: allow, description: 'Lets it pass' }),
      http_code: Type.Integer({
        minimum: 400,
        maximum: 599,
        default: status,
        description: 'Status of the answer'
      }),
      message: Type.String({ default: message, description: 'Text of the answer' })
    },
    { additionalProperties: false, default: {}, description: what }
  )

/** `auth.status_codes`: what each status of a key answers. */
export const StatusCodes = Type.Object(
  {
    active: StatusCode('An active key', 403, 'This API key may not be used.', true),
    disabled: StatusCode('A disabled key', 403, 'This API key has been disabled.'),
    expired: StatusCode('An expired key', 403, 'This API key has expired.'),
    quota_exceeded: StatusCode('A quota used up', 429, 'The quota of this API key is used up.'),
    not_found: StatusCode('An unknown key', 401, 'This API key is not valid.')
  },
  { additionalProperties: false, default: {}, description: 'What each status of a key answers' }
)
export type StatusCodes = Static<typeof StatusCodes>

const CODES: Record<string, ErrorCode> = {
  active: 'key_disabled',
  disabled: 'key_disabled',
  expired: 'key_expired',
  quota_exceeded: 'insufficient_quota',
  not_found: 'invalid_api_key'
}

/** The refusal of a key that has this status, or undefined when the status lets it pass. */
export function statusRefusal(
  status: KeyStatus | 'not_found',
  codes: StatusCodes
): GatewayError | undefined {
  if (codes[status].allow) return undefined
  const answer = codes[status]
  const retry = status === 'quota_exceeded' ? { 'x-should-retry': 'false' } : {}
  const ask = answer.http_code === 401 ? { 'www-authenticate': 'Bearer' } : {}
  return new GatewayError(CODES[status]!, answer.message, {
    statusCode: answer.http_code,
    headers: { ...retry, ...ask }
  })
}

/**
 * Decides whether a key may be used now, from this address.
 *
 * @example
 * checkKey({ id: 'k', status: 'active', expiresAt: 0 }, { ip: '::1', now: 1, codes }) // GatewayError
 */
export function checkKey(
  record: KeyRecord,
  { ip, now, codes }: { ip: string; now: number; codes: StatusCodes }
): GatewayError | undefined {
  const refusal = statusRefusal(statusAt(record, now), codes)
  if (refusal !== undefined) return refusal
  if (record.startsAt !== undefined && now < record.startsAt) {
    return new GatewayError('key_not_started', 'This API key is not valid yet.')
  }
  const { allowedIps, deniedIps } = record
  // A text that is no address may be a denied address in another notation.
  const isDenied = deniedIps !== undefined && (isIP(ip) === 0 || isListed(deniedIps, ip))
  if (isDenied || (allowedIps !== undefined && !isListed(allowedIps, ip))) {
    return new GatewayError('ip_not_allowed', 'This API key may not be used from this address.')
  }
  return undefined
}

function statusAt(record: KeyRecord, now: number): KeyStatus {
  if (record.status !== 'active') return record.status
  if (record.expiresAt !== undefined && now >= record.expiresAt) return 'expired'
  return record.quotaLeft !== undefined && record.quotaLeft <= 0 ? 'quota_exceeded' : 'active'
}

export function toCaller(record: KeyRecord): Caller {
  const { id, name, userId, models, limits, spent, tags, priority, trace } = record
  return { id, name, userId, models, limits, spent, tags, priority, trace }
}

/** SHA-256 of a key as lower-case hexadecimal digits: the only form in which keys are kept. */
export function hashKey(key: string): string {
  return crypto.hash('sha256', key)
}

/**
 * Why a source can't tell, fit for a log: not what it says if any of the key may be in it, as in a service's
 * or a database's complaint about what it was asked.
 */
export function reasonFor(error: unknown, key: string): string {
  const { code, message, name } = error as { code?: unknown; message: string; name: string }
  const reason = typeof code === 'string' ? code : message
  const isSafe = ![key, hashKey(key)].some(each => reason.includes(each.slice(0, SHOWN)))
  return isSafe ? reason : name
}

/** So many characters of a key tell nothing. */
const SHOWN = 7

/** The id of a key that its source gives none. */
export function idOfHash(hash: string): string {
  return `key_${hash.slice(0, 12)}`
}

/**
 * A key's status from text (`active`, `enabled`, `disabled` ...) or the number of the original
 * (0 active, 1 disabled, 2 quota exceeded, 3 expired).
 *
 * @returns undefined for anything else, which must not pass
 */
export function parseStatus(status: unknown): KeyStatus | undefined {
  switch (typeof status === 'string' ? status.toLowerCase() : status) {
    case 0:
    case '0':
    case 'active':
    case 'enabled':
      return 'active'
    case 1:
    case '1':
    case 'disabled':
      return 'disabled'
    case 2:
    case '2':
    case 'quota_exceeded':
      return 'quota_exceeded'
    case 3:
    case '3':
    case 'expired':
      return 'expired'
    default:
      return undefined
  }
}

/**
 * Unix seconds reach from 2001-09-09 to the year 5138, and milliseconds as far. 2099 is a year that was
 * meant, not half an hour after the beginning of 1970.
 */
const LEAST_SECONDS = 1e9
const LEAST_MILLISECONDS = 1e11
const MOST_MILLISECONDS = 1e14

const ISO = /^(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d(?::\d\d(?:\.\d+)?)?)(Z|[+-]\d\d:?\d\d)?)?$/i

/**
 * A point in time as Unix milliseconds, from ISO 8601 text (UTC where it names no zone) or Unix seconds
 * or milliseconds (number or digits).
 *
 * @returns NaN for anything else
 * @example
 * parseTime('2026-12-31') // 1798675200000
 */
export function parseTime(time: unknown): number {
  if (time instanceof Date) return time.getTime()
  if (typeof time === 'string' && !/^\d+$/.test(time)) return parseIso(time)
  const number = typeof time === 'string' || typeof time === 'number' ? Number(time) : Number.NaN
  if (number >= LEAST_MILLISECONDS) return number < MOST_MILLISECONDS ? number : Number.NaN
  return number >= LEAST_SECONDS ? number * 1000 : Number.NaN
}

function parseIso(text: string): number {
  const [, date, clock = '00:00', zone = 'Z'] = ISO.exec(text) ?? []
  const midnight = Date.parse(`${date}T00:00:00Z`)
  // Date.parse takes 31 February for 3 March.
  if (Number.isNaN(midnight) || !new Date(midnight).toISOString().startsWith(date!))
    return Number.NaN
  return Date.parse(`${date}T${clock}${zone.toUpperCase().replace(/^(...)(\d\d)$/, '$1:$2')}`)
}

/** Is this an address or a network (`10.0.0.0/8`, `2001:db8::/32`)? */
export function isNetwork(text: unknown): boolean {
  if (typeof text !== 'string') return false
  const [address, prefix, ...rest] = text.split('/')
  const family = isIP(address ?? '')
  if (family === 0 || rest.length > 0) return false
  if (prefix === undefined) return true
  return /^\d{1,3}$/.test(prefix) && Number(prefix) <= (family === 4 ? 32 : 128)
}

/**
 * A list of addresses and networks, made once. An empty one says nothing, as in the original; of one
 * that says something, what can't be read matches no address.
 */
export async function toNetworks(texts: string[] | undefined): Promise<BlockList | undefined> {
  if (texts === undefined || texts.length === 0) return undefined
  const list = new BlockList()
  await inSlices(texts, network => addNetwork(list, network))
  return list
}

/** The same for a list that is short. */
export function networksOf(texts: readonly string[]): BlockList {
  const list = new BlockList()
  for (const network of texts) addNetwork(list, network)
  return list
}

function addNetwork(list: BlockList, network: string): void {
  if (!isNetwork(network)) return
  const [address, prefix] = network.split('/') as [string, string | undefined]
  const family = isIP(address) === 6 ? 'ipv6' : 'ipv4'
  if (prefix === undefined) list.addAddress(address, family)
  else list.addSubnet(address, Number(prefix), family)
}

const LATEST = ':latest'

/**
 * Does one of the patterns (`*` stands for any text) name this model? To Ollama `llama3` and
 * `llama3:latest` are one and the same, so they are here.
 */
export function matchesModel(patterns: readonly string[], model: string): boolean {
  const bare = untagged(model)
  const tagged = `${bare}${LATEST}`
  return patterns.some(pattern => {
    if (pattern === bare || pattern === tagged) return true
    if (!pattern.includes('*')) return false
    return matches(pattern, model) || (bare !== model && matches(pattern, bare))
  })
}

/** The name without `:latest`, which Ollama adds to one without a tag. */
export function untagged(model: string): string {
  return model.endsWith(LATEST) ? model.slice(0, -LATEST.length) : model
}

function matches(pattern: string, model: string): boolean {
  const [head, ...tails] = pattern.split('*') as [string, ...string[]]
  if (!model.startsWith(head)) return false
  const last = tails.pop()!
  let at = head.length
  for (const tail of tails) {
    const found = model.indexOf(tail, at)
    if (found === -1) return false
    at = found + tail.length
  }
  return model.length - last.length >= at && model.endsWith(last)
}
