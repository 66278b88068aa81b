import { setImmediate as afterEvents } from 'node:timers'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { isMainThread } from 'node:worker_threads'

/**
 * Preloaded into a gateway: writes a line whenever one turn of the event loop took more CPU time than any before it.
 * CPU time, because wall time also counts what other processes do. Threads may take their time. SIGWINCH begins anew, and
 * writes the size of the heap after a collection.
 */

setFlagsFromString('--expose-gc')
const gc = runInNewContext('gc')

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
  if (ms > worst) {
    worst = ms
    process.stdout.write(`${JSON.stringify({ msg: 'longest turn', ms, pid: process.pid })}\n`)
  }
  afterEvents(look)
}
if (isMainThread) look()
