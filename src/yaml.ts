import {
  type Document,
  isAlias,
  isMap,
  isScalar,
  isSeq,
  LineCounter,
  type Node,
  type Pair,
  parseDocument
} from 'yaml'
import { andMore, firstOf, formatPath, type Issue, MAX_NAMED } from './issues.ts'
import { offsetIn, visitJson } from './json.ts'

/** A YAML file as plain values, and the places of all of them. */
export interface YamlFile {
  root: unknown
  /** The text is not YAML: a line for each error. Nothing else can be said then. */
  errors: string[]
  /** What was found so far; whoever checks the values adds to it. */
  issues: Issue[]
  /** Paths whose values came from the environment. */
  fromEnv: Set<string>
  /** Where a path is, or as near to it as the file goes. */
  placeOf(path: Issue['path']): Place
}

/** Both begin with 1. */
export interface Place {
  line: number
  column: number
}

/** A text that is being read. */
interface Reading {
  env: NodeJS.ProcessEnv
  issues: Issue[]
  fromEnv: Set<string>
}

/** A document that is being read. */
interface DocumentReading extends Reading {
  document: Document
  /** Nodes that are being read: an alias of one of them has no end. */
  open: Set<unknown>
}

/**
 * Reads YAML, or JSON, with `${NAME}` and `${NAME:-default}` in its values. JSON is parsed as JSON: the YAML parser
 * takes a hundred times as long, and a kilobyte of memory for each value.
 *
 * @param firstLine number of the first line, where the text is part of a file
 * @example
 * readYaml('a: ${A:-1}', 'file.yaml', {}).root // { a: '1' }
 */
export function readYaml(
  text: string,
  name: string,
  env: NodeJS.ProcessEnv,
  firstLine = 1
): YamlFile {
  const reading: Reading = { env, issues: [], fromEnv: new Set() }
  const json = parseJson(text)
  if (json !== undefined) return readJson(json, text, name, reading)
  const lines = new LineCounter()
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false })
  const place = (offset: number): Place => {
    const { line, col: column } = lines.linePos(offset)
    return { line: line + firstLine - 1, column }
  }
  const errors = firstOf(
    [...document.errors, ...document.warnings],
    ({ pos, message }) => `${name}:${toText(place(pos[0]))} ${message}`
  )
  if (errors.length === 0) {
    try {
      // Follows every alias once, and finds those that lead nowhere, in circles or to too much.
      document.toJS({ maxAliasCount: 100 })
    } catch (error) {
      errors.push(`${name}:1:1 ${(error as Error).message}`)
    }
  }
  const all = { ...reading, document, open: new Set() }
  const root = errors.length > 0 ? undefined : toPlain(document.contents as Node, [], all)
  const placeOf = (path: Issue['path']) => place(offsetOf(document.contents, path))
  return { ...reading, root: root ?? {}, errors, placeOf }
}

/** The first issues in the order of the file, each with its name, line and column. */
export function complaintsOf({ issues, fromEnv, placeOf }: YamlFile, name: string): string[] {
  const lines = issues
    // Finding a place takes as long as reading the file.
    .slice(0, MAX_NAMED)
    .map(issue => ({ ...issue, place: placeOf(issue.path) }))
    .sort(({ place: a }, { place: b }) => a.line - b.line || a.column - b.column)
    .map(({ path, message, place }) => {
      // A value from the environment may be a secret.
      const shown = fromEnv.has(formatPath(path))
        ? message.replace(/ \(got .*\)$/s, ' (got the value of an environment variable)')
        : message
      return `${name}:${toText(place)} ${formatPath(path)} ${shown}`
    })
  return andMore(lines, issues.length)
}

function toText({ line, column }: Place): string {
  return `${line}:${column}`
}

