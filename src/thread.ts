import { getAsset, isSea } from 'node:sea'
import { Worker, type WorkerOptions } from 'node:worker_threads'

/** The modules below this folder that run in a thread of their own. */
export const THREADS = [
  'config-thread',
  'keys/key-list-thread',
  'keys/key-sync-thread',
  'reporters/outbox-thread',
  'store/sqlite-thread'
] as const
export type ThreadName = (typeof THREADS)[number]

/** Starts a thread from its file, or from inside the single binary, which has no such files. */
export function startThread(name: ThreadName, options: WorkerOptions): Worker {
  // Options of the process, such as --input-type, are invalid for some threads.
  const own = { ...options, execArgv: [] }
  if (isSea()) return new Worker(getAsset(name, 'utf8'), { ...own, eval: true })
  return new Worker(new URL(`./${name}${import.meta.url.slice(-3)}`, import.meta.url), own)
}
