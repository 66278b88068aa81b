/** Where the members of a JSON text are: `JSON.parse` says what is in it, and this says where. */

export type Path = readonly (string | number)[]

/**
 * @param path of a member or an item; it changes after the visit
 * @param offset of the member's name, or of the item
 * @param isRepeated whether the object has had a member of this name before
 */
type Visit = (path: Path, offset: number, isRepeated: boolean) => void

const TOKEN = /[{}[\],]|"(?:[^"\\]+|\\.)*"|[^\s{}[\]:,"]+/g

/**
 * Visits all members and items of a JSON text, in order. The text must be valid.
 *
 * @example
 * const seen = []
 * visitJson('{"a": [1, 2]}', (path, offset) => seen.push(`${path.join('.')} ${offset}`))
 * seen // ['a 1', 'a.0 7', 'a.1 10']
 */
export function visitJson(text: string, visit: Visit): void {
  const path: (string | number)[] = []
  /** Names of the objects that are open; undefined: a list. */
  const open: (Set<string> | undefined)[] = []
  let isName = false
  for (const { 0: token, index } of text.matchAll(TOKEN)) {
    const last = path.length - 1
    if (token === '}' || token === ']') {
      open.pop()
      path.pop()
      isName = false
    } else if (token === ',') {
      isName = open.at(-1) !== undefined
      if (!isName) path[last] = Number(path[last]) + 1
    } else if (isName) {
      const names = open.at(-1)!
      const name: string = JSON.parse(token)
      path[last] = name
      visit(path, index, names.has(name))
      names.add(name)
      isName = false
    } else {
      if (open.length > 0 && open.at(-1) === undefined) visit(path, index, false)
      if (token === '{' || token === '[') {
        isName = token === '{'
        open.push(isName ? new Set() : undefined)
        path.push(0)
      }
    }
  }
}

/** Where a path is in a JSON text, or as near to it as the text goes. */
export function offsetIn(text: string, wanted: Path): number {
  let offset = Math.max(0, text.search(/\S/))
  let depth = 0
  visitJson(text, (path, at) => {
    if (path.length !== depth + 1 || path[depth] !== wanted[depth]) return
    if (path.every((part, index) => part === wanted[index])) {
      depth++
      offset = at
    }
  })
  return offset
}
