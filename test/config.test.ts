import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { Ajv } from 'ajv'
import fc from 'fast-check'
import { stringify } from 'yaml'
import { ConfigError, ConfigSchema, parseConfig } from '../src/config.ts'
import { completeEmpty, type DefaultsNode } from '../src/defaults.ts'
import { checkOptions, Duration, OptionsError, Section } from '../src/options.ts'
import { AuthOptions } from '../src/plugins/auth.ts'
import { parseQuantity } from '../src/quantity.ts'
import { substitute } from '../src/yaml.ts'

const parse = (yaml: string, env: NodeJS.ProcessEnv = {}) => parseConfig(yaml, 'config.yaml', env)

/** The lines of the complaint about a file. */
function complaint(yaml: string, env: NodeJS.ProcessEnv = {}): string[] {
  try {
    parse(yaml, env)
  } catch (error) {
    assert.ok(error instanceof ConfigError)
    return error.message.split('\n')
  }
  return []
}

const BACKEND = 'backends:\n  - url: http://a:1\n'

test('the provider page’s configuration works literally', () => {
  const page = readFileSync(new URL('./provider-page.yaml', import.meta.url), 'utf8')
  const [main, routing] = page.split('---\n') as [string, string]
  const config = parse(main)
  assert.equal(config.server.listen, ':8000')
  assert.deepEqual(
    config.backends.map(({ url, weight }) => [url, weight]),
    [
      ['http://vllm:8000', 5],
      ['http://ollama:11434', 3]
    ]
  )
  assert.equal(config.auth.enabled, true)
  assert.deepEqual(config.auth.skip_paths, ['/health', '/metrics'])
  assert.equal(config.usage.reporters[0]!.webhook!.timeout, 3000)
  assert.equal(config.rate_limit.per_key.enabled, true)
  assert.equal(config.rate_limit.per_key.requests_per_minute, 60)
  assert.equal(config.rate_limit.per_key.max_concurrent, 3)
  assert.equal(parse(routing).routing.load_balance, 'least_connections')
})

test('an error names the file, the line, the column, the member, what is right and what was there', () => {
  const yaml = `server:
  listen: ":8000"

backends:
  - name: a
    url: http://a:1
    weight: 2
  - name: b
    url: http://b:1
    # a comment
    timeout: 3s
    weight: ten
`
  assert.deepEqual(complaint(yaml), [
    'config.yaml:12:5 backends[1].weight: must be an integer from 1 to 1000000 (got "ten")'
  ])
})

test('all errors at once, in the order of the file', () => {
  const yaml = `server:
  listen: 8000
  read_timeout: soon
  max_body_size: 3 apples
  wite_timeout: 3s
log:
  level: loud
backends:
  - url: http://a:1
    weight: 0
  - weight: 3
  - url: ftp://x
  - url: http://a:1
auth:
  enabled: yes please
  keys: [1]
  pipeline:
    - type: webhook
rate_limit:
  per_key: {requests_per_minute: -1}
routing:
  load_balance: fastest
  retry: {retry_on: [6xx]}
nonsense: 1
`
  assert.deepEqual(complaint(yaml), [
    'config.yaml:2:3 server.listen: must be an address such as :8000 or 127.0.0.1:8000 (got 8000)',
    'config.yaml:3:3 server.read_timeout: must be a duration such as 500ms, 30s or 1m30s (got "soon")',
    'config.yaml:4:3 server.max_body_size: must be a size such as 64MB (got "3 apples")',
    'config.yaml:5:3 server.wite_timeout: is not known; did you mean "write_timeout"?',
    'config.yaml:7:3 log.level: must be one of trace, debug, info, warn, error, fatal, silent (got "loud")',
    'config.yaml:10:5 backends[0].weight: must be an integer from 1 to 1000000 (got 0)',
    'config.yaml:11:5 backends[1].url: is missing',
    'config.yaml:12:5 backends[2].url: must be a URL such as http://host:8000 (got "ftp://x")',
    'config.yaml:13:5 backends[3]: has the same name as backends[0]',
    'config.yaml:15:3 auth.enabled: must be true or false (got "yes please")',
    'config.yaml:16:10 auth.keys[0]: must be text or a mapping',
    'config.yaml:18:7 auth.pipeline[0].webhook: is missing',
    'config.yaml:20:13 rate_limit.per_key.requests_per_minute: must be an integer of 0 or more (got -1)',
    'config.yaml:22:3 routing.load_balance: must be one of round_robin, weighted, least_connections, latency_based, random, prefix_affinity, least_wait (got "fastest")',
    'config.yaml:23:22 routing.retry.retry_on[0]: must be one of connect_failure, timeout, 5xx, 429 (got "6xx"); did you mean "5xx"?',
    'config.yaml:24:1 nonsense: is not known'
  ])
})

