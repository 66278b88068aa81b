import type { GatewayError } from '../errors.ts'
import { findMembers, type Member, splice } from '../metering/members.ts'
import { type Answer, ENDLESS } from './answer.ts'
import { failureOf } from './first-event.ts'

/**
 * A stream of text whose backend has died goes on from another one, which gets the text so far as the
 * beginning of its own answer. What the client gets reads like one answer.
 */

/**
 * How a backend is told to go on with the last message of a chat: vLLM, SGLang and newer llama.cpp have
 * `continue_final_message`; older llama.cpp, TGI and Ollama do so of their own accord.
 */
export type ContinuationWay = (typeof CONTINUATION_WAYS)[number]
export const CONTINUATION_WAYS = ['continue_final_message', 'assistant_prefill'] as const

/** Takes what a backend sends. */
export interface Sink {
  data(chunk: Buffer): void
  /** The backend has sent all. */
  end(): void
  break(error: GatewayError): void
  /** Nobody wants it any more. */
  readonly destroyed: boolean
}

/** Whose stream it is. */
export interface Continuer {
  /** Is there somebody to go on? */
  canContinue(): boolean
  /** Nobody can go on with what it has become: what was kept for that may go. */
  forget(): void
  /** Whoever went on does something else than that. */
  abandon(): void
}

/** An event of a stream, as far as it matters here. */
interface Event {
  id?: unknown
  created?: unknown
  model?: unknown
  choices?: Choice[] | null
  usage?: Record<string, unknown> | null
  error?: unknown
}
interface Choice {
  index?: unknown
  text?: unknown
  delta?: Record<string, unknown>
  finish_reason?: unknown
}

/** A longer text (characters), or a longer event (bytes), is not kept. */
const MAX_TEXT = 256 * 1024
const MAX_EVENT = 64 * 1024
const BLANK_LINE = /(?:\r\n|\n|\r(?!\n)){2}/g

/** Members of a request that another backend reads as the first one did. */
const PLAIN = new Set(
  `model messages prompt stream stream_options max_tokens max_completion_tokens temperature top_p top_k min_p seed
  stop frequency_penalty presence_penalty repetition_penalty logit_bias user metadata`.split(/\s+/)
)
/** Values that ask for nothing. */
const NEUTRAL = new Set(['null', 'false', '[]', '{}', '""', '"none"', '{"type":"text"}'])

/**
 * Is text all that this request asks for? Tool calls, choices, grammars and whatever a server alone knows can't be
 * divided between two.
 *
 * @param bytes a JSON object
 */
export function asksForText(bytes: Buffer): boolean {
  return findMembers(bytes).every(({ name, start, end }) => {
    if (PLAIN.has(name)) return true
    const value = bytes.toString('latin1', start, Math.min(end, start + 64)).replace(/\s/g, '')
    return NEUTRAL.has(value) || (name === 'n' && value === '1')
  })
}

/** Is its end the model's to write? Some clients have a chat end with the beginning of the answer, or send many prompts. */
export function isOpenEnded(bytes: Buffer): boolean {
  const { name, start, end } = promptIn(bytes)!
  const prompt: unknown = JSON.parse(bytes.toString('utf8', start, end))
  if (name === 'prompt') return typeof prompt === 'string'
  return Array.isArray(prompt) && prompt.length > 0 && prompt.at(-1)?.role !== 'assistant'
}

/**
 * The request for what is missing of an answer.
 *
 * @param bytes an open-ended request to `/v1/chat/completions` or `/v1/completions`
 * @param text what there is of the answer
 * @param tokens how many tokens that is; the request allows so many less
 * @example
 * String(requestForRest(Buffer.from('{"prompt":"One, two","max_tokens":9}'), ', three', 3, 'assistant_prefill'))
 * // '{"prompt":"One, two, three","max_tokens":6}'
 */
