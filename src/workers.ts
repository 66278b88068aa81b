import cluster, { type Worker } from 'node:cluster'
import { once } from 'node:events'
import { isDeepStrictEqual } from 'node:util'
import { AggregatorRegistry } from '@prometheus-io/client'
import closeWithGrace from 'close-with-grace'
import { allOrNothing } from './changes.ts'
import { type Config, workerCount } from './config.ts'
import { GatewayError, reasonOf } from './errors.ts'
import { endWithin, exitWithoutWaiting, NOT_STOPPED } from './exit.ts'
import { Assembly, type Fragment, fragmentsOf } from './fragments.ts'
import { acknowledgeLost, guardAccepting } from './handover.ts'
import { openMemoryStore } from './limits/memory.ts'
import { Periods } from './limits/period.ts'
import { type LimitAnswer, type LimitQuestion, RemoteLeases, RemoteStore } from './limits/remote.ts'
import { Uploads } from './limits/uploads.ts'
import { Log } from './logs/log.ts'
import { type SharedLine, SharedLines } from './logs/shared-lines.ts'
import { collectGarbage } from './memory.ts'
import type { News, OutboxState, Peers } from './peers.ts'
import { toKeeping, usageFile } from './plugins/usage.ts'
import type { Delivery } from './reporters/courier.ts'
import { Outbox } from './reporters/outbox.ts'
import { Posts } from './reporters/posts.ts'
import { toReporters } from './reporters/reporters.ts'
import { LISTENING, type Server, startServer, stopTimeout } from './server.ts'
import { SIGNALS } from './signals.ts'
import { VERSION } from './version.ts'

/**
 * Several processes on one port: the primary accepts connections and hands them to its workers in
 * turn (node:cluster). It serves nothing itself; it passes on what all must know, and replaces a
 * worker that has crashed.
 */

/** What the primary says to a worker. */
type Order =
  // Without a fragment: those of another configuration follow.
  | { kind: Purpose; fragment?: Fragment | undefined }
  | { kind: 'close' }
  | { kind: 'answer'; id: number; value?: string | undefined; error?: Failure }
  | { kind: 'news'; news: News }
  | { kind: 'recorded' }
  | { kind: 'limited'; answer: LimitAnswer }
  | { kind: 'outbox'; state: OutboxState }
  | { kind: 'delivered'; result: Delivery; records: number }
  | { kind: 'refused'; connections: number }

/** Action of a worker when it has the whole configuration. */
type Purpose = 'serve' | 'reload'

/** What a worker says to the primary. */
type Message =
  | { kind: 'records'; entries: string[] }
  | { kind: 'limit'; question: LimitQuestion }
  | { kind: 'serves'; url: string }
  | { kind: 'failed'; error: Failure }
  // A fragment, and if it was the last one of a reload, all of it.
  | { kind: 'took'; purpose: Purpose; error?: Failure | undefined }
  | { kind: 'question'; id: number; what: 'metrics' | 'reload' }
  | { kind: 'news'; news: News }
  | { kind: 'line'; line: SharedLine }

/** An error on its way to another process. */
interface Failure {
  message: string
  name: string
  code: string | undefined
}

/** A worker that crashes as soon as it has begun is replaced after growing waits (ms). */
const FIRST_WAIT = 100
const MAX_WAIT = 30_000
const STABLE_AFTER = 10_000
const RELOAD_TIMEOUT = 10_000
const FLUSH_TIMEOUT = 5_000
/** Time (ms) the primary keeps for itself of what a stop may take. */
const OWN_CLOSE_TIMEOUT = 3_000
/** How often (ms) workers are told how usage records fare, and what the primary has refused. */
const TELL_INTERVAL = 1_000
/** The primary has little to do once its workers serve (ms). */
const TIDY_AFTER = 2_000

