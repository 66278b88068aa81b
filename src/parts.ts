import type { FastifyInstance, FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'

/**
 * How the parts of a gateway find one another. A part decorates its scope for the host, and enters the same value
 * here, below a symbol: a decorator of the host with the same name is never taken for a part.
 */
const PARTS = Symbol('llmproxy.parts')

type Scope = FastifyInstance & { [PARTS]?: Partial<FastifyInstance> }

/** Decorates a scope with a part that other parts may use. */
export function share<Name extends keyof FastifyInstance>(
  fastify: FastifyInstance,
  name: Name,
  value: FastifyInstance[Name]
): void {
  const scope: Scope = fastify
  fastify.decorate(name, value as never)
  if (!Object.hasOwn(scope, PARTS)) fastify.decorate(PARTS, Object.create(scope[PARTS] ?? null))
  scope[PARTS]![name] = value
}

/**
 * Returns a part that is shared in this scope or an outer one.
 *
 * @example
 * part(fastify, 'usage')?.refusesUnpriced
 */
export function part<Name extends keyof FastifyInstance>(
  fastify: FastifyInstance,
  name: Name
): FastifyInstance[Name] | undefined {
  return (fastify as Scope)[PARTS]?.[name]
}

interface Description {
  name: string
  /** Parts that must have been registered, each of which has a decorator of its name. */
  needs?: readonly ('backends' | 'proxy')[]
  /** Decorators of the instance, also those of plugins that the part registers. */
  decorates?: readonly string[]
}

/** Makes a plugin a part: it decorates the scope that registers it, or refuses with one clear error. */
export function toPart<Options extends object>(
  plugin: FastifyPluginAsync<Options>,
  { name, needs = [], decorates = [] }: Description
): FastifyPluginAsync<Options> {
  const checked: FastifyPluginAsync<Options> = async (fastify, options) => {
    const missing = needs.find(each => part(fastify, each) === undefined)
    if (missing !== undefined) {
      throw new Error(`llmproxy/${name}: register llmproxy/${missing} before it.`)
    }
    // Before the plugin opens anything.
    const present = decorates.find(each => Object.hasOwn(fastify, each))
    if (present !== undefined) throw alreadyPresent(name, present)
    try {
      await plugin(fastify, options)
    } catch (error) {
      const { code, message } = error as Error & { code?: unknown }
      if (code !== 'FST_ERR_DEC_ALREADY_PRESENT') throw error
      throw alreadyPresent(name, /'(.*)'/.exec(message)?.[1] ?? '')
    }
  }
  return fp(checked, { name, fastify: '5.x' })
}

function alreadyPresent(name: string, decorator: string): Error {
  const message = `llmproxy/${name}: its scope already has a decorator "${decorator}". Register the part once, in a scope of its own.`
  return Object.assign(new Error(message), { code: 'FST_ERR_DEC_ALREADY_PRESENT' })
}
