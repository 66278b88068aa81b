import { once } from 'node:events'
import { parentPort } from 'node:worker_threads'
import type { Issue } from './issues.ts'
import { OptionsError } from './options.ts'
import { startThread, type ThreadName } from './thread.ts'

/**
 * Work that would block the event loop runs in a thread of its own, and its results arrive a batch at a time: a
 * message that is too large blocks, too, when it is read.
 */

interface Failure {
  name: string
  message: string
  issues: Issue[] | undefined
}
type Reply<T> = { value: T } | { isDone: true } | { error: Failure }

interface ThreadOptions {
  /** Input of {@link handOut}. */
  data: unknown
  signal?: AbortSignal
}

/**
 * Runs a thread that calls {@link handOut}, and yields its batches. The next one is asked for when the last one has
 * been used.
 *
 * @throws what the thread has thrown, by its name and message
 */
export async function* batchesOf<T>(
  name: ThreadName,
  { data, signal }: ThreadOptions
): AsyncGenerator<T> {
  const thread = startThread(name, { workerData: data })
  try {
    for (;;) {
      thread.postMessage('next')
      const options = signal === undefined ? {} : { signal }
      const [reply] = (await once(thread, 'message', options)) as [Reply<T>]
      if ('isDone' in reply) return
      if ('error' in reply) throw toError(reply.error)
      yield reply.value
    }
  } finally {
    void thread.terminate()
  }
}

/** The side of the thread: sends a batch of this work each time it is asked for one. */
export function handOut<T>(work: () => Iterable<T>): void {
  const port = parentPort!
  let batches: Iterator<T> | undefined
  port.on('message', () => port.postMessage(nextOf()))

  function nextOf(): Reply<T> {
    try {
      batches ??= work()[Symbol.iterator]()
      const { value, done } = batches.next()
      return done ? { isDone: true } : { value }
    } catch (error) {
      const { name, message, issues } = error as OptionsError
      return { error: { name, message, issues } }
    }
  }
}

function toError({ name, message, issues }: Failure): Error {
  if (issues !== undefined) return new OptionsError(issues)
  return Object.assign(new Error(message), { name })
}

/** Maximum length of the texts in one batch (characters). */
const MAX_LENGTH = 256 * 1024

/** Gathers items into batches whose texts are not too long together. */
export function* gathered<T>(items: Iterable<T>, lengthOf: (item: T) => number): Generator<T[]> {
  let batch: T[] = []
  let length = 0
  for (const item of items) {
    batch.push(item)
    length += lengthOf(item)
    if (length < MAX_LENGTH) continue
    yield batch
    batch = []
    length = 0
  }
  if (batch.length > 0) yield batch
}
