import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { PrefixIndex } from '../src/pool/prefix-index.ts'
import { prefixesOf } from '../src/pool/prefixes.ts'

/** Which prompts begin alike, as their bytes show it. */

const text = (seed: string, bytes: number) =>
  seed.repeat(Math.ceil(bytes / seed.length)).slice(0, bytes)
const user = (content: unknown) => ({ role: 'user', content })
const assistant = (content: string) => ({ role: 'assistant', content })

/** Bytes of the second prompt that a backend has that was sent the first. */
function shared(first: object, second: object, seeds = ['m', 'm']): number {
  const index = new PrefixIndex()
  index.add(prefixesOf(Buffer.from(JSON.stringify(first)), seeds[0]!), 1)
  return index.shared(prefixesOf(Buffer.from(JSON.stringify(second)), seeds[1]!)).sent
}

const bytesOf = (body: object) => prefixesOf(Buffer.from(JSON.stringify(body)), 'm').bytes

test('a turn shares all of the turn before, and no more', () => {
  const first = {
    model: 'm',
    messages: [user(text('one ', 1500)), assistant('Yes.'), user(text('two ', 700))]
  }
  const messages = [...first.messages, assistant('No.'), user(text('three ', 2000))]
  assert.equal(shared(first, { stream: true, messages, tools: undefined }), bytesOf(first))
  assert.equal(shared({ messages }, { messages }), bytesOf({ messages }))
  assert.equal(shared({ messages }, first), bytesOf(first))
})

test('a long message shares the blocks that are the same', () => {
  const document = text('Once upon a time. ', 50_000)
  const ask = (question: string) => ({ messages: [user(`${document} ${question}`)] })
  const common = shared(ask('Who?'), ask('Where was that, and when?'))
  assert.ok(common > 48_000 && common <= 50_100, String(common))
  const prompt = (question: string) => ({ prompt: `${document} ${question}` })
  assert.ok(shared(prompt('Who?'), prompt('Where?')) > 48_000)
})

test('a prompt of tokens is as one of text', () => {
  const ofTokens = (count: number) => ({ prompt: Array.from({ length: count }, (_, at) => at) })
  const both = shared(ofTokens(1000), ofTokens(2000))
  assert.ok(both > bytesOf(ofTokens(1000)) - 1024, String(both))
})

test('what stands before the messages comes first, wherever it stands', () => {
  const messages = [user(text('long ', 4000))]
  const tools = [{ type: 'function', function: { name: 'read', description: text('x', 2000) } }]
  assert.equal(shared({ tools, messages }, { messages }), 0)
  const both = { messages, tools }
  assert.equal(shared({ tools, messages }, both), bytesOf(both))
  const system = (name: string) => ({ system: `You are ${name}.`, messages })
  assert.equal(shared(system('Anna'), system('Stiva')), 0)
  const input = (instructions: string) => ({ instructions, input: text('long ', 4000) })
  assert.equal(shared(input('Be kind.'), input('Be short.')), 0)
  assert.ok(shared(input('Be kind.'), input('Be kind.')) > 4000)
})

test('nothing is shared below 1 KB, or by another model or caller', () => {
  const body = { messages: [user(text('a', 900))] }
  assert.equal(shared(body, body), 0)
  const long = { messages: [user(text('a', 2000))] }
  assert.ok(shared(long, long) > 1024)
  assert.equal(shared(long, long, ['m\0one', 'm\0two']), 0)
})

test('where Anthropic’s clients want the cache is no part of the prompt', () => {
  const block = (length: number, marked: boolean) => ({
    type: 'text',
    text: text('word ', length),
    ...(marked ? { cache_control: { type: 'ephemeral', ttl: '1h' } } : {})
  })
  const first = { messages: [user([block(3000, true)])] }
  const second = {
    messages: [user([block(3000, false)]), assistant('Yes.'), user([block(50, true)])]
  }
  assert.equal(shared(first, second), bytesOf(first))
  const marks = '[{"cache_control" : {"type":"ephemeral"}, "text": "x"}]'
  const bare = '[{"text": "x"}]'
  const ofText = (list: string) => prefixesOf(Buffer.from(`{"system":${list}}`), 'm').low
  assert.deepEqual(ofText(marks), ofText(bare))
  const nested = '[{"text": "x", "cache_control": {"cache_control": {"ttl": "1h"}}}]'
  assert.deepEqual(ofText(nested), ofText(bare))
  // In a text it is text.
  const said = { messages: [user('{"cache_control": {"type": "ephemeral"}}')] }
  assert.equal(bytesOf(said), Buffer.byteLength(JSON.stringify(said.messages[0])))
})

