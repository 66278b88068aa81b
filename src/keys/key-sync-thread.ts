import { workerData } from 'node:worker_threads'
import { handOut } from '../batches.ts'
import { readSync } from './key-sync.ts'

/** The thread that reads a list of keys from the body of a request. */

handOut(() => readSync(workerData))
