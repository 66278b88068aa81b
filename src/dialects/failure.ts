/**
 * Failure that a backend reports inside a response with status 200. `429`: the backend is busy; `4xx`: the
 * request is at fault; `5xx`: the backend is broken.
 */
export type Failure = '429' | '4xx' | '5xx'

/** Fields of one event, or of one JSON body, that can report a failure. Unless noted they are top-level. */
export interface Report {
  /** Value as JSON, also inside a top-level `response`. */
  error: string | undefined
  type: string | undefined
  object: string | undefined
  status: string | undefined
  message: string | undefined
  code: string | undefined
  errorType: string | undefined
  /** The values of `finish_reason` that choices have. */
  finishReasons: readonly string[] | undefined
  /** `choices` is not empty. */
  hasChoices: boolean
  /** There is text of the model. */
  delta: boolean
  /** The event is named `error`, whatever its data is. */
  isErrorEvent: boolean
}

/** How servers end a response that they did not want to end. */
const ABORTED = ['abort', 'error']
/** Strings that servers put into `error` when there is none. */
const NO_ERROR = /^(none|null|nil|undefined|false|no|no[ _-]?errors?|ok|okay|success)?$/i
/** How servers name and describe an overload. */
const BUSY = /overloaded|rate_limit|too_many|queue|busy/i
/** How servers name an error of their own. */
const BROKEN = /server|internal|generation|engine/i
/** How servers name and describe a request that is at fault. */
const CALLERS_FAULT =
  /bad_?request|invalid|validation|not_?found|not found|authentication|permission|exceed|context_length|content_filter|not support|too long|must be|required/i

/** What llama.cpp and others answer with status 500 although the request is at fault. */
const REQUESTS_FAULT =
  /(image|audio|video|multimodal) input|mmproj|not supported|failed to parse|parse error|json\.exception|too large to process|physical batch|does not match the expected|type must be|invalid (request|json|grammar|schema|image|tool)/i

/**
 * Returns how the backend failed according to one event or one JSON body; undefined: it did not.
 *
 * @param types values of `type` that report a failure
 * @param statuses values of `status` that do
 */
export function failureIn(
  report: Report,
  types: readonly string[] = [],
  statuses: readonly string[] = []
): Failure | undefined {
  const { error: json, type = '', object, status = '', message, finishReasons } = report
  const isAborted = finishReasons?.some(reason => ABORTED.includes(reason)) ?? false
  const isNamed =
    report.isErrorEvent || object === 'error' || types.includes(type) || statuses.includes(status)
  // Nearly every event has none of these.
  if (!isAborted && !isNamed && json === undefined && message === undefined) return undefined
  const { code, errorType = type } = report
  const error = parse(json)
  if (!isAborted && !isNamed && !saysError(error, report) && !isFlatError(report)) return undefined
  const details = isObject(error) ? error : { message: error }
  return kindOf({ code, type: errorType, message, ...withoutNulls(details) })
}

/**
 * Whether the message of an error with status 500 says that its request is at fault: another backend would say the same.
 *
 * @example
 * isRequestsFault('image input is not supported') // true
 */
export function isRequestsFault(message: string): boolean {
  return REQUESTS_FAULT.test(message)
}

/** Whether `error` reports one. Beside text of the model only an object with a message or a status does. */
function saysError(error: unknown, { delta }: Report): boolean {
  if (!delta) return isSaid(error)
  return isObject(error) && (isSaid(error.message) || Number(error.code) >= 400)
}

/** Whether the event itself is an error object, as llama.cpp sends it in Messages streams. */
function isFlatError({ type = '', code, message, hasChoices, delta }: Report): boolean {
  const isContent = hasChoices || delta || message === undefined || message === ''
  return !isContent && (Number(code) >= 400 || /error$/i.test(type))
}

/** Whether a value is more than an empty one. */
function isSaid(value: unknown): boolean {
  if (typeof value === 'string') return !NO_ERROR.test(value.trim())
  if (typeof value === 'number') return value !== 0 && Math.floor(value / 100) !== 2
  if (typeof value !== 'object' || value === null) return value === true
  return Object.values(value).some(each =>
    typeof each === 'object' && each !== null ? Object.keys(each).length > 0 : isSaid(each)
  )
}

function kindOf(error: Record<string, unknown>): Failure {
  const { code, type, error_type = type, message } = error
  const status = Number(code)
  if (status === 429) return '429'
  if (status === 500 && isRequestsFault(String(message))) return '4xx'
  if (status >= 500) return '5xx'
  if (status >= 400) return '4xx'
  // Words of a message say less than the kind of error: "CUDA error: invalid argument" is no fault of the caller.
  for (const said of [`${error_type} ${code}`, String(message)]) {
    if (CALLERS_FAULT.test(said)) return '4xx'
    if (BUSY.test(said)) return '429'
    if (BROKEN.test(said)) return '5xx'
  }
  return '5xx'
}

function withoutNulls(object: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(object).filter(([, value]) => value != null))
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function parse(json: string | undefined): unknown {
  if (json === undefined) return undefined
  try {
    return JSON.parse(json)
  } catch {
    // It was cut, or is no JSON.
    return json
  }
}
