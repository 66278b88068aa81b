#!/usr/bin/env -S node --max-semi-space-size=8 --heap-growing-percent=60 --no-memory-reducer --v8-pool-size=2
import cluster from 'node:cluster'
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import closeWithGrace from 'close-with-grace'
import { CommandError } from './commands/command.ts'
import { loadConfig, workerCount } from './config.ts'
import { followFile, isPlain } from './follow.ts'
import { type Server, startServer } from './server.ts'
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

/** How often (ms) npm is looked for, when it has started this process. */
const PARENT_INTERVAL = 500
/** Interrupts so close together (ms) are one press of Ctrl-C. */
const SAME_KEY = 300
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
  const config = await loadConfig(file)
  const start = workerCount(config) === 1 ? startServer : startWorkers
  const starting = start(config, DATA_DIR)
  const following = starting.then(server => followFile(file, config, server))
  closeOnSignals(starting, async () => (await following).stop())
  // What went wrong is in the log.
  process.on('SIGHUP', () => void following.then(each => each.reload()).catch(() => {}))
  await following
  stopWithNpm()
}

/** Before it says that it listens, so that whoever waits for that can stop it. */
function closeOnSignals(starting: Promise<Server>, stop: () => Promise<void>): void {
  let log: Pick<Server['log'], 'error' | 'fatal'> = { error: console.error, fatal: console.error }
  starting.then(
    server => {
      log = server.log
    },
    // Whoever has started it hears of it.
    () => {}
  )
  // The gateway's own drain timeout ends a close; a second signal ends the process at once.
  let isStopping = false
  const { close } = closeWithGrace(
    {
      delay: false,
      logger: { error: (what: string) => log.error(what) },
      skip: ['SIGHUP', 'SIGINT']
    },
    async ({ err }) => {
      isStopping = true
      if (err) log.fatal({ err }, 'unexpected error')
      const server = await starting
      await stop()
      await server.close()
    }
  )
  onCtrlC(() => {
    if (isStopping) process.exit(1)
    close()
  })
}

/** Ctrl-C comes twice where npm has started this process: from the terminal, and passed on by npm. */
function onCtrlC(act: () => void): void {
  let latest = Number.NEGATIVE_INFINITY
  process.on('SIGINT', () => {
    const isSameKey = performance.now() - latest < SAME_KEY
    latest = performance.now()
    if (!isSameKey) act()
  })
}

/** npm dies of a SIGHUP, as when its terminal is closed, without passing it on: nobody must stay behind. */
function stopWithNpm(): void {
  const { ppid } = process
  if (process.env.npm_lifecycle_event === undefined) return
  const watch = setInterval(() => {
    if (process.ppid === ppid) return
    clearInterval(watch)
    process.kill(process.pid, 'SIGTERM')
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
