import { FORMS, type PromptForm } from './dialects/prompt.ts'
import { GatewayError } from './errors.ts'
import type { Endpoint } from './exchange.ts'
import { type Member, membersOf, type Outline } from './wire/json-scanner.ts'

/** One JSON object, and where its members stand in it. */
export interface Body extends Outline {
  bytes: Buffer
}

/** A request body: its bytes as they arrived, until the response begins, and the facts the gateway reads from it. */
export interface Payload extends Body {
  /** The model that is asked for, or the only one there is. */
  model: string | undefined
  /** The request names no model; the gateway adds the one it has chosen. */
  isModelImplied: boolean
  stream: boolean
  /** The client itself asked for a usage chunk. */
  includeUsage: boolean
  /** The client itself asked for the usage so far in every chunk. */
  runningUsage: boolean
  /** The response leaves reasoning out (vLLM). */
  hidesReasoning: boolean
  /** Maximum of generated tokens, of all sequences together; undefined: the request sets none. */
  maxTokens: number | undefined
  /** Whether all servers of its API read that limit: some do not know `max_completion_tokens`. */
  isLimitSure: boolean
  /** Number of sequences that are generated: for each prompt `n`, or `best_of` if that is more. */
  sequences: number
  prompts: number
  /** The response repeats the prompt (completions). */
  echo: boolean
  /** The response is made after the request has ended (Responses API). Backends take other values for true, too. */
  isBackground: boolean
  previousResponseId: string | undefined
  /** The request refers to a prompt that is stored at the backend (Responses API). */
  hasStoredPrompt: boolean
}

/** Fields that limit the generated tokens, in all APIs. Ollama has `num_predict` inside `options`. */
const MAX_TOKENS = [
  'max_tokens',
  'max_completion_tokens',
  'max_output_tokens',
  'max_new_tokens',
  'n_predict',
  'num_predict'
]
/** Fields that say how many sequences each prompt gets; `n_cmpl` is llama.cpp's name of `n`. */
const SEQUENCES = ['n', 'n_cmpl', 'best_of']

/**
 * Fields on which a decision of the gateway depends. They must be spelled exactly and occur once: Go's JSON parser
 * ignores case, and parsers disagree about which of two equal names counts.
 */
const READ = new Set([
  ...MAX_TOKENS,
  'model',
  'name',
  'stream',
  'stream_options',
  'include_reasoning',
  'options',
  'parameters',
  ...SEQUENCES,
  'echo',
  'prompt',
  'prompt_embeds',
  'background',
  'previous_response_id',
  'conversation',
  ...FORMS.flatMap(namesOf)
])
const READ_IN_STREAM_OPTIONS = new Set(['include_usage', 'continuous_usage_stats'])
const READ_IN_OPTIONS = new Set(['num_predict'])
const READ_IN_PARAMETERS = new Set(['adapter_id'])

/** Maximum length of a model name (characters). State about models is kept by their names. */
const MAX_MODEL = 1_000
/** Maximum of a limit of tokens, and of the number of sequences: sums of them stay exact. */
const MAX_LIMIT = 100_000_000
const MAX_SEQUENCES = 100_000
/** Maximum length of a number (characters). */
const MAX_NUMBER = 64
/** Maximum size (bytes) of a value that is parsed. */
const MAX_PARSED = 64 * 1024
const IS_FOLDED = /^[a-z0-9_]*$/
const QUOTE = 0x22
const BRACE = 0x7b
/** First bytes of literals. */
const NULL = 0x6e
const TRUE = 0x74
const FALSE = 0x66

/**
 * Reads the facts from a request body.
 *
 * @param bytes one JSON object
 * @param outline what a `JsonScanner` has noted of it
 * @throws {GatewayError} `invalid_request`; the message names the field
 */
