import { readFileSync } from 'node:fs'
import { basename } from 'node:path'
import { workerData } from 'node:worker_threads'
import { handOut } from './batches.ts'
import { parseConfig } from './config.ts'
import { fragmentsOf } from './fragments.ts'
import { type Given, toReread } from './reread.ts'

/** The thread that reads a configuration file again, and compares it with the one that runs. */

const { file, running }: Given = workerData

handOut(function* () {
  const { config, ...more } = toReread(
    parseConfig(readFileSync(file, 'utf8'), basename(file), process.env),
    running
  )
  yield* fragmentsOf(config)
  yield more
})
