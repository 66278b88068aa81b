import '../check-node.ts'
import type { FastifyPluginAsync } from 'fastify'
import { Finder } from '../discovery/finder.ts'
import type { Source } from '../discovery/source.ts'
import { DiscoveryOptions, discoveryIssues } from '../discovery/sources.ts'
import { checkOptions, type Given, OptionsError } from '../options.ts'
import { part, share, toPart } from '../parts.ts'
import type { Found } from '../pool/found.ts'
import { StorageOptions } from '../store/storage.ts'

/**
 * Finds backends while the gateway runs, and tells the backends plugin of all changes. It waits for the
 * first answers, but not for long.
 *
 * @example
 * await fastify.register(backends)
 * const dns = { host: 'vllm.internal', port: 8000 }
 * await fastify.register(discovery, { sources: [{ type: 'dns', dns }] })
 */

/** The options of the plugin; `storage` has what its sources name. */
export type GivenDiscoveryOptions = Given<DiscoveryOptions> & {
  storage?: Given<StorageOptions>
  /** Directory of an SQLite database that is named by a relative path. */
  dataDir?: string | undefined
}

/** Where backends are found. */
export interface Discovery {
  readonly sources: readonly Source[]
  /**
   * Takes over other options; sources that have not changed go on.
   *
   * @returns what is found then, for `fastify.backends.update`
   */
  update(options: DiscoveryOptions, storage: StorageOptions): Promise<readonly Found[]>
}

/** A gateway that waits longer (ms) for its sources would seem to hang. */
const PATIENCE = 3_000

const discoveryPlugin: FastifyPluginAsync<GivenDiscoveryOptions> = async function discovery(
  fastify,
  given
) {
  const { storage: givenStorage, dataDir, ...givenOptions } = given
  const options = checkOptions(DiscoveryOptions, { enabled: true, ...givenOptions })
  const storage = checkOptions(StorageOptions, givenStorage)
  const issues = discoveryIssues(options, storage)
  if (issues.length > 0) throw new OptionsError(issues)
  const backends = part(fastify, 'backends')!
  const around = {
    log: fastify.log,
    dataDir,
    onChange: (found: readonly Found[]) => backends.find(found)
  }
  const finder = new Finder(around, PATIENCE)
  share(fastify, 'discovery', {
    get sources() {
      return finder.sources
    },
    update: (changed, changedStorage) => finder.update(changed, changedStorage)
  } satisfies Discovery)
  fastify.addHook('onClose', () => finder.close())
  backends.find(await finder.update(options, storage))
}

export default toPart(discoveryPlugin, {
  name: 'discovery',
  needs: ['backends'],
  decorates: ['discovery']
})
