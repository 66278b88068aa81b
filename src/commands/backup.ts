import { mkdirSync, statSync } from 'node:fs'
import { basename, dirname, isAbsolute, join, relative, resolve } from 'node:path'
import { type Config, loadConfig } from '../config.ts'
import { dataFiles } from '../data-files.ts'
import { copyDatabase, isDatabase } from '../store/copies.ts'
import { fileOf } from '../store/storage.ts'
import { CommandError, read } from './command.ts'

/** `llmproxy backup`: a copy of what the gateway keeps in its data directory, also while it runs. */

const HELP = `Usage
  llmproxy backup DIR [--config FILE]
      copies the databases of a gateway, which may run, into DIR

Copied are all databases in LLMPROXY_DATA_DIR (default: ./data), and those that the configuration names elsewhere
(auth.db_path, storage.databases of SQLite). DIR is made if it is not there; nothing in it is overwritten.
How a copy is restored: docs/backup.md.
`

/** @returns the exit code */
export async function runBackup(
  args: string[],
  dataDir: string,
  defaultConfig: string
): Promise<number> {
  const { values, positionals } = read(args, {
    config: { type: 'string', short: 'c' },
    help: { type: 'boolean', short: 'h' }
  })
  if (values.help) {
    console.log(HELP)
    return 0
  }
  const [directory, ...rest] = positionals
  if (directory === undefined || rest.length > 0) {
    throw new CommandError('backup needs one directory, DIR')
  }
  const files = await databasesOf(await loadConfig(values.config ?? defaultConfig), dataDir)
  if (files.length === 0) {
    throw new CommandError(`there is no database in ${dataDir}; is LLMPROXY_DATA_DIR right?`, 1)
  }
  for (const file of files) {
    const target = join(directory, nameOf(file, dataDir))
    mkdirSync(dirname(target), { recursive: true, mode: 0o700 })
    try {
      await copyDatabase(file, target)
    } catch (error) {
      throw new CommandError(`${file} was not copied: ${(error as Error).message}`, 1)
    }
    console.log(`${target}: ${statSync(target).size} bytes`)
  }
  return 0
}

async function databasesOf({ auth, storage }: Config, dataDir: string): Promise<string[]> {
  const named = storage.databases
    .filter(({ driver, enabled }) => enabled && driver === 'sqlite')
    .map(each => fileOf(each, dataDir))
  const all = [...dataFiles(dataDir, auth), ...named]
  const files = [...new Set(all.map(each => resolve(each)))]
  const are = await Promise.all(files.map(isDatabase))
  return files.filter((_, at) => are[at])
}

/** Path below the data directory; of a file elsewhere, its name. */
function nameOf(file: string, dataDir: string): string {
  const path = relative(resolve(dataDir), file)
  return path.startsWith('..') || isAbsolute(path) ? basename(file) : path
}