export function toPayload(bytes: Buffer, outline: Outline, endpoint: Endpoint): Payload {
  const { members, hasLinks } = outline
  const form = endpoint.prompt ?? endpoint.dialect.prompt
  // A host may declare routes with forms of its own.
  const read = FORMS.includes(form) ? READ : new Set([...READ, ...namesOf(form)])
  const fields = new Fields(bytes, members, read)
  const options = fields.object('options', READ_IN_OPTIONS)
  fields.object('parameters', READ_IN_PARAMETERS)
  const streamOptions = fields.object('stream_options', READ_IN_STREAM_OPTIONS)
  const { most, isSure } = maxTokens(fields, options, endpoint)
  const prompts = fields.prompts()
  const sequences = perPrompt(fields) * prompts
  return {
    bytes,
    members,
    hasLinks,
    model: modelOf(fields, endpoint),
    isModelImplied: false,
    stream: fields.boolean('stream') ?? endpoint.streamsByDefault ?? false,
    includeUsage: streamOptions?.value('include_usage') === true,
    runningUsage: streamOptions?.value('continuous_usage_stats') === true,
    hidesReasoning: fields.value('include_reasoning') === false,
    maxTokens: most && most * sequences,
    isLimitSure: isSure,
    sequences,
    prompts,
    echo: fields.value('echo') === true,
    isBackground: Boolean(fields.value('background')),
    previousResponseId: previousOf(fields, endpoint),
    hasStoredPrompt: endpoint.dialect.name === 'responses' && fields.has('prompt')
  }
}

/** Returns the fields that reach the model. */
function namesOf({ fields, optional = [] }: PromptForm): readonly string[] {
  return [...fields, ...optional]
}

/** An empty name is no name: servers with one model use that one. */
function modelOf(fields: Fields, { dialect }: Endpoint): string | undefined {
  const model = fields.model('model') || undefined
  // Ollama's older name of the field.
  return model ?? (dialect.name === 'ollama' ? fields.model('name') || undefined : undefined)
}

/**
 * The most tokens that a sequence can get; undefined: the request sets no limit that its API has. Of several limits the
 * largest counts, because servers use different ones; one that is below 1 or no number is no limit for some of them.
 */
function maxTokens(fields: Fields, options: Fields | undefined, endpoint: Endpoint) {
  let most = 0
  let isLimited = false
  let isSure = false
  for (const name of MAX_TOKENS) {
    const from = name === 'num_predict' ? options : fields
    const limit = from?.number(name, MAX_LIMIT)
    if (limit === undefined) continue
    if (!(limit >= 1)) return { most: undefined, isSure }
    most = Math.max(most, limit)
    if (endpoint.limitedBy?.includes(name) !== true) continue
    isLimited = true
    isSure ||= name !== 'max_completion_tokens'
  }
  return { most: isLimited ? most : undefined, isSure }
}

/** Returns the sequences of each prompt. vLLM takes "100" for 100, and other servers do not. */
function perPrompt(fields: Fields): number {
  let most = 1
  for (const name of SEQUENCES) {
    const count = fields.number(name, MAX_SEQUENCES) ?? 1
    if (Number.isNaN(count)) throw invalid(name, 'must be a number')
    most = Math.max(most, Math.floor(count))
  }
  return most
}

function previousOf(fields: Fields, { dialect }: Endpoint): string | undefined {
  if (dialect.name !== 'responses') return undefined
  if (fields.has('conversation')) {
    throw invalid('conversation', 'the field is not supported; use "previous_response_id"')
  }
  const previous = fields.value('previous_response_id')
  if (typeof previous === 'string' || !fields.has('previous_response_id')) {
    return previous as string | undefined
  }
  throw invalid('previous_response_id', 'must be a string')
}

/** The fields of one object that are read. */
class Fields {
  readonly #bytes: Buffer
  /** There are few: a search costs less than a map. */
  readonly #members: Member[] = []

