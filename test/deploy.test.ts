import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  cpSync,
  existsSync,
  globSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync
} from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, dirname, join, resolve } from 'node:path'
import { createInterface } from 'node:readline'
import { test } from 'node:test'
import { parse } from 'yaml'
import { loadConfig } from '../src/config.ts'
import { answerChat, CHAT, closedPort, fakeBackend, post, startGateway } from './helper.ts'

/**
 * The image, the compose file and the dashboard against the code they are about. No engine is
 * needed: what they say is read, and what can be run is run.
 */

const ROOT = new URL('..', import.meta.url).pathname
const inRoot = (path: string) => join(ROOT, path)
const read = (path: string) => readFileSync(inRoot(path), 'utf8')
const readYaml = (path: string) => parse(read(path), { merge: true })

const cli = read('src/cli.ts') + read('src/main.ts')
const containerConfig = /CONTAINER_CONFIG = '([^']+)'/.exec(cli)![1]!
const packageJson = JSON.parse(read('package.json'))
const compose: Compose = readYaml('docker-compose.yml')
const dashboard: Dashboard = JSON.parse(read('config/grafana/dashboards/llmproxy.json'))
const dockerfile = readDockerfile()
const port = Number(instruction('EXPOSE'))
const TIMEOUT = 60_000

test('every query of the dashboard is about metrics, labels and values that the gateway has', {
  timeout: TIMEOUT
}, async t => {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    backends: [{ name: 'b', url: backend.url }],
    rate_limit: { enabled: true, per_key: { requests_per_minute: 2 } }
  })
  for (const stream of [true, false, true]) {
    const answer = await post(`${gateway.url}/v1/chat/completions`, { ...CHAT, stream })
    await answer.text()
    await gateway.logged({ requestId: answer.headers.get('x-llmproxy-request-id') })
  }
  const known = readMetrics(await gateway.metrics())
  const outcomes = /type Outcome = (.*)/.exec(read('src/exchange.ts'))![1]!

  const queries = dashboard.panels.flatMap(panel => panel.targets ?? [])
  assert.ok(queries.length > 30)
  for (const { expr, legendFormat } of queries) {
    const { selectors, groupedBy } = parseQuery(expr)
    assert.ok(selectors.length > 0, expr)
    for (const { name, matchers } of selectors) {
      const labels = known.get(name)
      assert.ok(labels, `there is no metric ${name}: ${expr}`)
      const shown = [...legendFormat.matchAll(/\{\{(\w+)\}\}/g)].map(([, label]) => label!)
      for (const label of [...groupedBy, ...shown, ...matchers.map(({ label }) => label)]) {
        assert.ok(labels.has(label), `${name} has no label ${label}: ${expr}`)
      }
      if (groupedBy.length > 0) assert.deepEqual(without(shown, groupedBy), [], legendFormat)
      for (const { label, value } of matchers) {
        for (const each of value.split('|')) {
          if (label === 'type') assert.ok(labels.get(label)!.has(each), expr)
          if (label === 'outcome') assert.ok(outcomes.includes(`'${each}'`), expr)
        }
      }
    }
  }
  for (const { definition } of dashboard.templating.list) {
    if (definition === undefined) continue
    const [, name, label] = /^label_values\((\w+), (\w+)\)$/.exec(definition)!
    assert.ok(known.get(name!)?.has(label!), definition)
  }
})

test('the dashboard asks the data source that is provisioned, and every panel can be read', () => {
  const { datasources } = readYaml('config/grafana/provisioning/datasources/prometheus.yml')
  const [source] = datasources
  assert.equal(datasources.length, 1)
  assert.equal(source.isDefault, true)
  const { host } = new URL(source.url)
  assert.equal(host, `prometheus:${ports('prometheus')[0]!.container}`)
  const prometheus = readYaml('config/prometheus.yml')
  assert.equal(source.jsonData.timeInterval, prometheus.global.scrape_interval)

  const variables = new Map(dashboard.templating.list.map(each => [each.name, each]))
  assert.equal(variables.get('datasource')!.query, source.type)
  assert.equal(variables.get('datasource')!.current.value, source.uid)
  const asks = (place: object, { datasource }: { datasource?: object }) =>
    assert.deepEqual(datasource, { type: source.type, uid: '${datasource}' }, JSON.stringify(place))
  asks(variables.get('instance')!, variables.get('instance')!)

  const ids = dashboard.panels.map(({ id }) => id)
  assert.equal(new Set(ids).size, ids.length)
  const taken = new Set<string>()
  for (const panel of dashboard.panels) {
    const { x, y, w, h } = panel.gridPos
    assert.ok(x + w <= 24, panel.title)
    for (let at = 0; at < w * h; at++) {
      const cell = `${x + (at % w)}:${y + Math.floor(at / w)}`
      assert.ok(!taken.has(cell), `${panel.title} lies over another panel`)
      taken.add(cell)
    }
    if (panel.type === 'row') continue
    assert.ok(panel.description, panel.title)
    const { defaults } = panel.fieldConfig!
    assert.ok(defaults.unit ?? defaults.mappings, `${panel.title} has no unit`)
    asks(panel, panel)
    for (const target of panel.targets!) asks(panel, target)
  }
})

