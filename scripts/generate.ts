import { writeFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'
import { stringify } from 'yaml'
import { ConfigSchema } from '../src/config.ts'
import { expected } from '../src/issues.ts'

/**
 * Writes what follows from the option schemas: the full configuration with every default, the JSON
 * Schema for editors, and the reference. `npm run generate`; a test fails when a file is out of date.
 */

interface Schema {
  type?: string | string[]
  description?: string
  default?: unknown
  enum?: unknown[]
  const?: unknown
  anyOf?: Schema[]
  items?: Schema
  properties?: Record<string, Schema>
  patternProperties?: Record<string, Schema>
  required?: string[] | undefined
  additionalProperties?: boolean
  minimum?: number
  maximum?: number
  exclusiveMinimum?: number
  minLength?: number
  minItems?: number
  pattern?: string
  unit?: 'ms' | 'bytes'
  notBuilt?: true
  restart?: true
  shorthand?: string
}

const root = ConfigSchema as Schema

export const FILES: Record<string, () => string> = {
  'config/llmproxy.full.yaml': fullYaml,
  'config/llmproxy.schema.json': () => `${JSON.stringify(editorSchema(), null, 2)}\n`,
  'docs/configuration.md': reference
}

/** Every option at its default; options without one, and the members of lists, as comments. */
function fullYaml(): string {
  const lines = [
    '# Every option of LLMProxy, at its default. What has no default is commented out.',
    '# This file is generated; the smallest configuration that works is llmproxy.yaml.',
    '# yaml-language-server: $schema=./llmproxy.schema.json'
  ]
  for (const [name, schema] of built(root)) {
    lines.push('', `# ${describe(schema)}`, ...member(name, schema, ''))
  }
  return `${lines.join('\n')}\n`
}

/** The lines of one member. `start` is the indent, and `# ` inside of what is commented out. */
function member(name: string, schema: Schema, start: string): string[] {
  const isList = schema.items?.properties !== undefined
  if (isList && name === 'backends' && start === '') {
    return ['backends:', ...item(schema.items!, start, { name: 'demo', url: 'demo://' })]
  }
  const isExample = start.includes('#') || schema.default === undefined
  const mark = isExample && !start.includes('#') ? '# ' : ''
  const inner = `${start}${mark}  `
  if (isList) {
    const example = start.includes('#') ? start : `${start}# `
    const head = line(`${start}${name}:${isExample ? '' : ' []'}`, schema)
    return [head, ...item(schema.items!, example, {})]
  }
  if (schema.properties !== undefined) {
    const head = start === '' ? `${name}:` : line(`${start}${mark}${name}:`, schema)
    return [head, ...built(schema).flatMap(([each, its]) => member(each, its, inner))]
  }
  const shown = schema.default === undefined ? placeholder(schema) : value(schema.default)
  return [line(`${start}${mark}${name}: ${shown}`, schema)]
}

/** One member of a list of mappings. */
function item(schema: Schema, start: string, given: Record<string, string>): string[] {
  const lines = built(schema).flatMap(([name, inner]) =>
    member(name, name in given ? { ...inner, default: given[name] } : inner, `${start}    `)
  )
  return [lines[0]!.replace(`${start}    `, `${start}  - `), ...lines.slice(1)]
}

function line(text: string, schema: Schema): string {
  return `${text.padEnd(40)} # ${describe(schema)}`
}

/** The members of a mapping that this version has. */
function built(schema: Schema): [string, Schema][] {
  return Object.entries(schema.properties!).filter(([, inner]) => !inner.notBuilt)
}

function value(fallback: unknown): string {
  return stringify(fallback, {
    collectionStyle: 'flow',
    lineWidth: 0,
    defaultStringType: 'QUOTE_DOUBLE'
  })
    .trim()
    .replace(/^"([\w.]+)"$/, '$1')
}

function placeholder(schema: Schema): string {
  if (schema.unit === 'ms') return '30s'
  if (schema.patternProperties !== undefined) return '{}'
  if (schema.type === 'array') return '[]'
  if (schema.enum !== undefined) return String(schema.enum[0])
  return '...'
}

function describe(schema: Schema, isPartOfRestart = false): string {
  const text = schema.description ?? expected(schema as never)
  return schema.restart || isPartOfRestart ? `${text} (needs a restart)` : text
}

/** JSON Schema as editors know it: no keywords of ours, and nothing required that has a default. */
function editorSchema(): object {
  return {
    $schema: 'http://json-schema.org/draft-07/schema#',
    title: 'LLMProxy configuration',
    ...(forEditors(root) as object),
    // A gateway that finds its backends needs none in its file.
    anyOf: [{ required: ['backends'] }, { required: ['discovery'] }]
  }
}

const ENV = { type: 'string', pattern: '\\$\\{' }

function forEditors(schema: Schema): unknown {
  const { description, default: fallback } = schema
  const said = {
    ...(description === undefined ? {} : { description }),
    ...(fallback === undefined ? {} : { default: fallback })
  }
  if (schema.notBuilt) return { description: `${description} (not supported yet)` }
  if (schema.unit !== undefined) {
    return {
      ...said,
      type: ['string', 'integer'],
      pattern: '^(0|(\\d+(\\.\\d+)?[a-zA-Z]+)+|.*\\$\\{.*)$'
    }
  }
  if (schema.anyOf !== undefined) return { ...said, anyOf: schema.anyOf.map(forEditors) }
  if (schema.properties !== undefined) {
    const required = (schema.required ?? []).filter(
      name => schema.properties![name]!.default === undefined
    )
    const object = {
      ...said,
      type: schema.default === undefined ? 'object' : ['object', 'null'],
      properties: Object.fromEntries(
        Object.entries(schema.properties).map(([name, inner]) => [name, forEditors(inner)])
      ),
      ...(required.length === 0 ? {} : { required }),
      additionalProperties: schema.additionalProperties ?? true
    }
    return schema.shorthand === undefined ? object : { anyOf: [{ type: 'string' }, object] }
  }
  if (schema.type === 'array') {
    const { minItems } = schema
    return {
      ...said,
      type: 'array',
      items: forEditors(schema.items!),
      ...(minItems === undefined ? {} : { minItems })
    }
  }
  if (schema.patternProperties !== undefined) {
    return { ...said, type: 'object', additionalProperties: { type: 'string' } }
  }
  if (schema.enum !== undefined) return { ...said, enum: schema.enum }
  if (schema.type === 'string' && schema.pattern !== undefined) {
    return { ...said, type: 'string', pattern: `${schema.pattern}|\\$\\{` }
  }
  const plain = pick(schema, ['type', 'minimum', 'maximum', 'exclusiveMinimum', 'minLength'])
  if (schema.type === 'string' || Array.isArray(schema.type)) return { ...said, ...plain }
  return { ...said, anyOf: [plain, ENV] }
}

function pick(schema: Schema, names: (keyof Schema)[]): object {
  return Object.fromEntries(
    names.filter(name => schema[name] !== undefined).map(name => [name, schema[name]])
  )
}

/** The reference manual: a table for each section. */
function reference(): string {
  const lines = [
    '# Configuration',
    '',
    'One YAML file. `npm start` and `llmproxy` take it from `--config FILE`, else from the environment',
    'variable `LLMPROXY_CONFIG`, else from `/home/llmproxy/config.yaml` (the container’s place), else',
    'from `config/llmproxy.yaml` of the package. `llmproxy check FILE` says whether a file is right.',
    '',
    '- Values may hold `${NAME}` or `${NAME:-default}`; a variable that is not set is an error. `$${`',
    '  stands for `${`.',
    '- Durations have a unit: `500ms`, `30s`, `1m30s`, `1h`. Sizes too: `512KB`, `64MB` (1 KB = 1024).',
    '- An unknown name, a wrong type or a missing value stops the start, with file, line and column.',
    '- `SIGHUP`, `POST /admin/reload`, or a change of the file, reloads it. Running calls keep what they began',
    '  with. A broken file is refused and the last good one stays. What “needs a restart” here stays as it is',
    '  until then, and the log and the answer name it; TLS files are read again when they change.',
    '  `llmproxy diff OLD NEW` says beforehand what differs ([deployment](deployment.md#stop-and-reload)).',
    '- An editor that knows YAML Language Server checks the file as you type with',
    '  `# yaml-language-server: $schema=llmproxy.schema.json` in its first line.',
    '',
    'All options with their defaults in one file: [llmproxy.full.yaml](../config/llmproxy.full.yaml).',
    'This page is made from the same schemas that check the file.'
  ]
  const later: string[] = []
  for (const [name, schema] of Object.entries(root.properties!)) {
    if (schema.notBuilt) {
      later.push(`| \`${name}\` | ${describe(schema)} |`)
      continue
    }
    lines.push('', `## ${name}`, '', `${describe(schema)}.`, '')
    lines.push('| option | type | default | meaning |', '|---|---|---|---|')
    rows(name, schema, lines, later, false)
  }
  lines.push('', '## Not supported yet', '')
  lines.push('These belong to the dialect. They are refused when they are switched on.', '')
  lines.push('| option | what it will be |', '|---|---|', ...later)
  return `${lines.join('\n')}\n`
}

function rows(
  path: string,
  schema: Schema,
  lines: string[],
  later: string[],
  isPartOfRestart: boolean
): void {
  const needsRestart = isPartOfRestart || schema.restart === true
  const inner = schema.items?.properties ?? schema.properties
  const prefix = schema.items?.properties === undefined ? path : `${path}[]`
  for (const [name, option] of Object.entries(inner ?? {})) {
    const full = `${prefix}.${name}`
    if (option.notBuilt) {
      later.push(`| \`${full}\` | ${describe(option)} |`)
      continue
    }
    if ((option.properties ?? option.items?.properties) !== undefined) {
      rows(full, option, lines, later, needsRestart)
      continue
    }
    const isOptional = schema.items?.required ?? schema.required ?? []
    const fallback =
      option.default !== undefined
        ? `\`${value(option.default)}\``
        : isOptional.includes(name)
          ? '**required**'
          : ''
    const type = expected(option as never).replaceAll('|', '\\|')
    const meaning = describe(option, needsRestart)
    lines.push(`| \`${full}\` | ${type} | ${fallback} | ${meaning} |`)
  }
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  for (const [file, make] of Object.entries(FILES)) {
    writeFileSync(new URL(`../${file}`, import.meta.url), make())
    console.log(file)
  }
}
