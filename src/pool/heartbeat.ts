import { GatewayError } from '../errors.ts'
import { Answer } from './answer.ts'
import type { Head } from './attempt.ts'

/** Whose client hears a heartbeat. */
export interface Patient {
  /** How many calls are before it in the queue; undefined: it is in none. */
  readonly position: number | undefined
  /** Its client gets this head now; the answer will follow. */
  open(head: Head, answer: Answer): void
}

/** An error of a backend that is longer (characters) is not read to its end. */
const MAX_READ = 64 * 1024
/** How long (ms) the rest of it may take. */
const READ_TIMEOUT = 1_000

const HEAD = {
  statusCode: 200,
  headers: { 'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-cache' }
}

/**
 * What the client of a stream hears while its call waits: a head, and then comments
 * (https://html.spec.whatwg.org/multipage/server-sent-events.html), which every reader of events skips. Clients
 * and proxies give up connections on which nothing comes for a minute.
 */
export class Heartbeat {
  /** What the client is getting; undefined before the first beat. */
  answer: Answer | undefined
  readonly #patient: Patient
  readonly #timer: NodeJS.Timeout

  /**
   * @param interval between two beats, and before the first (ms)
   * @param answer what the client is getting already
   */
  constructor(patient: Patient, interval: number, answer?: Answer) {
    this.#patient = patient
    this.answer = answer
    this.#timer = setInterval(() => this.#beat(), interval).unref()
  }

  stop(): void {
    clearInterval(this.#timer)
  }

  #beat(): void {
    if (this.answer === undefined) {
      this.answer = Answer.awaited()
      this.#patient.open(HEAD, this.answer)
    }
    const { position } = this.#patient
    this.answer.say(
      position === undefined ? ':\n\n' : `: position ${position + 1} in the queue\n\n`
    )
  }
}

/** Can this answer follow the head that the client has? */
export function isEventStream({ statusCode }: Head, { framing }: Answer): boolean {
  return statusCode < 300 && framing === 'sse'
}

/** What to tell the client of an answer that can't: what the backend says, if it says what is wrong. */
export async function complaintOf({ statusCode }: Head, answer: Answer): Promise<GatewayError> {
  if (statusCode < 400) {
    answer.destroy()
    return new GatewayError('backend_failed', 'The backend did not answer with a stream of events.')
  }
  const said = messageIn(await read(answer))
  const message = said ?? `The backend answered with status ${statusCode}.`
  const code = statusCode === 429 ? 'rate_limit_exceeded' : 'invalid_request'
  return new GatewayError(statusCode < 500 ? code : 'backend_failed', message, { statusCode })
}

async function read(answer: Answer): Promise<string> {
  const timer = setTimeout(() => answer.destroy(), READ_TIMEOUT)
  let text = ''
  try {
    for await (const piece of answer.setEncoding('utf8')) {
      text += piece
      if (text.length > MAX_READ) break
    }
  } catch {
    // What has come is what there is.
  }
  clearTimeout(timer)
  return text
}

/** OpenAI's and Anthropic's errors are objects, Ollama's are texts, and FastAPI's stand in `detail`. */
export function messageIn(text: string): string | undefined {
  try {
    const { error, message, detail } = Object(JSON.parse(text))
    return [error?.message, error, message, detail].find(each => typeof each === 'string')
  } catch {
    return undefined
  }
}