test('Grafana finds the dashboard where compose mounts it', () => {
  const { providers } = readYaml('config/grafana/provisioning/dashboards/llmproxy.yml')
  const mounted = mounts('grafana')
  const place = mounted.find(({ target }) => target === providers[0].options.path)!
  assert.equal(place.source, './config/grafana/dashboards')
  const home = compose.services.grafana!.environment as Record<string, string>
  const homePath = home.GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH!
  assert.equal(dirname(homePath), place.target)
  assert.ok(existsSync(inRoot(join(place.source, basename(homePath)))))
  for (const kind of ['datasources', 'dashboards']) {
    const { source } = mounted.find(({ target }) => target === `/etc/grafana/provisioning/${kind}`)!
    assert.equal(source, `./config/grafana/provisioning/${kind}`)
  }
})

test('Prometheus scrapes the gateway that compose starts', async () => {
  const { scrape_configs } = readYaml('config/prometheus.yml')
  assert.deepEqual(scrape_configs[0].static_configs, [{ targets: [`llmproxy:${port}`] }])
  const { metrics } = await loadConfig(inRoot('config/llmproxy.yaml'), {})
  assert.equal(scrape_configs[0].metrics_path ?? '/metrics', metrics.path)
  const [file] = mounts('prometheus')
  assert.deepEqual(file, {
    source: './config/prometheus.yml',
    target: '/etc/prometheus/prometheus.yml'
  })
})

test('compose: mounts exist, volumes are declared, images are pinned, ports fit', () => {
  for (const [name, service] of Object.entries(compose.services)) {
    for (const { source } of mounts(name)) {
      if (source.startsWith('.')) assert.ok(existsSync(inRoot(source)), source)
      else assert.ok(source in compose.volumes, source)
    }
    if (service.build === undefined) assert.match(service.image, /:v?\d+\.\d+\.\d+$/)
    else assert.equal(service.build, '.')
  }
  assert.deepEqual(ports('llmproxy'), [{ address: '', container: port }])
  for (const name of ['prometheus', 'grafana']) assert.equal(ports(name)[0]!.address, '127.0.0.1')

  const inGateway = new Map(mounts('llmproxy').map(({ source, target }) => [target, source]))
  assert.equal(inGateway.get(containerConfig), './config/llmproxy.yaml')
  assert.equal(inGateway.get(instruction('VOLUME')), 'llmproxy-data')
})

test('every configuration that compose is said to use is valid and fits its profile', async () => {
  const commands = [read('docker-compose.yml'), read('docs/deployment.md')].flatMap(text => [
    ...text.matchAll(/LLMPROXY_CONFIG_FILE=(\S+) docker compose --profile (\w+) up/g)
  ])
  assert.equal(new Set(commands.map(([, file]) => file)).size, 2)
  for (const [, file, profile] of [...commands, ['', './config/llmproxy.yaml', undefined]]) {
    const { backends, server } = await loadConfig(inRoot(file!), {})
    assert.equal(server.listen, `:${port}`)
    // Draining, the rest of its answers, the rest of its usage events: see src/app.ts.
    const grace = Number.parseInt(compose.services.llmproxy!.stop_grace_period!, 10)
    assert.ok(grace * 1000 >= server.drain_timeout + 10_000)
    for (const { url } of backends) {
      if (profile === undefined) assert.equal(url, 'demo://')
      else assert.deepEqual(compose.services[new URL(url).hostname]!.profiles, [profile])
    }
  }
})

test('the client of the profile "demo" asks, with and without streaming', {
  timeout: TIMEOUT
}, async t => {
  const gateway = await startGateway(t, { backends: [{ url: 'demo://' }] })
  const { entrypoint, command, environment } = compose.services.demo!
  assert.deepEqual(environment, { GATEWAY: `http://llmproxy:${port}` })
  assert.equal(entrypoint![0], 'node')
  const child = spawn(process.execPath, [...entrypoint!.slice(1), ...command!], {
    env: { GATEWAY: gateway.url },
    stdio: 'inherit'
  })
  t.after(() => child.kill('SIGKILL'))
  await gateway.logged({ outcome: 'ok', status: 200, stream: false })
  await gateway.logged({ outcome: 'ok', status: 200, stream: true })
})

