import { readFileSync } from 'node:fs'
import { workerData } from 'node:worker_threads'
import { gathered, handOut } from '../batches.ts'
import { readKeyList } from './key-list.ts'
import { type KeptKey, toKept } from './static.ts'

/** The thread that reads a file of keys. */

const path: string = workerData

handOut(() => gathered(kept(), ([hash, fields]) => hash.length + fields.length))

function* kept(): Generator<KeptKey> {
  for (const key of readKeyList(readFileSync(path, 'utf8'), path)) yield toKept(key)
}
