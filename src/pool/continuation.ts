import { openai } from '../dialects/openai.ts'
import type { GatewayError } from '../errors.ts'
import { failureOf } from '../metering/event.ts'
import type { Body } from '../payload.ts'
import type { Change } from '../payload-edits.ts'
import { EventReader } from '../wire/event-reader.ts'
import { type Member, membersOf } from '../wire/json-scanner.ts'
import { type Answer, ENDLESS } from './answer.ts'

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
  /** Nobody will have to go on any more: what was kept for that may go. */
  forget(): void
}

/** Estimated tokens of a response's prompt, and of the text so far. */
export interface TokensBefore {
  prompt: number
  text: number
}

/** An event of a stream, as far as it matters here. */
interface Event {
  id?: unknown
  created?: unknown
  model?: unknown
  choices?: unknown
  usage?: unknown
}
interface Choice {
  index?: unknown
  text?: unknown
  delta?: Record<string, unknown> | null
  finish_reason?: unknown
}

/** A longer text (characters), or a longer event (bytes), is not kept. */
const MAX_TEXT = 256 * 1024
const MAX_EVENT = 64 * 1024
const MAX_SAMPLE = 4 * 1024
const EMPTY = Buffer.alloc(0)
const LF = 0x0a
const QUOTE = 0x22
const BRACE = 0x7b
const BRACE_END = 0x7d
/** A last message that is larger (bytes) is not read for its role. */
const MAX_LAST_MESSAGE = 1024 * 1024

/** Members of a request that another backend reads as the first one did. */
const PLAIN = new Set(
  `model messages prompt stream stream_options max_tokens max_completion_tokens temperature top_p top_k min_p seed
  stop frequency_penalty presence_penalty repetition_penalty logit_bias user metadata store service_tier
  prompt_cache_key safety_identifier`.split(/\s+/)
)
/** Values that ask for nothing. */
const NEUTRAL = new Set(['null', 'false', '[]', '{}', '""', '"none"', '{"type":"text"}'])
/** Where a client says itself what is to become of its last message, nobody else does. */
const OWN = ['continue_final_message', 'add_generation_prompt']

/**
 * The member of a request at whose end the response would be written: its messages, or its prompt. Undefined where
 * it asks for more than text: two backends cannot share tool calls, choices, grammars and what only one server
 * knows. Nor can they share a response whose beginning the client has written, or that of many prompts.
 */
export function openEnd({ bytes, members }: Body): Member | undefined {
  const isPlain = members.every(({ name, start, end }) => {
    if (PLAIN.has(name)) return true
    const value = bytes.toString('latin1', start, Math.min(end, start + 64)).replace(/\s/g, '')
    return (name === 'n' && value === '1') || (NEUTRAL.has(value) && !OWN.includes(name))
  })
  const [asked, another] = members.filter(({ name }) => name === 'messages' || name === 'prompt')
  if (!isPlain || asked === undefined || another !== undefined) return undefined
  const isOpen = asked.name === 'prompt' ? bytes[asked.start] === QUOTE : isQuestion(bytes, asked)
  return isOpen ? asked : undefined
}

/** Whether these are messages of which the last is not the model's. */
function isQuestion(bytes: Buffer, { end, elements, last }: Member): boolean {
  if (elements === 0 || bytes[last] !== BRACE || end - last > MAX_LAST_MESSAGE) return false
  const message = bytes.subarray(last, bytes.lastIndexOf(BRACE_END, end - 1) + 1)
  const role = membersOf(message).findLast(({ name }) => name === 'role')
  return role !== undefined && message.toString('latin1', role.start, role.end) !== '"assistant"'
}

/**
 * The changes that turn a request with an {@link openEnd} into one for what is missing of its response.
 *
 * @param text what there is of the response
 * @param tokens number of tokens of that text; the request then allows fewer
 */