test('a number without a unit is refused where it could be anything', () => {
  assert.deepEqual(complaint(`${BACKEND}    timeout: 30\n`), [
    'config.yaml:3:5 backends[0].timeout: must have a unit, such as 30s (got 30)'
  ])
  assert.equal(parse(`${BACKEND}routing: {idle_timeout: 0}`).routing.idle_timeout, 0)
  assert.equal(parse(`${BACKEND}server: {max_body_size: 1024}`).server.max_body_size, 1024)
})

test('YAML that is none, and files that are no mapping', () => {
  assert.match(complaint('a: [1\nb: 2')[0]!, /^config\.yaml:\d+:\d+ /)
  assert.match(complaint('a: 1\na: 2')[0]!, /^config\.yaml:2:1 /)
  assert.match(complaint('- 1')[0]!, /must be a mapping of sections/)
  for (const nothing of ['', 'backends: []']) {
    assert.deepEqual(complaint(nothing), [
      'config.yaml:1:1 backends: must be a list of at least one backend, unless discovery is enabled'
    ])
  }
})

const NOT_BUILT = [
  'discovery: {enabled: true, sources: [{type: static, script: x.lua, static: {backends: []}}]}',
  'logging: {enabled: true, request: {enabled: true, script: x.lua}}',
  'hooks: {enabled: true}',
  'routing: {script: x.lua}',
  'rate_limit: {script: x.lua}',
  'logging: {enabled: true, access: {enabled: true, script: x.lua}}',
  'metrics: {custom_labels: [a]}',
  'auth: {pipeline: [{type: lua, lua: {script: x}}]}',
  'usage: {reporters: [{type: webhook, script: x.lua, webhook: {url: "http://h"}}]}',
  'health_check: {script: x}'
]

test('what is not built yet is refused by name when it is switched on', () => {
  for (const section of NOT_BUILT) {
    const lines = complaint(`${BACKEND}${section}\n`)
    assert.ok(
      lines.some(line => /not supported by this version yet/.test(line)),
      `${section}: ${lines}`
    )
    assert.match(lines[0]!, /^config\.yaml:3:/)
  }
})

test('what is not built yet may be there when it is switched off', () => {
  for (const section of [
    'discovery: {enabled: false, mode: merge, sources: []}',
    'admin: {enabled: false, db_path: ./data/keys.db}',
    'logging: {enabled: false, access: {enabled: false}}',
    'hooks: {enabled: false, on_request: {enabled: false, path: x.lua}}',
    'routing: {fallback: []}',
    'rate_limit: {per_key: {tokens_per_minute: 0}, redis: default}',
    'storage:',
    'auth:\n  keys:\n'
  ]) {
    assert.deepEqual(complaint(`${BACKEND}${section}\n`), [], section)
  }
})

test('an unknown type is the only complaint about its item', () => {
  assert.deepEqual(complaint(`${BACKEND}auth: {pipeline: [{type: sttic}]}\n`), [
    'config.yaml:3:20 auth.pipeline[0].type: must be one of builtin, static, file, redis, database, webhook, jwt (lua: not supported by this version yet) (got "sttic"); did you mean "static"?'
  ])
})

