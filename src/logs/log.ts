import { createRequire } from 'node:module'
import { resolve } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { type Logger, pino } from 'pino'
import { type Static, Type } from 'typebox'
import { Section } from '../options.ts'
import { fileOptions, RotatingFile } from './rotating-file.ts'
import { LogSink } from './sink.ts'

/** The log of the program: what it says of itself, and a line for each exchange. */

export const LogOptions = Section(
  {
    level: Type.Enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'], {
      default: 'info',
      description: 'Least level that is written'
    }),
    format: Type.Enum(['auto', 'json', 'text'], {
      default: 'auto',
      description: 'auto: text on a terminal, json elsewhere'
    }),
    output: Type.Enum(['stdout', 'stderr', 'file'], { default: 'stdout', description: 'Where to' }),
    file: Section(fileOptions('llmproxy.log', 10), 'For output: file')
  },
  'The log'
)
export type LogOptions = Static<typeof LogOptions>

/** Where the lines go, and in which form. */
interface Outlet {
  sink: LogSink
  format(line: string): string
}

/**
 * A logger whose lines can be sent elsewhere while it is in use.
 *
 * @example
 * const file = { path: 'a.log', rotate: 'size', max_size: 1024, max_files: 3, max_age: 0, compress: true }
 * const options = { level: 'warn', format: 'json', output: 'stderr', file }
 * const log = new Log(options, 'data')
 * await log.update({ ...options, level: 'info' })
 * log.logger.level // 'info'
 */
export class Log {
  readonly logger: Logger
  readonly #dataDir: string
  #options: LogOptions
  #outlet: Outlet

  /** @throws what the system says of a file that cannot be written */
  constructor(options: LogOptions, dataDir: string) {
    this.#dataDir = dataDir
    this.#options = options
    this.#outlet = openOutlet(options, dataDir)
    this.logger = pino({ level: options.level, base: null }, {
      write: (line: string) => this.#outlet.sink.write(this.#outlet.format(line)),
      flush: (done: () => void) => this.#outlet.sink.flush(done)
    } as pino.DestinationStream)
  }

  /** @throws when the new file cannot be written; then everything stays as it was */
  async update(options: LogOptions): Promise<void> {
    const { level: _, ...place } = this.#options
    const { level, ...newPlace } = options
    const before = this.#outlet
    const isElsewhere = !isDeepStrictEqual(place, newPlace)
    if (isElsewhere) this.#outlet = openOutlet(options, this.#dataDir)
    this.#options = options
    this.logger.level = level
    if (isElsewhere) await before.sink.close()
  }

  /** Resolves when the last lines are written, or when nobody takes them. */
  flush(): Promise<void> {
    return new Promise(resolve => this.logger.flush(() => resolve()))
  }
}

function openOutlet({ output, format, file }: LogOptions, dataDir: string): Outlet {
  if (output === 'file') {
    const target = new RotatingFile({ ...file, path: resolve(dataDir, file.path) })
    target.touch()
    return { sink: new LogSink(target, 'log'), format: line => line }
  }
  const { isTTY } = output === 'stdout' ? process.stdout : process.stderr
  const sink = new LogSink(output === 'stdout' ? 1 : 2, 'log')
  const isText = format === 'text' || (format === 'auto' && isTTY)
  if (!isText) return { sink, format: line => line }
  // Only for text: it takes a tenth of a start.
  const { prettyFactory }: typeof import('pino-pretty') = createRequire(import.meta.url)(
    'pino-pretty'
  )
  const pretty = prettyFactory({
    colorize: isTTY,
    singleLine: true,
    translateTime: 'SYS:HH:MM:ss.l'
  })
  return { sink, format: line => pretty(line) }
}
