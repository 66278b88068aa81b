import { constants } from 'node:os'
import { isTerminalGone } from './terminal.ts'

/**
 * Signals, from the first line of the program on. One that stops it is kept until there is something to stop. This
 * file must load fast: no more than Node's own modules.
 */

export interface SignalHandlers {
  /** The first signal that stops the program. */
  stop(): void
  /** One more of them. */
  stopNow(signal: NodeJS.Signals): void
  reload(): void
}

/** All that are handled here. */
export const SIGNALS = ['SIGTERM', 'SIGINT', 'SIGQUIT', 'SIGHUP'] as const
/** Interrupts that follow within this time (ms) are one press of Ctrl-C: npm passes it on once more. */
const SAME_KEY = 300

let handlers: SignalHandlers = { stop() {}, stopNow: () => process.exit(1), reload() {} }
/** The first signal that was to stop the program. */
let received: NodeJS.Signals | undefined
let interruptedAt = Number.NEGATIVE_INFINITY

export function receiveSignals(): void {
  for (const signal of SIGNALS) process.on(signal, receive)
}

/** The signals of workers are the primary's: a terminal sends them to all processes. */
export function ignoreSignals(): void {
  for (const signal of SIGNALS) process.on(signal, () => {})
}

/** Hands signals over, also one that was received before. */
export function handleSignals(next: SignalHandlers): void {
  handlers = next
  if (received !== undefined) next.stop()
}

/** Gives signals back to the system, for what ends by itself. */
export function releaseSignals(): void {
  for (const signal of SIGNALS) process.off(signal, receive)
  if (received !== undefined) process.exit(128 + constants.signals[received])
}

/** Stops the program, unless it is stopping. */
export function stop(signal: NodeJS.Signals): void {
  if (received !== undefined) return
  received = signal
  handlers.stop()
}

function receive(signal: NodeJS.Signals): void {
  if (signal === 'SIGHUP') {
    // A shell that ends sends it a second time: that is no demand to hurry.
    if (isTerminalGone()) stop(signal)
    else if (received === undefined) handlers.reload()
    return
  }
  if (signal === 'SIGINT') {
    const isSameKey = performance.now() - interruptedAt < SAME_KEY
    interruptedAt = performance.now()
    if (isSameKey) return
  }
  if (received === undefined) stop(signal)
  else handlers.stopNow(signal)
}
