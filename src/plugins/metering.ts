import '../check-node.ts'
import type { FastifyPluginAsync } from 'fastify'
import type { Dialect } from '../dialects/dialect.ts'
import { type Endpoint, type Exchange, type Usage, withExchanges } from '../exchange.ts'
import type { Framing } from '../http.ts'
import type { Seen, UnbilledResponse } from '../metering/billed.ts'
import { Estimates, type Passed, type Source } from '../metering/estimate.ts'
import { Meter, memberNames } from '../metering/meter.ts'
import { type Asked, isPlausible, isPlausibleOutput } from '../metering/plausible.ts'
import { hasText, leastTokens, type PromptText, promptText } from '../metering/prompt.ts'
import { characters } from '../metering/text.ts'
import type { MemberNames } from '../metering/watcher.ts'
import { part, share, toPart } from '../parts.ts'
import { NO_USAGE, unaskedUsage } from '../payload-edits.ts'

/**
 * Reads from every answer how many tokens it took: `request.exchange.usage`, complete when the
 * exchange ends. Where a streaming caller did not ask for usage the gateway asks, and takes the one
 * chunk that answers it out again. Where it does not say, tokens are estimated by what was learned from
 * the model's answers that did.
 *
 * @example
 * await fastify.register(metering)
 * fastify.exchanges.onEnd('record', exchange => console.log(exchange.usage?.totalTokens))
 */
/** What an exchange likely spends, before the backend has said it. */
export interface Tokens {
  /** Tokens of the prompt, and what they are at least: no tokenizer needs fewer. */
  input(exchange: Exchange): number
  least(exchange: Exchange): number
  /** Whether the text of the prompt does not bound its tokens. */
  isOpen(exchange: Exchange): boolean
  /** Tokens that have passed of an answer. */
  output(exchange: Exchange): number
}

const meteringPlugin: FastifyPluginAsync = async function metering(fastify) {
  const exchanges = withExchanges(fastify)
  const estimates = new Estimates(MAX_LEARNED)
  const streamNames = new Map<Dialect, MemberNames>()
  const wholeNames = new Map<Dialect, MemberNames>()
  const namesOf = (dialect: Dialect, framing: Framing): MemberNames => {
    const names = framing === 'json' ? wholeNames : streamNames
    const known = names.get(dialect) ?? memberNames(dialect, framing)
    names.set(dialect, known)
    return known
  }

  share(fastify, 'tokens', {
    input(exchange) {
      const prompt = promptOf(exchange)
      return prompt === undefined ? 0 : estimates.input(sourceOf(exchange), prompt)
    },
    least(exchange) {
      const prompt = promptOf(exchange)
      return prompt === undefined ? 0 : leastTokens(prompt)
    },
    isOpen: exchange => promptOf(exchange)?.isOpen ?? false,
    output(exchange) {
      const { meter, endpoint } = exchange
      if (meter === undefined || endpoint?.spends !== 'input and output') return 0
      const { tokens, since } = counted(exchange, meter)
      return tokens + estimates.output(sourceOf(exchange), since)
    }
  })

  fastify.addHook('preHandler', ({ exchange, payload }, _reply, done) => {
    const { endpoint } = exchange
    exchange.promptEstimate = part(fastify, 'tokens')!.input(exchange)
    if (endpoint?.asksForUsage && payload?.stream) {
      exchange.question = { wanted: unaskedUsage(payload), asked: NO_USAGE }
    }
    done()
  })

  part(fastify, 'answerHooks')!.push((exchange, answer) => {
    const { reply, request, endpoint, stored } = exchange
    const isRead = endpoint?.body !== 'none' && request.method === 'POST'
    if (!isRead && (stored === undefined || request.method === 'HEAD')) return undefined
    if (reply.statusCode < 200 || reply.statusCode > 299) return undefined
    const { framing } = answer
    if (framing === undefined) return undefined
    const { dialect } = exchange
    const meter = new Meter({
      framing,
      dialect,
      names: namesOf(dialect, framing),
      takeOut: exchange.question?.asked.includes('include_usage') === true,
      strips: exchange.question?.asked.includes('continuous_usage_stats') === true,
      // A stored response can be read from any event on, and so from its end.
      mustEnd: isRead && saysItsEnd(endpoint)
    })
    exchange.meter = meter
    meter.onId = exchange.onAnswerId
    answer.tap = meter
    return undefined
  })

  exchanges.onEnd('metering', exchange => {
    const { meter, stored, settlement } = exchange
    if (meter !== undefined) {
      measure(exchange, meter, estimates)
      if (stored !== undefined) billMeasured(exchange, stored, meter)
    } else if (settlement?.isLost && stored !== undefined) {
      exchange.usage = promptAlone(stored.promptTokens)
      bill(exchange, stored, { usage: exchange.usage, isComplete: false })
    } else if ((exchange.outcome === 'client_gone' && exchange.isWaiting) || isUnread(exchange)) {
      estimatePrompt(exchange, estimates)
    }
  })
}

