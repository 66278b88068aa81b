import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { Exchanges } from './exchange.ts'

/**
 * Has V8 keep what it knows of a gateway, whose calls are short and long, many and none:
 *
 * - When answers take long V8 decides that what is made for them is old from the start. Short ones then leave
 *   old garbage behind, which holds young garbage, and each collection of the young takes milliseconds.
 * - Compiled code rests on the shapes of objects, and V8 throws both away when a few collections have found no
 *   such object: that is so of exchanges and sockets after a lull. Compiling all anew doubled what a request costs.
 *   Its collections in lulls would do so at once: `--no-memory-reducer`, with which the gateway is started, leaves
 *   those to {@link giveMemoryBack}.
 */
export function tuneV8(): void {
  setFlagsFromString('--no-allocation-site-pretenuring')
  setFlagsFromString('--retain-maps-for-n-gc=1000000')
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

/** What is left of a rush goes back, and what is compiled stays. The second collection lets go of empty pages. */
function collectGently(): void {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc')
  for (let times = 1; times <= 2; times++) collect({ type: 'major', execution: 'sync' })
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

/** How long (ms) nothing may have been forwarded after the start, and how much at most. */
const FRESH_MS = 3_000
const FRESH_EXCHANGES = 10
/** Fewer exchanges at once leave nothing behind that is worth a pause. */
const RUSH = 100
/** A rush is over when there have been this part of its exchanges, or fewer, for so long (ms). */
const PART = 1 / 4
const QUIET_MS = 45_000
/** How often (ms) freed memory is given back at work: it takes a millisecond. */
const TRIM_MS = 5_000

/**
 * V8 keeps the memory of the start, and of the busiest moment, until it is told to give back what it can. The
 * one time costs its compiled code, the other a pause of some 50 ms. What compiling has left, and what lay
 * beside V8's heap, is given back at work, too.
 */
export function giveMemoryBack(exchanges: Exchanges): NodeJS.Timeout {
  let isFresh = true
  let forwarded = -1
  let peak = 0
  let quietSince = performance.now()
  let trimmedAt = 0
  return setInterval(() => {
    const now = performance.now()
    const open = exchanges.open.length
    const isWorking = open > 0 || exchanges.forwarded !== forwarded
    forwarded = exchanges.forwarded
    if (forwarded >= FRESH_EXCHANGES) isFresh = false
    if (open > peak) peak = open
    const isQuiet = isFresh ? !isWorking : peak >= RUSH && open <= peak * PART
    if (!isQuiet) quietSince = now
    else if (now - quietSince >= (isFresh ? FRESH_MS : QUIET_MS)) {
      if (isFresh) collectGarbage()
      else collectGently()
      isFresh = false
      peak = open
    }
    if (!isWorking || now - trimmedAt < TRIM_MS) return
    trimMalloc()
    trimmedAt = now
  }, 1_000).unref()
}
