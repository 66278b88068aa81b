import { type ChildProcess, fork } from 'node:child_process'
import { availableParallelism, cpus, release } from 'node:os'
import { setTimeout as pause } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import type { Job } from './load.ts'

/** What bench and soak share: the processes around an entrant, and the machine they run on. */

export interface Helper {
  port: number
  pid: number
  /** One question at a time. */
  ask(message: object): Promise<Record<string, unknown>>
  stop(): void
}

/** Starts one of the bench's own processes; resolves once it is ready. */
export function launch(file: string): Promise<Helper> {
  const child: ChildProcess = fork(fileURLToPath(new URL(file, import.meta.url)), {
    stdio: 'inherit'
  })
  return new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('message', message => {
      resolve({
        port: (message as { port: number }).port,
        pid: child.pid!,
        ask: request =>
          new Promise((answered, failed) => {
            const lost = () => failed(new Error(`${file} has stopped`))
            child.once('exit', lost)
            child.once('message', answer => {
              child.off('exit', lost)
              answered(answer as Record<string, unknown>)
            })
            child.send(request)
          }),
        stop: () => child.disconnect()
      })
    })
  })
}

/** Lets the load do one job; its result is that of the job's kind. */
export async function job<Result>(load: Helper, work: Job): Promise<Result> {
  return (await load.ask(work)).result as Result
}

/** The number of usage events that have arrived. */
export async function count(sink: Helper): Promise<number> {
  return (await sink.ask({})).events as number
}

/** How long (ms) the last usage event may take. */
const DELIVERY_TIMEOUT = 30_000

/** Waits until so many usage events have arrived. */
export async function delivered(sink: Helper, expected: number): Promise<void> {
  const startedAt = performance.now()
  while ((await count(sink)) < expected) {
    if (performance.now() - startedAt > DELIVERY_TIMEOUT) {
      throw new Error(`usage events are missing: ${await count(sink)} of ${expected}`)
    }
    await pause(20)
  }
}

/** Throws unless the entrant has done all of its work. */
export function expectAll(name: string, failed: number, done: number, expected: number): void {
  if (failed > 0 || done !== expected) {
    throw new Error(`${name}: ${done} of ${expected}, ${failed} failed`)
  }
}

export function machine(): string {
  return `${availableParallelism()} cores of ${cpus()[0]?.model.trim()}, Linux ${release()}`
}
