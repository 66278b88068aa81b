import type { Usage } from '../exchange.ts'
import { Counts } from './counts.ts'
import type { Seen } from './watcher.ts'

/** Maximum number of choices, and of usage objects without a choice, that are kept of one response. */
const MAX_KEPT = 1_000

interface Choice {
  readonly index: number
  /** The usage object of its latest event that has one, as JSON. */
  usage: string | undefined
  isFinished: boolean
}

/** Estimated tokens of the text of all choices; `first`: of the first one alone, where that is known. */
export interface ChoiceTexts {
  all: number
  first: number | undefined
}

/** Usage of a response with several choices. */
export interface Told {
  usage: Usage
  /** The backend has reported all choices. Else the output of those that it has not is estimated, if it can be. */
  isAll: boolean
}

/**
 * The choices of one response, and the usage that its backend reports of them. OpenAI, vLLM and SGLang report the
 * sum of all choices, and on request running numbers in each choice's events. llama.cpp reports each choice by itself:
 * in a usage chunk for each (chat), in each choice's last event (completions), and in a whole response of the first
 * choice alone. It sends `timings` beside them.
 *
 * @example
 * const choices = new Choices()
 * const ofOne = { choices: 1, usage: '{"prompt_tokens":9,"completion_tokens":20}' }
 * choices.add({ ...ofOne, index: 0 })
 * choices.add({ ...ofOne, index: 1 })
 * choices.total(1, { all: 42, first: undefined }).usage // { promptTokens: 9, completionTokens: 40, ... }
 */
export class Choices {
  /** Nearly every response has one choice, for which an array takes less memory than a map. */
  #choices: readonly Choice[] = []
  /** Number of choices in one event. */
  #together = 0
  /** Usage of an unnamed choice, and usage that may be of all of them. */
  #unnamed: readonly Usage[] = []
  #whole: readonly Usage[] = []

  /** Number of choices seen. */
  get count(): number {
    return Math.max(this.#choices.length, this.#together)
  }

  /** Whether all choices seen have ended. */
  get isFinished(): boolean {
    if (this.#together > this.#choices.length) return true
    return this.#choices.every(({ isFinished }) => isFinished)
  }

  /** Output tokens reported of all choices seen; undefined: not of all of them. */
  get output(): number | undefined {
    if (this.count < 2) return undefined
    const known = this.#reports
    return known.length === this.count ? sum(known, 'completionTokens') : undefined
  }

  /** Notes what one event, or a whole response, has shown. */
  add({ choices, index, usage, hasTimings, finishReasons }: Seen): void {
    if (choices > this.#together) this.#together = choices
    const choice = choices === 1 ? this.#choice(index ?? 0) : undefined
    if (choice !== undefined && finishReasons !== undefined) choice.isFinished = true
    if (usage === undefined) return
    if (choice !== undefined) {
      choice.usage = usage
      return
    }
    const reported = usageOf(usage)
    if (reported === undefined) return
    if (hasTimings) this.#unnamed = withOne(this.#unnamed, reported)
    else this.#whole = withOne(this.#whole, reported)
  }

  /** Replaces the usage of one choice (JSON). */
  setUsage(index: number, usage: string): void {
    const choice = this.#choice(index)
    if (choice !== undefined) choice.usage = usage
  }

  /**
   * Returns the usage that the backend has reported; undefined: none.
   *
   * @param prompts number of prompts in the request
   * @param isSum the backend is known to report the sum of all choices
   */
  total(prompts: number, texts: ChoiceTexts, isSum = false): Told | undefined {
    const { count } = this
    const perPrompt = Math.max(1, Math.round(count / prompts))
    const last = this.#whole.at(-1)
    const isRepeated = this.#whole.length === count
    if (last !== undefined && !(isRepeated && isEachOfOne(this.#whole, texts.all))) {
      const isOfOne =
        !isSum && last.completionTokens < Math.sqrt(texts.all * (texts.first ?? texts.all / count))
      return { usage: isOfOne ? completed(last, texts) : last, isAll: !isOfOne }
    }
    const reports = isRepeated ? this.#whole : this.#reports
    if (reports.length === 0) return undefined
    const usage = joined(reports, perPrompt)
    const isAll = reports.length >= count
    return { usage: isAll ? usage : completed(usage, texts), isAll }
  }

  get #reports(): readonly Usage[] {
    if (this.#unnamed.length > 0) return this.#unnamed
    const reports = this.#choices.map(({ usage }) => usage && usageOf(usage))
    return reports.filter(usage => usage !== undefined && usage !== '')
  }

  #choice(index: number): Choice | undefined {
    for (const choice of this.#choices) if (choice.index === index) return choice
    if (this.#choices.length >= MAX_KEPT) return undefined
    const choice = { index, usage: undefined, isFinished: false }
    this.#choices = withOne(this.#choices, choice)
    return choice
  }
}

/** Returns the list with one more item, unless it is full. `push` would reserve memory for 16 more. */
function withOne<Item>(list: readonly Item[], item: Item): readonly Item[] {
  return list.length < MAX_KEPT ? list.concat(item) : list
}

function usageOf(json: string): Usage | undefined {
  const counts = new Counts()
  counts.add(json)
  return counts.toUsage()
}

/** Adds the text of the choices behind the first. */
function completed(usage: Usage, { all, first = all }: ChoiceTexts): Usage {
  const completionTokens = usage.completionTokens + Math.max(0, Math.round(all - first))
  return { ...usage, completionTokens, totalTokens: usage.promptTokens + completionTokens }
}

/** Whether as many usage objects as choices are of one choice each: their sum fits the text better than the last. */
function isEachOfOne(reports: readonly Usage[], all: number): boolean {
  const last = reports.at(-1)!.completionTokens
  return all > Math.sqrt(last * sum(reports, 'completionTokens'))
}

/** @param perPrompt number of choices that share a prompt, which each of them reports */
function joined(reports: readonly Usage[], perPrompt: number): Usage {
  const ofPrompts = (count: keyof Counted) => {
    const most = Math.max(...reports.map(each => each[count] ?? 0))
    return Math.max(most, Math.round(sum(reports, count) / perPrompt))
  }
  const promptTokens = ofPrompts('promptTokens')
  const completionTokens = sum(reports, 'completionTokens')
  const usage: Usage = {
    promptTokens,
    completionTokens,
    totalTokens: promptTokens + completionTokens,
    exactness: 'exact'
  }
  const has = (count: keyof Counted) => reports.some(each => each[count] !== undefined)
  if (has('cachedTokens')) usage.cachedTokens = ofPrompts('cachedTokens')
  if (has('cacheWriteTokens')) usage.cacheWriteTokens = ofPrompts('cacheWriteTokens')
  if (has('reasoningTokens')) usage.reasoningTokens = sum(reports, 'reasoningTokens')
  return usage
}

type Counted = Omit<Usage, 'exactness'>

function sum(reports: readonly Usage[], count: keyof Counted): number {
  return reports.reduce((total, each) => total + (each[count] ?? 0), 0)
}
