import type { Dialect } from '../dialects/dialect.ts'
import type { Failure } from '../dialects/failure.ts'
import type { Usage } from '../exchange.ts'
import type { Framing } from '../http.ts'
import { Choices, type ChoiceTexts, type Told } from './choices.ts'
import { Counts, isOutput } from './counts.ts'
import type { Passed } from './estimate.ts'
import { Sample, withoutUsage } from './sample.ts'
import { addText, characters, type TextCounts } from './text.ts'
import { JsonWatcher, MemberNames } from './watcher.ts'

const DATA = Buffer.from('data:')
const THE_END = Buffer.from('[DONE]')
const EMPTY = Buffer.alloc(0)
const LF = 0x0a
const CR = 0x0d
const MAX_HELD = 64 * 1024
/** Maximum size (bytes) of running usage that is kept unread. */
const MAX_RUNNING = 512

/** Where in a line of an event stream the next byte stands. */
const LINE_START = 0
const DATA_START = 1
const DATA_LINE = 2
const OTHER_LINE = 3

/**
 * Reads the usage out of an answer that passes by. Bytes go on as they came and when they came; only
 * where the usage chunk was asked for by the gateway and not by the client, that one event is taken
 * out, and for that an event's beginning waits for its end. The same holds for running usage in the other events.
 *
 * Event streams are read as https://html.spec.whatwg.org/multipage/server-sent-events.html says:
 * LF, CRLF or CR, one optional space after the colon, over any split of the bytes.
 *
 * @example
 * const meter = new Meter({ framing: 'sse', dialect: openai, takeOut: false })
 * meter.pass(Buffer.from('data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":1}}\n\n'))
 * meter.usage // { promptTokens: 2, completionTokens: 1, totalTokens: 3, exactness: 'exact' }
 */
export class Meter {
  /** Events with a piece of the answer, and when the first and the last of them passed. */
  deltas = 0
  firstDeltaAt = 0
  lastDeltaAt = 0
  /** The usage is the answer's last word, not a count on the way. */
  hasFinalUsage = false
  /** Another backend goes on with the answer, and has not said yet how many tokens that is. */
  isUsageOld = false
  /** How the backend failed, where it reported that inside its response. */
  failure: Failure | undefined
  /** `id` of the answer, and who wants to know it as soon as it is seen. */
  id: string | undefined
  onId: ((id: string) => void) | undefined
  /** `status` of a response. */
  #status: string | undefined
  readonly framing: Framing
  readonly #dialect: Dialect
  readonly #takeOut: boolean
  readonly #strips: boolean
  readonly #mustEnd: boolean
  readonly #watcher: JsonWatcher
  #hasReasoning = false
  readonly #counts = new Counts()
  readonly #choices = new Choices()
  /** The stream said properly that it is over, or a choice did. */
  #saidEnd = false
  #endedChoice = false
  /** What had passed when the backend last said how many tokens that was: servers can say it on the way. */
  #toldTokens = 0
  #toldText: TextCounts | undefined
  #toldDeltas = 0
  #line = LINE_START
  #matched = 0
  #endMatched = 0
  #afterCr = false
  #hasData = false
  /** The beginning of an event that may have to be taken out. */
  #held: Buffer | undefined
  #tooLong = false
  /** The last event, which waits until it is released. */
  #lastEvent: Buffer | undefined
  #isReleased = false
  /** What passed ended in the middle of a line, or of an event. */
  #isMidLine = false
  #isMidEvent = false
  #tookOut = false
  #sample: Sample | undefined
  /** Running usage of the latest event, as JSON, and its length while it has not been read. */
  #running: Buffer | undefined
  #runningLength = 0
  #sampledChoice = 0

  /**
   * @param options.takeOut takes the usage chunk out
   * @param options.strips takes running usage out of the other events
   * @param options.mustEnd a stream that does not say that it is over is broken
   * @param options.names of the dialect, where many answers share them
   */
  constructor(options: {
    framing: Framing
    dialect: Dialect
    takeOut: boolean
    strips?: boolean
    mustEnd?: boolean
    names?: MemberNames
  }) {
    this.#mustEnd = options.mustEnd ?? false
    this.framing = options.framing
    this.#dialect = options.dialect
    this.#takeOut = options.takeOut && options.framing === 'sse'
    this.#strips = options.strips === true && options.framing === 'sse'
    this.#watcher = new JsonWatcher(options.names ?? memberNames(options.dialect, options.framing))
  }

