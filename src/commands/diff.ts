import { type Change, compare } from '../changes.ts'
import { ConfigError, ConfigSchema, loadConfig } from '../config.ts'
import { CommandError, read } from './command.ts'

/** `llmproxy diff`: what differs between two configuration files. */

const HELP = `What differs between two configuration files, and what of it needs a restart

Usage
  llmproxy diff OLD NEW [--json]

Both are read as a start would read them, with the environment of this process, so that only what makes a
difference is shown: no comments, no order of members, no default that is written out. Secrets are ***.

  --json   one object, as POST /admin/reload answers: {"changed": [...], "restart_needed": [...]}

Exit code: 0 where nothing differs, 1 where something does, 2 where a file cannot be used.
`

/** @returns the exit code */
export async function runDiff(args: string[]): Promise<number> {
  const { values, positionals } = read(args, {
    json: { type: 'boolean' },
    help: { type: 'boolean', short: 'h' }
  })
  if (values.help) {
    console.log(HELP)
    return 0
  }
  const [before, after, ...rest] = positionals
  if (before === undefined || after === undefined || rest.length > 0) {
    throw new CommandError('diff needs two files, OLD and NEW')
  }
  try {
    const changes = compare(ConfigSchema, await load(before), await load(after))
    const { changed, restart_needed } = changes
    if (values.json) console.log(JSON.stringify(changes))
    else {
      show('Takes effect at a reload:', changed)
      show('Needs a restart:', restart_needed)
    }
    return changed.length + restart_needed.length > 0 ? 1 : 0
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    console.error(error.message)
    return 2
  }
}

/** Both may have the same name in different folders. */
async function load(file: string) {
  try {
    return await loadConfig(file)
  } catch (error) {
    if (error instanceof ConfigError) error.message = `${file} cannot be used\n${error.message}`
    throw error
  }
}

function show(title: string, changes: Change[]): void {
  if (changes.length === 0) return
  console.log([title, ...changes.map(each => `  ${toLine(each)}`)].join('\n'))
}

/**
 * A change in a line.
 *
 * @example
 * toLine({ path: 'log.level', before: 'info', after: 'warn' }) // 'log.level: "info" -> "warn"'
 */
export function toLine({ path, before, after }: Change): string {
  if (before === undefined) return `${path}: added ${JSON.stringify(after)}`
  if (after === undefined) return `${path}: removed ${JSON.stringify(before)}`
  const [one, other] = [JSON.stringify(before), JSON.stringify(after)]
  return one === other ? `${path}: another secret` : `${path}: ${one} -> ${other}`
}