export function requestForRest(
  bytes: Buffer,
  text: string,
  tokens: number,
  way: ContinuationWay
): Buffer {
  if (text === '') return bytes
  const prompt = promptIn(bytes)!
  const isChat = prompt.name === 'messages'
  const last = JSON.stringify({ role: 'assistant', content: text })
  const more = isChat ? `,${last}` : JSON.stringify(text).slice(1, -1)
  let changed = bytes
  for (const { name, start, end } of findMembers(bytes).toReversed()) {
    if (start === prompt.start) changed = splice(changed, end - 1, end - 1, Buffer.from(more))
    if (!name.startsWith('max_')) continue
    const most = Number(bytes.toString('latin1', start, end))
    if (most > 0) {
      changed = splice(changed, start, end, Buffer.from(`${Math.max(1, most - tokens)}`))
    }
  }
  if (!isChat || way === 'assistant_prefill') return changed
  const brace = changed.indexOf('{') + 1
  const goOn = '"continue_final_message":true,"add_generation_prompt":false,'
  return splice(changed, brace, brace, Buffer.from(goOn))
}

function promptIn(bytes: Buffer): Member | undefined {
  return findMembers(bytes).findLast(({ name }) => name === 'messages' || name === 'prompt')
}

/**
 * Stands between a backend and an answer that another one could continue. Only whole events pass, and it is kept
 * what they say.
 */
export class Continuation implements Sink {
  /** The text so far. */
  text = ''
  readonly #continuer: Continuer
  readonly #answer: Answer
  /** The beginning of an event. */
  #held: Buffer | undefined
  /** Events that have not been passed on. */
  #taken: Buffer[] = []
  /** Nothing but text has passed, and not its end. */
  #isOpen = true
  /** Between two backends nobody is listened to. */
  #isDeaf = false
  /** How the answer has introduced itself. */
  #head: Pick<Event, 'id' | 'created' | 'model'> | undefined
  #hasRole = false
  /** How many tokens other backends have written than the one that goes on; undefined: it is still the first. */
  #before: number | undefined

  constructor(continuer: Continuer, answer: Answer) {
    this.#continuer = continuer
    this.#answer = answer
  }

  /** Another backend could go on. */
  get isOpen(): boolean {
    return this.#isOpen
  }

  get destroyed(): boolean {
    return this.#answer.destroyed
  }

  /** The backend is not heard any more, until another one {@link goOn goes on}. */
  wait(): void {
    this.#isDeaf = true
    this.#held = undefined
    this.#answer.loseSource()
  }

  /** @param tokens how many there were before */
  goOn(answer: Answer, tokens: number): void {
    this.#isDeaf = false
    this.#before = tokens
    const early = answer.takeBack()
    this.#answer.takeOver(answer)
    this.#answer.data(Buffer.from(': goes on from another backend\n\n'))
    for (const chunk of early) this.data(chunk)
  }

