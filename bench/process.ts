import { readdirSync, readFileSync } from 'node:fs'

/** What Linux says of a process and of the processes it started. */

/** CPU time in microseconds, of all threads. */
export function cpuTime(pid: number): number {
  let nanoseconds = 0
  for (const each of family(pid)) {
    for (const task of list(`/proc/${each}/task`)) {
      nanoseconds += Number(read(`/proc/${each}/task/${task}/schedstat`).split(' ')[0])
    }
  }
  return nanoseconds / 1000
}

/** Memory in KB: `private` is RssAnon, which no other process shares. */
export function memory(pid: number): { private: number; rss: number } {
  const sum = { private: 0, rss: 0 }
  for (const each of family(pid)) {
    const status = read(`/proc/${each}/status`)
    sum.private += Number(/RssAnon:\s*(\d+)/.exec(status)?.[1] ?? 0)
    sum.rss += Number(/VmRSS:\s*(\d+)/.exec(status)?.[1] ?? 0)
  }
  return sum
}

/** The process and all its descendants. */
function family(pid: number): number[] {
  const children = list(`/proc/${pid}/task`)
    .flatMap(task => read(`/proc/${pid}/task/${task}/children`).split(' '))
    .filter(child => child !== '')
  return [pid, ...children.flatMap(child => family(Number(child)))]
}

function read(file: string): string {
  try {
    return readFileSync(file, 'utf8')
  } catch {
    return ''
  }
}

function list(folder: string): string[] {
  try {
    return readdirSync(folder)
  } catch {
    return []
  }
}
