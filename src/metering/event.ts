import type { Dialect } from '../dialects/dialect.ts'
import type { Failure } from '../dialects/failure.ts'
import type { Framing } from '../http.ts'
import { memberNames } from './meter.ts'
import { JsonWatcher } from './watcher.ts'

/** A text without any of these reports no failure. */
const MAY_FAIL = /error|fail|abort/

/**
 * How the backend failed according to the data of one event, or one JSON body; undefined: it did not.
 *
 * @example
 * failureOf('{"error":{"message":"Loading model","code":503}}', openai, 'sse') // '5xx'
 */
export function failureOf(json: string, dialect: Dialect, framing: Framing): Failure | undefined {
  if (!MAY_FAIL.test(json)) return undefined
  const bytes = Buffer.from(json)
  const watcher = new JsonWatcher(memberNames(dialect, framing))
  watcher.feed(bytes, 0, bytes.length)
  return dialect.failure(watcher.seen)
}
