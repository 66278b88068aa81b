import cluster from 'node:cluster'
import { existsSync } from 'node:fs'
import { parseArgs } from 'node:util'
import closeWithGrace from 'close-with-grace'
import { toFailure } from './commands/failure.ts'
import { type Config, DEFAULT_CONFIG, loadConfig, workerCount } from './config.ts'
import { DATA_DIR } from './data-dir.ts'
import { dataFiles, findIncomplete, INCOMPLETE, leaveWhole } from './data-files.ts'
import { endSoon, endWithin, endWithReader, exitWithoutWaiting, NOT_STOPPED } from './exit.ts'
import { type Following, followFile } from './follow.ts'
import { looksIntoStore } from './keys/sources.ts'
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
  llmproxy backup DIR                copy the databases of a gateway, which may run; see llmproxy backup --help
  llmproxy --version
  llmproxy --help

Configuration file, the first of
  --config FILE
  the environment variable LLMPROXY_CONFIG
  /home/llmproxy/config.yaml, if it is there (the container's place)
  config/llmproxy.yaml of this package (the single binary has it inside), with a built-in demo backend

Whatever the gateway writes goes below LLMPROXY_DATA_DIR (default: ./data).
`

/** Commands that end by themselves. */
const COMMANDS = ['keys', 'usage', 'backup', 'diff', 'check']
/** How often (ms) npm is looked for, when it has started this process. */
const PARENT_INTERVAL = 500
const dataDir = process.env.LLMPROXY_DATA_DIR ?? DATA_DIR
const CONTAINER_CONFIG = '/home/llmproxy/config.yaml'

try {
  if (cluster.isWorker) runWorker(dataDir)
  else process.exitCode = await run(process.argv.slice(2))
} catch (error) {
  const { message, exitCode } = toFailure(error as Error)
  console.error(message)
  process.exit(exitCode)
}

/** @returns the exit code, or undefined while the server runs */
async function run(args: string[]): Promise<number | undefined> {
  if (COMMANDS.includes(args[0] ?? '')) {
    releaseSignals()
    endWithReader()
  }
  // A server does not need the commands, and they take memory.
  if (args[0] === 'keys') {
    const { runKeys } = await import('./commands/keys.ts')
    return runKeys(args.slice(1), dataDir, defaultConfig())
  }
  if (args[0] === 'usage') {
    const { runUsage } = await import('./commands/usage.ts')
    return runUsage(args.slice(1), dataDir, defaultConfig()).finally(leaveDataWhole)
  }
  if (args[0] === 'backup') {
    const { runBackup } = await import('./commands/backup.ts')
    return runBackup(args.slice(1), dataDir, defaultConfig()).finally(leaveDataWhole)
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
  if (keepsFiles(config)) {
    const { takeDataDir } = await import('./data-dir-lock.ts')
    const lock = takeDataDir(dataDir)
    process.once('exit', () => lock.close())
  }
  const incomplete = await findIncomplete(dataFiles(dataDir, config.auth))
  const start = workerCount(config) === 1 ? startServer : startWorkers
  const starting = start(config, dataDir)
  const following = starting.then(server => followFile(file, config, server))
  stopInOrder(starting, following, stopTimeout(config.server), config.auth)
  await following
  const { log } = await starting
  for (const each of incomplete) log.error({ file: each }, INCOMPLETE)
  stopWithNpm()
}

/** Whether it needs a directory for records, keys or quotas: a file system that is read-only is enough for all else. */
function keepsFiles({ usage, auth, rate_limit: limits }: Config): boolean {
  const hasQuota = limits.enabled && limits.storage === 'memory' && limits.per_key.total_quota > 0
  return hasQuota || (usage.enabled && usage.reporters.length > 0) || looksIntoStore(auth)
}

/** The gateway's own drain timeout ends a close; a second signal, or the deadline, ends the process. */
function stopInOrder(
  starting: Promise<Server>,
  following: Promise<Following>,
  untilStarted: number,
  auth: Config['auth']
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
      await leaveWhole(dataFiles(dataDir, auth))
    }
  )
  handleSignals({
    stop: () => void close(),
    stopNow(signal) {
      log.error({ signal }, 'second signal: ending immediately')
      endSoon(1)
    },
    // The log has the reason.
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

async function leaveDataWhole(): Promise<void> {
  await leaveWhole(dataFiles(dataDir))
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