  /** The last event of a stream has passed by; it is kept back until it is released. */
  get isOver(): boolean {
    return this.#isReleased || this.#lastEvent !== undefined
  }

  /** Returns what was kept back from the last event on, and keeps nothing back from now on. */
  release(): Buffer | undefined {
    const last = this.#lastEvent
    this.#lastEvent = undefined
    this.#isReleased = true
    return last
  }

  /** The stream said properly that it is over: itself, or by the ends of all its choices. */
  get finished(): boolean {
    return this.#saidEnd || (this.#endedChoice && this.#choices.isFinished)
  }

  /** No reasoning has passed. A whole response of the Responses API does not show it by the names of its fields. */
  get hidesReasoning(): boolean {
    const isUnknown = this.framing === 'json' && this.#dialect.reasoningMembers.length === 0
    return !this.#hasReasoning && !isUnknown
  }

  /** Number of choices that have begun; 0 for an API without choices. */
  get choices(): number {
    return this.#choices.count
  }

  /** Looks at a chunk and returns what of it goes on now. */
  pass(chunk: Buffer): Buffer | undefined {
    if (this.#isReleased) return chunk
    if (this.#lastEvent !== undefined) {
      this.#lastEvent = Buffer.concat([this.#lastEvent, chunk])
      return undefined
    }
    const before = this.deltas
    let out: Buffer | undefined = chunk
    if (this.framing === 'sse') {
      if (this.#isLikeSample(chunk)) out = this.#addDelta(chunk, this.#sample!)
      else out = this.#events(chunk)
    } else if (this.framing === 'ndjson') out = this.#lines(chunk)
    else this.#watcher.feed(chunk, 0, chunk.length)
    if (this.deltas !== before) {
      this.lastDeltaAt = performance.now()
      if (before === 0) this.firstDeltaAt = this.lastDeltaAt
    }
    return out
  }

  /** The answer is over; returns what is still kept back: the last event, or one that never ended. */
  end(): Buffer | undefined {
    this.#readRunning()
    if (this.framing !== 'sse') this.#harvest()
    // The last event may lack its blank line.
    else if (this.#hasData) {
      if (this.#isOurs()) this.#held = undefined
      else if (this.#held && this.#strips && this.#isRunning())
        this.#held = withoutUsage(this.#held)
      this.#endEvent()
    }
    const kept = this.#lastEvent ?? this.#held
    this.#lastEvent = undefined
    this.#held = undefined
    return kept
  }

  breakOff(): string {
    this.#held = undefined
    this.#lastEvent = undefined
    if (this.framing === 'json') return ''
    if (this.framing === 'ndjson') return this.#isMidLine ? '\n' : ''
    if (this.#changes && !this.#tooLong) return ''
    if (this.#line !== LINE_START || this.#matched > 0) return '\n\n'
    return this.#isMidEvent ? '\n' : ''
  }

  /** A response is shown that is not complete. */
  get isOngoing(): boolean {
    if (this.framing !== 'json') return !this.finished
    return this.#status === 'queued' || this.#status === 'in_progress'
  }

  isCutShort(): boolean {
    // The last line may lack its end.
    if (this.framing === 'ndjson') this.#harvest()
    return this.#mustEnd && this.framing !== 'json' && !this.finished && this.failure === undefined
  }

  /**
   * What the backend reported of a response with several choices; undefined: nothing.
   *
   * @param prompts number of prompts in the request
   * @param estimate returns the tokens of a text
   */
  told(prompts: number, estimate: (passed: Passed) => number): Told | undefined {
    this.#readRunning()
    const first = this.framing === 'json' ? this.#watcher.firstChoice : undefined
    const texts: ChoiceTexts = {
      all: estimate(this.passed(true)),
      first: first && estimate({ text: first, deltas: 0, isWhole: true })
    }
    return this.#choices.total(prompts, texts)
  }

  /** What the backend said, or undefined. */
  get usage(): Usage | undefined {
    this.#readRunning()
    return this.#counts.toUsage()
  }

  /** What it said last is no count of tokens. */
  get isUsageWrong(): boolean {
    return this.#counts.isWrong
  }

  /** All that has passed. */
  passed(isWhole: boolean): Passed {
    const deltas = this.framing === 'json' ? 0 : this.deltas
    return { text: this.#watcher.text, deltas, isWhole }
  }

  /** Tokens that the backend has counted on the way, and what has passed since. */
  get counted(): { tokens: number; since: Passed } {
    this.#readRunning()
    const passed = this.passed(false)
    const told = this.#toldText
    if (told === undefined) return { tokens: 0, since: passed }
    const text = passed.text.map((count, at) => count - told[at]!)
    const deltas = passed.deltas - this.#toldDeltas
    return { tokens: this.#toldTokens, since: { text, deltas, isWhole: false } }
  }

  /** The backend has counted all that has passed. */
  get isAllTold(): boolean {
    this.#readRunning()
    return this.deltas === 0 || (this.#toldTokens > 0 && this.#toldDeltas === this.deltas)
  }

  #lines(chunk: Buffer): Buffer | undefined {
    let at = 0
    this.#isMidLine = chunk[chunk.length - 1] !== LF
    while (at < chunk.length) {
      const end = chunk.indexOf(LF, at)
      this.#watcher.feed(chunk, at, end === -1 ? chunk.length : end)
      if (end === -1) return chunk
      const isLast = this.#watcher.seen.done
      this.#harvest()
      if (isLast) {
        this.#lastEvent = chunk.subarray(at)
        return chunk.subarray(0, at)
      }
      at = end + 1
    }
    return chunk
  }

  #isLikeSample(chunk: Buffer): boolean {
    const isKnown = this.#sample !== undefined && this.#isBetweenEvents()
    return isKnown && this.#sample!.fits(chunk) && this.#canKeepUsage(this.#sample!)
  }

  #canKeepUsage({ hasUsage, usageBegin, usageEnd }: Sample): boolean {
    return !hasUsage || usageEnd - usageBegin <= MAX_RUNNING
  }

  #addDelta(chunk: Buffer, sample: Sample): Buffer {
    // What is shorter may lack numbers that the one before had.
    if (sample.usageEnd - sample.usageBegin < this.#runningLength) this.#readRunning()
    this.deltas++
    addText(this.#watcher.text, chunk, sample.textBegin, sample.textEnd)
    if (!sample.hasUsage) return chunk
    this.#running ??= Buffer.allocUnsafeSlow(MAX_RUNNING)
    this.#runningLength = chunk.copy(this.#running, 0, sample.usageBegin, sample.usageEnd)
    return this.#strips ? sample.withoutUsage(chunk) : chunk
  }

  /** Reads the latest running usage, which is only of interest where the stream ends or is looked at. */
  #readRunning(): void {
    if (this.#runningLength === 0) return
    const usage = this.#running!.toString('latin1', 0, this.#runningLength)
    this.#runningLength = 0
    this.#choices.setUsage(this.#sampledChoice, usage)
    this.#addUsage(usage)
  }

  #addUsage(usage: string): void {
    this.#counts.add(usage)
    this.isUsageOld = false
    this.#noteTold()
  }

  #isBetweenEvents(): boolean {
    return !this.#isMidEvent && this.#line === LINE_START && this.#matched === 0 && !this.#afterCr
  }

  /** Remembers an event that came alone, and in which there was one piece of the answer and no more. */
  #takeSample(chunk: Buffer): void {
    const { seen } = this.#watcher
    const { textBegin, textEnd } = seen
    if (seen.texts !== 1 || this.#saysEnd() || this.#saysFailure()) return
    this.#sample = Sample.of(chunk, textBegin, textEnd, seen.usage !== undefined) ?? this.#sample
    this.#sampledChoice = seen.index ?? 0
  }

  #events(chunk: Buffer): Buffer | undefined {
    this.#readRunning()
    const hasCr = chunk.includes(CR)
    const isAlone = !hasCr && this.#isBetweenEvents()
    const kept: Buffer[] = []
    /** What stands before `keepFrom` has gone on or was taken out; the event began at `eventStart`. */
    let keepFrom = 0
    let eventStart = 0
    let at = 0
    while (at < chunk.length) {
      const byte = chunk[at]!
      if (this.#afterCr) {
        this.#afterCr = false
        if (byte === LF) {
          at++
          const endsEvent = eventStart === at - 1 && this.#held === undefined && !this.#tooLong
          if (endsEvent) {
            if (this.#tookOut) keepFrom = at
            eventStart = at
          }
          continue
        }
      }
      this.#tookOut = false
      if (this.#line === DATA_START) {
        this.#line = DATA_LINE
        if (byte === 0x20) at++
        continue
      }
      if (this.#line === LINE_START && byte === DATA[this.#matched]) {
        at++
        if (++this.#matched === DATA.length) {
          this.#line = DATA_START
          this.#hasData = true
        }
        continue
      }
      const isBlank =
        this.#line === LINE_START && this.#matched === 0 && (byte === LF || byte === CR)
      const end = isBlank ? at : lineEnd(chunk, at, hasCr)
      if (this.#line === DATA_LINE) this.#data(chunk, at, end)
      else if (!isBlank) this.#line = OTHER_LINE
      at = end
      if (end === chunk.length) break
      this.#afterCr = chunk[end] === CR
      this.#line = LINE_START
      this.#matched = 0
      at++
      this.#isMidEvent = !isBlank
      if (isBlank) {
        if (this.#isLast()) return this.#keepLast(chunk, kept, keepFrom, eventStart)
        if (this.#isOurs()) {
          if (this.#held === undefined) kept.push(chunk.subarray(keepFrom, eventStart))
          keepFrom = at
          this.#tookOut = true
        } else if (this.#strips && this.#isRunning()) {
          if (this.#held === undefined) kept.push(chunk.subarray(keepFrom, eventStart))
          kept.push(withoutUsage(join([this.#held ?? EMPTY, chunk.subarray(eventStart, at)])!))
          keepFrom = at
        } else if (this.#held !== undefined) kept.push(this.#held)
        this.#held = undefined
        this.#tooLong = false
        if (isAlone && eventStart === 0 && at === chunk.length) this.#takeSample(chunk)
        this.#endEvent()
        eventStart = at
      }
    }
    if (!this.#changes) return chunk
    return this.#hold(chunk, kept, keepFrom, eventStart)
  }

  /** The last event, and whatever may come behind it, waits to be released. */
  #keepLast(
    chunk: Buffer,
    kept: Buffer[],
    keepFrom: number,
    eventStart: number
  ): Buffer | undefined {
    const last = chunk.subarray(eventStart)
    this.#lastEvent = this.#held === undefined ? last : Buffer.concat([this.#held, last])
    this.#held = undefined
    this.#endEvent()
    if (eventStart > keepFrom) kept.push(chunk.subarray(keepFrom, eventStart))
    return join(kept)
  }

  /** Is the event that just ended the one that ends the stream? */
  #isLast(): boolean {
    const { type } = this.#watcher.seen
    if (this.#endMatched === THE_END.length) return true
    return type !== undefined && this.#dialect.endTypes.includes(type)
  }

  /** Keeps back the beginning of an unfinished event, and joins what goes on. */
  #hold(chunk: Buffer, kept: Buffer[], keepFrom: number, eventStart: number): Buffer | undefined {
    const rest = chunk.length - eventStart
    if (rest > 0 && !this.#tooLong) {
      const length = (this.#held?.length ?? 0) + rest
      if (length <= MAX_HELD) {
        if (eventStart > keepFrom) kept.push(chunk.subarray(keepFrom, eventStart))
        const beginning = chunk.subarray(eventStart)
        this.#held = this.#held ? Buffer.concat([this.#held, beginning]) : beginning
        return join(kept)
      }
      this.#tooLong = true
      if (this.#held !== undefined) kept.push(this.#held)
      this.#held = undefined
    }
    if (keepFrom === 0 && kept.length === 0) return chunk
    if (keepFrom < chunk.length) kept.push(chunk.subarray(keepFrom))
    return join(kept)
  }

  #data(chunk: Buffer, from: number, to: number): void {
    this.#watcher.feed(chunk, from, to)
    for (
      let at = from;
      at < to && this.#endMatched >= 0 && this.#endMatched < THE_END.length;
      at++
    ) {
      this.#endMatched = chunk[at] === THE_END[this.#endMatched] ? this.#endMatched + 1 : -1
    }
  }

  /** Is the event that just ended the usage chunk that only the gateway asked for? */
  #isOurs(): boolean {
    return this.#takeOut && !this.#tooLong && this.#isUsageChunk()
  }

  /** Has the event that just ended both a choice and usage? */
  #isRunning(): boolean {
    const { hasChoices, usage } = this.#watcher.seen
    return hasChoices && usage !== undefined && !this.#tooLong
  }

  /** Does what passes differ from what the backend sends? */
  get #changes(): boolean {
    return this.#takeOut || this.#strips
  }

  #endEvent(): void {
    if (this.#endMatched === THE_END.length) this.#saidEnd = true
    this.#endMatched = 0
    if (this.#hasData) this.#harvest()
    this.#hasData = false
  }

  /** Takes what was seen in the JSON text that just ended. */
  #harvest(): void {
    const { seen } = this.#watcher
    if (seen.delta) this.deltas++
    this.#choices.add(seen)
    if (seen.hasReasoning || (seen.delta && seen.type?.includes('reasoning'))) {
      this.#hasReasoning = true
    }
    if (seen.usage !== undefined) {
      this.#addUsage(seen.usage)
      if (this.#isUsageChunk()) this.hasFinalUsage = true
    }
    if (seen.promptEvalCount !== undefined) this.#counts.set('input_tokens', seen.promptEvalCount)
    if (seen.evalCount !== undefined) this.#counts.set('output_tokens', seen.evalCount)
    this.failure ??= this.#dialect.failure(seen)
    this.#status = seen.status
    if (seen.finishReasons !== undefined) this.#endedChoice = true
    else if (this.#saysEnd()) this.#saidEnd = true
    if (this.id === undefined && seen.id !== undefined) {
      this.id = seen.id
      this.onId?.(seen.id)
    }
    this.#watcher.reset()
  }

  #noteTold(): void {
    const tokens = this.choices > 1 ? this.#choices.output : this.#counts.output
    if (tokens === undefined || this.deltas === 0 || tokens === this.#toldTokens) return
    if (!isOutput(tokens, characters(this.#watcher.text))) return
    this.#toldTokens = tokens
    this.#toldText = [...this.#watcher.text]
    this.#toldDeltas = this.deltas
  }

  /** The one chunk of a stream that has usage and nothing else: `choices` is empty, null or left out. */
  #isUsageChunk(): boolean {
    const { hasChoices, usage, type } = this.#watcher.seen
    return usage !== undefined && !hasChoices && type === undefined && !this.#saysFailure()
  }

  #saysFailure(): boolean {
    return this.#dialect.failure(this.#watcher.seen) !== undefined
  }

  #saysEnd(): boolean {
    const { done, finishReasons, type } = this.#watcher.seen
    return (
      done ||
      finishReasons !== undefined ||
      (type !== undefined && this.#dialect.endTypes.includes(type))
    )
  }
}

/** The members whose text is a piece of an answer that comes like this. */
export function memberNames(dialect: Dialect, framing: Framing): MemberNames {
  const { answerMembers, deltaMembers, reasoningMembers } = dialect
  return new MemberNames(framing === 'json' ? answerMembers : deltaMembers, reasoningMembers)
}

function lineEnd(chunk: Buffer, from: number, hasCr: boolean): number {
  const lf = chunk.indexOf(LF, from)
  const end = lf === -1 ? chunk.length : lf
  if (!hasCr) return end
  const cr = chunk.indexOf(CR, from)
  return cr === -1 ? end : Math.min(cr, end)
}

function join(parts: Buffer[]): Buffer | undefined {
  const full = parts.filter(part => part.length > 0)
  return full.length < 2 ? full[0] : Buffer.concat(full)
}
