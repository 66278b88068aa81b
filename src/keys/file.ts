import type { FastifyBaseLogger } from 'fastify'
import { type Static, Type } from 'typebox'
import { findIssues } from '../options.ts'
import { readYaml } from '../yaml.ts'
import { FollowedFile } from './followed.ts'
import type { KeyRecord, KeySource } from './key.ts'
import { StaticKeyList, StaticKeys } from './static.ts'

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

const Content = Type.Object(
  { keys: StaticKeyList('Keys') },
  { additionalProperties: false, secret: true }
)
type Content = Static<typeof Content>

/** A file of keys that can't be used: a line for each error. */
class KeyFileError extends Error {
  override name = 'KeyFileError'
}

/** Keys in a file, as they stand in the configuration. */
export class FileKeys implements KeySource {
  readonly name: string
  readonly #file: FollowedFile<StaticKeys>

  /** @throws {KeyFileError} */
  constructor(name: string, { path }: FileKeysOptions, log: FastifyBaseLogger) {
    this.name = name
    this.#file = new FollowedFile(path, text => new StaticKeys(name, readKeys(text, path)), log)
  }

  lookup(key: string, hash: string): Promise<KeyRecord | undefined> {
    return this.#file.content.lookup(key, hash)
  }

  async close(): Promise<void> {
    this.#file.close()
  }
}

function readKeys(text: string, path: string): Content['keys'] {
  const file = readYaml(text, path, process.env)
  if (file.errors.length > 0) throw new KeyFileError(file.errors.join('\n'))
  const isList = Array.isArray(file.root)
  const content = isList ? { keys: file.root } : file.root
  for (const issue of findIssues(Content, content)) {
    file.issues.push({ ...issue, path: isList ? issue.path.slice(1) : issue.path })
  }
  if (file.issues.length > 0) throw new KeyFileError(file.complaints().join('\n'))
  return (content as Content).keys
}
