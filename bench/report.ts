import { readFileSync, writeFileSync } from 'node:fs'

/** The table and the chart of a run. */

/** Values by figure, one for each round. */
export type Figures = Record<string, number[]>

export interface Results {
  date: string
  machine: string
  rounds: number
  command: string
  entrants: { name: string; description: string; figures: Figures }[]
}

export function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = Math.floor(sorted.length / 2)
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2
}

/** Median over the rounds of a figure's ratio to the same round of another entrant. */
export function ratio(own: number[], base: number[]): number {
  return median(own.map((value, round) => value / base[round]!))
}

/** What the README shows; the whole table is in docs/performance.md. */
const MAIN = [
  'cpu µs/chunk',
  'cpu µs/request 2 KB',
  'requests/s 2 KB',
  'added ttft p50 ms',
  'added ttft p99 ms',
  'idle private MB',
  'KB per held stream',
  '10,000 streams on 2 workers private MB'
]

/** All figures as a table, and what was measured where and how; or the main ones alone. */
export function toMarkdown(
  { date, machine, rounds, command, entrants }: Results,
  extent: 'all' | 'main' = 'all'
): string {
  const all = [...new Set(entrants.flatMap(each => Object.keys(each.figures)))]
  const names = extent === 'all' ? all : MAIN.filter(name => all.includes(name))
  const nginx = entrants.find(each => each.name === 'nginx')
  const row = (cells: string[]) => `| ${cells.join(' | ')} |\n`
  let table = row(['median', ...entrants.map(each => each.name)])
  table += row(['---', ...entrants.map(() => '---:')])
  for (const name of names) {
    table += row([name, ...entrants.map(each => cell(each.figures[name]))])
    if (nginx?.figures[name] === undefined || !name.startsWith('cpu')) continue
    const base = nginx.figures[name]!
    const ratios = entrants.map(({ figures }) => {
      const own = figures[name]
      return own === undefined || median(own) === 0 ? '' : ratio(own, base).toFixed(2)
    })
    table += row([`${name} / nginx`, ...ratios])
  }
  const list = entrants.map(each => `- ${each.name}: ${each.description}`).join('\n')
  return `${table}\nMedians of ${rounds} rounds on ${date}, ${machine}; \`${command}\`\n\n${list}\n`
}

/** What the gateway must reach, and should; a ratio is to nginx in the same round. */
const TARGETS = [
  { figure: 'cpu µs/chunk', isRatio: true, must: 2.6, aim: 1.9 },
  { figure: 'cpu µs/request 2 KB', isRatio: true, must: 8, aim: 5.5 },
  { figure: 'added ttft p50 ms', must: 0.5, aim: 0.25 },
  { figure: 'added ttft p99 ms', must: 2, aim: 1 },
  { figure: 'KB per held stream', must: 40, aim: 25 },
  { figure: 'idle private MB', must: 50, aim: 40 },
  { figure: '60 s later / idle', must: 2.5, aim: 1.5 },
  { figure: 'latest chunk beside a 1 MB prompt p50 ms', must: 5, aim: 2 }
]

/** How far the gateway is from its targets. */
export function toTargets({ entrants }: Results): string {
  const of = (name: string) => entrants.find(each => each.name === name)?.figures ?? {}
  let table = '| figure | measured | must | aim | |\n| --- | ---: | ---: | ---: | --- |\n'
  for (const { figure, isRatio, must, aim } of TARGETS) {
    const own = of(OWN)[figure]
    const base = isRatio ? of('nginx')[figure] : undefined
    if (own === undefined || (isRatio && base === undefined)) continue
    const value = base === undefined ? median(own) : ratio(own, base)
    const verdict = value <= aim ? 'reached' : value <= must ? 'within' : 'not reached'
    const name = isRatio ? `${figure} / nginx` : figure
    table += `| ${name} | ${short(value)} | ${must} | ${aim} | ${verdict} |\n`
  }
  return table
}

function cell(values: number[] | undefined): string {
  return values === undefined ? '' : short(median(values))
}

function short(value: number): string {
  if (Math.abs(value) >= 100) return value.toFixed(0)
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 2)
}

const OWN = 'llmproxy'
const PANELS = [
  { figure: 'cpu µs/chunk', title: 'CPU per streamed chunk, µs' },
  { figure: 'cpu µs/request 2 KB', title: 'CPU per request, µs (2 KB in, 1 KB out)' },
  { figure: 'added ttft p50 ms', title: 'Added time to first token, ms (median)' },
  { figure: 'KB per held stream', title: 'Private memory per held stream, KB' }
]

/** Measures of the chart: two panels beside each other, a name before each bar and a value behind it. */
const WIDTH = 860
const GAP = 28
const PANEL_WIDTH = (WIDTH - GAP) / 2
const TITLE_HEIGHT = 28
const ROW_HEIGHT = 22
const BAR_HEIGHT = 14
const BAR_X = 80
const BAR_WIDTH = PANEL_WIDTH - BAR_X - 52

