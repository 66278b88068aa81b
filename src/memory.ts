import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { Exchanges } from './exchange.ts'

/**
 * When answers take long V8 decides that what is made for them is old from the start. Short ones then leave
 * old garbage behind, which holds young garbage, and each collection of the young takes milliseconds.
 */
export function keepYoung(): void {
  setFlagsFromString('--no-allocation-site-pretenuring')
}

/**
 * Everything that is not in use goes back to the operating system, the code included that only the start
 * has needed: V8 keeps that for some collections more.
 */
export function collectGarbage(): void {
  for (const flag of ['--expose-gc', '--stress-flush-code', '--flush-baseline-code']) {
    setFlagsFromString(flag)
  }
  runInNewContext('gc')({ type: 'major', execution: 'sync', flavor: 'last-resort' })
  setFlagsFromString('--no-stress-flush-code')
  trimMalloc()
}

/**
 * What lay beside V8's heap, sockets and parsers above all, is free after a rush and in pieces: glibc keeps
 * such memory until it is asked. Where there is no glibc, or Node is too old to ask it, it stays.
 */
function trimMalloc(): void {
  const { emitWarning } = process
  // That node:ffi is experimental is known here and of no use to whoever reads the log.
  process.emitWarning = () => {}
  try {
    const ffi: typeof import('node:ffi') | undefined = process.getBuiltinModule('node:ffi')
    const libc = ffi?.dlopen('libc.so.6', {
      malloc_trim: { arguments: ['uint64'], return: 'int32' }
    })
    libc?.functions.malloc_trim(0n)
    libc?.lib.close()
  } catch {
  } finally {
    process.emitWarning = emitWarning
  }
}

let latestResident = 0

/** Resident memory (bytes); as it was last while the process has no descriptor left to read it. */
function residentBytes(): number {
  try {
    latestResident = process.memoryUsage.rss()
  } catch {}
  return latestResident
}

/** How long (ms) nothing may have been forwarded after the start, and how much at most. */
const FRESH_MS = 3_000
const FRESH_EXCHANGES = 10
/** Fewer exchanges at once leave nothing behind that is worth it, unless the process has grown by that much (bytes). */
const RUSH = 1_000
const GROWN = 256 * 1024 * 1024
/** A rush is over when there have been this part of its exchanges, or fewer, for so long (ms). */
const PART = 1 / 4
const QUIET_MS = 45_000
/** The part of the time that giving back freed memory at work may take. */
const TRIM_PART = 1 / 250
/**
 * Giving back takes about a millisecond per megabyte, so it waits while request bodies exceed this size (bytes).
 * The weight of a body halves every second.
 */
const MAX_BODIES = 4 * 1024 * 1024

/**
 * V8 keeps the memory of the start, and of the busiest moment, until it is told to give back what it can. That
 * pauses the process for some 50 ms, and costs it its compiled code: that rests on the shapes of objects, and V8
 * forgets both when it finds no such object, as there is no exchange in a lull. So it is told so after the start,
 * unless there is work at once, and after a rush, and its own collections in lulls are off: `--no-memory-reducer`,
 * with which the gateway is started. What compiling has left, and what lay beside V8's heap, is given back at work,
 * too: once a second while request bodies are small, else some seconds after the last large ones.
 *
 * @param trim gives back what lies beside V8's heap
 */
export function giveMemoryBack(exchanges: Exchanges, trim = trimMalloc): NodeJS.Timeout {
  let isFresh = true
  let forwarded = -1
  let peak = 0
  let quietSince = performance.now()
  let size = residentBytes()
  let isTrimDue = false
  let trimAt = 0
  let { total } = exchanges.bodies
  let recent = 0
  return setInterval(() => {
    const now = performance.now()
    const open = exchanges.open.length
    const isWorking = open > 0 || exchanges.forwarded !== forwarded
    forwarded = exchanges.forwarded
    if (forwarded >= FRESH_EXCHANGES) isFresh = false
    if (open > peak) peak = open
    const isQuiet = isFresh ? !isWorking : open <= peak * PART
    if (!isQuiet) quietSince = now
    const wait = isFresh ? FRESH_MS : QUIET_MS
    const isWorthIt = isFresh || peak >= RUSH || residentBytes() > size + GROWN
    if (now - quietSince >= wait && isWorthIt) {
      collectGarbage()
      isFresh = false
      peak = open
      size = residentBytes()
      quietSince = now
    }
    if (isWorking) isTrimDue = true
    recent = recent / 2 + exchanges.bodies.total - total
    total = exchanges.bodies.total
    if (!isTrimDue || now < trimAt || recent > MAX_BODIES) return
    trim()
    isTrimDue = false
    trimAt = now + (performance.now() - now) / TRIM_PART
  }, 1_000).unref()
}
