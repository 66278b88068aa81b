import type { Dialect } from './dialects/dialect.ts'
import { GatewayError } from './errors.ts'
import { folded } from './payload.ts'
import type { Member } from './wire/json-scanner.ts'

/** Bytes that are read before other requests get their turn: less than 5 ms of work. */
const SLICE = 128 * 1024
/** Maximum length (bytes, with quotes) of a name or type below, even if each of its characters is escaped. */
const MAX_TEXT = 128

/** Fields that may hold references, in each API that has some. */
const FIELDS: Partial<Record<Dialect['name'], ReadonlySet<string>>> = {
  openai: new Set(['messages', 'tools', 'tool_choice', 'audio', 'voice']),
  responses: new Set(['input', 'instructions', 'tools', 'tool_choice', 'audio', 'voice']),
  anthropic: new Set(['messages', 'system', 'tools', 'tool_choice', 'container'])
}
/** Fields with items, which a backend may have stored under their ids. */
const ITEMS = new Set(['input', 'instructions'])
/** Names whose strings refer to something that is stored at the backend. */
const REFERENCES = new Set(['file_id', 'file_ids', 'vector_store_ids', 'container_id', 'skill_id'])
/** Fields where a container is no text of a caller, and names of objects whose `id` refers to something. */
const WITH_CONTAINER = new Set(['tools', 'container'])
const WITH_ID = new Set(['audio', 'voice', 'container'])
/** Values below these refer to nothing: JSON schemas, citations and search results of earlier responses. */
const IGNORED = new Set(['parameters', 'input_schema', 'annotations', 'results'])
/** The same for the arguments of a tool in the Messages API. */
const ARGUMENTS = 'input'
/** Roles of messages, and types of items whose content is in the request although they have an id. */
const ROLES = new Set(['user', 'assistant', 'system', 'developer', 'tool'])
const TYPES = new Set([
  ...['message', 'reasoning', 'function_call', 'function_call_output'],
  ...['custom_tool_call', 'custom_tool_call_output', 'web_search_call', 'file_search_call'],
  ...['computer_call', 'computer_call_output', 'code_interpreter_call'],
  ...['local_shell_call', 'local_shell_call_output', 'shell_call', 'shell_call_output'],
  ...['apply_patch_call', 'apply_patch_call_output', 'tool_search_call', 'tool_search_output'],
  ...['mcp_call', 'mcp_list_tools', 'mcp_approval_request', 'mcp_approval_response']
])
/** Names that decide about an item, each as a bit. */
const DECISIVE = new Map([
  ['type', 1],
  ['role', 2],
  ['result', 4],
  ['encrypted_content', 8]
])
/** Types whose content is in the request only with this field (its bit); without it their id refers to it. */
const CONTENT = new Map([
  ['image_generation_call', 4],
  ['compaction', 8]
])

/** Names that matter, by their length and first letter: others are not read, which saves most of the work. */
const NAMES = ['id', ARGUMENTS, ...REFERENCES, ...WITH_CONTAINER, ...WITH_ID, ...IGNORED]
const MATTERS = signsOf(NAMES)
const MATTERS_IN_ITEMS = signsOf([...NAMES, ...DECISIVE.keys()])

const QUOTE = 0x22
const COMMA = 0x2c
const BACKSLASH = 0x5c

/** An object or array whose end is not reached. */
interface Level {
  isObject: boolean
  isIgnored: boolean
  /** Name of the member that is being read, in an array of the member that it is. */
  name: string
  /** Name of the member whose value it is. */
  of: string
  expectsName: boolean
  hasId: boolean
  /** Whether its role, and its type, are known ones; undefined: it has none. */
  hasRole: boolean | undefined
  hasType: boolean | undefined
  /** Bits of decisive names: those that were read, that have text, and that the type needs. */
  named: number
  filled: number
  needed: number
  /** Parsers disagree about which of two equal names counts. */
  isRepeated: boolean
}

/**
 * Rejects references to items, files and other things that a backend stores: the gateway cannot check which caller
 * owns them. Ids of responses are checked elsewhere.
 *
 * @param members of the body, which is valid JSON
 * @throws {GatewayError} `invalid_request`; the message names the field
 */
export async function refuseReferences(
  bytes: Buffer,
  members: readonly Member[],
  api: Dialect['name']
): Promise<void> {
  const fields = FIELDS[api]
  // The turn in which a long body ended has had its share of work.
  if (bytes.length > SLICE) await new Promise(setImmediate)
  for (const member of members) {
    if (!fields?.has(folded(member.name))) continue
    for (const _ of walk(bytes, member, api)) await new Promise(setImmediate)
  }
}

