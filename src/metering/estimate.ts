import { FRAMES } from '../dialects/prompt.ts'
import { Lru } from '../keys/lru.ts'
import { Fit } from './fit.ts'
import { Lessons } from './lessons.ts'
import { hasText, type PromptText, promptFeatures, withOptional } from './prompt.ts'
import {
  characters,
  MOST_CHARACTERS,
  TEXT_COUNTS,
  type TextCounts,
  wideCharacters
} from './text.ts'

/** What has passed of an answer. */
export interface Passed {
  text: TextCounts
  /** Events with a piece of the answer; 0 of an answer that came whole. */
  deltas: number
  /** All of it: with the token that says the end, which has no text. */
  isWhole: boolean
}

/**
 * What byte-pair tokenizers of today come to (fitted to Llama 3's, over English text and code): for each
 * character of a kind, then for each run of them; the kinds are those of `text.ts`.
 */
const CHARACTERS = [0.04, 0.35, 0.15, 0.05, -0.15, 0.05, 0.3, 0.65, 0.7, 0.7]
const RUNS = [0.75, -0.2, 1.2, 0.1, 0.85, 0.85, 0.8, 0.1, 0.1, 0.15]
const TEXT_WEIGHTS = [...CHARACTERS, ...RUNS, 0]
const TEXT_VARIANCES = [...new Array(TEXT_COUNTS).fill(0.05), 4]
/** Tokens that servers add: marks of the beginning and the end, a chat template, and instructions for the use of tools. */
const ADDED = [...FRAMES.map(frame => (frame === 'plain' ? 1 : 20)), 100]
const ADDED_VARIANCES = [...FRAMES.map(frame => (frame === 'plain' ? 2 : 100) ** 2), 200 ** 2]
const PROMPT_WEIGHTS = [...CHARACTERS, ...RUNS, ...ADDED]
const PROMPT_VARIANCES = [...new Array(TEXT_COUNTS).fill(0.05), ...ADDED_VARIANCES]

/** Below so many tokens of text in a delta a stream counts as one of single tokens. */
const SINGLE = 1.4
/** Weights of text, deltas, characters outside ASCII (some take several tokens, and one delta) and the end. */
const SINGLE_WEIGHTS = [0, 1, 0, 0]
const SEVERAL_WEIGHTS = [1, 0, 0, 0]
const STREAM_VARIANCES = [0.1, 30, 0.05, 9]

/** Tokens beside the text: marks of the format in an answer, and what the server puts before a prompt. */
const MAX_BESIDE = 64
const MAX_TEMPLATE = 2000

/** Maximum number of tokens for each character of a kind, and for each run of small letters. */
const MOST = [0.4, 1, 1, 1, 1, 1, 3, 3, 3, 3, 1]

/** A model's name that is longer is not remembered. */
const MAX_NAME = 200

/** Number of other callers between two lessons that one caller gives all of them. */
const OTHERS = 3
/** How far such a lesson counts as off at most: a share, and tokens. */
const MOST_OFF = 0.25
const MOST_OFF_TOKENS = 4
/** Text (characters) that only some servers read, up to which a prompt teaches: a switch for a chat template. */
const MAX_OPTIONAL = 64
/** A caller's prompts are never estimated below this share of what their text would be for a new caller. */
const LEAST = 1 / 3

/** Model and caller whose tokens are estimated. */
export interface Source {
  model: string
  /** Caller, or another name that stands for one tenant. */
  caller: string
}

/** Weights of one model, learned from all callers or from one of them. */
class Known {
  readonly outputs = new Lessons()
  readonly inputs = new Lessons()
  readonly text: Fit
  readonly prompt: Fit
  /** How far to trust the text and the deltas, in streams of single tokens and in others. */
  readonly single: Fit
  readonly several: Fit

  constructor(prior?: Known) {
    this.text = prior?.text.heir() ?? new Fit(TEXT_WEIGHTS, TEXT_VARIANCES)
    this.prompt = prior?.prompt.heir() ?? new Fit(PROMPT_WEIGHTS, PROMPT_VARIANCES)
    this.single = prior?.single.heir() ?? new Fit(SINGLE_WEIGHTS, STREAM_VARIANCES)
    this.several = prior?.several.heir() ?? new Fit(SEVERAL_WEIGHTS, STREAM_VARIANCES)
  }
}

/** Weights for all callers of a model, and the callers that taught them last: outputs and prompts. */
class Common extends Known {
  readonly outputTeachers: string[] = []
  readonly inputTeachers: string[] = []
  /** Its latest reasoning was not shown. */
  hidesReasoning = false
}

/**
 * Tokens from text, without a tokenizer: responses with usage teach how many tokens the text and the deltas of
 * its model amount to. A caller teaches what is estimated for itself. What is estimated for callers that have taught
 * nothing yet is learned from several of them by turns and in small steps, so that no caller can spoil it.
 *
 * @example
 * const estimates = new Estimates(1000)
 * const text = [7, 1, 0, 1, 0, 0, 0, 0, 0, 0, 2, 1, 0, 1, 0, 0, 0, 0, 0, 0] // Two words
 * estimates.output({ model: 'm', caller: 'alice' }, { text, deltas: 0, isWhole: false }) // 2
 */
export class Estimates {
  readonly #common: Lru<string, Common>
  readonly #own: Lru<string, Known>
  readonly #unknown = new Known()

