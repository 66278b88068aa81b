import { Worker } from 'node:worker_threads'

/** Ways to end this process that nothing can hold up. */

/** A reader that has read enough ends a command, and is no error (`llmproxy keys list | head -1`). */
export function endWithReader(): void {
  process.stdout.on('error', ({ code }: NodeJS.ErrnoException) => {
    process.exit(code === 'EPIPE' ? 0 : 1)
  })
}

export const NOT_STOPPED = 'not stopped in time: ending immediately'

/** The thread that watches leaves this much time (ms) to the main one, which can say why. */
const HEAD_START = 1_000

/*
 * `process.exit` waits for threads and for file operations: on a disk that does not respond it waits without limit.
 * The first two functions also run as text, in a thread: they must not use anything but each other.
 */

/** Ends this process immediately, unless Node is too old to call the C library. */
function exitNow(code: number): void {
  try {
    process.emitWarning = () => {}
    const ffi: typeof import('node:ffi') | undefined = process.getBuiltinModule('node:ffi')
    const signature = { _exit: { arguments: ['int32'], return: 'void' } } as const
    ffi?.dlopen(null, signature).functions._exit(code)
  } catch {}
}

/** Ends this process immediately, at worst by a signal. */
function hardExit(code: number): void {
  exitNow(code)
  process.kill(process.pid, 'SIGKILL')
  // Process 1 of a container is immune to signals of its own.
  process.abort()
}

/** Lets `process.exit` call the listeners of `exit`, and then wait for nothing, if that is possible. */
export function exitWithoutWaiting(): void {
  const { reallyExit } = process as unknown as { reallyExit(code: number): void }
  Object.assign(process, {
    reallyExit(code: number) {
      exitNow(code)
      reallyExit.call(process, code)
    }
  })
}

/** Ends this process after `ms`, with exit code 1, unless it has ended before; `onLate` is called first. */
export function endWithin(ms: number, onLate: () => void): void {
  setTimeout(() => {
    onLate()
    endSoon(1)
  }, ms).unref()
  // The main thread may be blocked by then.
  const wait = `Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ${ms + HEAD_START})`
  const watch = new Worker(`${exitNow}\n${wait}\n;(${hardExit})(1)`, { eval: true, execArgv: [] })
  watch.unref()
  watch.on('error', () => {})
}

/** How long (ms) the last lines of a log may take. */
const LAST_WORDS = 200

/** Ends this process as soon as the last log lines can be written. */
export function endSoon(code: number): void {
  setTimeout(() => hardExit(code), LAST_WORDS)
}
