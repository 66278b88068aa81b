import { readFileSync } from 'node:fs'
import { basename } from 'node:path'
import { workerData } from 'node:worker_threads'
import { handOut } from './batches.ts'
import { parseConfig } from './config.ts'

/** The thread that reads a configuration file again. */

const file: string = workerData

handOut(() => [parseConfig(readFileSync(file, 'utf8'), basename(file), process.env)])
