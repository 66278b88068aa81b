import cluster from 'node:cluster'
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import closeWithGrace from 'close-with-grace'
import { CommandError } from './commands/command.ts'
import { loadConfig, workerCount } from './config.ts'
import { endSoon, endWithin, exitWithoutWaiting, NOT_STOPPED } from './exit.ts'
import { type Following, followFile, isPlain } from './follow.ts'
import { type Server, startServer, stopTimeout } from './server.ts'
import { handleSignals, releaseSignals, SIGNALS, stop } from './signals.ts'
import { VERSION } from './version.ts'
import { runWorker, startWorkers } from './workers.ts'

const HELP = `LLMProxy ${VERSION}: a reverse proxy for LLM inference servers

Usage
  llmproxy [serve] [--config FILE]   serve until SIGTERM or Ctrl-C; SIGHUP reloads the file
  llmproxy check [FILE]              check a configuration file and exit
  llmproxy diff OLD NEW [--json]     what differs, and what of it needs a restart; exits with 0 if nothing, else 1
  llmproxy keys ...                  make, list, change and revoke API keys; see llmproxy keys --help
  llmproxy usage ...                 export usage records, report them again; see llmproxy usage --help
  llmproxy --version
  llmproxy --help

Configuration file, the first of
  --config FILE
  the environment variable LLMPROXY_CONFIG
  /home/llmproxy/config.yaml, if it is there (the container's place)
  config/llmproxy.yaml of this package, with a built-in demo backend

Whatever the gateway writes goes below LLMPROXY_DATA_DIR (default: ./data).
`

/** What ends by itself. */
const COMMANDS = ['keys', 'usage', 'diff', 'check']
/** How often (ms) npm is looked for, when it has started this process. */
const PARENT_INTERVAL = 500
const DATA_DIR = process.env.LLMPROXY_DATA_DIR ?? './data'
const CONTAINER_CONFIG = '/home/llmproxy/config.yaml'
const DEFAULT_CONFIG = fileURLToPath(new URL('../config/llmproxy.yaml', import.meta.url))

try {
  if (cluster.isWorker) runWorker(DATA_DIR)
  else process.exitCode = await run(process.argv.slice(2))
} catch (error) {
  console.error(explain(error as Error))
  process.exit(isMisuse(error) ? 2 : 1)
}

/** @returns the exit code, or undefined while the server runs */
async function run(args: string[]): Promise<number | undefined> {
  if (COMMANDS.includes(args[0] ?? '')) releaseSignals()
  // What serves does not need the commands, and they take memory.
  if (args[0] === 'keys') {
    const { runKeys } = await import('./commands/keys.ts')
    return runKeys(args.slice(1), DATA_DIR, defaultConfig())
  }
  if (args[0] === 'usage') {
    const { runUsage } = await import('./commands/usage.ts')
    return runUsage(args.slice(1), DATA_DIR, defaultConfig())
  }
  if (args[0] === 'diff') {
    const { runDiff } = await import('./commands/diff.ts')
    return runDiff(args.slice(1))
  }
  const { values, positionals } = parseArgs({
    // The original's only option was written with one dash.
    args: args.map(arg => arg.replace(/^-config(?==|$)/, '--config')),
    allowPositionals: true,
    options: {
      config: { type: 'string', short: 'c' },
      help: { type: 'boolean', short: 'h' },
      version: { type: 'boolean', short: 'v' }
    }
  })
  const [command = 'serve', file, ...rest] = positionals
  if (values.version) return print(VERSION)
  if (values.help || command === 'help') return print(HELP)
  if (values.config === '') return misused('--config needs a file')
  if (rest.length > 0) return misused(`too many arguments: ${rest.join(' ')}`)
  if (command === 'check') {
    const checked = file ?? values.config ?? defaultConfig()
    await loadConfig(checked)
    return print(`${checked} is valid`)
  }
  if (command !== 'serve') return misused(`there is no command "${command}"`)
  await serve(values.config ?? file ?? defaultConfig())
  return undefined
}

async function serve(file: string): Promise<void> {
  exitWithoutWaiting()
  handleSignals({ stop: () => process.exit(0), stopNow: () => process.exit(1), reload() {} })
  const config = await loadConfig(file)
  const start = workerCount(config) === 1 ? startServer : startWorkers
  const starting = start(config, DATA_DIR)
  const following = starting.then(server => followFile(file, config, server))
  stopInOrder(starting, following, stopTimeout(config.server))
  await following
  stopWithNpm()
}

/** The gateway's own drain timeout ends a close; a second signal, or the deadline, ends the process. */
function stopInOrder(
  starting: Promise<Server>,
  following: Promise<Following>,
  untilStarted: number
): void {
  let log: Pick<Server['log'], 'error' | 'fatal'> = { error: console.error, fatal: console.error }
  let server: Server | undefined
  starting.then(
    started => {
      server = started
      log = server.log
    },
    // The caller of this program reports it.
    () => {}
  )
  const { close } = closeWithGrace(
    { delay: false, logger: { error: (what: string) => log.error(what) }, skip: [...SIGNALS] },
    async ({ err }) => {
      const timeout = server?.stopTimeout ?? untilStarted
      endWithin(timeout, () => log.error({ timeout }, NOT_STOPPED))
      if (err) log.fatal({ err }, 'unexpected error')
      const running = await starting
      await (await following).stop()
      await running.close()
    }
  )
  handleSignals({
    stop: () => void close(),
    stopNow(signal) {
      log.error({ signal }, 'second signal: ending immediately')
      endSoon(1)
    },
    // What went wrong is in the log.
    reload: () => void following.then(each => each.reload()).catch(() => {})
  })
}

/** npm dies of a SIGHUP without passing it on: the gateway must not stay behind. */
function stopWithNpm(): void {
  const { ppid } = process
  if (process.env.npm_lifecycle_event === undefined) return
  const watch = setInterval(() => {
    if (process.ppid === ppid) return
    clearInterval(watch)
    stop('SIGHUP')
  }, PARENT_INTERVAL).unref()
}

function defaultConfig(): string {
  const fromEnv = process.env.LLMPROXY_CONFIG
  if (fromEnv) return fromEnv
  return existsSync(CONTAINER_CONFIG) ? CONTAINER_CONFIG : DEFAULT_CONFIG
}

function print(text: string): number {
  console.log(text)
  return 0
}

function misused(complaint: string): number {
  console.error(`llmproxy: ${complaint}; see llmproxy --help`)
  return 2
}

/** An error of the operating system in a line; anything else with its stack, for a report. */
function explain(error: NodeJS.ErrnoException): string {
  if (isPlain(error)) return error.message
  if (isMisuse(error)) return `llmproxy: ${error.message.split('. ')[0]}; see llmproxy --help`
  if (error instanceof CommandError) return `llmproxy: ${error.message}`
  return `llmproxy: ${error.code?.startsWith('E') ? error.message : error.stack}`
}

function isMisuse(error: unknown): boolean {
  if (error instanceof CommandError) return error.exitCode === 2
  return String((error as NodeJS.ErrnoException).code).startsWith('ERR_PARSE_ARGS')
}
