import assert from 'node:assert/strict'
import { globSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { decode, encode } from 'gpt-tokenizer/encoding/o200k_base'
import { openai } from '../src/dialects/openai.ts'
import {
  CHAT as CHAT_FORM,
  COMPLETION,
  EMBEDDING,
  GENERATION,
  MESSAGES,
  type PromptForm,
  RANKING,
  RESPONSE
} from '../src/dialects/prompt.ts'
import { Estimates } from '../src/metering/estimate.ts'
import { Lessons } from '../src/metering/lessons.ts'
import { Meter } from '../src/metering/meter.ts'
import { type PromptText, promptText } from '../src/metering/prompt.ts'
import { addText, characters, noText, type TextCounts } from '../src/metering/text.ts'
import { outlineOf } from '../src/wire/json-scanner.ts'
import { CORPUS } from './corpus.ts'
import { type Random, randomizer } from './random.ts'

/**
 * Simulated streams with real tokens: gpt-oss's vocabulary (o200k), texts of several kinds, and servers that
 * put their tokens into deltas in several ways. Each server's model is learned from whole answers of one half
 * of the texts; then streams of the other half are cut at random points, and what the gateway would bill is
 * compared with the tokens that have passed.
 */

const of = (model: string, caller = 'alice') => ({ model, caller })
const prompted = (json: string, form: PromptForm = CHAT_FORM) => {
  const bytes = Buffer.from(json)
  return promptText({ bytes, ...outlineOf(bytes) }, form)
}
const textPrompt = (counts: TextCounts): PromptText => ({
  counts,
  optional: noText(),
  tokens: 0,
  frame: 'chat',
  hasTools: false,
  hasData: false,
  size: characters(counts),
  isMore: false,
  isOpen: false
})

const ROOT = new URL('..', import.meta.url).pathname
const CUTS = process.env.LONG === '1' ? 10_000 : 200
const LESSONS = 500
/** The error of shorter cuts is told in tokens: of five tokens one is a fifth. */
const SHORT = 50
const MAX_LENGTH = 4000

/** The least that a server can send: one token, or as many as make whole characters. */
interface Unit {
  text: string
  tokens: number
}
/** Paragraphs or functions, tokenised. */
type Pieces = Unit[][]

function units(text: string): Unit[] {
  const found: Unit[] = []
  let held: number[] = []
  for (const token of encode(text)) {
    held.push(token)
    const read = decode(held)
    if (read.includes('\ufffd')) continue
    found.push({ text: read, tokens: held.length })
    held = []
  }
  return found
}

/** There are few texts: of each, every other sentence makes a piece that is learned from, and one that is cut. */
function sentences(paragraphs: string[], ends: RegExp): Pieces {
  return paragraphs.flatMap(paragraph => {
    const parts = paragraph.split(ends)
    return [0, 1].map(half => units(parts.filter((_, index) => index % 2 === half).join('')))
  })
}

/** Of a dependency: its texts stay the same until its version changes. */
const read = (pattern: string) =>
  globSync(pattern, { cwd: join(ROOT, 'node_modules/fastify') })
    .sort()
    .flatMap(file =>
      readFileSync(join(ROOT, 'node_modules/fastify', file), 'utf8').split(/(?<=\n\n)/)
    )
const PIECES = {
  prose: [...CORPUS.prose, ...read('docs/Guides/[P-T]*.md')].map(units),
  code: [...CORPUS.code, ...read('lib/[c-r]*.js')].map(units),
  Chinese: sentences(CORPUS.chinese, /(?<=。)/),
  Japanese: sentences(CORPUS.japanese, /(?<=。)/),
  Korean: sentences(CORPUS.korean, /(?<=\. )/),
  'tool arguments': CORPUS.tools.map(units)
} satisfies Record<string, Pieces>
type Kind = keyof typeof PIECES | 'mixed'
const KINDS = [...Object.keys(PIECES), 'mixed'] as Kind[]

/** How many tokens a server puts into its next delta; `pace` is drawn for each stream. */
type Packing = (random: Random, pace: number) => number
const one: Packing = () => 1
const few: Packing = random => 1 + Math.floor(random() * 4)
const batched: Packing = (random, pace) => {
  const mean = 2 + 10 * pace
  return Math.min(16, Math.max(1, Math.round(mean + normal(random) * Math.sqrt(mean))))
}
const SERVERS: Record<string, Packing> = {
  '1 token a delta': one,
  '8 (a fixed interval)': () => 8,
  '1 to 4 at random': few,
  'batched by time, up to 16': batched,
  'one by one or batched, by load': (random, pace) =>
    pace < 0.5 ? 1 : batched(random, 2 * pace - 1)
}

function normal(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random())
}

