import { randomUUID } from 'node:crypto'
import type { ExplanationGiven, Peers } from './peers.ts'
import type { Decisions, Explanation } from './pool/decisions.ts'

/** How long (ms) the other workers are waited for. */
const PATIENCE = 1_000

/** Finds out why a request went where it did. */
export type Explain = (requestId: string) => Promise<Explanation | undefined>

/** A worker knows of its own requests alone: it asks the others for theirs, and answers them. */
export function explainer(decisions: Decisions, peers: Peers | undefined): Explain {
  const asked = new Map<string, (given: ExplanationGiven) => void>()
  const own = (id: string) => decisions.find(id)?.explain()
  peers?.onNews(news => {
    if (news.kind === 'explained') asked.get(news.question)?.(news)
    if (news.kind !== 'explain') return
    const { question, request } = news
    peers.tell({ kind: 'explained', question, explanation: own(request) ?? null })
  })

  const askOthers = ({ count, tell }: Peers, request: string) =>
    new Promise<Explanation | undefined>(resolve => {
      const question = randomUUID()
      const done = (explanation?: Explanation) => {
        clearTimeout(timer)
        asked.delete(question)
        resolve(explanation)
      }
      const timer = setTimeout(done, PATIENCE)
      let silent = count - 1
      asked.set(question, ({ explanation }) => {
        silent--
        if (explanation !== null) done(explanation)
        else if (silent === 0) done()
      })
      tell({ kind: 'explain', question, request })
    })

  return async id => {
    const explanation = own(id)
    if (explanation !== undefined || peers === undefined || peers.count < 2) return explanation
    return askOthers(peers, id)
  }
}
