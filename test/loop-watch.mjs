import { setImmediate as afterEvents } from 'node:timers'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { isMainThread } from 'node:worker_threads'

/**
 * Preloaded into a gateway: writes a line whenever one turn of the event loop took more CPU time than any before it, and for
 * each turn above 20 ms. CPU time, because wall time also counts what other processes do. Threads may take their time. SIGWINCH begins anew, and
 * writes the size of the heap after a collection.
 */

setFlagsFromString('--expose-gc')
const gc = runInNewContext('gc')

const LONG_TURN = 20
let worst = 0
let before = 0
process.on('SIGWINCH', () => {
  gc()
  // The turns of these collections do not count.
  worst = Number.POSITIVE_INFINITY
  // What was collected may have kept more alive.
  afterEvents(writeHeap)
})

function writeHeap() {
  gc()
  const { heapUsed, external } = process.memoryUsage()
  process.stdout.write(`${JSON.stringify({ msg: 'heap', bytes: heapUsed + external })}\n`)
  before = cpu()
  worst = 0
}

/** CPU time (µs) of this thread. */
function cpu() {
  const { user, system } = process.threadCpuUsage()
  return user + system
}

function look() {
  const now = cpu()
  const ms = (now - before) / 1000
  before = now
  const isCounted = worst !== Number.POSITIVE_INFINITY
  if (isCounted && ms > LONG_TURN) write('long turn', ms)
  if (isCounted && ms > worst) {
    worst = ms
    write('longest turn', ms)
  }
  afterEvents(look)
}

function write(msg, ms) {
  process.stdout.write(`${JSON.stringify({ msg, ms, pid: process.pid })}\n`)
}

if (isMainThread) look()