/** Starts the workers; this process is their primary from now on. */
export async function startWorkers(started: Config, dataDir: string): Promise<Server> {
  let config = started
  let isClosing = false
  let wait = FIRST_WAIT
  const out = new Log(config.log, dataDir)
  const log = out.logger
  let read: (() => Promise<string>) | undefined
  const all = new AggregatorRegistry()
  const reporters = ({ usage, storage }: Config) => toReporters(usage, { storage, dataDir, log })
  const outbox = new Outbox(
    usageFile(dataDir),
    await reporters(config),
    toKeeping(config.usage),
    log,
    countDelivery
  )
  await outbox.open()
  const limits = await openMemoryStore(config.rate_limit.time_zone, dataDir, log)
  const uploads = new Uploads()
  const lines = new SharedLines()
  cluster.setupPrimary({ args: [] })
  let refused = 0
  guardAccepting(() => refused++)

  const urls = await Promise.all(Array.from({ length: workerCount(config) }, start)).catch(
    error => {
      isClosing = true
      killWorkers()
      throw error
    }
  )
  const url = urls[0]!
  log.info({ version: VERSION, node: process.version, url, workers: urls.length }, LISTENING)
  setTimeout(collectGarbage, TIDY_AFTER).unref()
  setInterval(tellState, TELL_INTERVAL).unref()

  /** Starts a worker, and resolves with its URL when it serves. */
  function start(): Promise<string> {
    const startedAt = performance.now()
    return new Promise((resolve, reject) => {
      let worker: Worker
      try {
        worker = cluster.fork()
      } catch (error) {
        reject(error)
        return replaceLater({ reason: reasonOf(error as Error) })
      }
      const limited = (answer: LimitAnswer) => send(worker, { kind: 'limited', answer })
      const leases = new RemoteLeases(limits, limited, uploads)
      worker.on('message', (message: Message) => {
        if (message.kind === 'serves') resolve(message.url)
        else if (message.kind === 'failed') {
          reject(toError(message.error))
        } else if (message.kind === 'news') tellOthers(worker, message.news)
        else if (message.kind === 'line') write(worker, message.line)
        else if (message.kind === 'question') void answer(worker, message)
        else if (message.kind === 'limit') void leases.hear(message.question)
        else if (message.kind === 'records') void record(worker, message.entries)
      })
      // A process that could not be started, as when no descriptors are left, does not exit.
      worker.once('error', error => {
        delete cluster.workers![worker.id]
        reject(error)
        leases.close()
        replaceLater({ reason: reasonOf(error) })
      })
      worker.once('exit', (code, signal) => {
        leases.close()
        reject(new Error('a worker has stopped while it was starting'))
        if (performance.now() - startedAt > STABLE_AFTER) wait = FIRST_WAIT
        replaceLater({ pid: worker.process.pid, code, signal })
      })
      void sendConfig(worker, 'serve', config)
    })
  }

  function replaceLater(details: object): void {
    if (isClosing) return
    log.error({ ...details, wait }, 'a worker has stopped')
    setTimeout(replace, wait)
    wait = Math.min(wait * 2, MAX_WAIT)
  }

  function replace(): void {
    if (isClosing) return
    // One that fails exits, and is replaced in its turn.
    start().then(
      () => log.info('a worker has been replaced'),
      error => log.error({ err: error }, 'a worker could not be started')
    )
  }

  function write(worker: Worker, line: SharedLine): void {
    if (lines.isNew(worker, line)) log[line.level](line.fields, line.msg)
  }

  function tellOthers(teller: Worker, news: News): void {
    for (const worker of workers()) if (worker !== teller) send(worker, { kind: 'news', news })
  }

  /** One process writes all records down: what it has written it says to the worker, in order. */
  async function record(worker: Worker, entries: string[]): Promise<void> {
    await Promise.all(entries.map(each => outbox.append(each)))
    send(worker, { kind: 'recorded' })
  }

  /** The primary has no metrics of its own; one worker counts for it. */
  function countDelivery(result: Delivery, records: number): void {
    const [worker] = workers()
    if (worker !== undefined) send(worker, { kind: 'delivered', result, records })
  }

  /** State that the primary has, and a worker counts. */
  function tellState(): void {
    const [first] = workers()
    if (refused > 0 && first !== undefined) {
      send(first, { kind: 'refused', connections: refused })
      refused = 0
    }
    const { pending, trouble } = outbox
    for (const [index, worker] of workers().entries()) {
      send(worker, { kind: 'outbox', state: { pending: index === 0 ? pending : 0, trouble } })
    }
  }

  async function answer(worker: Worker, { id, what }: Message & { kind: 'question' }) {
    try {
      const value = await (what === 'metrics' ? scrape() : reread())
      send(worker, { kind: 'answer', id, value })
    } catch (error) {
      send(worker, { kind: 'answer', id, error: toFailure(error) })
    }
  }

  async function scrape(): Promise<string> {
    tellState()
    return all.clusterMetrics()
  }

  async function reread(): Promise<string> {
    if (read === undefined) throw new Error('nobody follows the configuration yet')
    return read()
  }

  /** A worker that is being started takes over what it finds in `config`. */
  async function take(changed: Config): Promise<void> {
    const { usage, storage } = config
    config = changed
    await out.update(changed.log)
    limits.update({ periods: new Periods(changed.rate_limit.time_zone) })
    if (!isDeepStrictEqual([changed.usage, changed.storage], [usage, storage])) {
      await outbox.update(await reporters(changed), toKeeping(changed.usage))
    }
    const errors = await Promise.all(workers().map(worker => sendConfig(worker, 'reload', changed)))
    const error = errors.find(each => each !== undefined)
    if (error !== undefined) throw toError(error)
  }

  return {
    url,
    log,
    reload: changed => allOrNothing(take, config, changed),
    onReload(reader) {
      read = reader
    },
    get stopTimeout() {
      return stopTimeout(config.server)
    },
    async close() {
      isClosing = true
      log.info('shutting down')
      const late = setTimeout(killWorkers, stopTimeout(config.server) - OWN_CLOSE_TIMEOUT)
      await Promise.all(
        workers().map(async worker => {
          send(worker, { kind: 'close' })
          await once(worker, 'exit')
        })
      )
      clearTimeout(late)
      await limits.close()
      await outbox.close(AbortSignal.timeout(FLUSH_TIMEOUT))
      log.info('stopped')
      await out.flush()
    }
  }
}

