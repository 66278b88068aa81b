import { Fit } from './fit.ts'
import { characters, TEXT_COUNTS, type TextCounts, wideCharacters } from './text.ts'

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
const PROMPT_VARIANCES = [...new Array(TEXT_COUNTS).fill(0.05), 100 ** 2]

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

/** What was learned about one model. */
class Known {
  readonly text = new Fit(TEXT_WEIGHTS, TEXT_VARIANCES)
  readonly prompt = new Fit(TEXT_WEIGHTS, PROMPT_VARIANCES)
  /** How far to trust the text and the deltas, in streams of single tokens and in others. */
  readonly single = new Fit(SINGLE_WEIGHTS, STREAM_VARIANCES)
  readonly several = new Fit(SEVERAL_WEIGHTS, STREAM_VARIANCES)
}

/**
 * Tokens from text, without a tokenizer: each model's answers with usage teach how many tokens its text
 * and its deltas come to.
 *
 * @example
 * const estimates = new Estimates(1000)
 * const text = [7, 1, 0, 1, 0, 0, 0, 0, 0, 0, 2, 1, 0, 1, 0, 0, 0, 0, 0, 0] // Two words
 * estimates.output('some-model', { text, deltas: 0, isWhole: false }) // 2
 */
export class Estimates {
  /** The one that was learned about last stands last. */
  readonly #known = new Map<string, Known>()
  readonly #unknown = new Known()
  readonly #max: number

  /** @param max how many models are remembered, about 8 KB each */
  constructor(max: number) {
    this.#max = max
  }

  output(model: string, passed: Passed): number {
    if (characters(passed.text) === 0) return passed.deltas
    const tokens = outputOf(this.#known.get(model) ?? this.#unknown, passed)
    return Math.max(1, Math.round(tokens))
  }

  input(model: string, text: TextCounts): number {
    if (characters(text) === 0) return 0
    const { prompt } = this.#known.get(model) ?? this.#unknown
    return Math.max(1, Math.round(prompt.of([...text, 1])))
  }

  /** A whole answer has taken so many tokens, says its backend. */
  learnOutput(model: string, passed: Passed, tokens: number): void {
    if (!isPlausible(passed.text, tokens, MAX_BESIDE)) return
    const known = this.#remember(model)
    if (known === undefined) return
    if (passed.deltas > 0) {
      const text = known.text.of([...passed.text, 0])
      const stream = text < SINGLE * passed.deltas ? known.single : known.several
      stream.learn([text, passed.deltas, wideCharacters(passed.text), 1], tokens)
    }
    known.text.learn([...passed.text, 1], tokens)
  }

  learnInput(model: string, text: TextCounts, tokens: number): void {
    if (isPlausible(text, tokens, MAX_TEMPLATE))
      this.#remember(model)?.prompt.learn([...text, 1], tokens)
  }

  #remember(model: string): Known | undefined {
    if (model.length > MAX_NAME) return undefined
    const known = this.#known.get(model) ?? new Known()
    this.#known.delete(model)
    this.#known.set(model, known)
    if (this.#known.size > this.#max) this.#known.delete(this.#known.keys().next().value!)
    return known
  }
}

function outputOf(known: Known, { text, deltas, isWhole }: Passed): number {
  const end = isWhole ? 1 : 0
  if (deltas === 0) return known.text.of([...text, end])
  const tokens = known.text.of([...text, 0])
  const stream = tokens < SINGLE * deltas ? known.single : known.several
  return stream.of([tokens, deltas, wideCharacters(text), end])
}

/**
 * More tokens than text can have been: reasoning that is not shown, a picture in the prompt. Far too few:
 * a backend that does not count. Neither teaches anything about text.
 */
function isPlausible(text: TextCounts, tokens: number, beside: number): boolean {
  const size = characters(text)
  return size > 0 && tokens > size / 64 && tokens < mostTokens(text) + beside
}

/** No tokenizer makes more tokens of a text: one of each byte, but for words and names in Latin letters. */
function mostTokens(text: TextCounts): number {
  return text.reduce((sum, count, at) => sum + count * (MOST[at] ?? 0), 0)
}