  data(chunk: Buffer): void {
    if (this.#isDeaf) return
    if (!this.#isKept) return this.#answer.data(chunk)
    const bytes = this.#held === undefined ? chunk : Buffer.concat([this.#held, chunk])
    let from = 0
    for (const { index, 0: blank } of bytes.toString('latin1').matchAll(BLANK_LINE)) {
      const end = index + blank.length
      const event = this.#take(bytes.subarray(from, end))
      if (event !== undefined) this.#taken.push(event)
      if (this.#isDeaf) return
      from = end
    }
    this.#pass()
    this.#held = from === bytes.length ? undefined : bytes.subarray(from)
    if (bytes.length - from > MAX_EVENT) this.#isOpen = false
    if (!this.#isKept) this.#release()
  }

  end(): void {
    if (this.#isDeaf || this.#isCutShort(ENDLESS)) return
    this.#release()
    this.#answer.end()
  }

  break(error: GatewayError): void {
    if (!this.#isDeaf) this.#answer.break(error)
  }

  /** Is what passes still looked at? */
  get #isKept(): boolean {
    return this.#isOpen || this.#before !== undefined
  }

  #pass(): void {
    const [first, ...more] = this.#taken
    if (first !== undefined)
      this.#answer.data(more.length === 0 ? first : Buffer.concat(this.#taken))
    this.#taken = []
  }

  #release(): void {
    const rest = this.#held
    this.#held = undefined
    this.text = ''
    this.#continuer.forget()
    if (rest !== undefined) this.#answer.data(rest)
  }

  /** The backend has stopped without saying so: does another one go on? */
  #isCutShort(why: string): boolean {
    if (!this.#isOpen || !this.#continuer.canContinue()) return false
    this.#pass()
    const error = this.#answer.source!.broke(why)
    this.break(error)
    return true
  }

  /** Returns what the client gets in its place, if it gets something. */
  #take(event: Buffer): Buffer | undefined {
    const data = dataOf(event.toString())
    if (data === undefined) return event
    const said = parse(data)
    if (data === '[DONE]' || said?.error) {
      if (failureOf(data) !== undefined && this.#isCutShort('an error in its stream'))
        return undefined
      this.#isOpen = false
      return event
    }
    const hadRole = this.#hasRole
    const isText = said !== undefined && this.#read(said)
    if (!isText) this.#isOpen = false
    if (this.#before === undefined) return event
    if (isText) return this.#joined(said, hadRole)
    this.#pass()
    this.#isDeaf = true
    this.#continuer.abandon()
    return undefined
  }

  /** Returns whether it is text and no more. */
  #read({ id, created, model, choices }: Event): boolean {
    this.#head ??= { id, created, model }
    const [choice, another] = choices ?? []
    if (choice === undefined) return true
    const { index = 0, delta = {}, text, finish_reason } = choice
    const { role, content = text, ...others } = delta
    if (another !== undefined || index !== 0 || Object.values(others).some(isSaid)) return false
    if (typeof content === 'string') this.text += content
    else if (isSaid(content)) return false
    if (isSaid(role)) this.#hasRole = true
    if (isSaid(finish_reason) || this.text.length > MAX_TEXT) this.#isOpen = false
    return true
  }

  /** An event of a backend that goes on, as one of the answer that was begun. */
  #joined(said: Event, hadRole: boolean): Buffer | undefined {
    const choice = said.choices?.[0]
    if (hadRole) delete choice?.delta?.role
    if (said.usage) said.usage = withTokensBefore(said.usage, this.#before!)
    const isNews =
      said.usage ||
      [choice?.text, choice?.finish_reason, ...Object.values(choice?.delta ?? {})].some(isSaid)
    if (!isNews) return undefined
    return Buffer.from(`data: ${JSON.stringify({ ...said, ...this.#head })}\n\n`)
  }
}

/** Who goes on has read what was written before as a part of the prompt. */
function withTokensBefore(usage: Record<string, unknown>, tokens: number): Record<string, unknown> {
  const { prompt_tokens, completion_tokens } = usage
  if (typeof prompt_tokens !== 'number' || typeof completion_tokens !== 'number') return usage
  const before = Math.min(tokens, prompt_tokens)
  return {
    ...usage,
    prompt_tokens: prompt_tokens - before,
    completion_tokens: completion_tokens + before
  }
}

/** The data of an event (https://html.spec.whatwg.org/multipage/server-sent-events.html); undefined: it has none. */
function dataOf(event: string): string | undefined {
  const lines = event.split(/\r\n|\n|\r/).filter(line => line.startsWith('data:'))
  if (lines.length === 0) return undefined
  return lines.map(line => line.slice(line[5] === ' ' ? 6 : 5)).join('\n')
}

function parse(json: string): Event | undefined {
  try {
    const value: unknown = JSON.parse(json)
    return typeof value === 'object' && value !== null ? value : undefined
  } catch {
    return undefined
  }
}

function isSaid(value: unknown): boolean {
  const isNothing = value === undefined || value === null || value === ''
  return !isNothing && !(Array.isArray(value) && value.length === 0)
}