/** Reads a field, and pauses after each slice. */
function* walk(bytes: Buffer, member: Member, api: Dialect['name']): Generator<void> {
  const { start, end } = member
  const field = folded(member.name)
  const hasItems = api === 'responses' && ITEMS.has(field)
  const signs = hasItems ? MATTERS_IN_ITEMS : MATTERS
  const levels: Level[] = []
  let level = open(undefined, false, api)
  level.name = field
  for (let at = start, pause = start + SLICE; at < end; ) {
    if (at > pause) {
      pause = at + SLICE
      yield
    }
    const byte = bytes[at]!
    if (byte === QUOTE) {
      let quote = at
      let slashes: number
      do {
        quote = bytes.indexOf(QUOTE, quote + 1)
        slashes = 0
        while (bytes[quote - 1 - slashes] === BACKSLASH) if (++slashes % SLICE === 0) yield
        if (quote > pause) {
          pause = quote + SLICE
          yield
        }
      } while (slashes % 2 === 1)
      const after = quote + 1
      if (level.expectsName) {
        readName(level, matters(bytes, at, after, signs) ? text(bytes, at, after) : '')
      } else if (level.name !== '' && !level.isIgnored) {
        visit(field, level, bytes, at, after)
      }
      at = after
      continue
    }
    if (byte === 0x7b || byte === 0x5b) {
      levels.push(level)
      level = open(level, byte === 0x7b, api)
    } else if (byte === 0x7d || byte === 0x5d) {
      const isItem = hasItems && level.isObject && levels.length <= 2
      if (isItem && level.hasId && !hasContent(level)) refuse(field, ITEM)
      level = levels.pop()!
    } else if (byte === COMMA) level.expectsName = level.isObject
    at++
  }
}

function open(parent: Level | undefined, isObject: boolean, api: Dialect['name']): Level {
  const { name = '', isIgnored = false } = parent ?? {}
  const isArguments = api === 'anthropic' && name === ARGUMENTS
  return {
    isObject,
    isIgnored: isIgnored || IGNORED.has(name) || isArguments,
    name: isObject ? '' : name,
    of: name,
    expectsName: isObject,
    hasId: false,
    hasRole: undefined,
    hasType: undefined,
    named: 0,
    filled: 0,
    needed: 0,
    isRepeated: false
  }
}

function signsOf(names: readonly string[]): Uint8Array {
  const signs = new Uint8Array(32 * 256)
  for (const name of names) signs[(name.length << 8) | name.charCodeAt(0)] = 1
  return signs
}

/** Whether a name may be one that matters; one with escapes, or with letters outside ASCII, always may. */
function matters(bytes: Buffer, from: number, after: number, signs: Uint8Array): boolean {
  for (let at = from + 1; at < after - 1; at++) {
    const byte = bytes[at]!
    if (byte === BACKSLASH || byte > 0x7f) return true
    if (at - from > MAX_TEXT) return false
  }
  const length = after - from - 2
  return length < 32 && signs[(length << 8) | (bytes[from + 1]! | 0x20)] === 1
}

function readName(level: Level, name: string): void {
  const bit = DECISIVE.get(name) ?? 0
  if (level.named & bit) level.isRepeated = true
  level.named |= bit
  level.name = name
  level.expectsName = false
}

/** Looks at a string, with quotes from `from` to `after`. Parsers differ in how they read names in another case. */
function visit(field: string, level: Level, bytes: Buffer, from: number, after: number): void {
  const name = folded(level.name)
  if (name === 'id') level.hasId = true
  else if (level.name === 'role') level.hasRole = ROLES.has(text(bytes, from, after))
  else if (name === 'type') visitType(field, level, text(bytes, from, after))
  else if (after - from > 2) level.filled |= DECISIVE.get(name) ?? 0
  const isReference =
    REFERENCES.has(name) ||
    (name === 'id' && WITH_ID.has(folded(level.of))) ||
    (name === 'container' && WITH_CONTAINER.has(field))
  if (isReference) refuse(field, `"${name}" is not supported; send the content itself`)
}

function visitType(field: string, level: Level, type: string): void {
  if (type === 'item_reference') refuse(field, ITEM)
  if (level.name !== 'type') return
  level.needed = CONTENT.get(type) ?? 0
  level.hasType = TYPES.has(type) || CONTENT.has(type)
}

/** Whether an item brings its content along. The type is optional in a reference, and in a message, which has a role. */
function hasContent({ hasType, hasRole, needed, filled, isRepeated }: Level): boolean {
  if (isRepeated || (needed & filled) !== needed) return false
  return hasType ?? hasRole === true
}

const ITEM =
  'references to stored items are not supported; send the item itself, or "previous_response_id"'

function refuse(field: string, problem: string): never {
  throw new GatewayError('invalid_request', `${field}: ${problem}.`)
}

/** Returns a string without its escapes; of a long one nothing. */
function text(bytes: Buffer, from: number, after: number): string {
  if (after - from > MAX_TEXT) return ''
  const quoted = bytes.toString('utf8', from, after)
  return quoted.includes('\\') ? JSON.parse(quoted) : quoted.slice(1, -1)
}