  /** @param max how many models, and how many pairs of a model and a caller, are remembered: about 10 KB each */
  constructor(max: number) {
    this.#common = new Lru(max)
    this.#own = new Lru(max)
  }

  output(source: Source, passed: Passed): number {
    if (characters(passed.text) === 0) return passed.deltas
    const known = this.#own.get(nameOf(source)) ?? this.#prior(source)
    return Math.max(1, Math.round(outputOf(known, passed)))
  }

  input(source: Source, read: PromptText): number {
    const prompt = withOptional(read)
    if (!hasText(prompt)) return 0
    if (characters(prompt.counts) === 0) return prompt.tokens
    const prior = this.#prior(source)
    const known = this.#own.get(nameOf(source)) ?? prior
    const tokens = Math.max(known.prompt.of(promptFeatures(prompt)), leastOf(prior, prompt))
    return Math.max(1, Math.round(prompt.tokens + tokens))
  }

  /** The backend has counted this many tokens for a whole response. */
  learnOutput(source: Source, passed: Passed, tokens: number): void {
    if (!isPlausible(passed.text, tokens, MAX_BESIDE)) return
    const { own, common } = this.#remember(source)
    if (own === undefined || !own.outputs.isDue(outputOf(own, passed), tokens)) return
    learnOutput(own, passed, tokens)
    if (takesTurn(common.outputTeachers, source.caller)) {
      learnOutput(common, passed, limited(tokens, outputOf(common, passed)))
    }
  }

  learnInput(source: Source, prompt: PromptText, tokens: number): void {
    if (prompt.hasData || prompt.isOpen || isUnsure(prompt)) return
    if (!isPlausible(prompt.counts, tokens, MAX_TEMPLATE)) return
    // Servers may cut a prompt that is too long for them.
    if (tokens < leastOf(this.#prior(source), prompt)) return
    const { own, common } = this.#remember(source)
    if (own === undefined) return
    const features = promptFeatures(prompt)
    if (!own.inputs.isDue(own.prompt.of(features), tokens)) return
    own.prompt.learn(features, tokens)
    if (takesTurn(common.inputTeachers, source.caller)) {
      common.prompt.learn(features, limited(tokens, common.prompt.of(features)))
    }
  }

  /** Whether a model's reasoning is not shown, as far as is known. */
  hidesReasoning({ model }: Source): boolean {
    return this.#common.get(model)?.hidesReasoning ?? false
  }

  noteReasoning({ model }: Source, isHidden: boolean): void {
    const common = this.#common.get(model)
    if (common !== undefined) common.hidesReasoning = isHidden
  }

  #prior({ model }: Source): Known {
    return this.#common.get(model) ?? this.#unknown
  }

  #remember(
    source: Source
  ): { own: Known; common: Common } | { own: undefined; common: undefined } {
    const { model } = source
    if (model.length > MAX_NAME) return { own: undefined, common: undefined }
    const common = this.#common.get(model) ?? new Common()
    const name = nameOf(source)
    const own = this.#own.get(name) ?? new Known(common)
    this.#common.set(model, common)
    this.#own.set(name, own)
    return { own, common }
  }
}

function nameOf({ model, caller }: Source): string {
  return `${model}\n${caller}`
}

/** The least that a caller's prompt can be, whatever it has taught: without what a server adds. */
function leastOf(prior: Known, { counts }: PromptText): number {
  return LEAST * prior.prompt.of(counts)
}

/** Whether servers may read much more of a request than its certain text. */
function isUnsure({ counts, optional }: PromptText): boolean {
  return characters(optional) > Math.max(MAX_OPTIONAL, characters(counts) / 16)
}

/** Whether a caller may teach all of them now: after others have used the model. */
function takesTurn(last: string[], caller: string): boolean {
  if (last.includes(caller)) return false
  last.push(caller)
  if (last.length <= OTHERS) return false
  last.shift()
  return true
}

/** A count that is not too far off an estimate. */
function limited(tokens: number, estimate: number): number {
  const most = MOST_OFF * Math.abs(estimate) + MOST_OFF_TOKENS
  return Math.max(1, Math.min(Math.max(tokens, estimate - most), estimate + most))
}

function learnOutput(known: Known, passed: Passed, tokens: number): void {
  if (passed.deltas > 0) {
    const text = known.text.of(passed.text)
    const stream = text < SINGLE * passed.deltas ? known.single : known.several
    stream.learn([text, passed.deltas, wideCharacters(passed.text), 1], tokens)
  }
  known.text.learn([...passed.text, 1], tokens)
}

function outputOf(known: Known, { text, deltas, isWhole }: Passed): number {
  const end = isWhole ? 1 : 0
  if (deltas === 0) return known.text.of([...text, end])
  const tokens = known.text.of(text)
  const stream = tokens < SINGLE * deltas ? known.single : known.several
  return stream.of([tokens, deltas, wideCharacters(text), end])
}

/**
 * More tokens than text can have been: reasoning that is not shown, a picture in the prompt. Far too few:
 * a backend that does not count. Neither teaches anything about text.
 */
function isPlausible(text: TextCounts, tokens: number, beside: number): boolean {
  const size = characters(text)
  return size > 0 && tokens > size / MOST_CHARACTERS && tokens < mostTokens(text) + beside
}

/** No tokenizer makes more tokens of a text: one of each byte, but for words and names in Latin letters. */
function mostTokens(text: TextCounts): number {
  return text.reduce((sum, count, at) => sum + count * (MOST[at] ?? 0), 0)
}
