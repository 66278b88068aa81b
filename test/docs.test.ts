import assert from 'node:assert/strict'
import { execFile, spawnSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { promisify } from 'node:util'
import OpenAI from 'openai'
import { parse } from 'yaml'
import { ConfigError, parseConfig } from '../src/config.ts'
import { answerChat, CHAT, fakeBackend, post, startGateway } from './helper.ts'

/** Everything in the documentation that can be run is run. */

const ROOT = new URL('..', import.meta.url).pathname
const run = promisify(execFile)
const PAGES = [
  'README.md',
  ...readdirSync(join(ROOT, 'docs'))
    .filter(each => each.endsWith('.md'))
    .map(each => `docs/${each}`)
]

interface Snippet {
  page: string
  language: string
  text: string
}

const snippets: Snippet[] = PAGES.flatMap(page =>
  [...readFileSync(join(ROOT, page), 'utf8').matchAll(/^```(\w+)\n([\s\S]*?)^```$/gm)].map(
    ([, language, text]) => ({ page, language: language!, text: text! })
  )
)
const of = (language: string, page?: string) =>
  snippets.filter(each => each.language === language && (page ?? each.page) === each.page)

test('links to files lead somewhere', () => {
  for (const page of PAGES) {
    const text = readFileSync(join(ROOT, page), 'utf8')
    for (const [, link] of text.matchAll(/\]\(([^)#:]+)(?:#[^)]*)?\)/g)) {
      assert.ok(existsSync(join(ROOT, page, '..', link!)), `${page}: ${link}`)
    }
  }
})

test('every YAML configuration is valid', () => {
  const configs = of('yaml').filter(({ text }) => /^(backends|discovery):/m.test(text))
  assert.ok(configs.length >= 2)
  for (const { page, text } of configs) {
    const { backends, discovery } = parseConfig(text, page, {})
    assert.ok(backends.length > 0 || discovery.enabled)
  }
})

test('the errors in the README are what the program says', () => {
  const [shown] = of('text', 'README.md')
  const yaml = `server: {listen: ":1"}\n\nlog: {}\n\n\n\n\n\n\nbackends:\n  - url: http://a:1\n    weight: ten\n\nauth:\n  key: [a]\n`
  assert.throws(
    () => parseConfig(yaml, 'config.yaml', {}),
    (error: Error) => {
      assert.ok(error instanceof ConfigError)
      assert.equal(`${error.message}\n`, shown!.text)
      return true
    }
  )
})

const NO_CURL = spawnSync('curl', ['--version']).error ? 'curl is not installed' : false

test('the curl commands of the README work against the demo', { skip: NO_CURL }, async t => {
  const demo = parse(readFileSync(join(ROOT, 'config/llmproxy.yaml'), 'utf8'))
  const gateway = await startGateway(t, demo)
  const block = of('bash', 'README.md').find(({ text }) => text.startsWith('curl'))!
  const script = block.text
    .replaceAll('http://localhost:8000', gateway.url)
    .replaceAll('curl ', 'curl -sS ')
  const { stdout } = await run('sh', ['-e', '-c', script])
  assert.match(stdout, /data: \[DONE\]\n/)
  assert.match(stdout, /"status":"ok"/)
  assert.match(stdout, /llmproxy_usage_tokens_total\{type="completion"\} 47\n/)
  const [log] = of('json', 'README.md')
  const line = await gateway.logged({ msg: 'exchange' })
  const { level: _, time: __, ...members } = line
  assert.deepEqual(Object.keys(members), Object.keys(JSON.parse(log!.text)))
})

test('the curl commands of docs/admin.md work with its configuration', {
  skip: NO_CURL
}, async t => {
  const dataDir = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  t.after(() => rmSync(dataDir, { recursive: true }))
  const config = parse(of('yaml', 'docs/admin.md')[0]!.text)
  config.admin.listen = '127.0.0.1:0'
  config.usage = { enabled: true, reporters: [{ type: 'builtin', builtin: {} }] }
  const gateway = await startGateway(t, config, {}, dataDir)
  const { url } = await gateway.logged({ msg: 'the admin API is listening' })
  const script = of('bash', 'docs/admin.md')
    .map(({ text }) => text)
    .join('\n')
    .replaceAll('http://localhost:8001', String(url))
    .replaceAll('KEY_ID', '$KEY_ID')
    .replace(
      /^curl .* -d '{"name".*$/m,
      line => `OUT=$(${line}); echo "$OUT"
KEY_ID=$(echo "$OUT" | sed 's/.*"id":"\\(key_[0-9a-f]*\\)".*/\\1/')`
    )
    .replaceAll('curl ', 'curl -sS --fail-with-body -w "\\n" ')
  const { stdout } = await run('sh', ['-e', '-c', script])
  const answers = stdout
    .split('\n')
    .filter(line => line !== '')
    .map(line => JSON.parse(line))
  assert.match(answers[0].key, /^sk-[\w-]{43}$/)
  assert.equal(answers[3].limits.requests_per_minute, 60)
  assert.equal(answers[5].status, 'revoked')
  const [done, line] = of('json', 'docs/admin.md').map(({ text }) => JSON.parse(text))
  assert.deepEqual(answers.at(-1), done)
  const { level: _, time: __, ...members } = await gateway.logged({ action: 'revoke' })
  assert.deepEqual(Object.keys(members), Object.keys(line))
})

test('the npm commands of the README work', async t => {
  const folder = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  t.after(() => rmSync(folder, { recursive: true }))
  const file = join(folder, 'config.yaml')
  writeFileSync(file, of('yaml', 'README.md')[0]!.text)
  const { scripts } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'))
  const commands = of('bash', 'README.md').flatMap(
    ({ text }) => text.match(/npm (?:start|test|ci)[^#&\n]*/g) ?? []
  )
  assert.deepEqual(
    commands.map(command => command.trim()),
    [
      'npm ci',
      'npm start',
      'npm test',
      'npm start -- --config config.yaml',
      'npm start -- check config.yaml'
    ]
  )
  assert.ok(scripts.start && scripts.test)
  const { stdout } = await run('npm', ['start', '-s', '--', 'check', file], { cwd: ROOT })
  assert.equal(stdout, `${file} is valid\n`)
})

test('the clients’ settings in the README work with its configuration', async t => {
  const backend = await fakeBackend(t, answerChat)
  const config = parse(of('yaml', 'README.md')[0]!.text)
  const hook = await fakeBackend(t, (_request, response) => response.end())
  config.backends = [{ name: 'gpu-1', url: backend.url }]
  config.usage.reporters[0].webhook.url = hook.url
  const gateway = await startGateway(t, config)
  const [, event, openClaw, openCode] = of('json', 'README.md').map(({ text }) => JSON.parse(text))

  const { baseUrl, apiKey, models } = openClaw.models.providers.llmproxy
  const { options, npm } = openCode.provider.llmproxy
  assert.equal(npm, '@ai-sdk/openai-compatible')
  for (const { url, key } of [
    { url: baseUrl, key: apiKey },
    { url: options.baseURL, key: options.apiKey }
  ]) {
    const client = new OpenAI({
      baseURL: url.replace('http://localhost:8000', gateway.url),
      apiKey: key
    })
    const answer = await client.chat.completions.create({
      model: models[0].id,
      messages: [{ role: 'user', content: 'Hello' }]
    })
    assert.equal(answer.choices[0]!.message.content, 'Hi there!')
  }
  const sent = JSON.parse((await hook.request()).body)
  assert.deepEqual(Object.keys(sent), Object.keys(event))
  for (const name of Object.keys(event)) assert.equal(typeof sent[name], typeof event[name], name)
})

test('every JavaScript snippet runs', async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, { backends: [{ url: backend.url }] })
  assert.ok(of('js').length >= 4)
  // Inside of the package, which the snippets import by its name.
  mkdirSync(join(ROOT, 'dist-test'), { recursive: true })
  const folder = mkdtempSync(join(ROOT, 'dist-test', 'snippets-'))
  t.after(() => rmSync(folder, { recursive: true }))
  const files = of('js').map(({ page, text }, at) => {
    const code = text
      .replaceAll('http://localhost:8000', gateway.url)
      .replaceAll('http://127.0.0.1:8001', backend.url)
      .replace('port: 3000', 'port: 0')
    const end = code.includes('fastify') ? '\nawait fastify.ready()\nawait fastify.close()' : ''
    const file = join(folder, `${at}-${page.replace('/', '-')}.mjs`)
    writeFileSync(file, code + end)
    return file
  })
  // All in one process: each start takes half a second.
  const all = files.map(file => `await import(${JSON.stringify(file)})`).join('\n')
  const args = ['-C', 'llmproxy-source', '--input-type=module', '-e', all]
  const { stdout } = await run(process.execPath, args, { cwd: ROOT })
  assert.match(stdout, /Hi there!/)
})

test('every error code is explained', () => {
  const source = readFileSync(join(ROOT, 'src/errors.ts'), 'utf8')
  const page = readFileSync(join(ROOT, 'docs/errors.md'), 'utf8')
  const codes = [...source.matchAll(/^ {2}([a-z_]+): (\d{3}),?$/gm)].map(String)
  assert.ok(codes.length > 15)
  for (const line of codes) {
    const [code, status] = line.trim().split(/: |,/)
    assert.match(page, new RegExp(`^\\| [^|]*\`${code}\`[^|]*\\| ${status} \\|`, 'm'), line)
  }
})

test('every dependency is explained, and no more', () => {
  const { dependencies, peerDependencies, devDependencies } = JSON.parse(
    readFileSync(join(ROOT, 'package.json'), 'utf8')
  )
  const page = readFileSync(join(ROOT, 'docs/dependencies.md'), 'utf8')
  const rows = [...page.matchAll(/^\| `([^`]+)` \|/gm)].map(([, name]) => name)
  assert.deepEqual(rows.sort(), Object.keys({ ...dependencies, ...peerDependencies }).sort())
  for (const name of Object.keys(devDependencies)) {
    assert.ok(name.startsWith('@types/') || page.includes(`\`${name}\``), name)
  }
})

test('errors come in the shapes of docs/errors.md', async t => {
  const gateway = await startGateway(t, { backends: [{ url: 'http://127.0.0.1:1' }] })
  const shape = (value: unknown): unknown =>
    typeof value === 'object' && value !== null
      ? Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, shape(inner)]))
      : value === null
        ? null
        : typeof value
  const shown = [...of('text', 'docs/errors.md')[0]!.text.matchAll(/\{.*\}/g)].map(([json]) =>
    shape(JSON.parse(json))
  )
  for (const [index, path] of ['/v1/chat/completions', '/v1/messages', '/api/chat'].entries()) {
    assert.deepEqual(shape(await (await post(gateway.url + path, CHAT)).json()), shown[index])
  }
})
