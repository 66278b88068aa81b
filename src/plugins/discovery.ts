import type { FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import { Finder } from '../discovery/finder.ts'
import type { Source } from '../discovery/source.ts'
import { DiscoveryOptions, discoveryIssues } from '../discovery/sources.ts'
import { checkOptions, type Given, OptionsError } from '../options.ts'
import type { Found } from '../pool/found.ts'
import { StorageOptions } from '../store/storage.ts'
import type {} from './backends.ts'
import type {} from './usage.ts'

/**
 * Finds backends while the gateway runs, and tells the backends plugin of all changes. It waits for the
 * first answers, but not for long.
 *
 * @example
 * await fastify.register(backends)
 * const dns = { host: 'vllm.internal', port: 8000 }
 * await fastify.register(discovery, { sources: [{ type: 'dns', dns }] })
 */

export type GivenDiscoveryOptions = Given<DiscoveryOptions> & { storage?: Given<StorageOptions> }

declare module 'fastify' {
  interface FastifyInstance {
    discovery: Discovery
  }
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
  const { storage: givenStorage, ...givenOptions } = given
  const options = checkOptions(DiscoveryOptions, { enabled: true, ...givenOptions })
  const storage = checkOptions(StorageOptions, givenStorage)
  const issues = discoveryIssues(options, storage)
  if (issues.length > 0) throw new OptionsError(issues)
  const around = {
    log: fastify.log,
    dataDir: fastify.dataDir,
    onChange: (found: readonly Found[]) => fastify.backends.find(found)
  }
  const finder = new Finder(around, PATIENCE)
  fastify.decorate('discovery', {
    get sources() {
      return finder.sources
    },
    update: (changed, changedStorage) => finder.update(changed, changedStorage)
  } satisfies Discovery)
  fastify.addHook('onClose', () => finder.close())
  fastify.backends.find(await finder.update(options, storage))
}

export default fp(discoveryPlugin, {
  name: 'discovery',
  fastify: '5.x',
  decorators: { fastify: ['backends'] }
})