/** Whole pieces, until it is as long as drawn: half of the answers are longer than 400 tokens. */
function answer(kind: Kind, half: number, random: Random): Unit[] {
  const length = Math.min(MAX_LENGTH, 400 * Math.exp(normal(random)))
  const found: Unit[] = []
  while (found.length < length) {
    const from =
      kind === 'mixed'
        ? Object.values(PIECES)[Math.floor(random() * KINDS.length - 1)]
        : PIECES[kind]
    const pieces = (from ?? PIECES.prose).filter((_, index) => index % 2 === half)
    found.push(...pieces[Math.floor(random() * pieces.length)]!)
  }
  return found
}

interface Delta {
  event: string
  tokens: number
}

function deltas(kind: Kind, answer: Unit[], packing: Packing, random: Random): Delta[] {
  const pace = random()
  const escapes = random() < 0.3
  const found: Delta[] = []
  for (let at = 0; at < answer.length; ) {
    const packed: Unit[] = []
    for (let room = packing(random, pace); room > 0 && at < answer.length; at++) {
      packed.push(answer[at]!)
      room -= answer[at]!.tokens
    }
    const text = packed.map(each => each.text).join('')
    const delta =
      kind === 'tool arguments'
        ? { tool_calls: [{ index: 0, function: { arguments: text } }] }
        : { content: text }
    const json = JSON.stringify({ id: 'c', choices: [{ index: 0, delta, finish_reason: null }] })
    found.push({
      event: `data: ${escapes ? escaped(json) : json}\n\n`,
      tokens: packed.reduce((sum, each) => sum + each.tokens, 0)
    })
  }
  return found
}

