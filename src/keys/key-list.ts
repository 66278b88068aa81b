import { type Static, Type } from 'typebox'
import type { Issue } from '../issues.ts'
import { findIssues } from '../options.ts'
import { complaintsOf, readYaml, type YamlFile } from '../yaml.ts'
import { StaticKeyList } from './static.ts'

/** The text of a file of keys. */

const Content = Type.Object(
  { keys: StaticKeyList('Keys') },
  { additionalProperties: false, secret: true }
)
type Content = Static<typeof Content>

/** A file of keys that can't be used: a line for each error. */
class KeyFileError extends Error {
  override name = 'KeyFileError'
}

/**
 * Reads a list of keys, or a mapping with it as `keys`. The keys are hashed.
 *
 * @throws {KeyFileError}
 */
export function readKeyList(text: string, path: string): Content['keys'] {
  const file = readInParts(text, path) ?? readYaml(text, path, process.env)
  if (file.errors.length > 0) throw new KeyFileError(file.errors.join('\n'))
  const isList = Array.isArray(file.root)
  const content = isList ? { keys: file.root } : file.root
  for (const issue of findIssues(Content, content)) {
    file.issues.push({ ...issue, path: isList ? issue.path.slice(1) : issue.path })
  }
  if (file.issues.length > 0) throw new KeyFileError(complaintsOf(file, path).join('\n'))
  return (content as Content).keys
}

/** Items of a list that are parsed together: the YAML parser takes about 20 KB of memory for each key. */
const ITEMS = 1_000

/** Lines of a file that have some of the items. */
interface Part {
  text: string
  firstLine: number
  /** Index of the first item. */
  first: number
}

/** The same as {@link readYaml}, but with less memory; undefined if the file is not simply one item after the other. */
function readInParts(text: string, path: string): YamlFile | undefined {
  const head = HEAD.exec(text)?.groups
  const parts = head && partsOf(text, head.before!, head.indent!)
  if (parts === undefined || parts.length < 2) return undefined
  const read = ({ text, firstLine }: Part) => readYaml(text, path, process.env, firstLine)
  const base = head!.keys === undefined ? [] : ['keys']
  const root: unknown[] = []
  const issues: Issue[] = []
  for (const part of parts) {
    const file = read(part)
    // An alias of another part is one: the whole may be right.
    if (file.errors.length > 0 || !Array.isArray(file.root)) return undefined
    for (const item of file.root) root.push(item)
    for (const { path, message } of file.issues) {
      const [index, ...rest] = path
      issues.push({ path: [...base, Number(index) + part.first, ...rest], message })
    }
  }
  let latest: { part: Part; file: YamlFile } | undefined
  return {
    root: base.length === 0 ? root : { keys: root },
    errors: [],
    issues,
    fromEnv: new Set(),
    placeOf(path) {
      const [index, ...rest] = path.slice(base.length)
      const part = parts.findLast(({ first }) => first <= Number(index ?? 0)) ?? parts[0]!
      if (latest?.part !== part) latest = { part, file: read(part) }
      return latest.file.placeOf([Number(index ?? 0) - part.first, ...rest])
    }
  }
}

const EMPTY = '(?:[ \\t]*(?:#.*)?\\n)*'
/** Text before the first item: `keys:`, or nothing. */
const HEAD = new RegExp(
  `^(?<before>${EMPTY}(?<keys>keys:[ \\t]*(?:#.*)?\\n)?${EMPTY})(?<indent> *)- `
)

function partsOf(text: string, before: string, indent: string): Part[] | undefined {
  const parts: Part[] = []
  let line = before.split('\n').length
  let items = 0
  let start = before.length
  let firstLine = line
  for (let at = start; at < text.length; line++) {
    const end = (text.indexOf('\n', at) + 1 || text.length + 1) - 1
    const isItem =
      text.startsWith(`${indent}-`, at) && /^ ?$/.test(text[at + indent.length + 1] ?? '')
    const content = text.slice(at, end).search(/[^ ]/)
    if (isItem && items > 0 && items % ITEMS === 0) {
      parts.push({ text: text.slice(start, at), firstLine, first: items - ITEMS })
      start = at
      firstLine = line
    }
    if (isItem) items++
    // Another member, or the end of the document.
    else if (content !== -1 && content <= indent.length && !/[#\r]/.test(text[at + content]!)) {
      return undefined
    }
    at = end + 1
  }
  const first = Math.floor((items - 1) / ITEMS) * ITEMS
  return [...parts, { text: text.slice(start), firstLine, first }]
}