test('nothing is suggested that is too far from what was there', () => {
  for (const section of [
    'auth: {mode: any}',
    'foo: 1',
    'auth: {pipeline: [{type: webhook, webhook: {url: "http://h", method: GET}}]}'
  ]) {
    const [line] = complaint(`${BACKEND}${section}\n`)
    assert.doesNotMatch(line!, /did you mean/)
  }
  for (const section of ['lgo: {}', 'metrcs: {}', 'log: {level: wran}']) {
    const [line] = complaint(`${BACKEND}${section}\n`)
    assert.match(line!, /did you mean/)
  }
})

test('old names are refused with the new one', () => {
  const names: [string, string][] = [
    ['listen: ":1"', 'server.listen'],
    ['usage_hook: {}', 'usage.reporters'],
    ['api_keys: []', 'auth.keys'],
    ['auth: {storage: x}', 'auth.pipeline'],
    ['routing: {load_balance_strategy: x}', 'routing.load_balance']
  ]
  for (const [old, now] of names) {
    assert.match(complaint(`${BACKEND}${old}\n`)[0]!, new RegExp(`is an old name; use ${now}`))
  }
})

test('the environment', () => {
  const yaml = `backends:
  - url: \${URL}
    weight: \${WEIGHT:-4}
    api_key: "\${KEY}"
    headers: {x-a: "$\${KEY} \${EMPTY:-b}"}
auth: {enabled: "\${AUTH:-true}"}
`
  const config = parse(yaml, { URL: 'http://a:1', KEY: '123', EMPTY: '' })
  const [backend] = config.backends
  assert.equal(backend!.url, 'http://a:1')
  assert.equal(backend!.weight, 4)
  assert.equal(backend!.api_key, '123')
  assert.deepEqual(backend!.headers, { 'x-a': '${KEY} b' })
  assert.equal(config.auth.enabled, true)
  assert.deepEqual(complaint(yaml, { KEY: 'x' }), [
    'config.yaml:2:5 backends[0].url: needs the environment variable ${URL}, which is not set'
  ])
})

test('values from the environment, keys and headers are not shown in errors', () => {
  const shown = complaint(
    `backends:\n  - url: http://a:1\n    weight: \${SECRET}\n    api_key: [hunter2]\n    headers: {a: [hunter2]}\nauth: {keys: [{key: {a: hunter2}}]}\n`,
    { SECRET: 'hunter2' }
  ).join('\n')
  assert.match(
    shown,
    /weight: must be an integer from 1 to 1000000 \(got the value of an environment variable\)/
  )
  assert.doesNotMatch(shown, /hunter2/)
})

test('anchors, aliases and merges work', () => {
  const config = parse(
    'backends:\n  - &a {name: a, url: http://a:1, weight: 3}\n  - {<<: *a, name: b}\nserver: {listen: ":1"}'
  )
  assert.deepEqual(
    config.backends.map(({ name, url, weight }) => [name, url, weight]),
    [
      ['a', 'http://a:1', 3],
      ['b', 'http://a:1', 3]
    ]
  )
})

test('tls asks for its files', () => {
  assert.deepEqual(complaint(`${BACKEND}server:\n  tls: {enabled: true, client_auth: require}\n`), [
    'config.yaml:4:3 server.tls.cert_file: is missing, but tls is enabled',
    'config.yaml:4:3 server.tls.key_file: is missing, but tls is enabled',
    'config.yaml:4:3 server.tls.client_ca_file: is missing, but client_auth asks for certificates'
  ])
})

test('a configuration is frozen', () => {
  assert.throws(() => {
    ;(parse(BACKEND).backends as unknown[]).push({})
  }, TypeError)
})

