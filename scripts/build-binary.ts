import { execFileSync, spawnSync } from 'node:child_process'
import { copyFileSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type BuildOptions, build, type Plugin } from 'esbuild'
import { BUILT_IN } from '../src/config.ts'
import { THREADS } from '../src/thread.ts'

/**
 * Builds the gateway as one executable file, for the platform that this runs on: Node with a bundle of the program,
 * its threads and its default configuration inside (a single executable application). `npm run build:binary`
 */

const ROOT = join(import.meta.dirname, '..')
const OUT = join(ROOT, 'build')
const BINARY = join(OUT, 'llmproxy')
/** From the first line of the program. V8 accepts a code cache only under the options that made it. */
const V8_OPTIONS = readFileSync(join(ROOT, 'src/cli.ts'), 'utf8').split('\n')[0]!.match(/--\S+/g)!

/** Packages that the gateway loads when it needs them are in the bundle as well. */
const lazyPackages: Plugin = {
  name: 'lazy packages',
  setup({ onLoad }) {
    onLoad({ filter: /[\\/]src[\\/].*\.ts$/ }, ({ path }) => ({
      contents: readFileSync(path, 'utf8').replaceAll('createRequire(import.meta.url)', 'require'),
      loader: 'ts'
    }))
  }
}

const OPTIONS: BuildOptions = {
  absWorkingDir: ROOT,
  bundle: true,
  platform: 'node',
  // Error messages and Fastify use the names of classes and functions.
  keepNames: true,
  minifySyntax: true,
  minifyWhitespace: true,
  logLevel: 'warning',
  plugins: [lazyPackages],
  // Optional parts of `pg`: a native client, and sockets of another platform.
  external: ['pg-native', 'cloudflare:sockets'],
  define: { 'import.meta.url': '"file:///llmproxy.js"', 'import.meta.resolve': 'String' }
}

rmSync(OUT, { recursive: true, force: true })
mkdirSync(OUT)
const main = join(OUT, 'llmproxy.mjs')
await build({
  ...OPTIONS,
  entryPoints: ['src/cli.ts'],
  outfile: main,
  format: 'esm',
  banner: { js: "import { createRequire } from 'node:module'; const require = createRequire('/')" }
})
// A thread starts from a text, which must be CommonJS.
await build({
  ...OPTIONS,
  entryPoints: Object.fromEntries(THREADS.map(name => [name, `src/${name}.ts`])),
  outdir: OUT,
  format: 'cjs'
})

const node = join(OUT, 'node')
copyFileSync(process.execPath, node)
// Debug information is a fifth of Node; without binutils it stays.
spawnSync('strip', [node])
const config = {
  main,
  mainFormat: 'module',
  executable: node,
  output: BINARY,
  disableExperimentalSEAWarning: true,
  useCodeCache: true,
  execArgv: V8_OPTIONS,
  assets: {
    [BUILT_IN]: join(ROOT, 'config/llmproxy.yaml'),
    ...Object.fromEntries(THREADS.map(name => [name, join(OUT, `${name}.js`)]))
  }
}
const configFile = join(OUT, 'sea.json')
writeFileSync(configFile, JSON.stringify(config))
execFileSync(process.execPath, [...V8_OPTIONS, '--build-sea', configFile])
rmSync(node)
console.log(`${BINARY}: ${Math.round(statSync(BINARY).size / 1e6)} MB`)
