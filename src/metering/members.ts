/** A member of a JSON object: its name and where its value stands in the bytes. */
export interface Member {
  name: string
  /** First byte of the value and the byte after its last. */
  start: number
  end: number
}

const QUOTE = 0x22
const BACKSLASH = 0x5c

/**
 * Finds the members of a JSON object without parsing their values, so that one of them can be
 * changed and every other byte stays as it came. The text must be valid JSON.
 *
 * @param bytes JSON text in UTF-8
 * @param from where the object's `{` stands, or white space before it
 * @example
 * findMembers(Buffer.from('{"a": 1, "b": [2]}')) // [{ name: 'a', start: 6, end: 7 }, { name: 'b', start: 14, end: 17 }]
 */
export function findMembers(bytes: Buffer, from = 0): Member[] {
  const members: Member[] = []
  let at = skipSpace(bytes, from) + 1
  while (at < bytes.length) {
    at = skipSpace(bytes, at)
    if (bytes[at] !== QUOTE) break
    const nameEnd = skipString(bytes, at)
    const name: string = JSON.parse(bytes.toString('utf8', at, nameEnd))
    const start = skipSpace(bytes, skipSpace(bytes, nameEnd) + 1)
    const end = skipValue(bytes, start)
    members.push({ name, start, end })
    at = skipSpace(bytes, end) + 1
  }
  return members
}

/** The same bytes with `middle` in place of those from `start` to `end`. */
export function splice(bytes: Buffer, start: number, end: number, middle: Buffer): Buffer {
  // Not from Node's pool: it is kept as long as the answer takes, and would keep its neighbours.
  const spliced = Buffer.allocUnsafeSlow(start + middle.length + bytes.length - end)
  bytes.copy(spliced, 0, 0, start)
  middle.copy(spliced, start)
  bytes.copy(spliced, start + middle.length, end)
  return spliced
}

/** Returns the byte after the value that begins here. */
export function skipValue(bytes: Buffer, from: number): number {
  let depth = 0
  let at = from
  while (at < bytes.length) {
    switch (bytes[at]) {
      case QUOTE:
        at = skipString(bytes, at)
        if (depth === 0) return at
        continue
      case 0x7b:
      case 0x5b:
        depth++
        break
      case 0x7d:
      case 0x5d:
        if (depth === 0) return trimEnd(bytes, at)
        depth--
        if (depth === 0) return at + 1
        break
      case 0x2c:
        if (depth === 0) return trimEnd(bytes, at)
        break
    }
    at++
  }
  return at
}

/** In text without a quote for so long (bytes) a native search for the next one is faster than a loop. */
const LONG_TEXT = 64

/** Returns the byte after the string that begins here. */
export function skipString(bytes: Buffer, from: number): number {
  let at = from + 1
  for (;;) {
    const near = Math.min(bytes.length, at + LONG_TEXT)
    for (; at < near; at++) {
      const byte = bytes[at]
      if (byte === QUOTE) return at + 1
      if (byte === BACKSLASH) at++
    }
    if (at >= bytes.length) return bytes.length
    const quote = bytes.indexOf(QUOTE, at)
    if (quote === -1) return bytes.length
    let slashes = 0
    while (quote - 1 - slashes >= at && bytes[quote - 1 - slashes] === BACKSLASH) slashes++
    if (slashes % 2 === 0) return quote + 1
    at = quote + 1
  }
}

/** Returns the first byte from here on that is no white space. */
export function skipSpace(bytes: Buffer, from: number): number {
  let at = from
  while (isSpace(bytes[at])) at++
  return at
}

function trimEnd(bytes: Buffer, end: number): number {
  let at = end
  while (isSpace(bytes[at - 1])) at--
  return at
}

function isSpace(byte: number | undefined): boolean {
  return byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09
}