test('quantities', () => {
  assert.equal(parseQuantity('1h2m3s4ms', 'ms'), 3_723_004)
  assert.equal(parseQuantity('1.5s', 'ms'), 1500)
  assert.equal(parseQuantity('64MB', 'bytes'), 64 * 1024 ** 2)
  assert.equal(parseQuantity('1gb', 'bytes'), 1024 ** 3)
  for (const text of ['', 's', '5', '5x', '5 s', '-5s', '5s,', 'x5s']) {
    assert.equal(parseQuantity(text, 'ms'), undefined, text)
  }
  fc.assert(
    fc.property(fc.nat(1e6), fc.constantFrom('ms', 's', 'm', 'h'), (number, unit) => {
      const factor = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }[unit]!
      assert.equal(parseQuantity(`${number}${unit}`, 'ms'), number * factor)
    })
  )
})

test('an empty section comes to what its compiled check makes of it', () => {
  let sections = 0
  const compare = (schema: DefaultsNode) => {
    const section = {}
    if (completeEmpty(schema, section)) {
      sections++
      assert.deepEqual(section, checkOptions(compiled(schema) as never, {}))
    }
    for (const member of Object.values(schema.properties!)) if (member.properties) compare(member)
  }
  compare(ConfigSchema as DefaultsNode)
  assert.ok(sections > 30, `${sections}`)
})

/** A keyword that could reject an empty section: its check is compiled, and those of all that is in it. */
function compiled(schema: DefaultsNode): DefaultsNode {
  if (schema.properties === undefined) return schema
  const members = Object.entries(schema.properties).map(([name, each]) => [name, compiled(each)])
  return { ...schema, properties: Object.fromEntries(members), check: () => true } as DefaultsNode
}

test('a section that needs something is not completed', () => {
  const section = {}
  assert.equal(completeEmpty({ properties: { url: {} }, required: ['url'] }, section), false)
  assert.deepEqual(section, {})
  // A mapping where a list belongs stays wrong.
  assert.equal(completeEmpty({ default: [] }, section), false)
})

test('options in code take text and milliseconds, and complain the same way', () => {
  const Options = Section({ wait: Duration('3s', 'a wait') }, 'an example')
  assert.deepEqual(checkOptions(Options, {}), { wait: 3000 })
  assert.deepEqual(checkOptions(Options, { wait: 5 }), { wait: 5 })
  assert.deepEqual(checkOptions(Options, { wait: '5s' }), { wait: 5000 })
  assert.throws(() => checkOptions(Options, { wiat: 5 }, 'plugin'), {
    name: 'OptionsError',
    message: 'plugin: wiat: is not known; did you mean "wait"?'
  })
  assert.throws(() => checkOptions(Options, { wait: 'x' }), OptionsError)
})

test('no text whatever crashes the parser: it is a configuration or a complaint with a place', () => {
  const word = fc.constantFrom(
    'server',
    'backends',
    'url',
    'weight',
    'auth',
    '${A}',
    '- ',
    ': ',
    '\n',
    '  ',
    '{',
    '}',
    '[',
    ']',
    '"',
    '&a',
    '*a',
    '<<',
    '1',
    'true',
    'null',
    'http://a:1',
    '#',
    '|',
    '?'
  )
  fc.assert(
    fc.property(
      fc.oneof(
        fc.string(),
        fc.array(word).map(words => words.join(''))
      ),
      yaml => {
        for (const line of complaint(yaml)) assert.match(line, /^config\.yaml:\d+:\d+ /)
      }
    ),
    { numRuns: 500 }
  )
})

test('any value in any place is taken or refused by name', () => {
  const members = Object.keys(parse(BACKEND))
  fc.assert(
    fc.property(fc.constantFrom(...members), fc.jsonValue(), (member, value) => {
      const rest = member === 'backends' ? {} : { backends: [{ url: 'http://a:1' }] }
      for (const line of complaint(JSON.stringify({ ...rest, [member]: value }))) {
        assert.match(line, new RegExp(`^config\\.yaml:\\d+:\\d+ ${member}`))
      }
    }),
    { numRuns: 300 }
  )
})

test('substitution leaves all other text alone', () => {
  fc.assert(
    fc.property(fc.string(), text => {
      if (!text.includes('${')) assert.equal(substitute(text, {}, []), text)
    })
  )
  assert.equal(substitute('$$ $a $${A}', {}, []), '$$ $a ${A}')
})

