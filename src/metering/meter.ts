import type { Dialect } from '../dialects/dialect.ts'
import type { Failure } from '../dialects/failure.ts'
import type { Usage } from '../exchange.ts'
import type { Framing } from '../http.ts'
import { EventReader } from '../wire/event-reader.ts'
import { Choices, type ChoiceTexts, type Told } from './choices.ts'
import { Counts, isOutput } from './counts.ts'
import type { Passed } from './estimate.ts'
import { Sample, withExtras, withoutUsage } from './sample.ts'
import { addText, characters, type TextCounts } from './text.ts'
import { JsonWatcher, MemberNames } from './watcher.ts'

const THE_END = Buffer.from('[DONE]')
const EMPTY = Buffer.alloc(0)
const MAX_HELD = 64 * 1024
/** Maximum size (bytes) of running usage that is kept unread. */
const MAX_RUNNING = 512

/**
 * Reads the usage out of an answer that passes by. Bytes go on as they came and when they came; only
 * where the usage chunk was asked for by the gateway and not by the client, that one event is taken
 * out, and for that an event's beginning waits for its end. The same holds for running usage in the other events.
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
  /** `sequence_number` of the next event, as far as events have them. */
  sequence = 0
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
  readonly #reader: EventReader | undefined
  #endMatched = 0
  /** The beginning of an event that may have to be taken out. */
  #held: Buffer | undefined
  #tooLong = false
  /** The event with the finish reason: it waits for the usage chunk, which may tell more than usage. */
  #finish: Buffer | undefined
  /** The last event did not go on. */
  #isDropped = false
  /** The last event, which waits until it is released. */
  #lastEvent: Buffer | undefined
  #isReleased = false
  /** More follows the last event than is kept. */
  #isTrailed = false
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
    this.#reader = options.framing === 'json' ? undefined : new EventReader(options.framing)
    this.#dialect = options.dialect
    this.#takeOut = options.takeOut && options.framing === 'sse'
    this.#strips = options.strips === true && options.framing === 'sse'
    this.#watcher = new JsonWatcher(options.names ?? memberNames(options.dialect, options.framing))
  }

  /** The last event of a stream has passed by; it is kept back until it is released. */
  get isOver(): boolean {
    return this.#isReleased || this.#lastEvent !== undefined
  }

  /** What passed ends with a whole event of an event stream, and more is to come. */
  get isBetweenEvents(): boolean {
    return this.framing === 'sse' && !this.isOver && this.#reader!.isBetweenEvents
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
      // A backend may send more after the end of its stream: that is not kept without bound.
      this.#isTrailed ||= this.#lastEvent.length + chunk.length > MAX_HELD
      if (!this.#isTrailed) this.#lastEvent = Buffer.concat([this.#lastEvent, chunk])
      return undefined
    }
    const before = this.deltas
    let out: Buffer | undefined = chunk
    if (this.#reader === undefined) this.#watcher.feed(chunk, 0, chunk.length)
    else if (this.#isLikeSample(chunk)) out = this.#addDelta(chunk, this.#sample!)
    else out = this.#events(chunk, this.#reader)
    if (this.deltas !== before) {
      this.lastDeltaAt = performance.now()
      if (before === 0) this.firstDeltaAt = this.lastDeltaAt
    }
    return out
  }

  /** The answer is over; returns what is still kept back: the last event, or one that never ended. */
  end(): Buffer | undefined {
    this.#readRunning()
    this.#endStream()
    const kept = join([this.#finish ?? EMPTY, this.#lastEvent ?? this.#held ?? EMPTY])
    this.#finish = this.#lastEvent = this.#held = undefined
    return kept
  }

  breakOff(): string {
    const finish = String(this.#finish ?? '')
    this.#finish = this.#held = this.#lastEvent = undefined
    const reader = this.#reader
    if (reader === undefined) return ''
    if (this.framing === 'ndjson') return reader.isBetweenLines ? '' : '\n'
    if (this.#changes && !this.#tooLong) return finish
    if (!reader.isBetweenLines) return '\n\n'
    return reader.isBetweenEvents ? '' : '\n'
  }

  /** A response is shown that is not complete. */
  get isOngoing(): boolean {
    if (this.framing !== 'json') return !this.finished
    return this.#status === 'queued' || this.#status === 'in_progress'
  }

  isCutShort(): boolean {
    if (!this.#mustEnd || this.framing === 'json') return false
    this.#endStream()
    // Servers may report the usage of one choice while they still write others.
    const isCounted = this.hasFinalUsage && this.choices <= 1
    return !this.finished && !isCounted && this.failure === undefined
  }

  /**
   * What the backend reported of a response with several choices; undefined: nothing.
   *
   * @param prompts number of prompts in the request
   * @param isSum the backend is known to report the sum of all choices
   * @param estimate returns the tokens of a text
   */
  told(prompts: number, isSum: boolean, estimate: (passed: Passed) => number): Told | undefined {
    this.#readRunning()
    const first = this.framing === 'json' ? this.#watcher.firstChoice : undefined
    const texts: ChoiceTexts = {
      all: estimate(this.passed(true)),
      first: first && estimate({ text: first, deltas: 0, isWhole: true })
    }
    return this.#choices.total(prompts, texts, isSum)
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

  /** Reads the last event, whose line end or blank line may be missing. */
  #endStream(): void {
    const reader = this.#reader
    if (reader === undefined) return this.#harvest()
    if (reader.isBetweenEvents || this.#lastEvent !== undefined) return
    reader.feedEnd()
    for (let next = reader.next(); next !== undefined; next = reader.next()) {
      if (next === 'data') this.#data(reader)
      else if (reader.hasData) {
        this.#held = this.#held && this.#changed(this.#held)
        this.#endEvent(reader)
      }
    }
  }

  #isLikeSample(chunk: Buffer): boolean {
    const sample = this.#sample
    if (sample === undefined || this.#finish || !this.#reader!.isBetweenEvents) return false
    return sample.fits(chunk) && this.#canKeepUsage(sample)
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

  /** Remembers an event that came alone, and in which there was one piece of the answer and no more. */
  #takeSample(chunk: Buffer): void {
    const { seen } = this.#watcher
    const { textBegin, textEnd } = seen
    if (seen.texts !== 1 || this.#saysEnd() || this.#saysFailure()) return
    this.#sample = Sample.of(chunk, textBegin, textEnd, seen.usage !== undefined) ?? this.#sample
    this.#sampledChoice = seen.index ?? 0
  }

  #events(chunk: Buffer, reader: EventReader): Buffer | undefined {
    this.#readRunning()
    const isAlone = this.framing === 'sse' && reader.isBetweenEvents
    const out: Buffer[] = []
    // The event begins at `start`; what stands from `from` on has not gone on yet.
    let start = reader.feed(chunk)
    if (this.#finish !== undefined) this.#finish = join([this.#finish, chunk.subarray(0, start)])
    let from = this.#isDropped ? start : 0
    for (let next = reader.next(); next !== undefined; next = reader.next()) {
      if (next === 'data') {
        this.#data(reader)
        continue
      }
      const end = reader.to
      const event = this.#isChanged ? this.#wholeEvent(chunk.subarray(start, end)) : undefined
      if (this.#finish !== undefined) {
        out.push(this.#isOurs() && event ? withExtras(this.#finish, event) : this.#finish)
        this.#finish = undefined
      }
      if (this.#isLast()) {
        out.push(chunk.subarray(from, start))
        this.#lastEvent = join([this.#held ?? EMPTY, chunk.subarray(start)])
        this.#held = undefined
        this.#endEvent(reader)
        return join(out)
      }
      const changed = event && this.#changed(event)
      this.#isDropped = event !== undefined && changed === undefined
      if (event !== undefined) {
        out.push(chunk.subarray(from, start), changed ?? EMPTY)
        from = end
      } else if (this.#held !== undefined) out.push(this.#held)
      this.#held = undefined
      this.#tooLong = false
      if (isAlone && start === 0 && end === chunk.length) this.#takeSample(chunk)
      this.#endEvent(reader)
      start = end
    }
    return this.#changes ? this.#hold(chunk, out, from, start) : chunk
  }

  #wholeEvent(rest: Buffer): Buffer {
    return this.#held === undefined ? rest : Buffer.concat([this.#held, rest])
  }

  /** Whether the event that just ended must not go on as it is. */
  get #isChanged(): boolean {
    if (this.#tooLong) return false
    return this.#isOurs() || this.#isFinish() || (this.#strips && this.#isRunning())
  }

  /** Returns what goes on of an event now: all but usage that only the gateway asked for. */
  #changed(event: Buffer): Buffer | undefined {
    if (!this.#isChanged) return event
    if (this.#isOurs()) return undefined
    const rest = this.#strips && this.#isRunning() ? withoutUsage(event) : event
    if (!this.#isFinish()) return rest
    this.#finish = rest
    return undefined
  }

  /** Is the event that just ended the one that ends the stream? */
  #isLast(): boolean {
    const { done, type } = this.#watcher.seen
    if (this.#endMatched === THE_END.length) return true
    if (this.framing === 'ndjson') return done
    return type !== undefined && this.#dialect.endTypes.includes(type)
  }

  /** Keeps back the beginning of an unfinished event, and joins what goes on. */
  #hold(chunk: Buffer, out: Buffer[], from: number, start: number): Buffer | undefined {
    const beginning = chunk.subarray(start)
    if (beginning.length > 0 && !this.#tooLong) {
      const length = (this.#held?.length ?? 0) + beginning.length
      if (length <= MAX_HELD) {
        this.#held = this.#wholeEvent(beginning)
        return join([...out, chunk.subarray(from, start)])
      }
      this.#tooLong = true
      if (this.#held !== undefined) out.push(this.#held)
      this.#held = undefined
    }
    return join([...out, chunk.subarray(from)])
  }

  #data({ bytes, from, to }: EventReader): void {
    this.#watcher.feed(bytes, from, to)
    for (
      let at = from;
      at < to && this.#endMatched >= 0 && this.#endMatched < THE_END.length;
      at++
    ) {
      this.#endMatched = bytes[at] === THE_END[this.#endMatched] ? this.#endMatched + 1 : -1
    }
  }

  /** Is the event that just ended the usage chunk that only the gateway asked for? */
  #isOurs(): boolean {
    return this.#takeOut && this.#isUsageChunk()
  }

  /** Has the event that just ended the finish reason of the only choice, before the usage chunk? */
  #isFinish(): boolean {
    const { finishReasons, usage } = this.#watcher.seen
    const isLast = finishReasons !== undefined && this.#choices.count <= 1
    return this.#takeOut && isLast && (usage === undefined || this.#strips)
  }

  /** Has the event that just ended both a choice and usage? */
  #isRunning(): boolean {
    const { hasChoices, usage } = this.#watcher.seen
    return hasChoices && usage !== undefined
  }

  /** Does what passes differ from what the backend sends? */
  get #changes(): boolean {
    return this.#takeOut || this.#strips
  }

  #endEvent({ hasData, isError }: EventReader): void {
    if (this.#endMatched === THE_END.length) this.#saidEnd = true
    this.#endMatched = 0
    this.#watcher.seen.isErrorEvent = isError
    if (hasData) this.#harvest()
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
    this.sequence = (seen.sequence ?? this.sequence) + 1
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

function join(parts: Buffer[]): Buffer | undefined {
  const full = parts.filter(part => part.length > 0)
  return full.length < 2 ? full[0] : Buffer.concat(full)
}