  /** @throws {GatewayError} for a field that is repeated, or spelled in another case */
  constructor(bytes: Buffer, members: readonly Member[], read: ReadonlySet<string>) {
    this.#bytes = bytes
    for (const member of members) {
      const name = read.has(member.name) ? member.name : folded(member.name)
      if (!read.has(name)) continue
      if (name !== member.name) throw invalid(member.name, `unknown field; use "${name}"`)
      if (this.#member(name) !== undefined) throw invalid(name, 'the field must not be repeated')
      this.#members.push(member)
    }
  }

  #member(name: string): Member | undefined {
    for (const member of this.#members) if (member.name === name) return member
    return undefined
  }

  /** Returns the value; undefined where it is missing, null, or too large for a field that is read. */
  value(name: string): unknown {
    const member = this.#member(name)
    if (member === undefined || member.end - member.start > MAX_PARSED) return undefined
    const first = this.#bytes[member.start]
    if (first === NULL) return undefined
    if (first === TRUE || first === FALSE) return first === TRUE
    return JSON.parse(this.#bytes.toString('utf8', member.start, member.end))
  }

  /** Whether the field is there and not null. */
  has(name: string): boolean {
    const member = this.#member(name)
    return member !== undefined && this.#bytes[member.start] !== NULL
  }

  model(name: string): string | undefined {
    const member = this.#member(name)
    if (member === undefined) return undefined
    const model = this.value(name)
    const isString = this.#bytes[member.start] === QUOTE
    if (!isString && model !== undefined) throw invalid(name, 'must be a string')
    if (isString && (typeof model !== 'string' || model.length > MAX_MODEL)) {
      throw invalid(name, `must not be longer than ${MAX_MODEL} characters`)
    }
    return model as string | undefined
  }

  /**
   * Returns a number; NaN where the value is of another type, which servers read in different ways.
   *
   * @throws {GatewayError} for a number above `most`
   */
  number(name: string, most: number): number | undefined {
    const member = this.#member(name)
    if (member === undefined) return undefined
    // A string may have any length: parsers that read numbers from strings ignore spaces.
    if (this.#bytes[member.start] === QUOTE) return Number.NaN
    if (member.end - member.start > MAX_NUMBER) {
      throw invalid(name, `must be a number of at most ${MAX_NUMBER} characters`)
    }
    const value = this.value(name)
    if (value === undefined) return undefined
    if (typeof value !== 'number') return Number.NaN
    if (value > most) throw invalid(name, `must not exceed ${most}`)
    return value
  }

  boolean(name: string): boolean | undefined {
    const value = this.value(name)
    if (value === undefined || typeof value === 'boolean') return value
    throw invalid(name, 'must be true or false')
  }

  /** Returns the fields inside an object; undefined where the value is no object. */
  object(name: string, read: ReadonlySet<string>): Fields | undefined {
    const member = this.#member(name)
    if (member === undefined || this.#bytes[member.start] !== BRACE) return undefined
    if (member.end - member.start > MAX_PARSED) {
      throw invalid(name, `must not be larger than ${MAX_PARSED / 1024} KB`)
    }
    const bytes = this.#bytes.subarray(member.start, member.end)
    return new Fields(bytes, membersOf(bytes), read)
  }

  /** Returns the number of prompts, at least 1. vLLM takes those of `prompt_embeds` in addition to `prompt`. */
  prompts(): number {
    return Math.max(1, this.#prompts('prompt') + this.#prompts('prompt_embeds'))
  }

  #prompts(name: string): number {
    const member = this.#member(name)
    if (member === undefined || !this.has(name)) return 0
    // A list of numbers is one prompt, as tokens.
    return isDigit(this.#bytes[member.last]) ? 1 : Math.max(1, member.elements)
  }
}

/** Returns a name as parsers compare it that ignore case, the long s and the Kelvin sign included. */
export function folded(name: string): string {
  return IS_FOLDED.test(name) ? name : name.toUpperCase().toLowerCase()
}

function isDigit(byte: number | undefined): boolean {
  return byte !== undefined && byte >= 0x30 && byte <= 0x39
}

function invalid(field: string, problem: string): GatewayError {
  return new GatewayError('invalid_request', `${field}: ${problem}.`)
}
