import { setTimeout as sleep } from 'node:timers/promises'
import { parentPort, workerData } from 'node:worker_threads'

/** The callers of the storm, in a thread of their own, so that they do not delay what the backend sees. */

const { callers, keys, maxTokens } = workerData as {
  callers: number
  keys: string[]
  maxTokens: number
}
let urls: string[] = []
let isOver = false
const seen = { ok: 0, refused: 0, broken: 0, other: 0 }

async function call(index: number): Promise<void> {
  const key = keys[index % keys.length]!
  const body = JSON.stringify({ model: key, stream: true, max_tokens: maxTokens, messages: [] })
  while (!isOver) {
    const isLeaving = Math.random() < 0.2
    const signal = isLeaving ? AbortSignal.timeout(Math.ceil(Math.random() * 300)) : null
    try {
      const answer = await fetch(
        `${urls[Math.floor(Math.random() * urls.length)]}/v1/chat/completions`,
        {
          method: 'POST',
          headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
          body,
          signal
        }
      )
      await answer.text()
      if (answer.status === 200) seen.ok++
      else if (answer.status === 429) seen.refused++
      else seen.other++
      if (answer.status !== 200) await sleep(50 + Math.random() * 100)
    } catch {
      seen.broken++
      await sleep(20)
    }
  }
}

let running: Promise<unknown> | undefined
parentPort!.on('message', async (order: string[] | 'stop') => {
  if (order !== 'stop') {
    urls = order
    running ??= Promise.all(Array.from({ length: callers }, (_, index) => call(index)))
    return
  }
  isOver = true
  await running
  parentPort!.postMessage(seen)
  parentPort!.close()
})