test('npm start, the image and the command run node with the same options', () => {
  const options = (command: string) => command.match(/--[a-z0-9-]+(=\d+)?/g)
  const wanted = options(packageJson.scripts.start)
  assert.ok(wanted!.length > 0)
  assert.deepEqual(options(cli.split('\n')[0]!), wanted)
  assert.deepEqual(options(instruction('ENTRYPOINT')), wanted)
})

test('the Dockerfile copies what is there or is built, and .dockerignore lets it through', () => {
  const ignores = read('.dockerignore')
    .split('\n')
    .filter(line => line !== '' && !line.startsWith('#'))
  const isIgnored = (path: string) =>
    ignores.reduce((ignored, line) => {
      // Docker's * also stands for a leading dot, unlike that of path.matchesGlob.
      const pattern = line.replace(/^!/, '').replaceAll('.', '\\.').replaceAll('*', '[^/]*')
      const hits = new RegExp(`^${pattern}(/|$)`).test(path)
      return hits ? !line.startsWith('!') : ignored
    }, false)
  for (const secret of ['.env', '.git', 'data', 'node_modules', 'config.yaml', 'test']) {
    assert.ok(isIgnored(secret), secret)
  }
  for (const { stage, sources, from } of copies()) {
    for (const source of sources) {
      if (from === undefined) {
        const found = globSync(source, { cwd: ROOT })
        assert.ok(found.length > 0, `${source} of stage ${stage} does not exist`)
        for (const path of found) assert.ok(!isIgnored(path), `.dockerignore hides ${path}`)
      } else {
        assert.equal(from, 'build')
        assert.ok(['/build/dist', '/build/node_modules'].includes(source), source)
      }
    }
  }
  const inBuild = copies().filter(({ stage }) => stage === 'build')
  const { include } = JSON.parse(read('tsconfig.json'))
  const needed = ['package.json', 'package-lock.json', '.npmrc', 'tsconfig.json', ...include]
  const copied = inBuild.flatMap(({ sources }) => sources)
  assert.deepEqual(without(needed, copied), [])
  const runs = dockerfile.filter(({ stage, keyword }) => stage === 'build' && keyword === 'RUN')
  const commands = runs.map(({ rest }) => rest).join('\n')
  assert.match(commands, /npm ci .*\nnpm run build && .* && npm prune/s)
  // What a container can't install is made a dependency before the others go.
  for (const name of Object.keys(packageJson.peerDependenciesMeta)) {
    const member = name.startsWith('@') ? `[${name}]` : `.${name}`
    assert.ok(commands.includes(`devDependencies${member}`), name)
    assert.ok(
      commands.includes(` dependencies${member}=`) || commands.includes(`'dependencies${member}=`),
      name
    )
  }
})

test("the image's user, folders and environment are those of the command line", () => {
  const setUp = dockerfile.find(({ rest }) => rest.startsWith('userdel'))!.rest
  const user = /useradd --uid 1000 --user-group --create-home \S+ \S+ (\S+)/.exec(setUp)![1]!
  // A number, which Kubernetes can check.
  assert.equal(instruction('USER'), '1000:1000')
  const home = `/home/${user}`
  assert.equal(dirname(containerConfig), home)
  assert.equal(dockerfile.findLast(({ keyword }) => keyword === 'WORKDIR')!.rest, home)
  const [name, folder] = instruction('ENV').split('=') as [string, string]
  assert.ok(cli.includes(`process.env.${name} `), name)
  assert.equal(folder, instruction('VOLUME'))
  assert.ok(setUp.includes(`install --directory --owner=${user} --group=${user} ${folder}`))
  // The base image is of the Node that this is developed with.
  const major = /^\d+/.exec(packageJson.devDependencies.node)![0]
  for (const { keyword, rest } of dockerfile) {
    if (keyword === 'FROM') assert.match(rest, new RegExp(`^node:${major}-slim( |$)`))
  }
})

