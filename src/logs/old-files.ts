import { randomBytes } from 'node:crypto'
import { createReadStream, createWriteStream, type Stats } from 'node:fs'
import { open, readdir, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { createGzip } from 'node:zlib'

/** What becomes of files that were moved away. Several processes may see to the same ones. */

/** What is left of a compression that nobody finishes is taken away after so long (ms). */
const STALE = 60 * 60 * 1000

/** Which old files are kept, and how. */
interface Keeping {
  path: string
  max_files: number
  max_age: number
  compress: boolean
}

/** Names of old files sort by age, and no two processes make the same. */
export function oldName(path: string, time: number): string {
  const stamp = new Date(time).toISOString().replaceAll(':', '-')
  return `${path}.${stamp}-${randomBytes(3).toString('hex')}`
}

/**
 * Compresses old files, and removes those that are too many or too old. What fails is tried again the next
 * time.
 */
export async function tidy(keeping: Keeping, mode: number, signal: AbortSignal): Promise<void> {
  const { path, max_files, max_age, compress } = keeping
  const folder = dirname(path)
  const names = await readdir(folder).catch(() => [])
  const old = names.flatMap(name => movedAt(basename(path), name) ?? [])
  old.sort((a, b) => b.time - a.time)
  for (const [at, { name, time }] of old.entries()) {
    const file = join(folder, name)
    const isTooMany = max_files > 0 && at >= max_files
    const isTooOld = max_age > 0 && Date.now() - time > max_age
    if (isTooMany || isTooOld) await rm(file, { force: true }).catch(() => {})
    else if (compress && !name.endsWith('.gz')) await zip(file, mode, signal).catch(() => {})
  }
}

async function zip(file: string, mode: number, signal: AbortSignal): Promise<void> {
  const part = `${file}.gz.part`
  const before = await statOf(part)
  if (before !== undefined && Date.now() - before.mtimeMs > STALE) await rm(part, { force: true })
  // wx: of several processes one does it.
  const handle = await open(part, 'wx', mode)
  try {
    const source = createReadStream(file)
    const target = createWriteStream(part, { fd: handle, flush: true })
    await pipeline(source, createGzip(), target, { signal })
    const { size } = await stat(file)
    if (size !== source.bytesRead) throw new Error('somebody still writes to it')
    await rename(part, `${file}.gz`)
    await rm(file, { force: true })
  } catch (error) {
    await handle.close().catch(() => {})
    await rm(part, { force: true })
    throw error
  }
}

/** When an old file was moved away, by its name; undefined for other files. */
function movedAt(current: string, name: string): { name: string; time: number } | undefined {
  if (!name.startsWith(`${current}.`)) return undefined
  const [, day, hour, minute, rest] =
    /^(\d{4}-\d\d-\d\dT)(\d\d)-(\d\d)-(\d\d\.\d{3}Z)-[0-9a-f]{6}(?:\.gz)?$/.exec(
      name.slice(current.length + 1)
    ) ?? []
  return day === undefined
    ? undefined
    : { name, time: Date.parse(`${day}${hour}:${minute}:${rest}`) }
}

export async function statOf(path: string): Promise<Stats | undefined> {
  return stat(path).catch(() => undefined)
}
