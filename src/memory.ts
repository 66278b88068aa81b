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
 * or the latest rush has needed: V8 keeps that for some collections more.
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

/** How long (ms) nothing may have been forwarded: after the start, and after work. */
const FRESH_MS = 3_000
const IDLE_MS = 45_000
/** Fewer than this have not warmed anything up. */
const FRESH_EXCHANGES = 10
/** How often (ms) freed memory is given back at work: it takes a millisecond. */
const TRIM_MS = 5_000

/**
 * V8 keeps the memory of the start, and of the busiest moment. When nothing has been forwarded for a
 * while it is told, once, to give back what it can. That pauses the process for some 50 ms and costs it
 * its compiled code, so it is not done in every lull. What compiling has left is given back at work, too.
 */
export function giveMemoryBack(exchanges: Exchanges): NodeJS.Timeout {
  let forwarded = -1
  let idleSince = 0
  let trimmedAt = 0
  return setInterval(() => {
    const now = performance.now()
    const wait = exchanges.forwarded < FRESH_EXCHANGES ? FRESH_MS : IDLE_MS
    if (exchanges.forwarded !== forwarded || exchanges.open.length > 0) {
      forwarded = exchanges.forwarded
      idleSince = now
      if (now - trimmedAt < TRIM_MS) return
      trimMalloc()
      trimmedAt = now
    } else if (now - idleSince >= wait) {
      collectGarbage()
      idleSince = Number.POSITIVE_INFINITY
    }
  }, 1_000).unref()
}
