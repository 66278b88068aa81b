import type { FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import type { Dialect } from '../dialects/dialect.ts'
import { type Endpoint, type Exchange, type Usage, withExchanges } from '../exchange.ts'
import type { Framing } from '../http.ts'
import type { UnbilledResponse } from '../metering/billed.ts'
import { isPlausible } from '../metering/counts.ts'
import { Estimates } from '../metering/estimate.ts'
import { Meter, memberNames } from '../metering/meter.ts'
import { characters, promptText } from '../metering/text.ts'
import type { MemberNames } from '../metering/watcher.ts'

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
declare module 'fastify' {
  interface FastifyInstance {
    /** What an exchange likely spends, before the backend has said it. */
    tokens: {
      /** Tokens of the prompt. */
      input(exchange: Exchange): number
      /** Tokens that have passed of an answer. */
      output(exchange: Exchange): number
    }
  }
}

const meteringPlugin: FastifyPluginAsync = async function metering(fastify) {
  const exchanges = withExchanges(fastify)
  const estimates = new Estimates(MAX_MODELS)
  const streamNames = new Map<Dialect, MemberNames>()
  const wholeNames = new Map<Dialect, MemberNames>()
  const namesOf = (dialect: Dialect, framing: Framing): MemberNames => {
    const names = framing === 'json' ? wholeNames : streamNames
    const known = names.get(dialect) ?? memberNames(dialect, framing)
    names.set(dialect, known)
    return known
  }

  fastify.decorate('tokens', {
    input(exchange) {
      const { payload } = exchange.request
      if (exchange.endpoint?.spends === undefined || payload === undefined) return 0
      exchange.prompt ??= promptText(payload.bytes)
      return estimates.input(payload.model ?? '', exchange.prompt.counts)
    },
    output({ meter, endpoint, request }) {
      if (meter === undefined || endpoint?.spends !== 'input and output') return 0
      const { tokens, since } = meter.counted
      return tokens + estimates.output(request.payload?.model ?? '', since)
    }
  })

  fastify.addHook('preHandler', ({ exchange, payload }, _reply, done) => {
    const { endpoint } = exchange
    if (endpoint?.spends && payload) {
      exchange.prompt ??= promptText(payload.bytes)
      exchange.promptEstimate = estimates.input(payload.model ?? '', exchange.prompt.counts)
    }
    if (endpoint?.asksForUsage && payload?.stream && !payload.includeUsage) {
      exchange.question = { asked: false }
    }
    done()
  })

  fastify.answerHooks.push((exchange, answer) => {
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
      takeOut: exchange.question?.asked === true,
      // A stored response can be read from any event on, and so from its end.
      mustEnd: isRead && saysItsEnd(endpoint)
    })
    exchange.meter = meter
    meter.onId = exchange.onAnswerId
    answer.tap = meter
    return undefined
  })

  exchanges.onEnd('metering', exchange => {
    const { meter } = exchange
    if (meter !== undefined) {
      measure(exchange, meter, estimates)
      if (exchange.stored !== undefined) bill(exchange, exchange.stored, meter)
    } else if (exchange.outcome === 'client_gone' && exchange.isWaiting) {
      estimatePrompt(exchange, estimates)
    }
  })
}

/** Of how many models it is remembered what their tokens are like. */
const MAX_MODELS = 1000

/** What the meter has seen becomes what the exchange has spent. */
function measure(exchange: Exchange, meter: Meter, estimates: Estimates): void {
  if (meter.failure !== undefined && exchange.outcome === 'ok') {
    exchange.outcome = 'backend_failed'
    exchange.errorCode = 'backend_failed'
  }
  const said = plausible(exchange, meter)
  // A failure alone costs as little as one that comes with a status of its own.
  if (meter.failure !== undefined && said === undefined && meter.deltas === 0) return
  // What is made in the background has its usage later.
  if (meter.framing === 'json' && meter.isOngoing && said === undefined) return
  if (meter.framing !== 'json') {
    exchange.firstTokenAt = meter.firstDeltaAt
    exchange.lastTokenAt = meter.lastDeltaAt
  }
  const isOver = isTold(exchange, meter, said) && !meter.isUsageOld
  const isRight = isOver && said !== undefined && !meter.isUsageWrong
  if (isRight) teach(exchange, meter, estimates, said)
  if (isRight && saysAll(exchange, meter, said)) {
    // Of what several backends have written none has counted the whole.
    exchange.usage = exchange.isDivided ? { ...said, exactness: 'counted' } : said
  } else {
    const isWhole = isOver && meter.failure === undefined
    estimate(exchange, meter, estimates, { said, isRight, isWhole })
  }
}