/** As Python's json.dumps has it. */
function escaped(json: string): string {
  return json.replace(
    /[^\0-\x7f]/g,
    unit => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`
  )
}

/** Sends a stream, or its beginning, through a meter; sometimes two events come in one chunk. */
function metered(stream: Delta[], random: Random): Meter {
  const meter = new Meter({ framing: 'sse', dialect: openai, takeOut: false })
  meter.pass(
    Buffer.from(
      'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    )
  )
  let waiting = ''
  for (const { event } of stream) {
    waiting += event
    if (random() < 0.05) continue
    meter.pass(Buffer.from(waiting))
    waiting = ''
  }
  if (waiting !== '') meter.pass(Buffer.from(waiting))
  return meter
}

const sum = (numbers: number[]) => numbers.reduce((total, each) => total + each, 0)
const tokensOf = (stream: Delta[]) => sum(stream.map(each => each.tokens))

interface Cut {
  server: string
  kind: Kind
  truth: number
  error: number
}

/** Cuts streams of the texts that nothing was learned from. */
function cutStreams(lessons: number): Cut[] {
  const teacher = randomizer(1)
  const random = randomizer(2)
  const estimates = new Estimates(10)
  const servers = Object.entries(SERVERS)
  for (const [server, packing] of servers) {
    for (let lesson = 0; lesson < lessons; lesson++) {
      const kind = KINDS[lesson % KINDS.length]!
      const stream = deltas(kind, answer(kind, 0, teacher), packing, teacher)
      // The token that ends an answer is counted, and has no text.
      estimates.learnOutput(of(server), metered(stream, teacher).passed(true), tokensOf(stream) + 1)
    }
  }
  return Array.from({ length: CUTS }, (_, index) => {
    const [server, packing] = servers[index % servers.length]!
    const kind = KINDS[Math.floor(index / servers.length) % KINDS.length]!
    const whole = deltas(kind, answer(kind, 1, random), packing, random)
    const passed = whole.slice(0, 1 + Math.floor(random() * whole.length))
    const { tokens, since } = metered(passed, random).counted
    const truth = tokensOf(passed)
    return { server, kind, truth, error: tokens + estimates.output(of(server), since) - truth }
  })
}

interface Errors {
  mean: number
  p95: number
  max: number
  /** Share of cuts that are more than 15 % off. */
  far: number
  /** Of the sum of all tokens. */
  total: number
  /** Mean error in tokens, of short cuts. */
  short: number
}

function errors(cuts: Cut[]): Errors {
  const long = cuts.filter(each => each.truth >= SHORT)
  const short = cuts.filter(each => each.truth < SHORT)
  const relative = long.map(each => Math.abs(each.error) / each.truth).sort((a, b) => a - b)
  return {
    mean: sum(relative) / relative.length,
    p95: relative[Math.floor(relative.length * 0.95)]!,
    max: relative.at(-1)!,
    far: relative.filter(each => each > 0.15).length / relative.length,
    total: sum(cuts.map(each => each.error)) / sum(cuts.map(each => each.truth)),
    short: short.length === 0 ? 0 : sum(short.map(each => Math.abs(each.error))) / short.length
  }
}

function row(name: string, { mean, p95, max, far, total, short }: Errors): string {
  const percent = [mean, p95, max, far, total].map(each => `${(100 * each).toFixed(1)} %`)
  return `| ${[name, ...percent, short.toFixed(1)].join(' | ')} |`
}

/** Rows of cuts of at least so many tokens. */
const LENGTHS = [200, 1000]

function table(cuts: Cut[]): string {
  const by = (member: 'server' | 'kind', names: string[]) =>
    names.map(name => row(name, errors(cuts.filter(each => each[member] === name))))
  const byLength = LENGTHS.map(least =>
    row(`from ${least} tokens`, errors(cuts.filter(each => each.truth >= least)))
  )
  const all = row('all', errors(cuts))
  return [...by('server', Object.keys(SERVERS)), ...by('kind', KINDS), ...byLength, all].join('\n')
}

const HEAD = `| | mean | 95 of 100 within | worst | further off than 15 % | all together | short cuts, tokens |
|---|---|---|---|---|---|---|`

test(`the tokens of ${CUTS} streams, cut at random points`, t => {
  const learned = cutStreams(LESSONS)
  const cold = cutStreams(0)
  t.diagnostic(`after ${LESSONS} whole answers\n${HEAD}\n${table(learned)}`)
  t.diagnostic(`of a model that nothing is known of\n${HEAD}\n${table(cold)}`)
  const of = (cuts: Cut[], server: string) => errors(cuts.filter(each => each.server === server))
  const all = errors(learned)
  assert.ok(all.mean < 0.025 && all.far < 0.015 && Math.abs(all.total) < 0.015)
  assert.ok(of(learned, '1 token a delta').mean < 0.015 && of(learned, '1 token a delta').far === 0)
  assert.ok(of(learned, '8 (a fixed interval)').mean < 0.01)
  assert.ok(of(learned, '8 (a fixed interval)').far === 0)
  assert.ok(of(learned, '1 to 4 at random').mean < 0.035)
  assert.ok(of(learned, 'batched by time, up to 16').mean < 0.055)
  assert.ok(errors(cold).mean < 0.05 && of(cold, '1 token a delta').mean < 0.015)
})

test('the tokens of prompts', t => {
  const estimates = new Estimates(10)
  const random = randomizer(4)
  /** Some messages in a template: 20 tokens for all, 4 for each message. */
  const prompt = (half: number) => {
    const kind = KINDS[Math.floor(random() * KINDS.length)]!
    const asked = Array.from({ length: 1 + Math.floor(random() * 6) }, () =>
      answer(kind, half, random)
    )
    const messages = asked.map(each => ({
      role: 'user',
      content: each.map(({ text }) => text).join('')
    }))
    const body = JSON.stringify({ model: 'm', messages, stream: true, temperature: 0.7 })
    const tokens = asked.map(each => 4 + sum(each.map(unit => unit.tokens)))
    return { prompt: prompted(body), truth: 20 + sum(tokens) }
  }
  const error = () => {
    const { prompt: asked, truth } = prompt(1)
    return Math.abs(estimates.input(of('m'), asked) / truth - 1)
  }
  const cold = sum(Array.from({ length: 1000 }, error)) / 1000
  for (let lesson = 0; lesson < LESSONS; lesson++) {
    const { prompt: asked, truth } = prompt(0)
    estimates.learnInput(of('m'), asked, truth)
  }
  const learned = Array.from({ length: 1000 }, error).sort((a, b) => a - b)
  const mean = sum(learned) / 1000
  t.diagnostic(
    `mean error ${mean}, 95 of 100 within ${learned[950]}, worst ${learned[999]}; cold: ${cold}`
  )
  assert.ok(mean < 0.05 && cold < 0.1)
})

test('a server that changes its ways is soon known again', t => {
  const random = randomizer(3)
  const estimates = new Estimates(10)
  const send = (size: number) => deltas('prose', answer('prose', 0, random), () => size, random)
  const lessons = [...new Array(500).fill(8), ...new Array(20).fill(4)]
  for (const size of lessons) {
    const stream = send(size)
    estimates.learnOutput(of('m'), metered(stream, random).passed(true), tokensOf(stream) + 1)
  }
  const streams = Array.from({ length: 20 }, () => send(4))
  const estimate = sum(
    streams.map(each => estimates.output(of('m'), metered(each, random).passed(false)))
  )
  const truth = sum(streams.map(tokensOf))
  t.diagnostic(`${estimate} for ${truth} tokens`)
  assert.ok(Math.abs(estimate / truth - 1) < 0.15)
})

test('a tokenizer that changes is soon known again, from whole answers', () => {
  const estimates = new Estimates(10)
  const random = randomizer(4)
  const teach = (times: number, factor: number) => {
    let error = 0
    for (let time = 0; time < times; time++) {
      const words = 50 + Math.floor(random() * 200)
      const counts = noText()
      const bytes = Buffer.from('word '.repeat(words))
      addText(counts, bytes, 0, bytes.length)
      const text = { text: counts, deltas: 0, isWhole: true }
      error = Math.abs(estimates.output(of('m'), text) / (words * factor) - 1)
      estimates.learnOutput(of('m'), text, Math.round(words * factor))
    }
    return error
  }
  assert.ok(teach(300, 1.2) < 0.05)
  assert.ok(teach(60, 1.9) < 0.05)
})

test('examples that are estimated well are learned at random, and all while some are off', () => {
  const lessons = new Lessons()
  const due = (estimate: number) =>
    Array.from({ length: 400 }, () => lessons.isDue(estimate, 100)).filter(Boolean).length
  const first = due(98)
  assert.ok(first > 200 && first < 300, `${first}`)
  const known = due(98)
  assert.ok(known > 10 && known < 120, `${known}`)
  assert.ok(due(70) > 380)
})

test('what cannot be the tokens of a text teaches nothing', () => {
  const estimates = new Estimates(10)
  const text = noText()
  const bytes = Buffer.from('The answer is short, and much was thought before it.')
  addText(text, bytes, 0, bytes.length)
  const passed = { text, deltas: 0, isWhole: true }
  const before = estimates.output(of('m'), passed)
  for (let call = 0; call < 50; call++) {
    estimates.learnOutput(of('m'), passed, 5000)
    estimates.learnInput(of('m'), textPrompt(text), 100_000)
  }
  assert.equal(estimates.output(of('m'), passed), before)
  for (let call = 0; call < 50; call++) estimates.learnOutput(of('m'), passed, 20)
  assert.equal(estimates.output(of('m'), passed), 20)
})

function counts(json: string): number[] {
  const found = noText()
  const bytes = Buffer.from(json)
  addText(found, bytes, 0, bytes.length)
  return found
}

test('escapes count as what they stand for', () => {
  const texts = [...Object.values(CORPUS).flat(), '🦊 „Grüße“, Ж, ㄅ and ❤️', 'a\u2028\t\b"\\/']
  for (const text of texts) {
    const json = JSON.stringify(text).slice(1, -1)
    assert.deepEqual(counts(escaped(json)), counts(json), text)
  }
})

test('long text is counted in samples', () => {
  const pieces = Object.values(CORPUS).flatMap(texts => [0, 1, 2, 3].flatMap(() => texts))
  const sum = noText()
  for (const piece of pieces) {
    for (const [at, count] of counts(piece).entries()) sum[at]! += count
  }
  const sampled = counts(pieces.join(''))
  assert.ok(Math.abs(characters(sampled) / characters(sum) - 1) < 0.05)
  const cold = new Estimates(1)
  assert.ok(
    Math.abs(cold.input(of('m'), textPrompt(sampled)) / cold.input(of('m'), textPrompt(sum)) - 1) <
      0.1
  )
})

const BASE64 = 'iVBORw0KGgo/+A'.repeat(1_000)
const URL_OF_DATA = `data:image/png;base64,${BASE64}`
const ASKED = { text: 'What is it?' }

test('pictures, sounds and files in a prompt are no text', () => {
  const bare = prompted(JSON.stringify({ messages: [{ content: [ASKED] }] }))
  assert.equal(bare.hasData, false)
  for (const part of [
    { image_url: { url: URL_OF_DATA } },
    { image_url: URL_OF_DATA },
    { source: { type: 'base64', data: BASE64 } },
    { input_audio: { data: BASE64, format: 'wav' } },
    { file: { file_data: URL_OF_DATA } },
    { images: [BASE64, BASE64, BASE64] }
  ]) {
    for (const count of [1, 300]) {
      const parts = Array.from({ length: count }, () => part)
      for (const json of [
        JSON.stringify({ messages: [{ content: [ASKED, ...parts] }] }),
        JSON.stringify({ messages: [{ content: [ASKED, ...parts] }] }, undefined, 2)
      ]) {
        const prompt = prompted(json)
        assert.ok(prompt.hasData)
        const most = characters(bare.counts) + 250 * count
        assert.ok(characters(prompt.counts) < most, `${count}: ${characters(prompt.counts)}`)
      }
    }
  }
})

test('what only looks like a picture is text', () => {
  const words = 'some words and more. '.repeat(3_000)
  const least = words.length * 0.5
  const some = BASE64.slice(0, 4_500)
  for (const messages of [
    [{ content: `${some}${words}` }],
    [{ content: `${'-'.repeat(600)} ${words} `.repeat(2) }],
    [{ content: [{ text: `${words.slice(0, 3_000)}${some}${words}` }] }],
    // A name in the text itself, and a picture that has the text behind it.
    [{ content: `"url":"${BASE64}${words}` }],
    [{ content: [{ image_url: { url: `${URL_OF_DATA.slice(0, 9_000)}${words}` } }] }],
    [{ content: [{ image_url: { url: URL_OF_DATA } }, { text: words }] }],
    [
      ...Array.from({ length: 3_000 }, () => ({ url: BASE64.slice(0, 9_000) })),
      { content: words.repeat(20) }
    ]
  ]) {
    const counted = characters(prompted(JSON.stringify({ messages })).counts)
    assert.ok(counted > least, `${counted} of ${JSON.stringify(messages).slice(0, 80)}`)
  }
})

