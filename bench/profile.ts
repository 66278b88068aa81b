import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

/** Sums a V8 CPU profile up: `profile.ts FOLDER [LINES]` prints where the time was spent itself. */

interface Profile {
  nodes: { id: number; callFrame: { functionName: string; url: string; lineNumber: number } }[]
  samples: number[]
  timeDeltas: number[]
}

const [folder = '.', lines = '40'] = process.argv.slice(2)
const file = readdirSync(folder).find(name => name.endsWith('.cpuprofile'))!
const profile: Profile = JSON.parse(readFileSync(join(folder, file), 'utf8'))
const frames = new Map(profile.nodes.map(node => [node.id, node.callFrame]))
const byFunction = new Map<string, number>()
const byModule = new Map<string, number>()
let total = 0
for (const [at, id] of profile.samples.entries()) {
  const { functionName, url, lineNumber } = frames.get(id)!
  if (functionName === '(idle)' || functionName === '(program)') continue
  const time = profile.timeDeltas[at]!
  total += time
  const place = moduleOf(url)
  add(byModule, place === '' ? functionName : place, time)
  add(
    byFunction,
    `${functionName || '(anonymous)'} ${url.split('/').slice(-2).join('/')}:${lineNumber + 1}`,
    time
  )
}
print(byModule)
console.log()
print(byFunction)

function moduleOf(url: string): string {
  const dependency = /node_modules\/((?:@[^/]+\/)?[^/]+)(?!.*node_modules)/.exec(url)
  if (dependency !== null) return dependency[1]!
  return url.startsWith('node:') ? 'node' : url.split('/').slice(-2).join('/')
}

function add(sums: Map<string, number>, name: string, time: number): void {
  sums.set(name, (sums.get(name) ?? 0) + time)
}

function print(sums: Map<string, number>): void {
  const sorted = [...sums].sort((a, b) => b[1] - a[1]).slice(0, Number(lines))
  for (const [name, time] of sorted)
    console.log(`${((time / total) * 100).toFixed(1).padStart(5)} %  ${name}`)
}
