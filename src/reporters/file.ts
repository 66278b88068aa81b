import { resolve } from 'node:path'
import { type Static, Type } from 'typebox'
import { fileOptions, RotatingFile } from '../logs/rotating-file.ts'
import { type Receiver, recordJson, type Verdict, whileRunning } from './reporter.ts'

export const FileReporterOptions = Type.Object(fileOptions(undefined, 0), {
  additionalProperties: false,
  description: 'A file that receives usage records, a JSON object a line'
})
export type FileReporterOptions = Static<typeof FileReporterOptions>

/** Writes usage records into a file, in their order. What it says is delivered is on the disk. */
export class FileReporter implements Receiver {
  readonly concurrency = 1
  readonly batch = { max_events: 1000, max_wait: 100 }
  readonly wantsBody = false
  readonly #file: RotatingFile

  constructor(options: FileReporterOptions, dataDir = '.') {
    const path = resolve(dataDir, options.path)
    this.#file = new RotatingFile({ ...options, path }, { mode: 0o600, isSafe: true })
  }

  send(entries: readonly string[], signal: AbortSignal): Promise<Verdict> {
    const lines = entries.map(each => `${recordJson(each, false)}\n`)
    return whileRunning(signal, async () => {
      try {
        await this.#file.write(Buffer.from(lines.join('')))
        return { kind: 'delivered' }
      } catch (error) {
        return { kind: 'unavailable', reason: (error as Error).message, retryAfter: 0 }
      }
    })
  }

  close(): Promise<void> {
    return this.#file.close()
  }
}
