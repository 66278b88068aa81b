/**
 * A large value travels to another thread or process in fragments: a message blocks the event loop while it is read. Values
 * are as in JSON.
 */

/** Some members of a list or mapping, or the beginning or end of one that is too large for a fragment. */
export type Fragment = { begin: Name; isList: boolean } | { members: Container } | { isEnd: true }

type Name = string | number
type Container = unknown[] | Record<string, unknown>

/** Maximum size of a fragment (characters and values). */
const SIZE = 64 * 1024

/** Splits a value into fragments, for {@link Assembly}. */
export function* fragmentsOf(value: object, name: Name = ''): Generator<Fragment> {
  const isList = Array.isArray(value)
  let members: Container = isList ? [] : {}
  let room = SIZE
  yield { begin: name, isList }
  for (const [key, member] of membersOf(value)) {
    let rest = roomAfter(member, room)
    if (rest < 0 && room < SIZE) {
      yield { members }
      members = isList ? [] : {}
      room = SIZE
      rest = roomAfter(member, room)
    }
    if (rest < 0 && isContainer(member)) yield* fragmentsOf(member, key)
    else {
      put(members, key, member)
      room = rest
    }
  }
  if (room < SIZE) yield { members }
  yield { isEnd: true }
}

/** Returns what a value leaves of this room; less than 0: it does not fit. */
function roomAfter(value: unknown, room: number): number {
  if (typeof value === 'string') return room - 1 - value.length
  let rest = room - 1
  if (!isContainer(value)) return rest
  for (const [key, member] of membersOf(value)) {
    if (rest < 0) break
    rest = roomAfter(member, rest - String(key).length)
  }
  return rest
}

/** A list or mapping that has begun. */
interface Open {
  name: Name
  target: Container
  before: unknown
  /** Names that it had before, in order. */
  names: string[]
  count: number
  /** Whether it has been as before so far. */
  isSame: boolean
}

/**
 * Puts a value together from the fragments of {@link fragmentsOf}. It is frozen. What is the same as before is the same object,
 * so that comparing it with the one before takes no time.
 */
export class Assembly<T> {
  readonly #before: T | undefined
  /** From the outermost to the innermost. */
  readonly #open: Open[] = []

  constructor(before: T | undefined) {
    this.#before = before
  }

  /** Returns the value when this is its last fragment. */
  add(fragment: Fragment): T | undefined {
    if ('begin' in fragment) this.#begin(fragment.begin, fragment.isList)
    else if ('members' in fragment) this.#addAll(fragment.members)
    else return this.#end()
    return undefined
  }

  #begin(name: Name, isList: boolean): void {
    const outer = this.#open.at(-1)
    const before = outer === undefined ? this.#before : memberOf(outer.before, name)
    const isComparable = isContainer(before) && Array.isArray(before) === isList
    const names = isComparable && !isList ? Object.keys(before) : []
    const target = isList ? [] : {}
    this.#open.push({ name, target, before, names, count: 0, isSame: isComparable })
  }

  #addAll(members: Container): void {
    const { before, count } = this.#open.at(-1)!
    for (const [key, member] of membersOf(members)) {
      const name = typeof key === 'number' ? count + key : key
      const known = memberOf(before, name)
      this.#add(name, isSame(known, member) ? known : freeze(member))
    }
  }

  #add(name: Name, member: unknown): void {
    const open = this.#open.at(-1)!
    const isKnown = typeof name === 'number' || open.names[open.count] === name
    open.isSame &&= isKnown && memberOf(open.before, name) === member
    open.count++
    put(open.target, name, member)
  }

  #end(): T | undefined {
    const { name, target, before, names, count, isSame } = this.#open.pop()!
    const countBefore = Array.isArray(before) ? before.length : names.length
    const value = isSame && count === countBefore ? before : Object.freeze(target)
    if (this.#open.length === 0) return value as T
    this.#add(name, value)
    return undefined
  }
}

/** Freezes a value and all that is in it. */
export function freeze<T>(value: T): T {
  if (isContainer(value) && !Object.isFrozen(value)) {
    for (const [, member] of membersOf(value)) freeze(member)
    Object.freeze(value)
  }
  return value
}

function isContainer(value: unknown): value is Container {
  return typeof value === 'object' && value !== null
}

export function membersOf<T>(value: Record<string, T>): Generator<[string, T]>
export function membersOf(value: object): Generator<[Name, unknown]>
export function* membersOf(value: object): Generator<[Name, unknown]> {
  if (Array.isArray(value)) yield* value.entries()
  else for (const name of Object.keys(value)) yield [name, memberOf(value, name)]
}

function memberOf(value: unknown, name: Name): unknown {
  if (!isContainer(value) || !Object.hasOwn(value, name)) return undefined
  return (value as Record<Name, unknown>)[name]
}

/** To a list a member is appended. */
function put(target: Container, name: Name, member: unknown): void {
  if (Array.isArray(target)) target.push(member)
  else if (name !== '__proto__') target[name] = member
  else Object.defineProperty(target, name, { value: member, enumerable: true })
}

/** Whether two values are the same, with the order of their members: the first model that fits counts. */
function isSame(one: unknown, other: unknown): boolean {
  if (!isContainer(one) || !isContainer(other)) return Object.is(one, other)
  const names = Object.keys(one)
  const others = Object.keys(other)
  return (
    Array.isArray(one) === Array.isArray(other) &&
    names.length === others.length &&
    names.every(
      (name, at) => name === others[at] && isSame(memberOf(one, name), memberOf(other, name))
    )
  )
}