/** Whether a backend has responded in a form in which no usage is read, such as embeddings as bytes. */
function isUnread({ attempts, endpoint, statusCode, request }: Exchange): boolean {
  const isRead = endpoint?.spends !== undefined && request.method === 'POST'
  return isRead && attempts > 0 && statusCode >= 200 && statusCode <= 299
}

/** Maximum number of models, and of pairs of a model and a caller, whose tokens are learned. */
const MAX_LEARNED = 1000

/** Returns the model and caller whose tokens an exchange spends. Keys of one user are one caller. */
function sourceOf({ request, model = '', clientIp = '' }: Exchange): Source {
  const { caller } = request
  return { model, caller: caller?.userId ?? caller?.id ?? clientIp }
}

/** The text of a request that spends tokens. */
function promptOf(exchange: Exchange): PromptText | undefined {
  const { endpoint, dialect, request } = exchange
  if (endpoint?.spends === undefined || request.payload === undefined) return undefined
  exchange.prompt ??= promptText(request.payload, endpoint.prompt ?? dialect.prompt)
  return exchange.prompt
}

/** What the meter has seen becomes what the exchange has spent. */
function measure(exchange: Exchange, meter: Meter, estimates: Estimates): void {
  if (meter.failure !== undefined && exchange.outcome === 'ok') {
    exchange.outcome = 'backend_failed'
    exchange.errorCode = 'backend_failed'
  }
  if (exchange.endpoint?.isFree) return
  const { usage: said, isAll } = reported(exchange, meter, estimates)
  // A failure alone costs as little as one that comes with a status of its own.
  if (meter.failure !== undefined && said === undefined && meter.deltas === 0) return
  // A response that is made in the background has its usage later.
  if (meter.framing === 'json' && meter.isOngoing && said === undefined) return
  if (meter.framing !== 'json') {
    exchange.firstTokenAt = meter.firstDeltaAt
    exchange.lastTokenAt = meter.lastDeltaAt
  }
  const isOver = isTold(exchange, meter, said) && !meter.isUsageOld
  const isRight = isOver && isAll && said !== undefined && !meter.isUsageWrong
  if (isRight) teach(exchange, meter, estimates, said)
  if (isRight && saysAll(exchange, meter, said)) {
    // No backend has counted all that several backends have written.
    exchange.usage = exchange.isDivided ? { ...said, exactness: 'counted' } : said
  } else {
    const isWhole = isOver && meter.failure === undefined
    estimate(exchange, meter, estimates, { said, isRight, isWhole })
  }
}

function billMeasured(exchange: Exchange, stored: UnbilledResponse, meter: Meter): void {
  const { usage, outcome } = exchange
  const isSaid = usage?.exactness === 'exact'
  const isComplete =
    !meter.isOngoing && (isSaid || (outcome === 'ok' && meter.failure === undefined))
  const { startsAfter = 0 } = stored
  const isPart = !isSaid && meter.framing !== 'json'
  bill(exchange, stored, {
    usage,
    // The end of a stream does not say what came before.
    isComplete: isComplete && (isSaid || startsAfter === 0),
    part: isPart ? [startsAfter, startsAfter + meter.deltas] : undefined
  })
}

/** Bills a stored response, without the part that was billed before. */
function bill(exchange: Exchange, stored: UnbilledResponse, seen: Seen): void {
  const due = stored.bill(seen)
  exchange.usage = undefined
  if (!(due instanceof Promise)) exchange.usage = due
  else {
    exchange.settling = due.then(usage => {
      exchange.usage = usage
    })
  }
}