test('a list of texts and tokens is counted whole', () => {
  const words = 'some words and more. '.repeat(1_000)
  for (const prompt of [[words, 1], [words, [1]], [1, words, 2], [[words, 1]]]) {
    const counted = characters(prompted(JSON.stringify({ prompt }), COMPLETION).counts)
    assert.ok(counted > words.length * 0.9, String(counted))
  }
})

test('the models that were heard of last are remembered', () => {
  const estimates = new Estimates(2)
  const text = noText()
  addText(text, Buffer.from('word '.repeat(20)), 0, 100)
  const learn = (model: string) => {
    for (let call = 0; call < 20; call++) estimates.learnInput(of(model), textPrompt(text), 40)
  }
  const cold = estimates.input(of('?'), textPrompt(text))
  for (const model of ['a', 'b', 'a', 'c', 'x'.repeat(1000)]) learn(model)
  assert.deepEqual(
    ['a', 'b', 'c', 'x'.repeat(1000)].map(model => estimates.input(of(model), textPrompt(text))),
    [40, cold, 40, cold]
  )
})

/** A prompt of common words, whose tokens are those of the text, times `factor`, and a template's. */
function lesson(random: Random, factor: number, template: number) {
  const asked = answer('prose', 0, random).slice(0, 200)
  const messages = [{ role: 'user', content: asked.map(({ text }) => text).join('') }]
  const truth = Math.round(factor * sum(asked.map(each => each.tokens))) + template
  return { prompt: prompted(JSON.stringify({ model: 'm', messages })), truth }
}

