import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { matchesModel } from '../src/keys/key.ts'
import { ModelList } from '../src/model-list.ts'

/** Prices and limits by models and patterns. */

const TAGS = fc.constantFrom('', ':8b', ':latest')
const NAMES = fc
  .tuple(fc.string({ unit: fc.constantFrom('a', 'b', '*'), maxLength: 5 }), TAGS)
  .map(([name, tag]) => name + tag)
const MODELS = fc.array(
  NAMES.map(name => name.replaceAll('*', 'c')),
  { minLength: 1, maxLength: 3 }
)

test('the first entry of a list counts that fits one of the names, as if all were looked at', () => {
  fc.assert(
    fc.property(fc.array(NAMES), MODELS, (patterns, models) => {
      const list = new ModelList(patterns.map((pattern, at) => [pattern, at]))
      const expected = patterns.findIndex(each => models.some(name => matchesModel([each], name)))
      for (const _ of ['new', 'remembered']) {
        assert.equal(list.find(...models), expected === -1 ? undefined : expected)
      }
    }),
    { numRuns: 2_000 }
  )
})

test('a wildcard stands for any text, and :latest for no tag', () => {
  const cases: [string, string, boolean][] = [
    ['llama3', 'llama3:latest', true],
    ['llama3:latest', 'llama3', true],
    ['llama3', 'llama3:8b', false],
    ['llama*', 'llama3', true],
    ['*/llama*:8b', 'meta/llama3:8b', true],
    ['a*a', 'a', false],
    ['*mini', 'gpt-mini:latest', true],
    ['*', '', true]
  ]
  for (const [pattern, model, fits] of cases) {
    assert.equal(matchesModel([pattern], model), fits, `${pattern} ${model}`)
  }
})

test('100,000 prices cost a request nothing to speak of, for models that callers invent too', () => {
  const list = new ModelList(
    Array.from({ length: 100_000 }, (_, at) => [`vendor/model-${at}${at % 2 ? '*' : ''}`, at])
  )
  assert.equal(list.find('vendor/model-99999-x'), 9)
  const started = performance.now()
  for (let at = 0; at < 1_000; at++) list.find(`vendor/other-${at}`, `model-${at}`)
  assert.ok(performance.now() - started < 1_000)
})