test('a file is told about its half-written variables', () => {
  for (const text of ['${KEY', '${', '${X-foo}', '${X:?msg}', '${1}']) {
    const [line] = complaint(`${BACKEND}    api_key: "${text}"\n`, { KEY: 'k', X: 'x' })
    assert.match(
      line!,
      /^config\.yaml:3:5 backends\[0\]\.api_key: holds a "\$\{" that is not/,
      text
    )
  }
  const trimmed = parse(`${BACKEND}    api_key: "\${KEY}"\n`, { KEY: 'abc\n' })
  assert.equal(trimmed.backends[0]!.api_key, 'abc')
})

const SECRETS = [
  'auth: {keys: hunter2}',
  'auth: {keys: [12345678]}',
  'auth: {keys: [{hunter2: alice}]}',
  'auth: {keys: [hunter2 hunter2]}',
  'auth: {keys: ["sha256:hunter2"]}',
  'auth: {pipeline: [{type: static, static: {keys: [{key: [hunter2]}]}}]}',
  'auth: {pipeline: [{type: webhook, webhook: {url: "http://u:hunter2@h"}}]}',
  'usage: {reporters: [{type: webhook, webhook: {url: "http://h", headers: {Authorization: 12345678}}}]}'
]

test('nothing that may be a key or a password is shown', () => {
  for (const section of SECRETS) {
    const lines = complaint(`${BACKEND}${section}\n`)
    assert.ok(lines.length > 0, section)
    assert.doesNotMatch(lines.join('\n'), /hunter2|12345678/, section)
  }
  const [line] = complaint('backends: [{url: "http://user:hunter2@h:1"}]')
  assert.match(
    line!,
    /must be a URL such as .*without a user or a password \(use api_key or headers\)$/
  )
  assert.match(
    complaint(`${BACKEND}auth: {keys: [{key: x, user: y}]}`)[0]!,
    /auth\.keys\[0\]: has an unknown member; known are key, name, user_id/
  )
})

test('a configuration holds hashes of keys, not the keys', () => {
  const config = parse(`${BACKEND}auth: {keys: [hunter2, {key: hunter3, name: a}]}`)
  assert.doesNotMatch(JSON.stringify(config), /hunter/)
  assert.match(config.auth.keys[0]!.key, /^sha256:[0-9a-f]{64}$/)
})

const WRONG = [
  ['auth: {keys: ["sha256:abc"]}', 'auth.keys[0].key: must be a key without spaces, or sha256'],
  ['auth: {keys: [a, a]}', 'auth.keys[1]: has the same key as auth.keys[0]'],
  ['auth: {keys: [{key: a, name: n}, {key: b, name: n}]}', 'auth.keys[1]: has the same name as'],
  ['auth: {keys: [{key: a, expires_at: 2099}]}', 'auth.keys[0].expires_at: must be a time'],
  [
    'auth: {keys: [{key: a, expires_at: 2026-02-31}]}',
    'config.yaml:3:24 auth.keys[0].expires_at: must be a time'
  ],
  [
    'auth: {keys: [{key: a, starts_at: expires 2030}]}',
    'config.yaml:3:24 auth.keys[0].starts_at: must be a time'
  ],
  [
    'auth: {status_codes: {active: {allwo: false}}}',
    'auth.status_codes.active.allwo: is not known'
  ],
  ['server: {max_body_size: 0.2}', 'server.max_body_size: must be a size'],
  ['server: {trust_proxy: [nonsense]}', 'server.trust_proxy: must be true, false, or a list'],
  ['server: {trust_proxy: 10.0.0.0/8}', 'server.trust_proxy: must be true, false, or a list'],
  [
    'server: {read_timeout: 1s, header_timeout: 2s}',
    'server.read_timeout: must not be shorter than header_timeout'
  ],
  ['server: {listen: ":99999"}', 'server.listen: must be an address'],
  [
    'server: {drain_timeout: 30d}',
    'server.drain_timeout: must be a duration such as 500ms, 30s or 1m30s, at most 24d'
  ],
  [
    'usage: {reporters: [{type: builtin, max_age: 366d}]}',
    'usage.reporters[0].max_age: must be a duration such as 500ms, 30s or 1m30s, at most 365d'
  ],
  ['health_check: {interval: 0}', 'health_check.interval: must be a duration'],
  ['health_check: {timeout: 0s}', 'health_check.timeout: must be a duration'],
  ['metrics: {path: /health}', 'metrics.path: must be a path such as /metrics that no other'],
  ['metrics: {path: "/*"}', 'metrics.path: must be a path such as /metrics that no other'],
  ['metrics: {latency_buckets: []}', 'metrics.latency_buckets: must be a list of growing numbers'],
  ['metrics: {latency_buckets: [2, 1]}', 'metrics.latency_buckets: must be a list of growing'],
  ['rate_limit: {per_key: {burst_size: 5}}', 'rate_limit.per_key.burst_size: needs requests_per'],
  ['routing: {load_balance: least_conn}', 'did you mean "least_connections"?'],
  ['constructor: 1', 'constructor: is not known'],
  ['a: &a [*a]', 'config.yaml:'],
  ['a: *nope', 'config.yaml:'],
  ['server: {listen: !!binary aGVsbG8=}', 'server.listen: must be plain text'],
  [
    'server: {tls: {enabled: true, cert_file: /none.crt, key_file: /none.key}}',
    'must be a file that is there'
  ]
] as const

