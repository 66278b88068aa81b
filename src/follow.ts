import { unwatchFile, watchFile } from 'node:fs'
import { type Changes, compare, takeOver } from './changes.ts'
import { type Config, ConfigSchema, loadConfigAgain } from './config.ts'
import { GatewayError } from './errors.ts'
import type { Server } from './server.ts'

/** The configuration file of a server that runs: read again when it changes, and when somebody asks. */

const WATCH_INTERVAL = 1_000
/** The log names no more members than this. */
const MAX_NAMED = 50

export interface Following {
  /**
   * Reads the file again. What is refused changes nothing.
   *
   * @throws {GatewayError} `invalid_config`: the file is wrong, or something that it names cannot be used
   */
  reload(): Promise<Changes>
  /** Resolves when no reload is under way; there will be none any more. */
  stop(): Promise<void>
}

/** `running`: what the file said when the server was started. */
export function followFile(file: string, running: Config, server: Server): Following {
  const { log } = server
  let latest: Promise<unknown> = Promise.resolve()
  let next: Promise<Changes> | undefined
  let isStopped = false

  /** One after the other; who asks while one is waiting for its turn waits for the same. */
  function reload(): Promise<Changes> {
    if (next === undefined) {
      const turn = latest.then(() => {
        next = undefined
        return take()
      })
      next = turn
      latest = turn.catch(() => {})
    }
    return next
  }

  async function take(): Promise<Changes> {
    if (isStopped) throw new GatewayError('shutting_down', 'This server is shutting down.')
    try {
      const wanted = await loadConfigAgain(file)
      const changes = compare(ConfigSchema, running, wanted)
      const config = takeOver(ConfigSchema, running, wanted)
      await server.reload(config)
      running = config
      const { changed, restart_needed } = namesOf(changes)
      const level = restart_needed.length > 0 ? 'warn' : 'info'
      log[level]({ config: file, changed, restart_needed }, 'configuration reloaded')
      return changes
    } catch (error) {
      log.error({ config: file, errors: (error as Error).message.split('\n') }, 'reload refused')
      throw isOfFile(error) ? toRefusal(error as Error) : error
    }
  }

  // What went wrong is in the log.
  const onChange = () => void reload().catch(() => {})
  watchFile(file, { interval: WATCH_INTERVAL, persistent: false }, onChange)
  server.onReload(reload)
  return {
    reload,
    async stop() {
      isStopped = true
      unwatchFile(file, onChange)
      await latest
    }
  }
}

function namesOf({ changed, restart_needed }: Changes) {
  const names = (changes: { path: string }[]) => {
    const paths = changes.slice(0, MAX_NAMED).map(({ path }) => path)
    const more = changes.length - paths.length
    return more === 0 ? paths : [...paths, `and ${more} more`]
  }
  return { changed: names(changed), restart_needed: names(restart_needed) }
}

/** Errors that say all there is to say, and where. */
const PLAIN = new Set(['ConfigError', 'OptionsError', 'KeyFileError'])

export function isPlain({ name }: Error): boolean {
  return PLAIN.has(name)
}

/** Is it the file that is wrong, or something that the system says of what it names? */
function isOfFile(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException
  return isPlain(error as Error) || /^E[A-Z\d]+$/.test(String(code))
}

function toRefusal({ message }: Error): GatewayError {
  return new GatewayError('invalid_config', message.split('\n').join('; '))
}