export function changesForRest(
  payload: Body,
  text: string,
  tokens: number,
  way: ContinuationWay
): Change[] {
  if (text === '') return []
  const { bytes, members } = payload
  const asked = openEnd(payload)!
  const isChat = asked.name === 'messages'
  const last = JSON.stringify({ role: 'assistant', content: text })
  const more = isChat ? `,${last}` : JSON.stringify(text).slice(1, -1)
  const changes: Change[] = [{ start: asked.end - 1, end: asked.end - 1, bytes: Buffer.from(more) }]
  for (const { name, start, end } of members) {
    if (!name.startsWith('max_')) continue
    const most = Number(bytes.toString('latin1', start, end))
    if (most > 0) changes.push({ start, end, bytes: Buffer.from(`${Math.max(1, most - tokens)}`) })
  }
  if (!isChat || way === 'assistant_prefill') return changes
  const goOn = '"continue_final_message":true,"add_generation_prompt":false'
  return [...changes, goOn]
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
  #reader = new EventReader('sse')
  /** The beginning of an event, and its data. */
  #held: Buffer[] = []
  #data: Buffer[] = []
  /** Events that have not been passed on. */
  #taken: Buffer[] = []
  /** Nothing but text has passed, and not its end. */
  #isOpen = true
  /** This backend is not listened to any more; another one is looked for. */
  #isDeaf = false
  #isWaiting = false
  /** How the answer has introduced itself. */
  #head: Pick<Event, 'id' | 'created' | 'model'> | undefined
  #hasRole = false
  /** What other backends have written; undefined: this is still the first. */
  #before: TokensBefore | undefined
  /** The first piece of the text may repeat what was written before. */
  #mayEcho = false
  /** What stood before and behind the text of an event that came alone. */
  #sample: { before: Buffer; behind: Buffer } | undefined

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
    this.#isDeaf = this.#isWaiting = true
    this.#answer.loseSource()
  }

  goOn(answer: Answer, before: TokensBefore, way: ContinuationWay): void {
    this.#isDeaf = this.#isWaiting = false
    this.#before = before
    this.#mayEcho = way === 'assistant_prefill'
    this.#reader = new EventReader('sse')
    this.#held = []
    this.#data = []
    const early = answer.takeBack()
    this.#answer.takeOver(answer)
    this.#answer.data(Buffer.from(': goes on from another backend\n\n'))
    for (const chunk of early) this.data(chunk)
  }

  data(chunk: Buffer): void {
    if (this.#isDeaf) return
    if (!this.#isKept || this.#isLikeSample(chunk)) return this.#answer.data(chunk)
    const isAlone = this.#reader.isBetweenEvents
    let start = this.#reader.feed(chunk)
    if (start > 0) this.#taken.push(chunk.subarray(0, start))
    for (let next = this.#reader.next(); next !== undefined; next = this.#reader.next()) {
      if (next === 'data') {
        this.#data.push(this.#reader.data)
        continue
      }
      const end = this.#reader.to
      this.#endEvent(chunk.subarray(start, end), isAlone && start === 0 && end === chunk.length)
      if (this.#isDeaf) return
      start = end
    }
    this.#pass()
    this.#hold(chunk.subarray(start))
  }

  end(): void {
    if (this.#isDeaf) return
    // The last event may lack its blank line. One that lacks more is dropped, as where the connection breaks.
    if (this.#isKept && !this.#reader.isBetweenEvents) {
      this.#reader.feedEnd()
      for (let next = this.#reader.next(); next !== undefined; next = this.#reader.next()) {
        if (next === 'data') this.#data.push(this.#reader.data)
        else if (isComplete(Buffer.concat(this.#data).toString())) this.#endEvent(EMPTY)
      }
      if (this.#isDeaf) return
      this.#pass()
    }
    if (this.#isOpen && this.#continuer.canContinue()) return this.#cut(ENDLESS)
    this.#close()
    this.#answer.end()
  }

  break(error: GatewayError): void {
    if (!this.#isDeaf) this.#answer.break(error)
  }

  /** @param rest of the event: what was not held yet */
  #endEvent(rest: Buffer, isAlone = false): void {
    const event = this.#held.length === 0 ? rest : Buffer.concat([...this.#held, rest])
    const data = this.#reader.hasData ? Buffer.concat(this.#data).toString() : ''
    this.#held = []
    this.#data = []
    this.#take(event, data, isAlone)
  }

  /** Keeps the beginning of an event. */
  #hold(beginning: Buffer): void {
    if (beginning.length === 0) return
    this.#held.push(beginning)
    const length = this.#held.reduce((sum, each) => sum + each.length, 0)
    if (length > MAX_EVENT) {
      if (this.#before !== undefined) return this.#cut('an event that is too long')
      this.#close()
    }
    if (this.#isKept) return
    this.#answer.data(Buffer.concat(this.#held))
    this.#held = []
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

  /** Nobody can go on from here. */
  #close(): void {
    this.#isOpen = false
    this.text = ''
    this.#continuer.forget()
  }

  /** This backend can't be used any longer: another one goes on, or nobody. */
  #cut(why: string): void {
    this.#pass()
    this.#isDeaf = true
    const error = this.#answer.source!.broke(why)
    if (!this.#isWaiting) this.#answer.break(error)
  }

  /** Nearly every event is like the one before, but for its piece of the text. */
  #isLikeSample(chunk: Buffer): boolean {
    if (this.#sample === undefined || !this.#isOpen || !this.#reader.isBetweenEvents) return false
    const { before, behind } = this.#sample
    const begin = before.length
    const end = chunk.length - behind.length
    const isLike =
      end > begin &&
      chunk.indexOf(QUOTE, begin) === end &&
      chunk.indexOf(LF, begin) === chunk.length - 2 &&
      before.compare(chunk, 0, begin) === 0 &&
      behind.compare(chunk, end) === 0
    const text = isLike ? parse(chunk.toString('utf8', begin - 1, end + 1)) : undefined
    if (typeof text !== 'string') return false
    this.#add(text)
    return true
  }

  /** @param isAlone nothing came with it */
  #take(event: Buffer, data: string, isAlone: boolean): void {
    if (data === '') return void this.#taken.push(event)
    const json = parse(data)
    const said: Event | undefined = isObject(json) ? json : undefined
    const choices = said?.choices ?? []
    const choice: Choice | undefined = Array.isArray(choices) ? choices[0] : undefined
    const failure = failureOf(data, openai, 'sse', this.#reader.isError)
    const isBroken = failure !== undefined && failure !== '4xx'
    if (isBroken && this.#isOpen && this.#continuer.canContinue()) {
      return this.#cut('an error in its stream')
    }
    const isLast = data === '[DONE]' || failure !== undefined
    const hadRole = this.#hasRole
    if (this.#mayEcho && choice?.delta) this.#dropEcho(choice.delta)
    const isText = said !== undefined && !isLast && this.#read(said, choices, choice)
    if (this.#isOpen && !isText && !isLast && this.#before !== undefined) {
      return this.#cut('something else than text')
    }
    if (this.#isOpen && (!isText || isSaid(choice?.finish_reason))) this.#close()
    if (!isText || this.#before === undefined) {
      this.#taken.push(event)
      if (isText && isAlone && this.#before === undefined) this.#takeSample(event, choice)
      return
    }
    const joined = this.#joined(said, choice, hadRole)
    if (joined !== undefined) this.#taken.push(joined)
  }

  /** Newer llama.cpp servers repeat an assistant message in their first piece. */
  #dropEcho(delta: Record<string, unknown>): void {
    const { content } = delta
    if (typeof content !== 'string' || content === '') return
    this.#mayEcho = false
    if (content.startsWith(this.text)) delta.content = content.slice(this.text.length)
  }

  /** Returns whether it is text and no more. */
  #read({ id, created, model }: Event, choices: unknown, choice: Choice | undefined): boolean {
    if (!Array.isArray(choices) || choices.length > 1) return false
    if (choice === undefined) return true
    if (choice === null || typeof choice !== 'object' || (choice.index ?? 0) !== 0) return false
    const { role, content = choice.text, ...others } = choice.delta ?? {}
    if (Object.values(others).some(isSaid)) return false
    if (typeof content !== 'string' && isSaid(content)) return false
    this.#head ??= { id, created, model }
    if (isSaid(role)) this.#hasRole = true
    if (typeof content === 'string') this.#add(content)
    return true
  }

  #add(text: string): void {
    if (!this.#isOpen) return
    this.text += text
    if (this.text.length > MAX_TEXT) this.#close()
  }

  #takeSample(event: Buffer, choice: Choice | undefined): void {
    const text = choice?.delta?.content ?? choice?.text
    const piece = Buffer.from(JSON.stringify(text ?? null))
    const at = event.indexOf(piece)
    if (piece.length < 3 || event.length > MAX_SAMPLE || event.at(-2) !== LF) return
    if (at === -1 || at !== event.lastIndexOf(piece)) return
    // Not from Node's pool, of which it would keep 8 KB for as long as the answer takes.
    const kept = Buffer.allocUnsafeSlow(event.length)
    event.copy(kept)
    const [begin, end] = [at + 1, at + piece.length - 1]
    this.#sample = { before: kept.subarray(0, begin), behind: kept.subarray(end) }
  }

  /** An event of a backend that goes on, as one of the answer that was begun. */
  #joined(said: Event, choice: Choice | undefined, hadRole: boolean): Buffer | undefined {
    if (hadRole) delete choice?.delta?.role
    const usage = isObject(said.usage) ? withTokensBefore(said.usage, this.#before!) : said.usage
    const news = [usage, choice?.text, choice?.finish_reason, ...Object.values(choice?.delta ?? {})]
    if (!news.some(isSaid)) return undefined
    const joined = { ...said, ...this.#head, ...(usage === undefined ? {} : { usage }) }
    return Buffer.from(`data: ${JSON.stringify(joined)}\n\n`)
  }
}

/**
 * A backend that goes on has read the text so far as a part of its prompt. The reported sum is divided as the estimates
 * of both parts are.
 */
function withTokensBefore(
  usage: Record<string, unknown>,
  { prompt: asked, text }: TokensBefore
): Record<string, unknown> {
  const { prompt_tokens, completion_tokens, prompt_tokens_details: details } = usage
  if (typeof prompt_tokens !== 'number' || typeof completion_tokens !== 'number') return usage
  const before =
    asked > 0 ? Math.round((prompt_tokens * text) / (asked + text)) : Math.min(text, prompt_tokens)
  const prompt = prompt_tokens - before
  const changed = {
    ...usage,
    prompt_tokens: prompt,
    completion_tokens: completion_tokens + before
  }
  if (!isObject(details) || typeof details.cached_tokens !== 'number') return changed
  const cached_tokens = Math.min(details.cached_tokens, prompt)
  return { ...changed, prompt_tokens_details: { ...details, cached_tokens } }
}

function parse(json: string): unknown {
  try {
    return JSON.parse(json)
  } catch {
    return undefined
  }
}

/** Whether the data of an event has its end. */
function isComplete(data: string): boolean {
  return data === '[DONE]' || parse(data) !== undefined
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/** Is it more than an empty value? */
function isSaid(value: unknown): boolean {
  return typeof value === 'object' && value !== null
    ? Object.keys(value).length > 0
    : Boolean(value)
}
