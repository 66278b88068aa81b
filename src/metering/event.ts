import type { Dialect } from '../dialects/dialect.ts'
import type { Failure } from '../dialects/failure.ts'
import type { Usage } from '../exchange.ts'
import type { Framing } from '../http.ts'
import { Counts } from './counts.ts'
import { memberNames } from './meter.ts'
import { JsonWatcher } from './watcher.ts'

/** A text without any of these reports no failure. */
const MAY_FAIL = /error|fail|abort/

/**
 * How the backend failed according to the data of one event, or one JSON body; undefined: it did not.
 *
 * @param isErrorEvent whether the event is named `error`
 * @example
 * failureOf('{"error":{"message":"Loading model","code":503}}', openai, 'sse') // '5xx'
 */
export function failureOf(
  json: string,
  dialect: Dialect,
  framing: Framing,
  isErrorEvent = false
): Failure | undefined {
  if (!isErrorEvent && !MAY_FAIL.test(json)) return undefined
  const bytes = Buffer.from(json)
  const watcher = new JsonWatcher(memberNames(dialect, framing))
  watcher.feed(bytes, 0, bytes.length)
  return dialect.failure({ ...watcher.seen, isErrorEvent })
}

/**
 * Returns the usage that the body of an error response reports; undefined: none.
 *
 * @example
 * usageOfFailure('{"error":{},"usage":{"prompt_tokens":9,"completion_tokens":20}}', openai)?.totalTokens // 29
 */
export function usageOfFailure(json: string, dialect: Dialect): Usage | undefined {
  if (!json.includes('"usage"')) return undefined
  const bytes = Buffer.from(json)
  const watcher = new JsonWatcher(memberNames(dialect, 'json'))
  watcher.feed(bytes, 0, bytes.length)
  const { usage } = watcher.seen
  if (usage === undefined) return undefined
  const counts = new Counts()
  counts.add(usage)
  return counts.toUsage()
}
