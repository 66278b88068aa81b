import { CommandError } from './commands/command.ts'
import type { Config } from './config.ts'
import { keyFile } from './keys/key-store.ts'
import { databasesIn, incompleteness, makeWhole } from './store/copies.ts'

/** The databases that a gateway keeps on its disk, from its start to its end. */

export const INCOMPLETE =
  'this database may be an incomplete copy: it was in use when it was copied, and its -wal file is missing'

/** Their paths; some may not exist yet. */
export function dataFiles(dataDir: string, auth?: Config['auth']): string[] {
  const keys = auth === undefined ? [] : [keyFile(dataDir, auth.db_path)]
  return [...new Set([...databasesIn(dataDir), ...keys])]
}

/**
 * Returns the files that may lack what was written last (see {@link INCOMPLETE}).
 *
 * @throws {CommandError} for a file that lacks everything
 */
export async function findIncomplete(files: string[]): Promise<string[]> {
  const found: string[] = []
  for (const file of files) {
    const lacks = await incompleteness(file)
    if (lacks === 'partial') found.push(file)
    if (lacks !== 'empty') continue
    const message = `${file} is an incomplete copy: its contents were in ${file}-wal, which is missing`
    const remedy =
      'Restore a copy made by llmproxy backup, or delete the file to start without its contents'
    throw new CommandError(`${message}. ${remedy}`, 1)
  }
  return found
}

/** At the end: a plain copy of these files is complete as long as no gateway runs. */
export async function leaveWhole(files: string[]): Promise<void> {
  for (const file of files) await makeWhole(file)
}