test('a caller teaches what is estimated for itself, and others only together', t => {
  const random = randomizer(5)
  const estimates = new Estimates(100)
  const passed = (tokens: number) => {
    const text = noText()
    const bytes = Buffer.from('word '.repeat(tokens))
    addText(text, bytes, 0, bytes.length)
    return { text, deltas: tokens, isWhole: true }
  }
  const { prompt } = lesson(random, 1, 20)
  const bob = of('m', 'bob')
  const before = [estimates.input(bob, prompt), estimates.output(bob, passed(100))]
  for (let at = 0; at < 100; at++) {
    estimates.learnInput(of('m', 'odd'), lesson(random, 3, 1500).prompt, 1900)
    estimates.learnOutput(of('m', 'odd'), passed(100), 160)
  }
  assert.ok(Math.abs(estimates.output(of('m', 'odd'), passed(100)) - 160) < 5)
  const after = [estimates.input(bob, prompt), estimates.output(bob, passed(100))]
  const moved = after.map((each, at) => Math.abs(each / before[at]! - 1))
  assert.ok(
    moved.every(each => each < 0.1),
    String(moved)
  )

  // Eight callers with a model of 1.5 tokens for a common one, and one of them is odd.
  const callers = ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'odd']
  for (let at = 0; at < 60; at++) {
    for (const caller of callers) {
      const { prompt, truth } = lesson(random, 1.5, 100)
      estimates.learnInput(of('m', caller), prompt, caller === 'odd' ? 2 * truth : truth)
      estimates.learnOutput(of('m', caller), passed(100), caller === 'odd' ? 290 : 150)
    }
  }
  const errors = Array.from({ length: 50 }, () => {
    const { prompt, truth } = lesson(random, 1.5, 100)
    return estimates.input(bob, prompt) / truth - 1
  })
  const mean = sum(errors) / errors.length
  const output = estimates.output(bob, passed(100))
  t.diagnostic(`a caller that has taught nothing: prompts ${mean} off, ${output} for 150 tokens`)
  assert.ok(Math.abs(mean) < 0.1 && Math.abs(output / 150 - 1) < 0.1)
})

