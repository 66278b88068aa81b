import { type ChildProcess, fork } from 'node:child_process'
import { availableParallelism, cpus, release } from 'node:os'
import { fileURLToPath } from 'node:url'

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

export function machine(): string {
  return `${availableParallelism()} cores of ${cpus()[0]?.model.trim()}, Linux ${release()}`
}