/** A bar so many times longer than the next is cut, and the next gets this share of the width. */
const OUTLIER = 4
const NEXT_TO_OUTLIER = 0.6

/** Shows on light and dark ground alike, whichever the reader has: it has none of its own. */
const STYLE = `
    text { font: 12px -apple-system, BlinkMacSystemFont, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #59636e }
    .title { font-size: 13px; font-weight: 600; fill: #1f2328 }
    .name { text-anchor: end }
    .bar { fill: #afb8c1 }
    .own { fill: #0969da }
    text.own { font-weight: 600 }
    @media (prefers-color-scheme: dark) {
      text { fill: #9198a1 }
      .title { fill: #f0f6fc }
      .bar { fill: #656c76 }
      .own { fill: #4493f8 }
    }
  `

interface Bar {
  name: string
  value: number
}

interface Panel {
  title: string
  bars: Bar[]
}

/** A chart of what matters most; figures that were not measured are left out. */
export function toSvg({ date, machine, rounds, entrants }: Results): string {
  const panels: Panel[] = PANELS.map(({ figure, title }) => ({
    title,
    bars: entrants
      .filter(each => each.name !== 'direct')
      .map(({ name, figures }) => ({ name, value: median(figures[figure] ?? []) }))
      .filter(({ value }) => Number.isFinite(value))
  })).filter(({ bars }) => bars.length > 0)
  const most = Math.max(0, ...panels.map(({ bars }) => bars.length))
  const panelHeight = TITLE_HEIGHT + most * ROW_HEIGHT + GAP
  const height = Math.ceil(panels.length / 2) * panelHeight + 16
  const drawn = panels.map((panel, at) => {
    const x = (at % 2) * (PANEL_WIDTH + GAP)
    const y = Math.floor(at / 2) * panelHeight
    return `<g transform="translate(${x} ${y})">${drawPanel(panel)}\n  </g>`
  })
  const note = `Shorter is better. ${rounds} rounds on ${date}, ${machine}.`
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${height}" viewBox="0 0 ${WIDTH} ${height}" role="img" aria-labelledby="title desc">
  <title id="title">What LLMProxy costs beside its peers</title>
  <desc id="desc">${escaped(`${panels.map(describe).join('. ')}. ${note}`)}</desc>
  <style>${STYLE}</style>
  ${drawn.join('\n  ')}
  <text x="0" y="${height - 6}">${escaped(note)}</text>
</svg>
`
}

function describe({ title, bars }: Panel): string {
  return `${title}: ${bars.map(({ name, value }) => `${name} ${short(value)}`).join(', ')}`
}

function drawPanel({ title, bars }: Panel): string {
  const [largest = 0, next = 0] = bars.map(({ value }) => value).sort((a, b) => b - a)
  const isCut = next > 0 && largest > OUTLIER * next
  const full = isCut ? next / NEXT_TO_OUTLIER : largest
  const rows = bars.map(({ name, value }, at) => {
    const y = TITLE_HEIGHT + at * ROW_HEIGHT
    const own = name === OWN ? ' own' : ''
    const length = full > 0 ? BAR_WIDTH * Math.min(1, Math.max(0, value / full)) : 0
    const path = value > full ? cutBar(y) : bar(y, length)
    return `
    <text class="name${own}" x="${BAR_X - 8}" y="${y + 11}">${escaped(name)}</text>
    <path class="bar${own}" d="${path}"/>
    <text class="value${own}" x="${(BAR_X + length + 6).toFixed(1)}" y="${y + 11}">${short(value)}</text>`
  })
  return `
    <text class="title" x="0" y="14">${escaped(title)}</text>${rows.join('')}`
}

function bar(y: number, length: number): string {
  return `M${BAR_X} ${y}h${length.toFixed(1)}v${BAR_HEIGHT}H${BAR_X}z`
}

/** A bar of full width with a slanting gap near its end: it would be longer than there is room. */
function cutBar(y: number): string {
  const end = BAR_X + BAR_WIDTH
  const before = `M${BAR_X} ${y}H${end - 26}l-6 ${BAR_HEIGHT}H${BAR_X}z`
  return `${before}M${end - 20} ${y}H${end}v${BAR_HEIGHT}H${end - 26}z`
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
}

/** Puts text between the two comments of that name in a page of the documentation. */
export function insert(page: string, name: string, text: string): void {
  const file = new URL(page, import.meta.url)
  const [begin, end] = [`<!-- ${name} -->\n`, `<!-- /${name} -->`]
  const [before, rest = ''] = readFileSync(file, 'utf8').split(begin)
  const after = rest.split(end)[1]
  if (after === undefined) throw new Error(`${page} has no place for ${name}`)
  writeFileSync(file, `${before}${begin}\n${text}\n${end}${after}`)
}
