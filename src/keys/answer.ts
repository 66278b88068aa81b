import { GatewayError } from '../errors.ts'
import type { OwnLimits } from '../limits/limits.ts'
import { PRIORITIES, type Priority } from '../pool/queue.ts'
import { isTagName, MAX_TAG } from './fields.ts'
import { idOfHash, isNetwork, type KeyRecord, parseStatus, parseTime, toNetworks } from './key.ts'

/**
 * What a service, a database or Redis says about a key: members that all may be missing, of whatever type
 * they come in. Lists may be JSON or texts with commas, numbers may be text. What is there and cannot be
 * read refuses the key, for it may be what forbids it.
 */
export type KeyAnswer = Record<string, unknown>

/** Is told of a member that can't be read, and of the key's id; not what it was, which may be anything. */
export type OnUnreadable = (member: string, keyId: string) => void

const RATES = [
  'requests_per_second',
  'requests_per_minute',
  'burst_size',
  'tokens_per_minute',
  'max_concurrent'
] as const

/**
 * @example
 * await toAnswer({ user_id: 'alice', status: 1 }, 'a1b2', () => {}) // { userId: 'alice', status: 'disabled', ... }
 * await toAnswer({ expires_at: 'soon' }, 'a1b2', () => {}) // GatewayError
 */
export async function toAnswer(
  data: KeyAnswer,
  hash: string,
  onUnreadable: OnUnreadable
): Promise<KeyRecord | GatewayError> {
  const status = data.status === undefined ? 'active' : parseStatus(data.status)
  if (status === undefined) return refused(data.message)
  const id = text(data.api_key_id) ?? text(data.id) ?? idOfHash(hash)
  const wrong: string[] = []
  const read = <T>(member: string, parse: (value: unknown) => T): T | undefined => {
    const value = data[member]
    if (isNothing(value)) return undefined
    const parsed = parse(value)
    if (parsed === undefined || Number.isNaN(parsed)) wrong.push(member)
    return parsed
  }
  const record: KeyRecord = {
    id,
    name: text(data.name),
    userId: text(data.user_id),
    status,
    startsAt: read('starts_at', parseTime),
    expiresAt: read('expires_at', parseTime) ?? read('expired_at', parseTime),
    allowedIps: await toNetworks(read('allowed_ips', texts)),
    deniedIps: await toNetworks(read('denied_ips', networks)),
    models: nonEmpty(read('models', texts)),
    ...quotaOf(read),
    priority: read('priority', toPriority),
    // It forbids nothing, and others may have a member of this name: what cannot be read does not refuse the key.
    trace: TRUE.has(data.trace) || undefined,
    tags: read('tags', toTags)
  }
  if (wrong.length === 0) return record
  onUnreadable(wrong[0]!, id)
  return refused(undefined)
}

/** Of a list that denies, an entry that cannot be read must not let anybody pass. */
function networks(value: unknown): string[] | undefined {
  const list = texts(value).filter(each => each !== '')
  return list.every(isNetwork) ? list : undefined
}

export function refused(message: unknown): GatewayError {
  return new GatewayError('key_refused', text(message) ?? 'This API key may not be used.')
}

/** As services and databases write it. */
const TRUE = new Set<unknown>([true, 'true', 1, '1'])

function toPriority(value: unknown): Priority | undefined {
  return PRIORITIES.find(each => each === value)
}

type Read = <T>(member: string, parse: (value: unknown) => T) => T | undefined

/** Who says what was spent, or what is left, counts it; else the gateway does. */
function quotaOf(read: Read): Pick<KeyRecord, 'quotaLeft' | 'limits'> {
  const total = read('total_quota', amount)
  const used = read('used_quota', amount)
  const balance = read('balance', Number)
  const rates = Object.fromEntries(RATES.map(name => [name, read(name, amount)]))
  const limits = { ...rates, ...read('limits', toLimits) }
  const isCounted = used !== undefined || balance !== undefined
  const quota = {
    total_quota: total,
    quota_unit: read('quota_unit', oneOf(['tokens', 'cost'])),
    quota_reset_period: read('quota_reset_period', oneOf(['never', 'daily', 'weekly', 'monthly']))
  }
  const left = total && used !== undefined ? total - used : undefined
  return {
    quotaLeft: balance === undefined ? left : Math.min(balance, left ?? Number.POSITIVE_INFINITY),
    limits: said({ ...limits, ...(total && !isCounted ? quota : {}) })
  }
}

/** What is not said does not stand in the way of what holds for every key. */
function said(limits: Record<string, unknown>): OwnLimits | undefined {
  const members = Object.entries(limits).filter(([, value]) => value !== undefined)
  return members.length === 0 ? undefined : (Object.fromEntries(members) as OwnLimits)
}

function amount(value: unknown): number {
  const isText = typeof value === 'string' && value.trim() !== ''
  const number = isText || typeof value === 'bigint' ? Number(value) : value
  return Number.isFinite(number) && (number as number) >= 0 ? (number as number) : Number.NaN
}

const oneOf =
  <T extends string>(all: readonly T[]) =>
  (value: unknown) =>
    all.find(each => each === value)

function toLimits(value: unknown): OwnLimits | undefined {
  const members = toObject(value)
  const found = RATES.flatMap(name =>
    isNothing(members?.[name]) ? [] : [[name, amount(members![name])] as const]
  )
  const isRight = members !== undefined && found.every(([, number]) => !Number.isNaN(number))
  return isRight ? Object.fromEntries(found) : undefined
}

function toTags(value: unknown): Record<string, string> | undefined {
  const members = toObject(value)
  if (members === undefined) return undefined
  const tags = Object.entries(members).filter(([name]) => isTagName(name))
  return Object.fromEntries(tags.map(([name, tag]) => [name, String(tag).slice(0, MAX_TAG)]))
}

export function toObject(value: unknown): Record<string, unknown> | undefined {
  const parsed = typeof value === 'string' ? parseJson(value) : value
  const isObject = typeof parsed === 'object' && parsed !== null && !Array.isArray(parsed)
  return isObject ? (parsed as Record<string, unknown>) : undefined
}

export function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

function isNothing(value: unknown): boolean {
  return value === undefined || value === null || value === ''
}

function text(value: unknown): string | undefined {
  if (typeof value === 'number' || typeof value === 'bigint') return String(value)
  return typeof value === 'string' && value !== '' ? value : undefined
}

/**
 * A list of texts; an empty one says nothing. An item that is no text stays as one that matches nothing, so
 * that a list of such items is not taken for an empty one.
 */
function texts(value: unknown): string[] {
  const parsed = typeof value === 'string' && value.startsWith('[') ? parseJson(value) : value
  if (typeof parsed === 'string') return parsed.split(',').map(each => each.trim())
  return (Array.isArray(parsed) ? parsed : [parsed]).map(item => text(item) ?? '')
}

function nonEmpty<T>(list: T[] | undefined): T[] | undefined {
  return list?.length === 0 ? undefined : list
}
