import { rename, rm, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import type { FastifyBaseLogger } from 'fastify'
import { OptionsError } from '../options.ts'
import { BuiltinKeys } from './builtin.ts'
import { type KeyStore, MEMORY } from './key-store.ts'
import type { Sources } from './sources.ts'
import { newKey } from './stored-key.ts'

/**
 * Where keys are looked up in the embedded store alone, and it never had one, makes one.
 *
 * @param file of the store
 * @throws {OptionsError} when the store cannot be used
 */
export async function admitSomebody(
  sources: Sources,
  store: () => KeyStore,
  file: string,
  log: FastifyBaseLogger
): Promise<void> {
  if (![...sources.values()].every(each => each instanceof BuiltinKeys)) return
  if (sources.size === 0 || file === MEMORY) {
    return log.warn('auth is enabled but has no keys: nobody will be admitted')
  }
  try {
    await makeFirstKey(store(), file, log)
  } catch (error) {
    const message = `cannot be used: ${(error as Error).message} (${file})`
    throw new OptionsError([{ path: ['auth', 'db_path'], message }], 'llmproxy')
  }
}

/** It is shown once: on a terminal, else in a file that only its owner can read. */
async function makeFirstKey(store: KeyStore, file: string, log: FastifyBaseLogger): Promise<void> {
  if (await store.hadKeys()) return
  const key = newKey()
  if (process.stdout.isTTY) {
    const made = await store.createFirst({ name: 'first', key })
    if (made === undefined) return
    process.stdout.write(`\nThe first API key. It is not shown again:\n\n  ${key}\n\n`)
    return log.info({ keyId: made.record.id }, 'the first API key was made')
  }
  // It is written down before it is good, so that it cannot be lost; of several processes one makes it.
  const path = join(dirname(file), 'first-key')
  const draft = `${path}.${process.pid}`
  // One that was killed may have left it, and in a container all have the same number.
  await rm(draft, { force: true })
  await writeFile(draft, `${key}\n`, { mode: 0o600, flag: 'wx' })
  try {
    const made = await store.createFirst({ name: 'first', key })
    if (made === undefined) return
    await rename(draft, path)
    log.info(
      { keyId: made.record.id, file: path },
      'the first API key was made; it is in this file'
    )
  } finally {
    await rm(draft, { force: true })
  }
}