/** Returns the usage that the backend reported, if it can be true, and whether it is of all choices. */
function reported(exchange: Exchange, meter: Meter, estimates: Estimates) {
  const { prompts = 1, echo = false } = exchange.request.payload ?? {}
  const source = sourceOf(exchange)
  // Text that repeats the prompt says nothing about the output.
  const tokensOf = (passed: Passed) => (echo ? 0 : estimates.output(source, passed))
  const told = meter.choices > 1 ? meter.told(prompts, reportsSum(exchange), tokensOf) : undefined
  const { usage, isAll } = told ?? { usage: meter.usage, isAll: true }
  if (usage === undefined) return { usage, isAll }
  const isTrue = isPlausible(usage, askedOf(exchange, meter), passedOf(meter))
  return { usage: isTrue ? usage : undefined, isAll }
}

function reportsSum({ backend, request }: Exchange): boolean {
  const { backends } = request.server.backends?.pool ?? {}
  return backends?.find(({ name }) => name === backend)?.reportsSum ?? false
}

/** Tokens that the backend has counted on the way, if they can be true, and what has passed since. */
function counted(exchange: Exchange, meter: Meter): { tokens: number; since: Passed } {
  const { tokens, since } = meter.counted
  const isTrue = isPlausibleOutput(tokens, askedOf(exchange, meter), passedOf(meter))
  return isTrue ? { tokens, since } : { tokens: 0, since: meter.passed(false) }
}

/** Returns the facts of a request that bound its usage. */
function askedOf(exchange: Exchange, meter: Meter): Asked {
  const { prompt, endpoint, request, isDivided } = exchange
  const { payload, server } = request
  const isSure = () => payload?.isLimitSure || server.backends?.pool.readsCompletionLimit(exchange)
  const limit = payload?.maxTokens
  return {
    prompt,
    maxTokens: endpoint?.spends === 'input' ? 0 : limit && (isSure() ? limit : undefined),
    sequences: payload?.sequences ?? 1,
    continued: isDivided ? passedOf(meter) : 0,
    // The context of models for audio says nothing: servers cut it into parts.
    contextLength: () => payload && server.backends?.pool.contextLength(exchange)
  }
}

function passedOf(meter: Meter): number {
  return characters(meter.passed(true).text)
}

/** Whether nothing has passed that the backend has not counted, or all has that there is to count. */
function isTold(exchange: Exchange, meter: Meter, said: Usage | undefined): boolean {
  if (meter.framing === 'json') return said !== undefined || exchange.outcome === 'ok'
  if (meter.failure !== undefined) return meter.isAllTold
  if (exchange.outcome === 'ok') return true
  const { sequences = 1 } = exchange.request.payload ?? {}
  // A backend may report one choice while it still writes others.
  if (sequences > 1 || meter.choices > 1) return meter.finished && meter.choices >= sequences
  return meter.finished || meter.hasFinalUsage
}

/** Whether there is a count of all that must have some tokens: of the prompt, and of the text that has passed. */
function saysAll({ endpoint, prompt }: Exchange, meter: Meter, said: Usage): boolean {
  if (endpoint?.spends === undefined) return true
  const hasPrompt = prompt !== undefined && hasText(prompt)
  if (hasPrompt && said.promptTokens === 0) return false
  const hasOutput = endpoint.spends !== 'input' && meter.deltas > 0
  return !hasOutput || said.completionTokens > 0
}

/** The backend has said it: that is an example of the model's tokens. */
function teach(exchange: Exchange, meter: Meter, estimates: Estimates, usage: Usage): void {
  // A response that failed may lack text that its tokens were spent on.
  if (exchange.isDivided || meter.failure !== undefined) return
  // A stored response is shown without its prompt, and maybe not from its beginning.
  if (exchange.endpoint?.showsResponse) return
  const { payload } = exchange.request
  // Servers count several sequences in different ways, and a repeated prompt is no output.
  if (payload === undefined || payload.echo || Math.max(payload.sequences, meter.choices) > 1)
    return
  const source = sourceOf(exchange)
  const { promptTokens } = usage
  const passed = meter.passed(true)
  // Hidden reasoning is part of the output, and the backend has not reported how many tokens it was.
  const isUnsure = payload.hidesReasoning && !usage.reasoningTokens
  const shown = isUnsure ? 0 : shownTokens(usage, meter, () => estimates.output(source, passed))
  if (shown > 0) estimates.learnOutput(source, passed, shown)
  if (usage.reasoningTokens) estimates.noteReasoning(source, meter.hidesReasoning)
  const { prompt } = exchange
  // A stored response before it is part of the prompt and not of its text.
  const isText = prompt !== undefined && payload.previousResponseId === undefined
  if (isText && promptTokens > 0) estimates.learnInput(source, prompt, promptTokens)
}