test('what would fail later, or do something else, is refused at once', () => {
  for (const [section, expected] of WRONG) {
    const lines = complaint(`${BACKEND}${section}\n`).join('\n')
    assert.ok(lines.includes(expected), `${section}: ${lines}`)
  }
  for (const backend of [
    'api_key: "a b"',
    'headers: {"bad header": x}',
    'headers: {Host: x}',
    'headers: {Content-Length: "3"}',
    'headers: {a: "b\\nc"}',
    'id: x',
    'models: []',
    'paths: [x]'
  ]) {
    const lines = complaint(`${BACKEND}    ${backend}\n`)
    assert.equal(lines.length, 1, `${backend}: ${lines}`)
  }
  assert.equal(complaint('backends: [{url: "http://a:1/?x=1"}]').length, 1)
  const bomb = Array.from({ length: 9 }, (_, at) =>
    at === 0
      ? 'a0: &a0 [x, x, x, x, x, x, x, x, x]'
      : `a${at}: &a${at} [${Array(9).fill(`*a${at - 1}`)}]`
  )
  assert.match(complaint(bomb.join('\n'))[0]!, /alias/i)
})

test('what is switched on in any spelling is not ignored', () => {
  for (const section of ['hooks: {enabled: "true"}', 'hooks: {enabled: "on"}']) {
    assert.match(
      complaint(`${BACKEND}${section}\n`)[0]!,
      /not supported by this version yet/,
      section
    )
  }
})

test('the dialect’s other parts may stay in a file where they are switched off', () => {
  for (const section of [
    'auth: {enabled: false, pipeline: [{type: redis, redis: {storage: a}}]}',
    'auth: {enabled: true, keys: [a], pipeline: [{type: file, enabled: false}, {type: lua, enabled: false, lua: {script: x}}]}',
    'usage: {enabled: false, reporters: [{type: database, database: {storage: a}}]}',
    'usage: {enabled: true, reporters: [{type: builtin, enabled: false, builtin: {retention_days: 5}}]}',
    'rate_limit: {enabled: false, storage: redis, per_key: {tokens_per_minute: 5}}',
    'rate_limit: {enabled: true, per_key: {enabled: false, tokens_per_minute: 5}}',
    'health_check: {enabled: false, script: {path: x}}',
    'routing: {enabled: false, script: {path: x.lua}}',
    'server: {tls: {enabled: false, cert_file: "", key_file: ""}}',
    'log: {level: info, output: stdout, file: {path: x, rotate: daily, max_size: 100, compress: true}}',
    'logging: {enabled: true, request: {enabled: false, storage: a, table: b, include_body: false}}',
    'logging: {enabled: true, access: {enabled: true, output: stdout, file: {path: "", rotate: weekly}}}'
  ]) {
    assert.deepEqual(complaint(`${BACKEND}${section}\n`), [], section)
  }
  const config = parse(
    `${BACKEND}auth: {enabled: true, pipeline: [{type: lua, enabled: false}, {type: static, static: {keys: [a]}}]}`
  )
  assert.deepEqual(
    config.auth.pipeline.map(({ type }) => type),
    ['static']
  )
})

