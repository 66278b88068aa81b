import { isPlain } from '../follow.ts'
import { CommandError } from './command.ts'

/** How the program ends after an error. */
export interface Failure {
  /** An error of the operating system in a line; an unexpected one with its stack, for a report. */
  message: string
  /** 2: the command line is wrong; 1: it could not be carried out. */
  exitCode: 1 | 2
}

export function toFailure(error: NodeJS.ErrnoException): Failure {
  const exitCode = isMisuse(error) ? 2 : 1
  if (isPlain(error)) return { message: error.message, exitCode }
  return { message: `llmproxy: ${explain(error)}`, exitCode }
}

function explain(error: NodeJS.ErrnoException): string {
  if (isMisuse(error)) return `${error.message.split('. ')[0]}; see llmproxy --help`
  if (error instanceof CommandError) return error.message
  return error.code?.startsWith('E') ? error.message : String(error.stack)
}

function isMisuse(error: NodeJS.ErrnoException): boolean {
  if (error instanceof CommandError) return error.exitCode === 2
  return String(error.code).startsWith('ERR_PARSE_ARGS')
}
