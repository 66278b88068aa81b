import { closeSync, openSync } from 'node:fs'
import { isatty } from 'node:tty'

/**
 * The terminal that this program was started on, if any. A service has none, and nohup redirects input and output: for
 * both SIGHUP never means that a terminal was closed.
 */
const hadTerminal = [0, 1, 2].some(isatty) && isThere()

/** Whether the terminal has been closed since the start. */
export function isTerminalGone(): boolean {
  return hadTerminal && !isThere()
}

function isThere(): boolean {
  try {
    closeSync(openSync('/dev/tty', 'r'))
    return true
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    return code === 'EMFILE' || code === 'ENFILE'
  }
}