test('an age may be longer than a timer can be', () => {
  const { usage, auth, storage } = parseConfig(
    `${BACKEND}
usage: {reporters: [{type: builtin, max_age: 30d}]}
auth: {pipeline: [{type: webhook, webhook: {url: "http://a"}, cache: {ttl: 90d, negative_ttl: 90d, stale_if_error: 365d}}]}
storage: {databases: [{name: a, driver: sqlite, conn_max_lifetime: 30d}], caches: [{name: b, driver: redis, ttl: 30d}]}`,
    'test.yaml',
    {}
  )
  const DAY = 86_400_000
  assert.equal(usage.reporters[0]!.max_age, 30 * DAY)
  assert.deepEqual(auth.pipeline[0]!.cache, {
    ttl: 90 * DAY,
    negative_ttl: 90 * DAY,
    stale_if_error: 365 * DAY
  })
  assert.equal(storage.databases[0]!.conn_max_lifetime, 30 * DAY)
})

test('files of logs rotate as the dialect has it, where a bare number is MB or days', () => {
  const file = '{path: x, rotate: hourly, max_size: 100, max_age: 30, compress: true}'
  const { log, logging } = parse(
    `${BACKEND}log: {output: file, file: ${file}}\n` +
      `logging: {enabled: true, access: {enabled: true, output: file, file: ${file}}}\n`
  )
  const expected = {
    path: 'x',
    rotate: 'hourly',
    max_size: 100 * 1024 ** 2,
    max_files: 10,
    max_age: 30 * 24 * 60 * 60 * 1000,
    compress: true
  }
  assert.deepEqual([log.file, logging.access.file], [expected, expected])
  const env = parse(`${BACKEND}log: {output: file, file: {max_size: "\${SIZE}"}}`, { SIZE: '5' })
  assert.equal(env.log.file.max_size, 5 * 1024 ** 2)
  assert.match(
    complaint(`${BACKEND}log: {output: file, file: {max_backups: 3}}`)[0]!,
    /max_backups: is an old name; use log\.file\.max_files/
  )
  assert.match(
    complaint(`${BACKEND}log: {output: file, file: {max_age: -1}}`)[0]!,
    /max_age: must be a duration/
  )
})

test('what could not work is refused before the start', t => {
  const folder = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  t.after(() => rmSync(folder, { recursive: true }))
  const noPem = join(folder, 'cert.pem')
  writeFileSync(noPem, 'not a certificate')
  const tls = { enabled: true, cert_file: noPem, key_file: noPem }
  const cases: [object, RegExp][] = [
    [{ server: { tls } }, /tls\.cert_file: must be a file in PEM format/],
    [{ server: { tls } }, /tls\.key_file: must be a file in PEM format/],
    [{ server: { listen: '*:8000' } }, /server\.listen: must be an address/],
    [{ auth: { header_names: ['X Y'] } }, /auth\.header_names\[0\]: must be the name of a header/],
    [{ auth: { header_names: ['Host'] } }, /auth\.header_names\[0\]/],
    [{ auth: { header_names: [] } }, /auth\.header_names/],
    [{ auth: { skip_paths: ['/health/*'] } }, /auth\.skip_paths\[0\]: must be a path/],
    [{ auth: { skip_paths: ['/'] } }, /auth\.skip_paths\[0\]/],
    [{ metrics: { path: '/..' } }, /metrics\.path: must be a path/]
  ]
  for (const [part, complaint] of cases) {
    const yaml = JSON.stringify({ backends: [{ url: 'http://b' }], ...part })
    assert.throws(() => parseConfig(yaml, 'config.yaml', {}), { message: complaint })
  }
})

