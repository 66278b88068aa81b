import { type Prefixes, prefixesOf } from '../src/pool/prefixes.ts'
import { BLOCK, type EngineRates } from './engine.ts'
import { inputTokens, type Random, seeded, type Trace, type Turn } from './traces.ts'

/** The sessions of a trace with their prompts, as bytes of JSON that the gateway's own code has hashed. */

export const BYTES_PER_TOKEN = 4
export const MODEL = 'qwen3-32b'

/** A session and its prompts, made once for all strategies. */
export interface Session {
  caller: number
  startsAt: number
  turns: (Turn & { promptTokens: number; bytes: number; prefixes: Prefixes })[]
  blocks: number[]
}

/**
 * The sessions of a trace.
 *
 * @param load how many: their prompts are this part of what the fleet could read without any cache
 */
export function makeSessions(
  trace: Trace,
  fleet: EngineRates[],
  load: number,
  seed: number
): Session[] {
  const random = seeded(seed)
  const capacity = fleet.reduce((sum, rates) => sum + rates.prefill, 0)
  const rate = (capacity * load) / meanInput(trace)
  const end = (trace.warmUp + trace.measured) * 1000
  const systems = Array.from({ length: trace.callers }, () =>
    message('system', text(random, trace.systemTokens))
  )
  const sessions: Session[] = []
  const wait = () => -Math.log(1 - random()) / rate
  for (let now = wait(); now < end; now += wait()) {
    const caller = Math.floor(random() * trace.callers)
    sessions.push(makeSession(trace, systems[caller]!, caller, sessions.length, now, random))
  }
  return sessions
}

function makeSession(
  { systemTokens, session }: Trace,
  system: Buffer,
  caller: number,
  number: number,
  startsAt: number,
  random: Random
): Session {
  const parts = systemTokens === 0 ? [] : [system]
  const turns: Session['turns'] = []
  let context = systemTokens
  for (const turn of session(random)) {
    context += turn.tokens
    parts.push(message('user', text(random, turn.tokens)))
    const body = bodyOf(parts)
    const prefixes = prefixesOf(body, `${MODEL}\0${caller}`)
    turns.push({ ...turn, promptTokens: context, bytes: body.length, prefixes })
    parts.push(message('assistant', text(random, turn.outputTokens)))
    context += turn.outputTokens
  }
  const shared = systemTokens / BLOCK
  const blocks = Array.from({ length: Math.floor(context / BLOCK) }, (_, at) =>
    at < shared ? -1 - caller * 1000 - at : number * 10_000 + at
  )
  return { caller, startsAt, turns, blocks }
}

/** Mean tokens in the prompts of one session's calls, all of them together. */
function meanInput({ session, systemTokens }: Trace): number {
  const random = seeded(0)
  const samples = 20_000
  let sum = 0
  for (let at = 0; at < samples; at++) sum += inputTokens(session(random), systemTokens)
  return sum / samples
}

function bodyOf(parts: Buffer[]): Buffer {
  const pieces: Buffer[] = [Buffer.from(`{"model":"${MODEL}","stream":true,"messages":[`)]
  for (const [at, part] of parts.entries()) {
    if (at > 0) pieces.push(COMMA)
    pieces.push(part)
  }
  pieces.push(END)
  return Buffer.concat(pieces)
}

const COMMA = Buffer.from(',')
const END = Buffer.from(']}')

function message(role: string, content: Buffer): Buffer {
  return Buffer.concat([Buffer.from(`{"role":"${role}","content":"`), content, Buffer.from('"}')])
}

/** Words of three letters and a space, one for each token. */
function text(random: Random, tokens: number): Buffer {
  const bytes = Buffer.alloc(tokens * BYTES_PER_TOKEN, ' ')
  for (let at = 0; at < bytes.length; at += BYTES_PER_TOKEN) {
    let word = Math.floor(random() * 26 ** 3)
    for (let letter = 0; letter < 3; letter++) {
      bytes[at + letter] = 0x61 + (word % 26)
      word = Math.floor(word / 26)
    }
  }
  return bytes
}