const PROMPTS: [string, PromptForm, object][] = [
  ['chat', CHAT_FORM, { messages: [{ role: 'user', content: 'Words to the model' }] }],
  ['completions', COMPLETION, { prompt: 'Words to the model' }],
  ['embeddings', EMBEDDING, { input: ['Words to the model', 'and more'] }],
  ['rerank', RANKING, { query: 'Words to the model', documents: ['one', 'two'] }],
  ['Messages', MESSAGES, { system: 'Short', messages: [{ role: 'user', content: 'Words' }] }],
  ['Responses', RESPONSE, { instructions: 'Short', input: 'Words to the model' }],
  ['Ollama', GENERATION, { system: 'Short', prompt: 'Words to the model' }]
]

const unsized = (prompt: PromptText) => ({ ...prompt, size: 0 })

test('text that no model reads is no part of a prompt', () => {
  const note = 'x'.repeat(9_000)
  const junk = { metadata: { note }, user: 'nobody '.repeat(500), extra: [1, 2], stop: [note] }
  for (const [name, form, request] of PROMPTS) {
    const bare = prompted(JSON.stringify(request), form)
    const padded = prompted(JSON.stringify({ ...junk, model: 'm', ...request, zzz: junk }), form)
    assert.deepEqual(unsized(padded), unsized(bare), name)
    assert.ok(characters(bare.counts) > 10, name)
  }
  // Fields of another API are not read either.
  const other = { messages: [{ role: 'user', content: 'Hi' }] }
  const mixed = { ...other, prompt: 'x '.repeat(500), input: 'x '.repeat(500) }
  assert.deepEqual(
    unsized(prompted(JSON.stringify(mixed))),
    unsized(prompted(JSON.stringify(other)))
  )
})

