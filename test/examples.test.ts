import assert from 'node:assert/strict'
import { globSync, readFileSync } from 'node:fs'
import { basename } from 'node:path'
import { test } from 'node:test'
import Fastify from 'fastify'
import gateway from '../src/app.ts'
import { openai } from '../src/dialects/openai.ts'
import { StaticKeys } from '../src/keys/static.ts'
import { LimitSet } from '../src/limits/limits.ts'
import { Periods } from '../src/limits/period.ts'
import { toAccount } from '../src/limits/store.ts'
import { checkOptions } from '../src/options.ts'
import { AuthOptions } from '../src/plugins/auth.ts'
import backends from '../src/plugins/backends.ts'
import payload from '../src/plugins/payload.ts'
import proxy from '../src/plugins/proxy.ts'
import { Sqlite } from '../src/store/sqlite.ts'

/** Runs the `@example` of every docstring; `expression // value` must hold. */

const SRC = new URL('../src/', import.meta.url).pathname
const AsyncFunction = (async () => {}).constructor as new (
  ...args: string[]
) => (...values: unknown[]) => Promise<void>

/** `x // { a: 1, ... }`: these members. `x // GatewayError`: one of these. Else: equal. */
function toCode(line: string): string {
  const match = /^(?!const |await fastify)(.+?) \/\/ (.+)$/.exec(line)
  if (match === null) return line
  const [, expression, expected] = match
  if (/^[A-Z]\w+$/.test(expected!)) {
    return `assert.equal((${expression}).constructor.name, '${expected}')`
  }
  const compare = expected!.includes(', ...') ? 'partialDeepStrictEqual' : 'deepEqual'
  return `assert.${compare}(${expression}, (${expected!.replace(', ...', '')}))`
}

/** What some plugins need to be there before. */
const BEFORE: Record<string, ((fastify: ReturnType<typeof Fastify>) => Promise<unknown>)[]> = {
  metering: [
    async fastify => fastify.register(payload),
    async fastify => fastify.register(backends, { backends: [{ url: 'http://127.0.0.1:1' }] }),
    async fastify => fastify.register(proxy)
  ]
}

test('an example that is wrong fails', async () => {
  await assert.rejects(new AsyncFunction('assert', toCode('1 + 1 // 3'))(assert))
  await assert.rejects(new AsyncFunction('assert', toCode('new Map() // Set'))(assert))
  await assert.rejects(new AsyncFunction('assert', toCode('({ a: 1 }) // { a: 2, ... }'))(assert))
})

for (const file of globSync('**/*.ts', { cwd: SRC }).sort()) {
  const source = readFileSync(SRC + file, 'utf8')
  const examples = [...source.matchAll(/^ \* @example\n((?: \* ?.*\n)+?) \*\//gm)]
  for (const [index, [, text]] of examples.entries()) {
    test(`the example in ${file}, number ${index + 1}`, async t => {
      const lines = text!.split('\n').map(line => line.replace(/^ \* ?/, ''))
      const code = lines.filter(line => !line.startsWith('import ')).map(toCode)
      const exports = await import(SRC + file)
      const name = basename(file, '.ts')
      const fastify = Fastify()
      t.after(() => fastify.close())
      for (const prepare of BEFORE[name] ?? []) await prepare(fastify)
      const known = {
        ...exports,
        ...(exports.default === undefined ? {} : { [name]: exports.default }),
        assert,
        openai,
        backends,
        gateway,
        Sqlite,
        Periods,
        noLimits: checkOptions(LimitSet, {}),
        toAccount,
        log: name === 'log' ? exports.default : fastify.log,
        codes: checkOptions(AuthOptions, {}).status_codes,
        sources: [await StaticKeys.of('keys', [{ key: 'sk-alice', name: 'alice' }])],
        endpoint: { method: 'POST', url: '/x', dialect: openai, body: 'json' }
      }
      const declares = (variable: string) => new RegExp(`const ${variable} =`).test(code.join('\n'))
      const all = Object.entries({ ...known, fastify, Fastify }).filter(
        ([variable]) => variable !== 'default' && !declares(variable)
      )
      const run = new AsyncFunction(...all.map(([variable]) => variable), code.join('\n'))
      await run(...all.map(([, value]) => value))
      await fastify.ready()
    })
  }
}
