import type { KeyChanges, KeySpec } from '../keys/stored-key.ts'
import { parseQuantity } from '../quantity.ts'
import { CommandError } from './command.ts'

/** The fields of a key as options of the command line. */

const text = { type: 'string' } as const

export const FIELDS = {
  name: text,
  user: text,
  status: text,
  starts: text,
  expires: text,
  models: text,
  'allowed-ips': text,
  'denied-ips': text,
  tag: { type: 'string', multiple: true },
  rps: text,
  rpm: text,
  burst: text,
  tpm: text,
  'max-concurrent': text,
  quota: text,
  priority: text,
  trace: text,
  'quota-unit': text,
  'quota-period': text
} as const
export type Fields = { [Name in keyof typeof FIELDS]?: Name extends 'tag' ? string[] : string }

/** What was given, as the store has it; what is empty is taken away. */
export function toChanges(values: Fields): KeyChanges {
  const number = (name: keyof Fields) => given(values[name] as string, each => toNumber(name, each))
  const limits = {
    requests_per_second: number('rps'),
    requests_per_minute: number('rpm'),
    burst_size: number('burst'),
    tokens_per_minute: number('tpm'),
    max_concurrent: number('max-concurrent')
  }
  const tags = values.tag?.map(toTag)
  const changes = {
    name: given(values.name),
    user_id: given(values.user),
    status: given(values.status),
    starts_at: given(values.starts, fromNow),
    expires_at: given(values.expires, fromNow),
    models: given(values.models, toList),
    allowed_ips: given(values['allowed-ips'], toList),
    denied_ips: given(values['denied-ips'], toList),
    limits: Object.values(limits).some(each => each !== undefined) ? limits : undefined,
    tags: tags && Object.fromEntries(tags),
    priority: given(values.priority),
    trace: given(values.trace, toBoolean),
    total_quota: number('quota'),
    quota_unit: given(values['quota-unit']),
    quota_reset_period: given(values['quota-period'])
  }
  // What is undefined says nothing, and goes.
  return JSON.parse(JSON.stringify(changes))
}

function given<T = string>(value: string | undefined, parse?: (value: string) => T) {
  if (value === undefined) return undefined
  if (value === '') return null
  return parse === undefined ? value : parse(value)
}

/** In a new key there is nothing to take away. */
export function dropNull(changes: KeyChanges): KeySpec {
  return JSON.parse(JSON.stringify(changes), (_, each) => each ?? undefined)
}

function toNumber(name: string, value: string): number {
  if (Number.isNaN(Number(value)))
    throw new CommandError(`--${name} must be a number (got "${value}")`)
  return Number(value)
}

function toBoolean(value: string): boolean {
  if (value === 'true' || value === 'false') return value === 'true'
  throw new CommandError(`--trace must be true or false (got "${value}")`)
}

function toList(value: string): string[] {
  return value.split(',').map(each => each.trim())
}

function toTag(tag: string): [string, string | null] {
  const [, name, value] = /^([^=]+)=(.*)$/s.exec(tag) ?? []
  if (name === undefined) throw new CommandError(`--tag must be NAME=VALUE (got "${tag}")`)
  return [name, value === '' ? null : value!]
}

function fromNow(time: string): string {
  const ahead = parseQuantity(time, 'ms')
  return ahead === undefined ? time : new Date(Date.now() + ahead).toISOString()
}