/** What was billed before of a stored response, is not billed again. */
function bill(exchange: Exchange, stored: UnbilledResponse, meter: Meter): void {
  const { usage, outcome } = exchange
  const isSaid = usage?.exactness === 'exact'
  const isComplete =
    !meter.isOngoing && (isSaid || (outcome === 'ok' && meter.failure === undefined))
  const due = stored.bill(usage, isComplete)
  exchange.usage = undefined
  if (!(due instanceof Promise)) exchange.usage = due
  else {
    exchange.settling = due.then(usage => {
      exchange.usage = usage
    })
  }
}

/** What the backend said, if it can be true. */
function plausible({ prompt }: Exchange, meter: Meter): Usage | undefined {
  const { usage } = meter
  if (usage === undefined) return undefined
  const asked = prompt === undefined ? 0 : characters(prompt.counts)
  return isPlausible(usage, asked, characters(meter.passed(true).text)) ? usage : undefined
}

/** Whether nothing has passed that the backend has not counted, or all has that there is to count. */
function isTold(exchange: Exchange, meter: Meter, said: Usage | undefined): boolean {
  if (meter.framing === 'json') return said !== undefined || exchange.outcome === 'ok'
  if (meter.failure !== undefined) return meter.isAllTold
  return exchange.outcome === 'ok' || meter.finished || meter.hasFinalUsage
}

/** Whether there is a count of all that must have some tokens: of the prompt, and of the text that has passed. */
function saysAll({ endpoint, prompt }: Exchange, meter: Meter, said: Usage): boolean {
  if (endpoint?.spends === undefined) return true
  const hasPrompt = prompt !== undefined && characters(prompt.counts) > 0
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
  const model = payload?.model ?? ''
  const { promptTokens, completionTokens } = usage
  if (completionTokens > 0) estimates.learnOutput(model, meter.passed(true), completionTokens)
  const { prompt } = exchange
  // Pictures, and what a stored response brings along, are part of the prompt and not of its text.
  const isText = prompt?.hasData === false && payload?.previousResponseId === undefined
  if (isText && promptTokens > 0) estimates.learnInput(model, prompt.counts, promptTokens)
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
  const model = exchange.model ?? ''
  const { tokens, since } = isWhole ? { tokens: 0, since: meter.passed(true) } : meter.counted
  const output = spends === 'input' ? 0 : tokens + estimates.output(model, since)
  const saidOutput = said?.completionTokens ?? 0
  const completionTokens = isRight && saidOutput > 0 ? saidOutput : Math.max(output, saidOutput)
  const prompt =
    exchange.prompt === undefined
      ? (stored?.promptTokens ?? 0)
      : estimates.input(model, exchange.prompt.counts)
  const promptTokens = said?.promptTokens || prompt
  exchange.usage = {
    ...said,
    promptTokens,
    completionTokens,
    totalTokens: promptTokens + completionTokens,
    exactness: isWhole ? 'estimated' : 'counted'
  }
}

/** The client did not wait for the answer, of which nothing was heard: a backend has had the prompt. */
function estimatePrompt(exchange: Exchange, estimates: Estimates): void {
  const { endpoint, prompt, request } = exchange
  if (endpoint?.spends === undefined || prompt === undefined) return
  const promptTokens = estimates.input(request.payload?.model ?? '', prompt.counts)
  const usage = { promptTokens, completionTokens: 0, totalTokens: promptTokens }
  exchange.usage = { ...usage, exactness: 'counted' }
}

/**
 * Chat and completions end with a finish reason or `[DONE]`, the other APIs with an event of their own.
 * Ollama's OpenAI routes, for one, just end the stream when the model runner has died.
 */
function saysItsEnd(endpoint: Endpoint | undefined): boolean {
  if (endpoint === undefined) return false
  return endpoint.dialect.name !== 'openai' || endpoint.asksForUsage === true
}

export default fp(meteringPlugin, {
  name: 'metering',
  fastify: '5.x',
  decorators: { fastify: ['answerHooks'] }
})
