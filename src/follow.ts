import { unwatchFile, watchFile } from 'node:fs'
import type { Changes } from './changes.ts'
import { BUILT_IN, type Config } from './config.ts'
import { GatewayError } from './errors.ts'
import { reread, toJson } from './reread.ts'
import type { Server } from './server.ts'

/** The configuration file of a server that runs: read again when it changes, and when somebody asks. */

const WATCH_INTERVAL = 1_000

export interface Following {
  /**
   * Reads the file again. What is refused changes nothing.
   *
   * @returns what has changed, as JSON of {@link Changes}
   * @throws {GatewayError} `invalid_config`: the file is wrong, or something that it names cannot be used
   */
  reload(): Promise<string>
  /** Resolves when no reload is under way; there will be none any more. */
  stop(): Promise<void>
}

/** `running`: what the file said when the server was started. */
export function followFile(file: string, running: Config, server: Server): Following {
  const { log } = server
  let latest: Promise<unknown> = Promise.resolve()
  let next: Promise<string> | undefined
  let json = toJson(running)
  let isStopped = false

  /** One after the other; who asks while one is waiting for its turn waits for the same. */
  function reload(): Promise<string> {
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

  async function take(): Promise<string> {
    if (isStopped) throw new GatewayError('shutting_down', 'This server is shutting down.')
    try {
      const read = await reread(file, running, json)
      await server.reload(read.config)
      running = read.config
      json = read.json
      const { changes, changed, restart_needed } = read
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
  if (file !== BUILT_IN) watchFile(file, { interval: WATCH_INTERVAL, persistent: false }, onChange)
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

/** Errors that say all there is to say, and where. */
const PLAIN = new Set([
  'ConfigError',
  'OptionsError',
  'KeyFileError',
  'KeyStoreError',
  'NewerFormatError',
  'DataDirError'
])

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