test('text that only some servers read counts, and no caller can teach with it', () => {
  const estimates = new Estimates(5)
  const words = 'some words of a text '.repeat(100)
  const messages = [{ role: 'user', content: words }]
  const kwargs = (text: string) => ({ messages, chat_template_kwargs: { text } })
  const bare = prompted(JSON.stringify({ messages }))
  const long = prompted(JSON.stringify(kwargs(words)))
  const before = estimates.input(of('m'), bare)
  assert.ok(estimates.input(of('m'), long) > 1.8 * before)
  for (let at = 0; at < 200; at++) estimates.learnInput(of('m'), long, before)
  assert.equal(estimates.input(of('m'), bare), before)
  // A switch for a template is no reason to learn nothing.
  const brief = prompted(JSON.stringify(kwargs('no')))
  for (let at = 0; at < 50; at++) estimates.learnInput(of('m'), brief, 2 * before)
  assert.ok(estimates.input(of('m'), bare) > 1.5 * before)
})

test('tokens that a client sends as numbers are counted, and teach nothing', () => {
  const estimates = new Estimates(1)
  const tokens = Array.from({ length: 700 }, (_, at) => at * 37)
  const one = prompted(JSON.stringify({ prompt: tokens }), COMPLETION)
  assert.equal(estimates.input(of('m'), one), 700)
  const several = prompted(JSON.stringify({ prompt: [tokens, tokens] }), COMPLETION)
  assert.ok(Math.abs(estimates.input(of('m'), several) / 1400 - 1) < 0.1)
  assert.deepEqual([one.hasData, several.hasData], [true, true])
})

test('the text of a large body is counted in about a millisecond', t => {
  const content = 'Some words, and then some more. '.repeat(250_000)
  const image = `data:image/png;base64,${'iVBORw0KGgo/+A'.repeat(500_000)}`
  const json = JSON.stringify({
    model: 'm',
    messages: [{ content: [content, { url: image }] }],
    tools: []
  })
  const bytes = Buffer.from(json)
  const body = { bytes, ...outlineOf(bytes) }
  const times = Array.from({ length: 9 }, () => {
    const start = performance.now()
    promptText(body, CHAT_FORM)
    return performance.now() - start
  }).sort((a, b) => a - b)
  t.diagnostic(`${bytes.length} bytes: ${times[4]} ms`)
  assert.ok(times[0]! < 10)
})
