import { rm, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import type { FastifyBaseLogger } from 'fastify'
import type { KeyStore } from './key-store.ts'

/**
 * Makes a key in a store that never had one, so that somebody is admitted. It is shown once: on a terminal,
 * else in a file that only its owner can read. Of several processes one makes it.
 *
 * @param file of the store; the key's file is beside it
 */
export async function makeFirstKey(
  store: KeyStore,
  file: string,
  log: FastifyBaseLogger
): Promise<void> {
  const made = await store.createFirst({ name: 'first' })
  if (made === undefined) return
  const keyId = made.record.id
  if (process.stdout.isTTY) {
    process.stdout.write(`\nThe first API key. It is not shown again:\n\n  ${made.key}\n\n`)
    return log.info({ keyId }, 'the first API key was made')
  }
  const path = join(dirname(file), 'first-key')
  try {
    await rm(path, { force: true })
    await writeFile(path, `${made.key}\n`, { mode: 0o600, flag: 'wx' })
  } catch (error) {
    await store.delete(keyId)
    throw error
  }
  log.info(
    { keyId, file: path },
    'the first API key was made, and is in this file: keep it, delete the file'
  )
}
