import { execFileSync, spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import type { TestContext } from 'node:test'
import { gunzipSync } from 'node:zlib'

/** Disks, and files that rotate on them. */

export const NO_MOUNT = 'mounting is not allowed here'

/** Mounts something at a path of its own; undefined where that is not allowed. */
export function mounted(t: TestContext, isFile: boolean, ...what: string[]): string | undefined {
  const home = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  const path = join(home, 'mount')
  if (isFile) writeFileSync(path, '')
  else mkdirSync(path)
  const { status } = spawnSync('mount', [...what, path])
  t.after(() => {
    if (status === 0) execFileSync('umount', ['-l', path])
    rmSync(home, { recursive: true })
  })
  return status === 0 ? path : undefined
}

export function smallDisk(t: TestContext): string | undefined {
  return mounted(t, false, '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs')
}

/** The old files beside this one, oldest first. */
export function oldOnes(path: string): string[] {
  const names = readdirSync(dirname(path)).sort()
  return names.map(name => join(dirname(path), name)).filter(each => each.startsWith(`${path}.`))
}

/** What is in a file and in its old ones, oldest first. */
export function readAll(path: string): string {
  const texts = [...oldOnes(path), path].map(each => {
    const bytes = readFileSync(each)
    return String(each.endsWith('.gz') ? gunzipSync(bytes) : bytes)
  })
  return texts.join('')
}

/** Lines of a file and its old ones; none while there is no file. */
export function linesOf(path: string): string[] {
  try {
    return readAll(path).split('\n').slice(0, -1)
  } catch {
    return []
  }
}
