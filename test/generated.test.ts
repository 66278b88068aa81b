import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { Ajv } from 'ajv'
import { parse } from 'yaml'
import { FILES } from '../scripts/generate.ts'
import { parseConfig } from '../src/config.ts'

const read = (file: string) => readFileSync(new URL(`../${file}`, import.meta.url), 'utf8')

for (const [file, make] of Object.entries(FILES)) {
  test(`${file} is what the schemas say (npm run generate)`, () => {
    assert.equal(read(file), make())
  })
}

test('llmproxy.full.yaml shows every option at its default', () => {
  const full = read('config/llmproxy.full.yaml')
  // The default is what the original's files mean by saying nothing; new ones begin with the better one.
  const least = read('config/llmproxy.yaml').replace('load_balance: least_wait', '')
  assert.deepEqual(parseConfig(full, 'full', {}), parseConfig(least, 'least', {}))
  // Taking any line with a value away changes nothing: what is there is the default.
  for (const [at, line] of full.split('\n').entries()) {
    if (!/^ +[a-z_]+: \S/.test(line) || /^ +(url|name): /.test(line)) continue
    const without = full.split('\n').toSpliced(at, 1).join('\n')
    assert.deepEqual(parseConfig(without, 'without', {}), parseConfig(least, 'least', {}), line)
  }
})

test('the editor’s schema takes the shipped configurations and refuses a wrong one', () => {
  const validate = new Ajv({ strict: false }).compile(
    JSON.parse(read('config/llmproxy.schema.json'))
  )
  for (const file of ['llmproxy.yaml', 'llmproxy.full.yaml']) {
    assert.ok(validate(parse(read(`config/${file}`))), JSON.stringify(validate.errors))
  }
  const page = read('test/provider-page.yaml').split('---\n')
  for (const part of page) assert.ok(validate(parse(part)), JSON.stringify(validate.errors))
  assert.ok(
    validate({ backends: [{ url: 'http://a', weight: '${WEIGHT}' }], auth: { keys: ['a'] } })
  )
  assert.ok(!validate({ backends: [{ url: 'http://a', weight: 'ten' }] }))
  assert.ok(!validate({ backends: [{ url: 'http://a', wieght: 1 }] }))
  assert.ok(validate({ backends: [{ url: '${URL}' }], server: null }))
  assert.ok(!validate({ backends: [{ url: 'ftp://a' }] }))
  assert.ok(!validate({ backends: [{ url: 'http://a' }], metrics: { path: 'x' } }))
  assert.ok(!validate({}))
})
