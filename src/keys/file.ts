import { readFile, stat } from 'node:fs/promises'
import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import { batchesOf } from '../batches.ts'
import { FollowedFile } from './followed.ts'
import type { KeyRecord, KeySource } from './key.ts'
import { readKeyList } from './key-list.ts'
import { type KeptKey, StaticKeys } from './static.ts'

export const FileKeysOptions = Type.Object(
  {
    path: Type.String({
      minLength: 1,
      description: 'YAML or JSON: a list of keys as in auth.keys, or a mapping with it as keys'
    })
  },
  { additionalProperties: false, description: 'Keys in a file of their own' }
)
export type FileKeysOptions = Static<typeof FileKeysOptions>

/** Maximum size (bytes) of a file that is read without a thread: that takes a few milliseconds. */
const SMALL = 8 * 1024

/** Keys in a file, as they stand in the configuration. */
export class FileKeys implements KeySource {
  readonly name: string
  readonly #file: FollowedFile<StaticKeys>

  /** @throws {KeyFileError} */
  static async open(
    name: string,
    { path }: FileKeysOptions,
    log: FastifyBaseLogger
  ): Promise<FileKeys> {
    const load = (signal: AbortSignal) => loadKeys(name, path, signal)
    return new FileKeys(name, await FollowedFile.open(path, load, log))
  }

  private constructor(name: string, file: FollowedFile<StaticKeys>) {
    this.name = name
    this.#file = file
  }

  lookup(key: string, hash: string): Promise<KeyRecord | undefined> {
    return this.#file.content.lookup(key, hash)
  }

  async close(): Promise<void> {
    this.#file.close()
  }
}

/** Without blocking the event loop, however many keys there are. */
async function loadKeys(name: string, path: string, signal: AbortSignal): Promise<StaticKeys> {
  if ((await stat(path)).size <= SMALL) {
    return StaticKeys.of(name, readKeyList(await readFile(path, 'utf8'), path))
  }
  const keys = new StaticKeys(name)
  for await (const batch of batchesOf<KeptKey[]>('keys/key-list-thread', { data: path, signal })) {
    for (const each of batch) keys.add(each)
  }
  return keys
}