test('every beginning of any conversation is one of its own', () => {
  const message = fc.record({
    role: fc.constantFrom('user', 'assistant'),
    content: fc.string({ unit: 'grapheme', maxLength: 2000 })
  })
  fc.assert(
    fc.property(
      fc.array(message, { minLength: 1, maxLength: 8 }),
      fc.string(),
      (messages, other) => {
        const body = { [`x${other}`]: other, messages, after: { nested: [other] } }
        const all = prefixesOf(Buffer.from(JSON.stringify(body)), 'm')
        const bytes = messages.reduce(
          (sum, each) => sum + Buffer.byteLength(JSON.stringify(each)),
          0
        )
        assert.equal(all.bytes, bytes)
        const fewer = prefixesOf(
          Buffer.from(JSON.stringify({ messages: messages.slice(0, -1) }, null, 0)),
          'm'
        )
        assert.deepEqual(all.low.slice(0, fewer.ends.length), fewer.low)
        assert.deepEqual(all.high.slice(0, fewer.ends.length), fewer.high)
      }
    ),
    { numRuns: 200 }
  )
})

test('any change of a prompt changes its hashes from there on', () => {
  const body = Buffer.from(JSON.stringify({ messages: [user(text('abcdefg', 4000))] }))
  const before = prefixesOf(body, 'm')
  for (const at of [40, 1000, 1500, 3000]) {
    const changed = Buffer.from(body)
    changed[at]! ^= 1
    const after = prefixesOf(changed, 'm')
    for (let mark = 0; mark < before.ends.length; mark++) {
      const isSame = before.low[mark] === after.low[mark] && before.high[mark] === after.high[mark]
      assert.equal(isSame, before.ends[mark]! + 13 <= at, `byte ${at}, mark ${mark}`)
    }
  }
})

test('an index keeps what was used last, and is bounded', () => {
  const index = new PrefixIndex()
  const prompt = (name: number) =>
    prefixesOf(Buffer.from(JSON.stringify({ messages: [user(text(`${name} `, 64_000))] })), 'm')
  const kept = prompt(-1)
  for (let name = 0; name < 1000; name++) {
    if (name % 20 === 0) index.add(kept, 1)
    index.add(prompt(name), 1)
  }
  assert.ok(index.size > 30_000 && index.size <= 32_768, String(index.size))
  assert.equal(index.shared(kept).sent, kept.bytes)
  assert.equal(index.shared(prompt(999)).sent, prompt(999).bytes)
  assert.equal(index.shared(prompt(1)).sent, 0)
  index.clear()
  assert.equal(index.size, 0)
  assert.equal(index.shared(kept).sent, 0)
})

test('a long prompt is read once, whatever is in it: to read parts again and again would take minutes', () => {
  const prose = text('All happy families are alike. ', 8_000_000)
  const code = JSON.stringify(text('{"name": "value", "list": [1, 2]}\n', 4_000_000))
  const deep = '{"cache_control":'.repeat(500_000)
  const bodies = {
    prose: JSON.stringify({ model: 'm', messages: [user(prose)] }),
    code: JSON.stringify({ model: 'm', messages: [user(code)] }),
    tokens: `{"prompt":[${'15339,'.repeat(1_000_000)}0]}`,
    marks: `{"messages":[${deep}1${'}'.repeat(500_000)}]}`
  }
  for (const [kind, body] of Object.entries(bodies)) {
    const { ends } = prefixesOf(Buffer.from(body), 'm')
    assert.ok(ends.length < 4_096, `${kind}: ${ends.length}`)
  }
})