test('a tag has a name that can be asked for', () => {
  const [line] = complaint(`${BACKEND}usage: {tags: {"a b": x-team}}\n`)
  assert.match(line!, /usage\.tags: must be a mapping of names \(letters, digits, .*\) to headers/)
  assert.deepEqual(complaint(`${BACKEND}usage: {tags: {team: x-team}}\n`), [])
})

test('a section that lists something is enabled unless it says otherwise', () => {
  const isEnabled = (section: 'auth' | 'discovery' | 'rate_limit' | 'usage', content: string) =>
    parse(`${BACKEND}${section}: ${content}`)[section].enabled
  for (const [section, content] of [
    ['usage', 'reporters: [{type: file, file: {path: usage.jsonl}}]'],
    ['usage', 'reporters: [{type: builtin}]'],
    ['auth', 'keys: [sk-1]'],
    ['auth', 'pipeline: [{type: builtin}]'],
    ['discovery', 'sources: [{type: static, static: {backends: [{url: "http://b:1"}]}}]'],
    ['rate_limit', 'per_key: {requests_per_minute: 1}'],
    ['rate_limit', 'users: {alice: {total_quota: 1}}']
  ] as const) {
    assert.equal(isEnabled(section, `{${content}}`), true, content)
    assert.equal(isEnabled(section, `{enabled: false, ${content}}`), false, content)
  }
  assert.equal(isEnabled('usage', '{prices: [{model: m, input: 1, output: 1}]}'), false)
  assert.equal(isEnabled('rate_limit', '{per_key: {requests_per_minute: 0}}'), false)
  assert.equal(isEnabled('auth', '{keys: []}'), false)
})

test('a type whose settings all have defaults needs no block', () => {
  const { usage } = parse(`${BACKEND}usage: {reporters: [{type: builtin}]}`)
  assert.deepEqual(usage.reporters[0]!.builtin, { retention_days: 90 })
  assert.deepEqual(complaint(`${BACKEND}usage: {reporters: [{type: webhook}]}`), [
    'config.yaml:3:21 usage.reporters[0].webhook: is missing'
  ])
})

test('a section is compiled once, for the file and for its plugin', t => {
  parse(BACKEND)
  const compile = t.mock.method(Ajv.prototype, 'compile')
  checkOptions(AuthOptions, {})
  assert.equal(compile.mock.callCount(), 0)
  assert.throws(() => checkOptions(AuthOptions, { status_codes: { disabled: 'x' } }), {
    message: /^options: status_codes\.disabled: must be .* \(got "x"\)$/
  })
})

test('of many issues the first 20 are named, in JSON and YAML', () => {
  const networks = Array.from({ length: 1_000 }, (_, at) => `10.0.0.${300 + at}`)
  const config = {
    backends: [{ url: 'http://b' }],
    auth: { keys: [{ key: 'a', denied_ips: networks }] }
  }
  for (const text of [JSON.stringify(config), stringify(config)]) {
    const lines = complaint(text)
    assert.equal(lines.length, 21)
    assert.match(lines[0]!, /^config\.yaml:\d+:\d+ auth\.keys\[0\]\.denied_ips\[0\]: must be/)
    assert.match(lines[19]!, /^config\.yaml:\d+:\d+ auth\.keys\[0\]\.denied_ips\[19\]: must be/)
    assert.equal(lines[20], 'and 980 more')
  }
  const repeated = `{${Array.from({ length: 100 }, () => '"log":{}').join()}}`
  for (const text of [
    repeated,
    repeated.slice(1, -1).replaceAll(',', '\n').replaceAll(':', ': ')
  ]) {
    const lines = complaint(text)
    assert.deepEqual(lines.slice(20), ['and 79 more'])
  }
})
