import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestContext } from 'node:test'

/** The gateway as a process of its own, as people run it. */

export interface Process {
  child: ChildProcess
  url: string
  port: number
  /** Log lines so far. */
  lines: Record<string, unknown>[]
  /** The first line, or the one number `count`, whose message begins like this. */
  logged(message: string, count?: number): Promise<Record<string, unknown>>
  exit: Promise<number | null>
}

/** Time (ms) in which all processes know of a change. STRICT=1: what the documentation says, for an idle machine. */
export const SOON = process.env.STRICT ? 1_000 : 20_000

/** The program: its source, or the bundle that bundle.ts made of it for all tests. */
export const CLI = process.env.LLMPROXY_CLI ?? new URL('../src/cli.ts', import.meta.url).pathname

/** A command line of the gateway: LLMPROXY_BINARY names a single binary that runs in place of the source. */
export function commandLine(args: string[], command = process.execPath): [string, string[]] {
  const binary = process.env.LLMPROXY_BINARY
  return binary && args[0] === CLI ? [binary, args.slice(1)] : [command, args]
}

export function folder(t: TestContext): string {
  const path = mkdtempSync(join(tmpdir(), 'llmproxy-'))
  t.after(() => rmSync(path, { recursive: true, force: true }))
  return path
}

export async function start(
  t: TestContext,
  args: string[],
  env: NodeJS.ProcessEnv = {},
  command?: string,
  options: { detached?: boolean } = {}
): Promise<Process> {
  const child = spawn(...commandLine(args, command), {
    ...options,
    env: { ...process.env, LLMPROXY_CONFIG: '', ...env },
    stdio: ['ignore', 'pipe', 'inherit']
  })
  t.after(() => child.kill('SIGKILL'))
  const lines: Record<string, unknown>[] = []
  const waiting = new Set<() => void>()
  let rest = ''
  child.stdout!.on('data', (data: Buffer) => {
    const parts = (rest + data).split('\n')
    rest = parts.pop()!
    for (const part of parts.filter(each => each.startsWith('{'))) lines.push(JSON.parse(part))
    for (const look of waiting) look()
  })
  const running: Process = {
    child,
    url: '',
    port: 0,
    lines,
    logged: (message, count = 1) =>
      new Promise(resolve => {
        const look = () => {
          const found = lines.filter(({ msg }) => String(msg).startsWith(message))
          if (found.length < count) return
          waiting.delete(look)
          resolve(found[count - 1]!)
        }
        waiting.add(look)
        look()
      }),
    exit: new Promise(resolve => {
      child.once('exit', resolve)
    })
  }
  const { url } = await running.logged('LLMProxy is listening')
  running.url = String(url)
  running.port = Number(new URL(running.url).port)
  return running
}

/** The processes that this one has started. */
export function workersOf(pid: number): number[] {
  return readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim().split(' ').map(Number)
}

export function writeConfig(file: string, config: object): string {
  // In one step, so that nobody reads half a file.
  writeFileSync(`${file}.new`, JSON.stringify(config))
  renameSync(`${file}.new`, file)
  return file
}
