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
import { formatPath, type Issue } from './issues.ts'

/** A YAML file as plain values, and the places of all of them. */
export interface YamlFile {
  root: unknown
  /** The text is not YAML: a line for each error. Nothing else can be said then. */
  errors: string[]
  /** What was found so far; whoever checks the values adds to it. */
  issues: Issue[]
  /** Paths whose values came from the environment. */
  fromEnv: Set<string>
  /** The issues, each with file, line and column, in the order of the file. */
  complaints(): string[]
}

/** A document that is being read. */
interface Reading {
  document: Document
  env: NodeJS.ProcessEnv
  issues: Issue[]
  fromEnv: Set<string>
  /** Nodes that are being read: an alias of one of them has no end. */
  open: Set<unknown>
}

/**
 * Reads YAML with `${NAME}` and `${NAME:-default}` in its values.
 *
 * @example
 * readYaml('a: ${A:-1}', 'file.yaml', {}).root // { a: '1' }
 */
export function readYaml(text: string, name: string, env: NodeJS.ProcessEnv): YamlFile {
  const lines = new LineCounter()
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false })
  const reading: Reading = { document, env, issues: [], fromEnv: new Set(), open: new Set() }
  const place = (offset: number) => {
    const { line, col } = lines.linePos(offset)
    return `${name}:${line}:${col}`
  }
  const errors = [...document.errors, ...document.warnings].map(
    ({ pos, message }) => `${place(pos[0])} ${message}`
  )
  if (errors.length === 0) {
    try {
      // Follows every alias once, and finds those that lead nowhere, in circles or to too much.
      document.toJS({ maxAliasCount: 100 })
    } catch (error) {
      errors.push(`${name}:1:1 ${(error as Error).message}`)
    }
  }
  const root = errors.length > 0 ? undefined : toPlain(document.contents as Node, [], reading)
  return {
    root: root ?? {},
    errors,
    issues: reading.issues,
    fromEnv: reading.fromEnv,
    complaints: () =>
      reading.issues
        .map(issue => ({ ...issue, offset: offsetOf(document.contents, issue.path) }))
        .sort((a, b) => a.offset - b.offset)
        .map(({ path, message, offset }) => {
          // What came from the environment may be a secret.
          const shown = reading.fromEnv.has(formatPath(path))
            ? message.replace(/ \(got .*\)$/s, ' (got the value of an environment variable)')
            : message
          return `${place(offset)} ${formatPath(path)} ${shown}`
        })
  }
}

/** The document as plain values, with the environment put in. Members without a value are left out. */
function toPlain(node: Node | null | undefined, path: Issue['path'], reading: Reading): unknown {
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

function plainValue(node: Node | null | undefined, path: Issue['path'], reading: Reading): unknown {
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
  if (typeof node.value !== 'string' || !node.value.includes('${')) return node.value
  const wrong: string[] = []
  const filled = substitute(node.value, reading.env, wrong)
  if (wrong.length > 0) {
    reading.issues.push({ path, message: wrong.join(', ') })
    return undefined
  }
  reading.fromEnv.add(formatPath(path))
  return filled
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