test('laid out as in the image, the built program starts, is healthy and ends on SIGTERM', {
  timeout: TIMEOUT
}, async t => {
  const image = mkdtempSync(join(tmpdir(), 'llmproxy-image-'))
  t.after(() => rmSync(image, { recursive: true }))
  await layOut(image)
  const [node, ...flags] = JSON.parse(instruction('ENTRYPOINT'))
  const file = flags.pop()
  assert.equal(node, 'node')
  const bin = resolve('/opt/llmproxy', packageJson.bin.llmproxy)
  assert.equal(file, bin)
  const program = join(image, file)
  const opt = join(image, '/opt/llmproxy')

  assert.equal(await run([program, 'check', join(opt, 'config/llmproxy.yaml')]), 0)
  const config = join(image, 'config.yaml')
  writeFileSync(config, 'server: {listen: "127.0.0.1:0"}\nbackends: [{url: demo://}]\n')
  const child = spawn(process.execPath, [...flags, program, ...JSON.parse(instruction('CMD'))], {
    env: { LLMPROXY_CONFIG: config, LLMPROXY_DATA_DIR: join(image, 'data') },
    stdio: ['ignore', 'pipe', 'inherit']
  })
  t.after(() => child.kill('SIGKILL'))
  const exit = once(child, 'exit')
  const lines = createInterface(child.stdout)
  const url = await new Promise<string>((resolve, reject) => {
    lines.on('line', line => {
      const { msg, version, url } = JSON.parse(line)
      if (msg === 'LLMProxy is listening' && version === packageJson.version) resolve(url)
    })
    lines.on('close', () => reject(new Error('it never listened')))
  })
  assert.equal(await healthcheck(Number(new URL(url).port)), 0)
  child.kill('SIGTERM')
  assert.deepEqual(await exit, [0, null])
})

test('the health check fails when nothing listens and when the answer is an error', async t => {
  assert.equal(await healthcheck(await closedPort()), 1)
  const ill = await fakeBackend(t, (_request, response) => response.writeHead(503).end())
  assert.equal(await healthcheck(ill.port), 1)
  assert.equal(ill.requests[0]!.url, '/health')
})

interface Instruction {
  stage: string
  keyword: string
  rest: string
}

/** Its instructions, each on one line, with the stage they belong to. */
function readDockerfile(): Instruction[] {
  let stage = ''
  return read('Dockerfile')
    .replace(/^#.*\n/gm, '')
    .replace(/\\\n\s*/g, '')
    .split('\n')
    .filter(line => line !== '')
    .map(line => {
      const [, keyword, rest] = /^(\w+)\s+(.*)$/.exec(line) as unknown as [string, string, string]
      if (keyword === 'FROM') stage = / AS (\w+)$/.exec(rest)?.[1] ?? 'final'
      return { stage, keyword, rest }
    })
}

/** The one instruction of this kind. */
function instruction(wanted: string): string {
  const found = dockerfile.filter(({ keyword }) => keyword === wanted)
  assert.equal(found.length, 1, wanted)
  return found[0]!.rest
}

function copies() {
  let workdir = '/'
  return dockerfile.flatMap(({ stage, keyword, rest }) => {
    if (keyword === 'WORKDIR') workdir = rest
    if (keyword !== 'COPY') return []
    const from = /^--from=(\w+) /.exec(rest)?.[1]
    const sources = rest.replace(/^--\S+ /, '').split(' ')
    const target = sources.pop()!
    return [{ stage, from, sources, target: resolve(workdir, target), into: target.endsWith('/') }]
  })
}

/** Does in a folder what the COPY lines of the last stage do, with a build of its own. */
async function layOut(image: string): Promise<void> {
  const built = join(image, 'build')
  assert.match(packageJson.scripts.build, /&& tsc -p \.$/)
  const tsc = inRoot('node_modules/.bin/tsc')
  assert.equal(await run([tsc, '-p', ROOT, '--noCheck', '--outDir', join(built, 'dist')]), 0)
  linkProductionPackages(join(built, 'node_modules'))
  for (const { stage, from, sources, target, into } of copies()) {
    if (stage !== 'final') continue
    for (const source of sources) {
      const paths = from ? [join(image, source)] : globSync(source, { cwd: ROOT }).map(inRoot)
      for (const path of paths) {
        const to = join(image, target, into ? basename(path) : '')
        mkdirSync(dirname(to), { recursive: true })
        cpSync(path, to, { recursive: true, verbatimSymlinks: true })
      }
    }
  }
}

/** What `npm prune --omit=dev` leaves. */
function linkProductionPackages(folder: string): void {
  const { packages } = JSON.parse(read('package-lock.json'))
  for (const [path, { dev }] of Object.entries<{ dev?: boolean }>(packages)) {
    const name = /^node_modules\/((?:@[^/]+\/)?[^/]+)$/.exec(path)?.[1]
    if (name === undefined || dev || !existsSync(inRoot(path))) continue
    mkdirSync(dirname(join(folder, name)), { recursive: true })
    symlinkSync(inRoot(path), join(folder, name))
  }
}

/** The exit code of the image's health check, asked of another port. */
function healthcheck(at: number): Promise<number> {
  const [, command] = /CMD (\[.*\])$/.exec(instruction('HEALTHCHECK'))!
  const [node, ...args] = JSON.parse(command!) as string[]
  assert.equal(node, 'node')
  const script = args.pop()!
  assert.ok(script.includes(`127.0.0.1:${port}/`))
  return run([...args, script.replace(`:${port}/`, `:${at}/`)])
}

async function run(args: string[]): Promise<number> {
  const child = spawn(process.execPath, args, { stdio: ['ignore', 'ignore', 'inherit'] })
  const [code] = await once(child, 'exit')
  return code
}

interface Service {
  image: string
  build?: string
  profiles?: string[]
  ports?: string[]
  volumes?: (string | { source: string; target: string })[]
  environment?: Record<string, string> | string[]
  entrypoint?: string[]
  command?: string[]
  stop_grace_period?: string
}

interface Compose {
  services: Record<string, Service>
  volumes: Record<string, null>
}

/** A service's mounts, with the defaults of the variables. */
function mounts(service: string): { source: string; target: string }[] {
  return (compose.services[service]!.volumes ?? []).map(volume => {
    const [source, target] =
      typeof volume === 'string' ? volume.split(':') : [volume.source, volume.target]
    return { source: source!.replace(/\$\{\w+:-([^}]*)\}/g, '$1'), target: target! }
  })
}

