import { setImmediate as afterEvents } from 'node:timers'

/**
 * Preloaded into a gateway: writes a line whenever one turn of the event loop took more CPU time than any before it.
 * CPU time, because wall time also counts what other processes do.
 */

let worst = 0
let before = 0
process.on('SIGWINCH', () => {
  worst = 0
})

function look() {
  const { user, system } = process.threadCpuUsage()
  const ms = (user + system - before) / 1000
  before = user + system
  if (ms > worst) {
    worst = ms
    process.stdout.write(`${JSON.stringify({ msg: 'longest turn', ms })}\n`)
  }
  afterEvents(look)
}
look()