function workers(): Worker[] {
  return Object.values(cluster.workers ?? {}).filter(worker => worker !== undefined)
}

function killWorkers(): void {
  for (const worker of workers()) worker.process.kill('SIGKILL')
}

function send(worker: Worker, order: Order): void {
  // One that is about to stop needs no more orders.
  if (worker.isConnected()) worker.send(order, () => {})
}

function toFailure(error: unknown): Failure {
  const { message, name, code } = error as NodeJS.ErrnoException
  return { message, name, code }
}

function toError({ message, name, code }: Failure): Error {
  if (name === 'GatewayError') return new GatewayError(code as GatewayError['code'], message)
  return Object.assign(new Error(message), { name, code })
}

/** Resolves when a worker has taken all fragments of a configuration, or with what went wrong. */
async function sendConfig(
  worker: Worker,
  purpose: Purpose,
  config: Config
): Promise<Failure | undefined> {
  let error = await sendFragment(worker, { kind: purpose })
  for (const fragment of fragmentsOf(config)) {
    if (error !== undefined) break
    error = await sendFragment(worker, { kind: purpose, fragment })
  }
  return error
}

/** The same for one fragment, or for the beginning. */
function sendFragment(
  worker: Worker,
  order: Order & { kind: Purpose }
): Promise<Failure | undefined> {
  return new Promise(resolve => {
    if (!worker.isConnected()) return resolve(undefined)
    const silent = { message: `worker ${worker.process.pid} does not answer`, name: 'Error' }
    // A start may take any time.
    const timer =
      order.kind === 'reload'
        ? setTimeout(() => done({ ...silent, code: undefined }), RELOAD_TIMEOUT)
        : undefined
    const listen = (message: Message) => {
      if (message.kind === 'took' && message.purpose === order.kind) done(message.error)
    }
    const stopped = () => done(undefined)
    const done = (error: Failure | undefined) => {
      clearTimeout(timer)
      worker.off('message', listen)
      worker.off('exit', stopped)
      resolve(error)
    }
    worker.on('message', listen)
    worker.once('exit', stopped)
    send(worker, order)
  })
}