function ports(service: string): { address: string; container: number }[] {
  return compose.services[service]!.ports!.map(published => {
    const parts = published.split(':')
    return { container: Number(parts.pop()), address: parts.slice(0, -1).join(':') }
  })
}

interface Dashboard {
  templating: {
    list: {
      name: string
      query: unknown
      definition?: string
      current: { value: unknown }
      datasource?: object
    }[]
  }
  panels: {
    id: number
    type: string
    title: string
    description?: string
    datasource?: object
    gridPos: { x: number; y: number; w: number; h: number }
    fieldConfig?: { defaults: { unit?: string; mappings?: object[] } }
    targets?: { expr: string; legendFormat: string; datasource: object }[]
  }[]
}

/** The values of the labels of every series, with the labels that Prometheus adds. */
function readMetrics(text: string): Map<string, Map<string, Set<string>>> {
  const known = new Map<string, Map<string, Set<string>>>()
  const labelsOf = (name: string) => {
    const labels =
      known.get(name) ??
      new Map([
        ['instance', new Set()],
        ['job', new Set()]
      ])
    known.set(name, labels as Map<string, Set<string>>)
    return labels as Map<string, Set<string>>
  }
  for (const line of text.split('\n')) {
    const [, declared, type] = /^# TYPE (\S+) (\w+)/.exec(line) ?? []
    if (type === 'histogram') {
      for (const suffix of ['bucket', 'sum', 'count']) labelsOf(`${declared}_${suffix}`)
    } else if (declared !== undefined) labelsOf(declared)
    const [, name, labels] = /^(\w+)\{(.*)\} /.exec(line) ?? []
    for (const [, label, value] of (labels ?? '').matchAll(/(\w+)="([^"]*)"/g)) {
      const values = labelsOf(name!).get(label!) ?? new Set()
      labelsOf(name!).set(label!, values.add(value!))
    }
  }
  return known
}

const OPERATORS = new Set(['and', 'or', 'unless', 'on', 'ignoring', 'bool', 'offset'])

/** As much of PromQL as the dashboard speaks. */
function parseQuery(expr: string) {
  const groups = /\b(?:by|without)\s*\(([^)]*)\)/g
  const groupedBy = [...expr.matchAll(groups)].flatMap(([, labels]) => labels!.split(/,\s*/))
  const bare = expr.replace(groups, '').replace(/\[[^\]]*\]/g, '')
  const selectors = [...bare.matchAll(/([a-z_:][\w:]*)\b(?!\s*\()(?:\{([^}]*)\})?/gi)]
    .filter(([, name]) => !OPERATORS.has(name!))
    .map(([, name, matchers]) => ({
      name: name!,
      matchers: [...(matchers ?? '').matchAll(/(\w+)(?:=~|!~|!=|=)"([^"]*)"/g)].map(
        ([, label, value]) => ({ label: label!, value: value! })
      )
    }))
  return { selectors, groupedBy }
}

function without(all: string[], some: string[]): string[] {
  return all.filter(each => !some.includes(each))
}
