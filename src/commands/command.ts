import { type ParseArgsConfig, parseArgs } from 'node:util'

/** What the commands have in common. */

/** A command that cannot be carried out; the message says why. */
export class CommandError extends Error {
  override name = 'CommandError'
  /** 2: what was asked for makes no sense; 1: it did not work. */
  readonly exitCode: 1 | 2

  constructor(message: string, exitCode: 1 | 2 = 2) {
    super(message)
    this.exitCode = exitCode
  }
}

export function read<T extends ParseArgsConfig['options']>(args: string[], options: T) {
  return parseArgs({ args, options, allowPositionals: true })
}

/** Rows as a table, or as a line of JSON each. */
export function show(rows: object[], asJson: boolean, nothing: string): void {
  if (asJson) for (const row of rows) console.log(JSON.stringify(row))
  else if (rows.length === 0) console.log(nothing)
  else console.table(rows)
}