/** An object or a list; undefined: it is YAML, if anything. */
function parseJson(text: string): object | undefined {
  if (!/^\s*[{[]/.test(text)) return undefined
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

function readJson(json: object, text: string, name: string, reading: Reading): YamlFile {
  const place = (offset: number): Place => {
    const lines = text.slice(0, offset).split('\n')
    return { line: lines.length, column: lines.at(-1)!.length + 1 }
  }
  const repeated: number[] = []
  visitJson(text, (_, offset, isRepeated) => {
    if (isRepeated) repeated.push(offset)
  })
  const errors = firstOf(
    repeated,
    offset => `${name}:${toText(place(offset))} Map keys must be unique`
  )
  const root = errors.length > 0 ? {} : filled(json, [], reading)
  return { ...reading, root, errors, placeOf: path => place(offsetIn(text, path)) }
}

/** A value of JSON with the environment put in, in place. Members without a value are taken out. */
function filled(value: unknown, path: Issue['path'], reading: Reading): unknown {
  if (typeof value === 'string') return substituted(value, path, reading)
  if (typeof value !== 'object' || value === null) return value
  const members = value as Record<string, unknown>
  const isList = Array.isArray(value)
  for (const name of Object.keys(members)) {
    path.push(isList ? Number(name) : name)
    const member = filled(members[name], path, reading)
    if (isList || (member !== null && member !== undefined)) members[name] = member
    else delete members[name]
    path.pop()
  }
  return value
}

/** A text with the environment put in; undefined: something is wrong with it. */
function substituted(value: string, path: Issue['path'], reading: Reading): string | undefined {
  if (!value.includes('${')) return value
  const wrong: string[] = []
  const text = substitute(value, reading.env, wrong)
  if (wrong.length > 0) {
    reading.issues.push({ path: [...path], message: wrong.join(', ') })
    return undefined
  }
  reading.fromEnv.add(formatPath(path))
  return text
}

/** The document as plain values, with the environment put in. Members without a value are left out. */
function toPlain(
  node: Node | null | undefined,
  path: Issue['path'],
  reading: DocumentReading
): unknown {
  if (isAlias(node)) {
    const target = node.resolve(reading.document)
    if (!reading.open.has(target)) return toPlain(target, path, reading)
    reading.issues.push({ path, message: 'refers to itself' })
    return undefined
  }
  reading.open.add(node)
  const plain = plainValue(node, path, reading)
  reading.open.delete(node)
  return plain
}

function plainValue(
  node: Node | null | undefined,
  path: Issue['path'],
  reading: DocumentReading
): unknown {
  if (isSeq(node)) {
    return node.items.map((item, at) => toPlain(item as Node, [...path, at], reading))
  }
  if (isMap(node)) {
    const merged: Record<string, unknown> = {}
    const own: Record<string, unknown> = {}
    for (const { key, value } of node.items) {
      const name = String(isScalar(key) ? key.value : key)
      const isMerge = name === '<<'
      const plain = toPlain(value as Node, isMerge ? path : [...path, name], reading)
      if (isMerge) Object.assign(merged, ...[plain].flat().reverse())
      else if (plain !== null && plain !== undefined) own[name] = plain
    }
    return { ...merged, ...own }
  }
  if (!isScalar(node)) return undefined
  if (typeof node.value === 'object' && node.value !== null) {
    reading.issues.push({ path, message: 'must be plain text, a number or a truth value' })
    return undefined
  }
  return typeof node.value === 'string' ? substituted(node.value, path, reading) : node.value
}

const VARIABLE = /\$\$\{|\$\{(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?/g

/**
 * Puts the environment into a text: `${NAME}`, `${NAME:-default}`; `$${` stands for `${`.
 * A variable that is empty takes the default, as in a shell; white space around a value, such as the
 * line end of a secret's file, is no part of it.
 *
 * @param wrong what is wrong with it is added here
 */
export function substitute(value: string, env: NodeJS.ProcessEnv, wrong: string[]): string {
  return value.replace(
    VARIABLE,
    (whole, name: string | undefined, fallback: string | undefined) => {
      if (whole === '$${') return '${'
      if (name === undefined) {
        wrong.push(
          'holds a "${" that is not "${NAME}" or "${NAME:-default}"; write "$${" for the text'
        )
        return ''
      }
      const found = env[name]?.trim()
      if (found !== undefined && (found !== '' || fallback === undefined)) return found
      if (fallback === undefined) {
        wrong.push(`needs the environment variable \${${name}}, which is not set`)
      }
      return fallback ?? ''
    }
  )
}

/** Where in the file a path stands: at its name, or as near to it as the file goes. */
function offsetOf(node: unknown, path: Issue['path']): number {
  let offset = (node as Node | null)?.range?.[0] ?? 0
  let at = node
  for (const part of path) {
    if (isMap(at)) {
      const pair: Pair | undefined = at.items.find(
        ({ key }) => String(isScalar(key) ? key.value : key) === String(part)
      )
      if (pair === undefined) return offset
      offset = (pair.key as Node).range?.[0] ?? offset
      at = pair.value
    } else if (isSeq(at)) {
      at = at.items[Number(part)]
      offset = (at as Node | undefined)?.range?.[0] ?? offset
    } else return offset
  }
  return offset
}
