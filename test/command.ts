import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { toFailure } from '../src/commands/failure.ts'
import { CLI, commandLine } from './process.ts'

/** Commands of the program. */

export interface Result {
  status: number
  stdout: string
  stderr: string
}

/** Runs a command line as a process. */
export async function runProgram(args: string[], env: NodeJS.ProcessEnv = {}): Promise<Result> {
  const child = spawn(...commandLine([CLI, ...args]), {
    env: { ...process.env, LLMPROXY_CONFIG: '', ...env },
    stdio: ['ignore', 'pipe', 'pipe']
  })
  const output = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].on('data', data => {
      output[name] += data
    })
  }
  const [status] = await once(child, 'close')
  return { status, ...output }
}

/** Runs a command in this process, which takes a hundredth of the time, and returns what it prints. */
export async function runCommand(command: () => Promise<number>): Promise<Result> {
  const stdout = capture(process.stdout)
  const stderr = capture(process.stderr)
  try {
    const status = await command().catch(error => {
      const { message, exitCode } = toFailure(error)
      console.error(message)
      return exitCode
    })
    return { status, stdout: stdout.text, stderr: stderr.text }
  } finally {
    stdout.end()
    stderr.end()
  }
}

/** Keeps the text written to a stream. The test runner writes bytes, which pass. */
function capture(stream: NodeJS.WriteStream) {
  const { write } = stream
  const captured = {
    text: '',
    end() {
      stream.write = write
    }
  }
  stream.write = (data: string | Uint8Array, ...more: []) => {
    if (typeof data !== 'string') return write.call(stream, data, ...more)
    captured.text += data
    return true
  }
  return captured
}