/** The primary's reply, without the number by which the worker tells answers apart. */
type Question = Omit<Message & { kind: 'question' }, 'id'>

/** The life of a worker: it does as the primary says. */
export function runWorker(dataDir: string): void {
  exitWithoutWaiting()
  const asked = new Map<number, (answer: Order & { kind: 'answer' }) => void>()
  const newsListeners: ((news: News) => void)[] = []
  const usage = new Posts(entries => tell({ kind: 'records', entries }))
  const limits = new RemoteStore(question => tell({ kind: 'limit', question }))
  let lastId = 0
  const serving = Promise.withResolvers<void>()
  const assemblies: Partial<Record<Purpose, Assembly<Config>>> = {}
  let running: Config | undefined
  let server: Awaited<ReturnType<typeof startServer>> | undefined
  const peers = {
    count: 1,
    metrics: () => ask({ kind: 'question', what: 'metrics' }),
    tell: news => tell({ kind: 'news', news }),
    say: (level, fields, msg) => tell({ kind: 'line', line: { level, fields, msg } }),
    usage,
    limits,
    outbox: { pending: 0, trouble: undefined },
    onNews: listener => newsListeners.push(listener),
    reload: () => ask({ kind: 'question', what: 'reload' })
  } satisfies Peers

  async function ask(question: Question): Promise<string> {
    const id = ++lastId
    tell({ ...question, id })
    const { value, error } = await new Promise<Order & { kind: 'answer' }>(resolve => {
      asked.set(id, resolve)
    })
    if (error !== undefined) throw toError(error)
    return value!
  }

  process.on('message', async (order: Order) => {
    if (order.kind === 'serve' || order.kind === 'reload') await take(order.kind, order.fragment)
    else if (order.kind === 'recorded') usage.settle()
    else if (order.kind === 'limited') limits.hear(order.answer)
    else if (order.kind === 'outbox') Object.assign(peers.outbox, order.state)
    else if (order.kind === 'delivered') server?.gateway.countDelivery(order.result, order.records)
    else if (order.kind === 'refused') server?.connections.refuse('descriptors', order.connections)
    else if (order.kind === 'news') for (const listener of newsListeners) listener(order.news)
    else if (order.kind === 'answer') {
      asked.get(order.id)?.(order)
      asked.delete(order.id)
    } else if (order.kind === 'close') {
      await server?.close()
      process.exit()
    }
  })

  acknowledgeLost(() => server?.connections.refuse('accept', 1, 'EMFILE'))

  async function take(purpose: Purpose, fragment: Fragment | undefined): Promise<void> {
    if (fragment === undefined) assemblies[purpose] = new Assembly(running)
    const config = fragment && assemblies[purpose]!.add(fragment)
    if (config !== undefined) delete assemblies[purpose]
    const error = config && purpose === 'reload' ? await reload(config) : undefined
    tell({ kind: 'took', purpose, error })
    if (config !== undefined && purpose === 'serve') serving.resolve(serve(config))
  }

  async function serve(config: Config): Promise<void> {
    try {
      peers.count = workerCount(config)
      const started = await startServer(config, dataDir, peers)
      server = started
      running = config
      AggregatorRegistry.setRegistries(started.gateway.metricsRegistry)
      new AggregatorRegistry()
      closeWithGrace({ delay: false, logger: started.log, skip: [...SIGNALS] }, async ({ err }) => {
        const timeout = started.stopTimeout
        endWithin(timeout, () => started.log.error({ timeout }, NOT_STOPPED))
        started.log.fatal({ err }, 'unexpected error')
        await started.close()
      })
      tell({ kind: 'serves', url: started.url })
    } catch (error) {
      const failed: Message = { kind: 'failed', error: toFailure(error) }
      process.send!(failed, () => process.exit(1))
    }
  }

  async function reload(config: Config): Promise<Failure | undefined> {
    try {
      await serving.promise
      await server?.reload(config)
      running = config
      return undefined
    } catch (error) {
      return toFailure(error)
    }
  }
}

function tell(message: Message): void {
  if (process.connected) process.send!(message)
}