/**
 * Returns the tokens of the text that has passed; 0: they are not known, because reasoning was counted of which a
 * part may have passed, such as a summary.
 *
 * @param estimate estimates the tokens of that text
 */
function shownTokens(usage: Usage, meter: Meter, estimate: () => number): number {
  const { completionTokens, reasoningTokens = 0 } = usage
  if (reasoningTokens === 0) return completionTokens
  if (meter.hidesReasoning) return completionTokens - reasoningTokens
  return estimate() < completionTokens - reasoningTokens / 2 ? 0 : completionTokens
}

/**
 * The backend has not said all. The output is what has passed, beside what it may have said of it; the
 * prompt is estimated unless its tokens were told.
 */
function estimate(
  exchange: Exchange,
  meter: Meter,
  estimates: Estimates,
  { said, isRight, isWhole }: { said: Usage | undefined; isRight: boolean; isWhole: boolean }
): void {
  const { endpoint, stored } = exchange
  const spends = endpoint?.showsResponse ? 'input and output' : endpoint?.spends
  if (spends === undefined) return
  const source = sourceOf(exchange)
  const { prompts = 1 } = exchange.request.payload ?? {}
  const { tokens, since } = isWhole
    ? { tokens: 0, since: meter.passed(true) }
    : counted(exchange, meter)
  const { maxTokens = Number.POSITIVE_INFINITY } = askedOf(exchange, meter)
  const passed = Math.min(tokens + estimates.output(source, since), Math.max(tokens, maxTokens))
  const output = spends === 'input' ? 0 : passed
  const saidOutput = said?.completionTokens ?? 0
  const completionTokens = isRight && saidOutput > 0 ? saidOutput : Math.max(output, saidOutput)
  const prompt =
    exchange.prompt === undefined
      ? (stored?.promptTokens ?? 0)
      : estimates.input(source, exchange.prompt)
  // Usage that was reported of several prompts may be about one of them.
  const promptTokens =
    prompts > 1 && !isRight
      ? Math.max(prompt, said?.promptTokens ?? 0)
      : said?.promptTokens || prompt
  exchange.usage = {
    ...said,
    promptTokens,
    completionTokens,
    totalTokens: promptTokens + completionTokens,
    exactness: mayBeMore(exchange, estimates, isWhole ? saidOutput : tokens)
      ? 'at_least'
      : isWhole
        ? 'estimated'
        : 'counted'
  }
}

/** Whether there may be output that did not pass, of which the backend has `told` no tokens. */
function mayBeMore(exchange: Exchange, estimates: Estimates, told: number): boolean {
  const { endpoint, request } = exchange
  if (told > 0 || endpoint?.spends !== 'input and output') return false
  return request.payload?.hidesReasoning || estimates.hidesReasoning(sourceOf(exchange))
}

/** The client did not wait for the answer, of which nothing was heard: a backend has had the prompt. */
function estimatePrompt(exchange: Exchange, estimates: Estimates): void {
  const { endpoint, prompt } = exchange
  if (endpoint?.spends === undefined || prompt === undefined) return
  const promptTokens = estimates.input(sourceOf(exchange), prompt)
  const usage = promptAlone(promptTokens)
  exchange.usage = mayBeMore(exchange, estimates, 0) ? usage : { ...usage, exactness: 'counted' }
}

function promptAlone(promptTokens: number): Usage {
  const exactness = 'at_least'
  return { promptTokens, completionTokens: 0, totalTokens: promptTokens, exactness }
}

/**
 * Chat and completions end with a finish reason or `[DONE]`, the other APIs with an event of their own.
 * Ollama's OpenAI routes, for one, just end the stream when the model runner has died.
 */
function saysItsEnd(endpoint: Endpoint | undefined): boolean {
  if (endpoint === undefined) return false
  return endpoint.dialect.name !== 'openai' || endpoint.asksForUsage === true
}

export default toPart(meteringPlugin, {
  name: 'metering',
  needs: ['proxy'],
  decorates: ['tokens']
})
