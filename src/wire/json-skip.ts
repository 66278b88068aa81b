/** Finds the ends of values in JSON that is known to be valid. */

const QUOTE = 0x22
const BACKSLASH = 0x5c

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
